"""Options of policies, and how they are written: `name` or `name:key=value,key=value`."""

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from shared.errors import ConfigurationError


class Options(BaseModel):
    """Options that every policy takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    nodes: PositiveInt | None = None
    """Use only so many of the ready nodes, those with the lowest ids (the paper's "+" forms); None: all."""


def split_name(text: str) -> tuple[str, dict[str, str]]:
    """Name and written options of a policy. Raises ConfigurationError when the text is of another form."""
    name, _, rest = text.partition(":")
    pairs = [item.partition("=") for item in rest.split(",")] if rest else []
    written = {key.strip(): value.strip() for key, _, value in pairs}
    if not all(equals for _, equals, _ in pairs) or len(written) < len(pairs):
        raise ConfigurationError(f"policy {text!r} is not written as name:key=value,key=value")
    return name.strip(), written


def parse_options(name: str, kind: type[Options], written: dict[str, str]) -> Options:
    """Read the options. Raises ConfigurationError, naming the choices, when one is unknown or wrong."""
    if unknown := sorted(written.keys() - kind.model_fields.keys()):
        choices = ", ".join(sorted(kind.model_fields))
        raise ConfigurationError(f"policy {name!r} has no option {unknown[0]!r}; choose from: {choices}")
    try:
        return kind.model_validate(written)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        reasons = " or ".join(each["msg"] for each in error.errors() if each["loc"][0] == key)
        raise ConfigurationError(f"policy {name!r}: {key}={written[key]!r}: {reasons}") from error
