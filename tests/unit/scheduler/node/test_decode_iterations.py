"""Decoding in a node's prediction: what a newcomer joins, and where the rows of long prompts go."""

from itertools import pairwise

import pytest

from services.scheduler.forecast import forecast_inference, inference_alone
from services.scheduler.node.known_work import ITERATION
from services.scheduler.node.node_model import DECODE_OPS, NodeModel
from services.scheduler.tasks import TaskShape
from shared.messages.events import OpEnded, OpStarted, StageOp, StageProgress
from shared.messages.inference import Pace
from tests.support.policies import LinearCosts

ROW_S = 0.001
"""On each stage."""


def place(node_model: NodeModel, task_id: str, tokens: int, at_s: float, *, max_tokens: int = 1) -> None:
    shape = TaskShape(prompt_tokens=tokens, max_tokens=max_tokens)
    node_model.assign(task_id, "inference", shape, forecast=None, arrived_s=at_s, now_s=at_s)


def iteration(index: int, *completes: str, tokens: int, sequences: int = 1) -> StageOp:
    return StageOp(
        kind="iteration",
        task_ids=completes,
        index=index,
        num_tokens=tokens,
        num_pairs=tokens,
        num_sequences=sequences,
        num_context_tokens=tokens,
    )


def begins(node_model: NodeModel, op: StageOp, at_s: float, *, after: StageOp | None = None) -> None:
    """On stage 0, which has ended `after`."""
    ended = (OpEnded(op=after, elapsed_s=0.1, ago_s=0.0),) if after else ()
    running = OpStarted(op=op, ago_s=0.0)
    node_model.progressed(StageProgress(node=0, stage=0, ended=ended, running=running), at_s)


def both_decode() -> NodeModel:
    """Two sequences decode on two stages, each in iterations of its own."""
    node_model = NodeModel(2, LinearCosts(2))
    for index, task_id in enumerate(("a", "b")):
        place(node_model, task_id, 100, 0.2 * index, max_tokens=1000)
        op = iteration(index, task_id, tokens=100)
        for stage in range(2):
            ended = OpEnded(op=op, elapsed_s=0.1, ago_s=0.0)
            progress = StageProgress(node=0, stage=stage, ended=(ended,), running=None)
            node_model.progressed(progress, 0.2 * index + 0.1 * (1 + stage))
    return node_model


def test_iterations_of_decodes_follow_each_other_on_every_stage() -> None:
    prediction = both_decode().prediction
    for ops, starts_s in zip(prediction.ops, prediction.starts_s, strict=True):
        assert {op.kind for op in ops} == {ITERATION} and len(ops) >= DECODE_OPS // 2
        gaps_s = {round(later - earlier, 6) for earlier, later in pairwise(starts_s[2:9])}
        assert gaps_s == {ROW_S}


def test_a_newcomer_joins_the_next_iteration_of_decodes() -> None:
    prediction, now_s = both_decode().prediction, 0.405
    forecast = forecast_inference(prediction, inference_alone(LinearCosts(2), 50), now_s)
    entry = next(entry for entry in prediction.decode_entries if entry.at_s >= now_s)
    start_s, end_s = forecast.forward[0]
    assert start_s == entry.at_s <= now_s + ROW_S
    assert end_s - start_s == pytest.approx(51 * ROW_S)


def test_rows_left_over_by_a_piece_move_into_the_next_iteration() -> None:
    """Stage 0 had room for 500 rows of the long prompt where 512 were foreseen."""
    node_model = NodeModel(2, LinearCosts(2))
    first, second = iteration(0, "a", tokens=100), iteration(1, "b", tokens=100)
    place(node_model, "a", 100, 0.0)
    place(node_model, "b", 100, 0.0)
    begins(node_model, first, 0.0)
    begins(node_model, second, 0.1, after=first)
    place(node_model, "long", 1024, 0.15)
    place(node_model, "late", 100, 0.15)
    assert [each.work.num_tokens for each in node_model.prediction.known.formed] == [512, 512, 100]
    begins(node_model, iteration(2, tokens=500), 0.2, after=second)
    formed = node_model.prediction.known.formed
    assert [each.work.num_tokens for each in formed] == [512, 112]
    assert [each.completes for each in formed] == [(), ("long", "late")]


def test_no_row_is_lost_where_decodes_take_room_from_a_prompt() -> None:
    """The prompt may have 16 rows beside a decode, and came when nothing decoded."""
    node_model = NodeModel(2, LinearCosts(2))
    first, second = iteration(0, "a", tokens=100), iteration(1, "b", tokens=100)
    place(node_model, "a", 100, 0.0, max_tokens=1000)
    place(node_model, "b", 100, 0.0)
    begins(node_model, first, 0.0)
    begins(node_model, second, 0.1, after=first)
    shape = TaskShape(prompt_tokens=1024, max_tokens=1, pace=Pace(rows_beside_decodes=16))
    node_model.assign("long", "inference", shape, forecast=None, arrived_s=0.15, now_s=0.15)
    ended = OpEnded(op=first, elapsed_s=0.1, ago_s=0.0)
    node_model.progressed(StageProgress(node=0, stage=1, ended=(ended,), running=None), 0.2)
    begins(node_model, iteration(2, tokens=1 + 16, sequences=2), 0.2, after=second)
    formed = node_model.prediction.known.formed
    assert sum(each.work.num_tokens - each.num_decodes for each in formed) == 1024 - 16
    assert [task_id for each in formed for task_id in each.completes] == ["long"]


def test_a_prompt_goes_on_beside_more_decodes_than_an_iteration_has_rows() -> None:
    node_model = NodeModel(1, LinearCosts(1, max_iteration_tokens=4))
    for index in range(6):
        place(node_model, f"r{index}", 1, 0.0, max_tokens=100)
        ended = OpEnded(op=iteration(index, f"r{index}", tokens=1), elapsed_s=0.001, ago_s=0.0)
        node_model.progressed(StageProgress(node=0, stage=0, ended=(ended,), running=None), 0.001 * index)
    begins(node_model, iteration(6, tokens=4, sequences=4), 0.01)
    place(node_model, "long", 3, 0.01)
    formed = node_model.prediction.known.formed
    assert [task_id for each in formed for task_id in each.completes] == ["long"]
