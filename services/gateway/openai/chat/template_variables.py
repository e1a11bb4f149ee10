"""Variables that a client gives the chat template, beside the conversation."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from services.gateway.openai.schema import at_most
from shared.chat_template import RESERVED_NAMES

MAX_VARIABLES = 64


def _without_reserved(variables: dict[str, Any]) -> dict[str, Any]:
    for name in variables:
        if name in RESERVED_NAMES:
            raise PydanticCustomError(
                "variables", "'{name}' comes from the conversation or the model", {"name": name}
            )
    return variables


TemplateVariables = Annotated[
    dict[str, Any],
    Field(
        max_length=MAX_VARIABLES,
        json_schema_extra={"propertyNames": {"not": {"enum": sorted(RESERVED_NAMES)}}},
    ),
    at_most(MAX_VARIABLES),
    AfterValidator(_without_reserved),
]
