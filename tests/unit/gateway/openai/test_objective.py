"""What a request may ask for beside its text, on all routes that generate, and what its class makes of it."""

from typing import Any

import pytest

from services.gateway.access.keys import SERVICE_CLASSES, ServiceClass
from services.gateway.http.errors import ApiError
from services.gateway.openai.chat.request import ChatRequest
from services.gateway.openai.completions.request import CompletionRequest
from services.gateway.openai.objective import ObjectiveParameters
from services.gateway.openai.responses.request import ResponseRequest
from shared.messages.inference import RUN_OBJECTIVE, Objective
from tests.support import requests
from tests.support.gateway import MODEL

ROUTES: list[tuple[type[ObjectiveParameters], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": "Hello"}),
    (ChatRequest, {"messages": [{"role": "user", "content": "Hello"}]}),
    (ResponseRequest, {"input": "Hello"}),
]


def read(kind: type[ObjectiveParameters], required: dict[str, Any], **asked: Any) -> ObjectiveParameters:
    return requests.read(kind, {"model": MODEL} | required | asked)


@pytest.mark.parametrize(("kind", "required"), ROUTES)
def test_the_times_of_a_request_are_read(kind: type[ObjectiveParameters], required: dict[str, Any]) -> None:
    slo = {"ttft_s": 2, "tbt_s": 0.05, "when_late": "serve_last"}
    asked = read(kind, required, lemix={"slo": slo, "priority": 7})
    expected = Objective(ttft_s=2.0, tbt_s=0.05, when_late="serve_last", priority=7)
    assert asked.objective("interactive") == expected


@pytest.mark.parametrize(("kind", "required"), ROUTES)
@pytest.mark.parametrize(
    "asked",
    [{}, {"lemix": None}, {"lemix": {}}, {"lemix": {"slo": None, "priority": None}}, {"lemix": {"slo": {}}}],
)
def test_a_request_that_asks_for_nothing_has_the_objective_of_the_run(
    kind: type[ObjectiveParameters], required: dict[str, Any], asked: dict[str, Any]
) -> None:
    assert read(kind, required, **asked).objective("interactive") == RUN_OBJECTIVE


@pytest.mark.parametrize(("kind", "required"), ROUTES)
@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"lemix": 3}, "lemix"),
        ({"lemix": {"slos": {}}}, "lemix.slos"),
        ({"lemix": {"slo": {"ttft": 1}}}, "lemix.slo.ttft"),
        ({"lemix": {"slo": {"ttft_s": 0}}}, "lemix.slo.ttft_s"),
        ({"lemix": {"slo": {"ttft_s": "1"}}}, "lemix.slo.ttft_s"),
        ({"lemix": {"slo": {"tbt_s": -1}}}, "lemix.slo.tbt_s"),
        ({"lemix": {"slo": {"when_late": "never"}}}, "lemix.slo.when_late"),
        ({"lemix": {"priority": -1}}, "lemix.priority"),
        ({"lemix": {"priority": 100}}, "lemix.priority"),
        ({"lemix": {"priority": 1.5}}, "lemix.priority"),
        ({"service_tier": "priority"}, "service_tier"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(
    kind: type[ObjectiveParameters], required: dict[str, Any], asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as refused:
        read(kind, required, **asked)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_no_request_of_a_batch_goes_before_an_interactive_one() -> None:
    asked = [ObjectiveParameters.model_validate({"lemix": {"priority": number}}) for number in (0, 99)]
    interactive, batch = ([each.objective(kind).priority for each in asked] for kind in SERVICE_CLASSES)
    assert max(interactive) < min(batch)


def test_a_batch_is_served_last_unless_it_asks_otherwise() -> None:
    asked = [{}, {"when_late": "serve_last"}, {"when_late": "refuse"}]
    requests = [ObjectiveParameters.model_validate({"lemix": {"slo": slo}}) for slo in asked]
    assert [each.objective("batch").when_late for each in requests] == ["serve_last", "serve_last", "refuse"]


@pytest.mark.parametrize("of_key", SERVICE_CLASSES)
@pytest.mark.parametrize(("tier", "is_batch"), [("auto", False), ("default", False), ("flex", True)])
def test_a_tier_takes_a_request_down_but_not_up(of_key: ServiceClass, tier: str, is_batch: bool) -> None:
    asked = ObjectiveParameters.model_validate({"service_tier": tier})
    assert asked.service_class(of_key) == ("batch" if is_batch else of_key)
