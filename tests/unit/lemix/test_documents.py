"""Documents that say what settings and parameters there are, against the code."""

from pathlib import Path

import pytest

from services.gateway.openai_types import CompletionRequest
from services.gateway.settings import GatewaySettings
from services.scheduler.settings import SchedulerSettings
from services.stage_worker.settings import StageWorkerSettings
from services.trainer.settings import TrainerSettings
from shared.settings import LemixSettings

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "settings",
    [GatewaySettings, SchedulerSettings, StageWorkerSettings, TrainerSettings],
    ids=lambda s: s.__name__,
)
def test_every_setting_is_in_the_operations_document(settings: type[LemixSettings]) -> None:
    document = (ROOT / "docs" / "operations.md").read_text()
    missing = [name for name in settings.model_fields if f"`LEMIX_{name.upper()}`" not in document]
    assert missing == []


def test_every_parameter_of_the_api_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name for name in CompletionRequest.model_fields if f"`{name}" not in readme] == []
