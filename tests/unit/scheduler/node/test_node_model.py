"""What the model of a node makes of what its stages tell: late, twice, out of order, or not at all."""

import pytest

from services.scheduler.events import StageProgressed, TasksEnded
from services.scheduler.forecast import Forecast, Interval, forecast_inference, inference_alone
from services.scheduler.node.known_work import FORWARD, ITERATION, STEP
from services.scheduler.node.node_model import DECODE_OPS, NodeModel
from services.scheduler.policies.base import Place
from services.scheduler.state import ClusterState
from services.scheduler.tasks import TaskShape, shape_of
from shared.messages.events import OpEnded, OpKind, OpStarted, StageOp, StageProgress
from shared.messages.inference import Pace
from shared.messages.training import TrainingTask
from shared.profiles.times import Work, work_of_rows
from shared.schedule import Feeding
from shared.slices import TRAINING_TURN, NumSlices
from shared.subjects import PROGRESS_EVERY_S
from tests.support.policies import LinearCosts, assign, batch, cluster, request


def op(kind: OpKind, *task_ids: str, index: int = 0, tokens: int = 0, sequences: int = 1) -> StageOp:
    return StageOp(
        kind=kind,
        task_ids=task_ids,
        index=index,
        num_tokens=tokens,
        num_pairs=tokens,
        num_sequences=sequences,
        num_context_tokens=tokens,
    )


def ended(node_model: NodeModel, stage: int, what: StageOp, at_s: float, elapsed_s: float = 0.1) -> list[str]:
    """The stage tells of the op's end, and does nothing now; ids of tasks whose first token is out."""
    progress = StageProgress(
        node=0, stage=stage, ended=(OpEnded(op=what, elapsed_s=elapsed_s, ago_s=0.0),), running=None
    )
    return [task.task_id for task in node_model.progressed(progress, at_s)]


def started(node_model: NodeModel, stage: int, what: StageOp, at_s: float) -> None:
    progress = StageProgress(node=0, stage=stage, ended=(), running=OpStarted(op=what, ago_s=0.0))
    node_model.progressed(progress, at_s)


def place_request(
    node_model: NodeModel,
    task_id: str,
    tokens: int,
    *,
    at_s: float = 0.0,
    max_tokens: int = 1,
    forecast: Forecast | None = None,
) -> None:
    shape = TaskShape(prompt_tokens=tokens, max_tokens=max_tokens)
    node_model.assign(task_id, "inference", shape, forecast=forecast, arrived_s=at_s, now_s=at_s)


def place_batch(
    node_model: NodeModel, task_id: str, *tokens: int, at_s: float = 0.0, forecast: Forecast | None = None
) -> None:
    shape = TaskShape(microbatches=tuple(work_of_rows(0, each) for each in tokens))
    node_model.assign(task_id, "training", shape, forecast=forecast, arrived_s=at_s, now_s=at_s)


def two_stages() -> NodeModel:
    """A millisecond per token and stage."""
    return NodeModel(2, LinearCosts(2))


def starts(node_model: NodeModel, stage: int) -> list[float]:
    return [pytest.approx(start_s) for start_s in node_model.prediction.starts_s[stage]]


def test_the_shape_of_tasks() -> None:
    shape = shape_of(request("r", 7, max_tokens=3))
    assert (shape.prompt_tokens, shape.max_tokens, shape.num_tokens) == (7, 3, 7)
    alone = TrainingTask(task_id="b", microbatch_tokens=(5, 4))
    assert shape_of(alone).microbatches == (work_of_rows(0, 5), work_of_rows(0, 4))
    packed = TrainingTask(task_id="b", microbatch_tokens=(5, 4), microbatch_lengths=((2, 3), (4,)))
    assert shape_of(packed).microbatches == (Work(5, 3 + 6, 2, 5), work_of_rows(0, 4))
    assert shape_of(packed).num_tokens == 9


def test_requests_go_alone_while_there_are_slots_and_together_after() -> None:
    node_model = two_stages()
    for index, tokens in enumerate((100, 100, 60, 40)):
        place_request(node_model, f"r{index}", tokens)
    assert node_model.prediction.first_tokens_s == pytest.approx({"r0": 0.2, "r1": 0.3, "r2": 0.4, "r3": 0.4})
    assert len(node_model.prediction.ops[0]) == 3


def test_a_long_prompt_goes_in_pieces() -> None:
    node_model = two_stages()
    place_request(node_model, "r", 1000)
    assert [op.duration_s for op in node_model.prediction.ops[0]] == pytest.approx([0.512, 0.488])
    started(node_model, 0, op("iteration", index=0, tokens=512), 0.0)
    assert [op.duration_s for op in node_model.prediction.ops[0]] == pytest.approx([0.512, 0.488])
    assert node_model.prediction.first_tokens_s == pytest.approx({"r": 0.512 + 0.512 + 0.488})


def test_a_late_op_ends_when_one_would_not_have_heard_of_its_end_yet() -> None:
    node_model = two_stages()
    place_request(node_model, "r", 100)
    started(node_model, 0, op("iteration", "r", tokens=100), 0.0)
    place_request(node_model, "s", 100, at_s=0.5)
    assert node_model.prediction.first_tokens_s == pytest.approx({"r": 0.55, "s": 0.7})


def test_between_two_reports_a_node_goes_on_as_predicted() -> None:
    node_model = two_stages()
    place_batch(node_model, "b", 10, 10)
    started(node_model, 0, op("forward", "b", tokens=10), 0.0)
    place_request(node_model, "r", 10, at_s=0.045)
    # The second forward is over on stage 0, and the first on stage 1 until 0.04; nobody has told of it.
    assert starts(node_model, 0)[:3] == pytest.approx([0.0, 0.01, 0.045 - 0.005])
    assert node_model.prediction.first_tokens_s == {"r": pytest.approx(0.08)}


def test_a_step_on_one_stage_means_that_all_backwards_are_done() -> None:
    node_model = two_stages()
    place_batch(node_model, "b", 100)
    ended(node_model, 0, op("forward", "b", tokens=100), 0.1)
    started(node_model, 1, op("step", "b"), 0.6)
    assert [[each.kind for each in ops] for ops in node_model.prediction.ops] == [[STEP], [STEP]]


def test_what_a_later_stage_tells_first_has_left_the_earlier_one() -> None:
    node_model = two_stages()
    place_request(node_model, "r", 100)
    started(node_model, 0, op("iteration", "r", tokens=100), 0.0)
    started(node_model, 1, op("iteration", "r", tokens=100), 0.1)
    assert [node_model.prediction.ops[0], starts(node_model, 1)] == [[], [0.1]]
    ended(node_model, 0, op("iteration", "r", tokens=100), 0.105)
    assert [node_model.prediction.ops[0], starts(node_model, 1)] == [[], [0.1]]


def test_an_iteration_that_is_over_does_not_come_back() -> None:
    node_model = two_stages()
    place_request(node_model, "r", 100)
    place_request(node_model, "s", 100)
    assert ended(node_model, 1, op("iteration", "r", tokens=100), 0.2) == ["r"]
    assert ended(node_model, 1, op("iteration", "r", tokens=100), 0.2) == []
    ended(node_model, 0, op("iteration", "r", tokens=100), 0.21)
    assert set(node_model.prediction.first_tokens_s) == {"s"}


def test_an_iteration_that_was_lost_is_forgotten() -> None:
    node_model = two_stages()
    for task_id in ("r", "s"):
        place_request(node_model, task_id, 100)
    ended(node_model, 0, op("iteration", "r", index=0, tokens=100), 0.1)
    ended(node_model, 0, op("iteration", "s", index=1, tokens=100), 0.2)
    started(node_model, 1, op("iteration", "s", index=1, tokens=100), 0.2)
    assert set(node_model.prediction.first_tokens_s) == {"s"}


def test_tasks_that_end_early_leave_nothing_behind() -> None:
    node_model = two_stages()
    for task_id in ("r", "s", "t"):
        place_request(node_model, task_id, 100)
    place_batch(node_model, "b", 50, 50)
    started(node_model, 0, op("iteration", "r", tokens=100), 0.0)
    for task_id in ("t", "r", "b", "s"):
        node_model.end(task_id, 0.0)
    assert list(node_model.assigned()) == []
    assert node_model.exposure_s == 0.0
    assert [op.kind for op in node_model.prediction.ops[0]].count(FORWARD) == 2, "it may have run, untold"
    node_model.progressed(StageProgress(node=0, stage=1, ended=(), running=None), PROGRESS_EVERY_S)
    assert [len(ops) for ops in node_model.prediction.ops] == [1, 0]  # stage 0 is busy all the same
    ended(node_model, 0, op("iteration", "r", tokens=100), 0.1)
    assert node_model.prediction.is_idle


def test_a_node_that_begins_anew_has_nothing_to_do() -> None:
    node_model = two_stages()
    place_request(node_model, "r", 100)
    started(node_model, 0, op("iteration", "r", index=7, tokens=100), 0.0)
    node_model.end("r", 0.0)
    node_model.clear()
    assert node_model.prediction.is_idle
    place_request(node_model, "s", 100, at_s=1.0)
    assert ended(node_model, 1, op("iteration", "s", index=0, tokens=100), 1.2) == ["s"]


def test_progress_of_tasks_that_nobody_knows_is_no_work() -> None:
    node_model = two_stages()
    started(node_model, 0, op("iteration", "old", tokens=100), 0.0)
    started(node_model, 1, op("backward", "old", tokens=100), 0.0)
    ended(node_model, 1, op("step", "old"), 0.1)
    assert node_model.prediction.is_idle


def test_a_batch_goes_forward_backward_and_steps() -> None:
    node_model = two_stages()
    place_batch(node_model, "b", 100, 100)
    # Stage 1 takes 3 ms per token (forward and backward), stage 0 goes backward with 2 ms.
    # Both step when stage 0 has done its last backward.
    assert [starts(node_model, 0), starts(node_model, 1)] == [[0.0, 0.1, 0.4, 0.7, 0.9], [0.1, 0.4, 0.9]]
    ended(node_model, 0, op("forward", "b", index=0, tokens=100), 0.1)
    started(node_model, 1, op("forward", "b", index=0, tokens=100), 0.2)
    assert [starts(node_model, 0), starts(node_model, 1)] == [
        pytest.approx([0.15, 0.5, 0.8, 1.0]),  # before, stage 0 would have told of it by now
        [0.2, 0.5, 1.0],
    ]


def test_batches_of_a_synchronous_trainer_wait_for_the_steps_before() -> None:
    for schedule, second_s in (("async", 0.1), ("1f1b", 0.6)):
        node_model = NodeModel(2, LinearCosts(2), feeding=Feeding(schedule=schedule))
        place_batch(node_model, "a", 100)
        place_batch(node_model, "b", 100)
        assert second_s in starts(node_model, 0)
        assert (0.1 in starts(node_model, 0)) == (schedule == "async")


def test_inference_goes_before_training_but_interrupts_nothing() -> None:
    node_model = two_stages()
    place_batch(node_model, "b", 100)
    started(node_model, 0, op("forward", "b", tokens=100), 0.0)
    place_batch(node_model, "c", 100)
    place_request(node_model, "r", 10, at_s=0.05)
    assert starts(node_model, 0)[:3] == [0.0, 0.1, 0.11]
    assert node_model.prediction.first_tokens_s == pytest.approx({"r": 0.1 + 0.3 + 0.01})  # b holds stage 1


def test_sequences_that_decode_take_turns_with_training() -> None:
    node_model = two_stages()
    place_request(node_model, "r", 100, max_tokens=50_000)
    ended(node_model, 1, op("iteration", "r", tokens=100), 0.2)
    assert node_model.prediction.known.num_decoding == 1
    durations_s = [op.duration_s for op in node_model.prediction.ops[0]]
    assert durations_s == pytest.approx([0.001] * (1 + DECODE_OPS // 2))
    place_batch(node_model, "b", *[100] * 30, at_s=0.2)
    kinds = [op.kind for op in node_model.prediction.ops[0]]
    assert kinds.count(ITERATION) == 1 + DECODE_OPS // 2 and kinds[:3] == [ITERATION, FORWARD, ITERATION]
    first, second = (ends_s for ends_s in node_model.prediction.ends_s[1][-3:-1])
    assert second - first == pytest.approx(0.3 + 0.001)  # half a decode of one sequence over two stages
    node_model.end("r", 0.2)
    place_batch(node_model, "c", 100, at_s=0.2 + PROGRESS_EVERY_S)
    assert node_model.prediction.known.decode_gap_s == ()


def test_what_happened_replaces_what_was_forecast() -> None:
    node_model = two_stages()
    forecast = Forecast(
        forward=(Interval(0.0, 0.2), Interval(0.2, 0.3)), backward=(Interval(0.5, 0.9), Interval(0.3, 0.5))
    )
    place_batch(node_model, "b", 100, 100, forecast=forecast)
    (task,) = node_model.assigned()
    ended(node_model, 0, op("forward", "b", index=0, tokens=100), 1.1)
    assert task.forward[0] == pytest.approx((1.0, 1.1))
    ended(node_model, 0, op("forward", "b", index=1, tokens=100), 1.3)
    assert task.forward[0] == pytest.approx((1.0, 1.3))
    ended(node_model, 1, op("forward", "b", index=0, tokens=100), 1.4, elapsed_s=0.3)
    assert task.forward[1] == pytest.approx((1.1, 1.2))
    assert task.backward[1] == pytest.approx((1.2, 1.4))
    ended(node_model, 0, op("backward", "b", index=0, tokens=100), 1.6)
    assert task.backward[0] == pytest.approx((1.5, 1.6))


def test_a_request_that_was_forecast_is_expected_when_the_node_predicts_it() -> None:
    node_model = two_stages()
    place_request(node_model, "a", 100)
    place_request(node_model, "b", 100, forecast=Forecast((Interval(0.0, 0.1), Interval(0.1, 0.2))))
    expected = {task.task_id: task.expected_s for task in node_model.assigned()}
    assert expected == {"a": None, "b": pytest.approx(0.3)}


def test_as_many_microbatches_enter_as_there_are_stages() -> None:
    node_model = NodeModel(2, LinearCosts(2), feeding=Feeding(schedule="async"))
    place_batch(node_model, "b", 100, 100, 100)
    assert starts(node_model, 0)[:3] == [0.0, 0.1, 0.4]
    assert node_model.max_in_flight == 2


def test_what_policies_read() -> None:
    node_model = two_stages()
    assert (node_model.last_arrival_s, node_model.last_active_s, node_model.last_assigned) == (
        None,
        None,
        None,
    )
    place_request(node_model, "r", 100)
    place_batch(node_model, "b", 50, 150, at_s=0.5)
    assert (node_model.last_arrival_s, node_model.lengths.mean, node_model.lengths.std) == (0.5, 150, 50)
    assert node_model.last_assigned is not None and node_model.last_assigned.task_id == "b"
    assert [task.first_token_s for task in node_model.assigned()] == [None, None]
    assert starts(node_model, 0)[:2] == pytest.approx([0.45, 0.55])  # the request, and the batch behind it
    ended(node_model, 1, op("iteration", "r", tokens=100), 0.7)
    assert [task.first_token_s for task in node_model.assigned()] == [0.7, None]


def test_the_pace_of_a_request_leaves_training_what_its_objective_allows() -> None:
    """A token takes 1 ms a stage. The batch's longest slices take 200 / 4 ms on each of both: backwards."""
    node_model = two_stages()
    for stage in range(2):
        node_model.cut(stage, NumSlices(4, 4))
    alone_s = node_model.token_times.tbt_s
    assert alone_s == pytest.approx(0.002)
    assert node_model.token_times.pace(2.5 * alone_s).training_turn == pytest.approx(1.5)
    assert node_model.token_times.pace(9 * alone_s).training_turn == TRAINING_TURN
    place_batch(node_model, "b", 100)
    assert node_model.token_times.pace(0.1 + 2.5 * alone_s).training_turn == pytest.approx(1.5)
    assert node_model.token_times.pace(0.1).training_turn == 0.0
    assert node_model.token_times.keeps(0.1 + 1.01 * alone_s)
    assert not node_model.token_times.keeps(0.1 + 0.99 * alone_s)


def test_where_a_request_is_pressing_a_pass_gives_way_at_its_next_slice() -> None:
    """Of the forward of 100 ms 40 are done when an iteration of 30 ms ends, and the next one waits."""
    turns_until = {}
    for turn in (0.0, TRAINING_TURN):
        node_model = two_stages()
        node_model.cut(0, NumSlices(4, 4))
        place_batch(node_model, "b", 100)
        shape = TaskShape(prompt_tokens=30, max_tokens=9, pace=Pace(training_turn=turn))
        node_model.assign("r", "inference", shape, forecast=None, arrived_s=0.0, now_s=0.01)
        node_model.assign("s", "inference", shape, forecast=None, arrived_s=0.0, now_s=0.06)
        turns_until[turn] = node_model.prediction.first_tokens_s["s"]
    assert turns_until[0.0] < turns_until[TRAINING_TURN]


def test_a_prediction_holds_while_stages_do_what_it_says() -> None:
    node_model = two_stages()
    place_request(node_model, "r", 100)
    prediction = node_model.prediction
    started(node_model, 0, op("iteration", "r", tokens=100), 0.0)
    ended(node_model, 0, op("iteration", "r", tokens=100), 0.101)
    started(node_model, 1, op("iteration", "r", tokens=100), 0.101)
    ended(node_model, 1, op("iteration", "r", tokens=100), 0.201)
    assert node_model.prediction is prediction
    place_request(node_model, "s", 100, at_s=0.3)
    assert node_model.prediction is not prediction


@pytest.mark.parametrize(
    ("what", "at_s"),
    [
        (op("iteration", "r", tokens=100), 0.11),
        (op("iteration", "r", tokens=100), 0.09),
        (op("iteration", "r", tokens=90), 0.1),
        (op("iteration", "s", tokens=100), 0.1),
        (op("forward", "r", tokens=100), 0.1),
    ],
)
def test_a_prediction_does_not_hold_when_stages_do_otherwise(what: StageOp, at_s: float) -> None:
    node_model = two_stages()
    place_request(node_model, "r", 100)
    prediction = node_model.prediction
    ended(node_model, 0, what, at_s)
    assert node_model.prediction is not prediction


def test_a_stage_that_rests_where_it_should_work_is_noticed() -> None:
    node_model = two_stages()
    place_request(node_model, "r", 100)
    place_request(node_model, "s", 100)
    prediction = node_model.prediction
    ended(node_model, 0, op("iteration", "r", tokens=100), 0.1)
    assert node_model.prediction is prediction  # "s" is due now
    node_model.progressed(StageProgress(node=0, stage=0, ended=(), running=None), 0.15)
    assert node_model.prediction is not prediction


def test_a_prompt_that_nobody_knows_any_more_leaves_the_others_alone() -> None:
    """It was cancelled while its iteration stood behind others, or an earlier scheduler placed it."""
    state = cluster(0)
    names = [f"r{number}" for number in range(4)]
    for name in names:
        assign(state, request(name, 10, max_tokens=5), Place(0), 0.0)
    assign(state, request("other", 200, max_tokens=5), Place(0), 0.0)
    first = _iteration(0, tuple(names), num_tokens=40, num_sequences=4)
    for stage in (0, 1):
        _tell(state, stage, first, stage + 0.1, is_over=False)
        _tell(state, stage, first, stage + 0.2, is_over=True)
    _tell(state, 0, _iteration(1, ("cancelled",), num_tokens=100, num_sequences=1), 2.0, is_over=False)
    state.apply(TasksEnded(tuple(names), 2.0))
    assert [task.task_id for task in state.node(0).node_model.assigned()] == ["other"]
    state.apply(TasksEnded(("other",), 2.0))
    assign(state, batch("b", 10), Place(0), 2.0 + PROGRESS_EVERY_S)
    assert not any(state.node(0).node_model.prediction.known.formed)


def _iteration(index: int, task_ids: tuple[str, ...], *, num_tokens: int, num_sequences: int) -> StageOp:
    return StageOp(
        kind="iteration",
        task_ids=task_ids,
        index=index,
        num_tokens=num_tokens,
        num_pairs=num_tokens,
        num_sequences=num_sequences,
        num_context_tokens=num_tokens,
    )


def _tell(state: ClusterState, stage: int, op: StageOp, now_s: float, *, is_over: bool) -> None:
    ended = (OpEnded(op=op, elapsed_s=0.01, ago_s=0.0),) if is_over else ()
    running = None if is_over else OpStarted(op=op, ago_s=0.0)
    progress = StageProgress(node=0, stage=stage, ended=ended, running=running)
    state.apply(StageProgressed(progress, now_s))


def test_the_only_stage_tells_of_a_request_after_its_end() -> None:
    node_model = NodeModel(1, LinearCosts(1))
    for task_id in ("r", "failed"):
        place_request(node_model, task_id, 100)
        node_model.end(task_id, 0.0)
    assert ended(node_model, 0, op("iteration", "r", tokens=100), 0.01) == ["r"]
    assert ended(node_model, 0, op("iteration", "r", tokens=100), 0.01) == []
    # What the stage has not told by now is not to come.
    assert ended(node_model, 0, op("iteration", "failed", index=1, tokens=100), PROGRESS_EVERY_S) == []
    assert node_model.prediction.is_idle


def test_nothing_is_told_of_a_request_that_ended_before_its_stage_began_anew() -> None:
    node_model = NodeModel(1, LinearCosts(1))
    place_request(node_model, "r", 100)
    node_model.end("r", 0.0)
    node_model.clear()
    assert ended(node_model, 0, op("iteration", "r", tokens=100), 0.1) == []


def test_on_one_stage_a_step_lets_iterations_pass() -> None:
    """The second iteration can be formed when the first is over, and goes before the step that waits."""
    costs = LinearCosts(1, applied_s=0.5)
    node_model = NodeModel(1, costs)
    place_batch(node_model, "b", 100)
    started(node_model, 0, op("forward", "b", tokens=100), 0.0)  # until 0.3
    place_request(node_model, "r0", 100, at_s=0.1)
    forecast = forecast_inference(node_model.prediction, inference_alone(costs, 100), 0.2)
    place_request(node_model, "r1", 100, at_s=0.2)
    assert node_model.prediction.first_tokens_s == {"r0": pytest.approx(0.4), "r1": pytest.approx(0.5)}
    assert forecast.end_s == pytest.approx(0.5)


def test_prompts_go_in_the_pieces_that_stages_make_of_them() -> None:
    costs = LinearCosts(1, max_iteration_tokens=40)
    node_model = NodeModel(1, costs)
    place_request(node_model, "r", 100)
    assert [op.duration_s for op in node_model.prediction.ops[0]] == pytest.approx([0.04, 0.04, 0.02])
    assert inference_alone(costs, 100).forward[0].end_s == pytest.approx(0.1)
