"""Whether a request can be in time, and what becomes of one that cannot. Pure.

What can still be in time goes first. What cannot is refused, or stands in line until nobody else is ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from services.scheduler.policies.base import TOO_MUCH_LOAD, Decision, Place, Refuse, Wait
from services.scheduler.policies.lemix_score import Prospect
from services.scheduler.state import ClusterState
from shared.messages.inference import InferenceTask

MAX_IN_LINE = 1024
"""Requests that wait for their turn; further ones are refused."""
LEFT_FOR_URGENT = 0.25
"""Share of its objective that a request leaves free where more urgent ones come."""
LATE_SHARE = 0.5
"""Share of its objective that a request which is late anyway may use up, while others come."""
FOREVER = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A request's objectives, seen from a decision."""

    task: InferenceTask
    alone_s: float
    """To its first token, on a node with nothing else to do."""
    ttft_s: float
    """Its objective."""
    left_s: float
    """Until its first token is due."""
    patience_s: float
    """Most that it may wait for others. By the run's objective longer prompts have more time, but wait no
    longer for others than a prompt of mean length: else they alone would get in where all wait."""
    tbt_s: float | None
    refuses: bool
    """It is refused when it cannot be in time."""
    is_set: bool
    """Somebody has said when it is due, or what becomes of it when it is late."""


def due_of(
    state: ClusterState, task: InferenceTask, *, alone_s: float, waited_s: float, hops_s: float
) -> Due:
    """The objectives of a request: its own, else the run's. `hops_s`: of its messages, in no forecast."""
    asked, run = task.objective, state.objectives
    said = (run.ttft_s, run.when_late, asked.ttft_s, asked.when_late)
    ttft_s = asked.ttft_s or state.ttft_slo_s(len(task.prompt))
    refuses = run.refuses_late or asked.ttft_s is not None
    left_s, mean = ttft_s - hops_s - waited_s, state.mean_prompt
    patience_s = left_s - alone_s
    if asked.ttft_s is None and len(task.prompt) > mean.num_tokens:
        patience_s = min(patience_s, state.slo_s - mean.forward_s - hops_s - waited_s)
    return Due(
        task=task,
        alone_s=alone_s,
        ttft_s=ttft_s,
        left_s=left_s,
        patience_s=max(0.0, patience_s),
        tbt_s=asked.tbt_s or run.tbt_s,
        refuses=refuses if asked.when_late is None else asked.when_late == "refuse",
        is_set=any(each is not None for each in said),
    )


def in_time(state: ClusterState, prospects: Sequence[Prospect], due: Due, now_s: float) -> list[Prospect]:
    """The nodes on which the request meets its objectives, and a margin is left."""
    is_outranked = state.demand.outranks(due.task.objective.priority, now_s)
    margin = max(state.accuracy.late_margin.share, LEFT_FOR_URGENT if is_outranked else 0.0)
    limit_s = min(due.alone_s + (1 - margin) * due.patience_s, due.left_s)

    def is_in_time(each: Prospect) -> bool:
        keeps_pace = due.tbt_s is None or each.candidate.node_model.token_times.keeps(due.tbt_s)
        return keeps_pace and each.duration_s <= limit_s

    return [each for each in prospects if is_in_time(each)]


def decide_late(state: ClusterState, prospects: Sequence[Prospect], due: Due, now_s: float) -> Decision:
    """Decide on a request that no node can serve in time."""
    soonest_s = min(each.duration_s for each in prospects)
    reason = f"the first token would come after {soonest_s:.3g} s, and is due in {max(0.0, due.left_s):.3g} s"
    line, task_id = state.waiting_line, due.task.task_id
    if due.refuses or (len(line) >= MAX_IN_LINE and task_id not in line):
        return Refuse(TOO_MUCH_LOAD, reason, retry_after_s=max(0.0, soonest_s - due.left_s))
    if line.first not in (None, task_id):
        return Wait(FOREVER, reason, in_line=True)
    best = min(prospects, key=lambda each: _turn_s(each, due, now_s))
    turn_s = _turn_s(best, due, now_s)
    return Place(best.node, best.forecast) if turn_s <= now_s else Wait(turn_s, reason, in_line=True)


def _turn_s(prospect: Prospect, due: Due, now_s: float) -> float:
    """When a late request may go to the node, so that others that come there can still be in time.

    At once while its own first token leaves them most of the objective; else when nobody waits there. Where
    nobody has set a time, no more of them wait there than the next iteration takes, so that it is a full one.
    """
    if prospect.duration_s <= LATE_SHARE * due.ttft_s:
        return now_s
    node_model = prospect.candidate.node_model
    prediction = node_model.prediction
    if not due.is_set:
        return prediction.last_entry_s - node_model.token_times.full_iteration_s
    return max(prediction.last_entry_s, prediction.slot_s - due.alone_s)
