"""The checks of every route that generates, before the prompts of a request are read."""

from services.gateway.http.errors import ApiError
from services.gateway.settings import GatewaySettings
from shared.model_files import ModelCard


def check_model(name: str, card: ModelCard) -> None:
    """Raises ApiError (404) when another model is asked for than the one that is served."""
    if name != card.name:
        raise ApiError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")


def check_choices(num_prompts: int, n: int, settings: GatewaySettings) -> None:
    """Raises ApiError when more choices are asked for than is allowed."""
    num_choices = num_prompts * n
    if num_choices > settings.max_choices:
        message = f"{num_choices} choices (prompts times n), at most {settings.max_choices} are allowed"
        raise ApiError(400, message, param="n" if n > 1 else "prompt", code="invalid_value")
