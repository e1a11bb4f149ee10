"""LeMix: every task goes where it leaves devices least idle while responses meet their objective.

In this order: does memory allow the task anywhere now; which node suits it best; must a batch wait for the
sake of requests. docs/policy.md explains each part and its options.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from services.scheduler.costs import Costs
from services.scheduler.forecast import (
    Alone,
    forecast_inference,
    forecast_training,
    inference_alone,
    training_alone,
)
from services.scheduler.policies.admission import Due, decide_late, due_of, in_time
from services.scheduler.policies.base import (
    TOO_MUCH_LOAD,
    Arrival,
    Decision,
    Place,
    Refuse,
    Wait,
    no_node,
    ready_nodes,
)
from services.scheduler.policies.candidates import Candidate, shortlist
from services.scheduler.policies.deferral import (
    MIN_RATE_PER_S,
    BatchOps,
    Expected,
    OpTimes,
    late_share,
    safe_again_s,
)
from services.scheduler.policies.lemix_options import LemixOptions
from services.scheduler.policies.lemix_score import Prospect, Question, ranked
from services.scheduler.policies.memory import TrainingRoom, activation_tokens, kv_tokens_of
from services.scheduler.prefix_memory import beginnings_of
from services.scheduler.state import ClusterState
from services.scheduler.tasks import TaskShape, shape_of
from shared.messages.inference import OWN_PACE, InferenceTask
from shared.messages.training import TrainingTask
from shared.slices import NumSlices

ASK_AGAIN = 0.1
"""Share of an objective: after it a waiting task asks again, if nothing is known to change before."""

YIELDING = 4.0
"""For so many objectives after a request that could not be in time, a batch counts as making all late."""

T = TypeVar("T")

ANSWER_HOPS = 2
"""From the gateway to the scheduler, and from the last stage to the gateway."""


class Lemix:
    """The policy `lemix`. It keeps nothing between two decisions: everything is in the cluster's state."""

    name = "lemix"

    def __init__(self, options: LemixOptions, room: TrainingRoom | None) -> None:
        """`room`: for activations; None: not known, and not checked."""
        self._options = options
        self._room = room if options.has("memory") else None
        self.uses_profile = options.has("profile")
        """Whether costs should know the model's profile."""

    def choose(self, state: ClusterState, arrival: Arrival, now_s: float) -> Decision:
        nodes = ready_nodes(state, self._options.nodes)
        if not nodes:
            return no_node(state)
        if isinstance(arrival.task, TrainingTask):
            return self._place_batch(state, nodes, arrival.task, now_s - arrival.arrived_s, now_s)
        return self._place_request(state, nodes, arrival.task, now_s - arrival.arrived_s, now_s)

    # Requests

    def _place_request(
        self, state: ClusterState, nodes: Sequence[int], task: InferenceTask, waited_s: float, now_s: float
    ) -> Decision:
        wanted = kv_tokens_of(task)
        if self._options.has("memory"):
            with_room = [node for node in nodes if state.node(node).kv_tokens_free >= wanted]
            if not with_room:
                return self._without_memory(state, nodes, task, waited_s, now_s)
            nodes = with_room
        length = len(task.prompt)
        beginnings = beginnings_of(task.prompt, state.node(nodes[0]).block_size)
        found = self._shortlist(state, nodes, now_s, state.holder(beginnings, nodes))
        cached = {each.node: state.node(each.node).cached_tokens(beginnings) for each in found}
        alones = _by_node(
            found,
            lambda each: inference_alone(each.costs, length, each.node_model.devices, cached[each.node]),
            by=cached,
        )
        prospects = [_prospect_of_request(each, alones[each.node], now_s) for each in found]
        alone = min(alones.values(), key=lambda each: each.forward[-1].end_s)
        alone_s = alone.forward[-1].end_s
        hops_s = ANSWER_HOPS * state.costs.hop_s
        due = due_of(state, task, alone_s=alone_s, waited_s=waited_s, hops_s=hops_s)
        prompt = in_time(state, prospects, due, now_s)
        if not prompt:
            late = decide_late(state, prospects, due, now_s)
            return _as_known(state, late, due, cached, beginnings) if isinstance(late, Place) else late
        spare_s, load = max(0.0, due.left_s - alone_s), state.load(now_s)
        question = Question(
            length=length,
            limit_s=alone_s + self._options.comfort_at(load) * spare_s,
            opening_s=alone_s + self._options.opening_at(load) * spare_s,
            unit_s=state.slo_s,
            slo_s=state.slo_s,
            now_s=now_s,
        )
        best = ranked(prompt, question, self._options)[0]
        place = Place(best.node, best.forecast, due_s=now_s + due.left_s)
        return _as_known(state, place, due, cached, beginnings)

    def _without_memory(
        self, state: ClusterState, nodes: Sequence[int], task: InferenceTask, waited_s: float, now_s: float
    ) -> Decision:
        """Decide on a request when no node has room for its keys and values now."""
        wanted, capacity = kv_tokens_of(task), max(state.node(node).kv_capacity for node in nodes)
        if wanted > capacity:
            return Refuse(
                400, f"prompt and max_tokens want {wanted} tokens of KV cache; a node has {capacity}"
            )
        if waited_s >= min(self._options.memory_patience_s, task.timeout_s / 2):
            return Refuse(TOO_MUCH_LOAD, f"no node had {wanted} tokens of KV cache free for {waited_s:.3g} s")
        reason = f"no node has {wanted} tokens of KV cache free"
        return Wait(now_s + ASK_AGAIN * state.slo_s, reason)

    # Training

    def _place_batch(
        self, state: ClusterState, nodes: Sequence[int], task: TrainingTask, waited_s: float, now_s: float
    ) -> Decision:
        found, shape = self._shortlist(state, nodes, now_s), shape_of(task)
        alones = _by_node(
            found, lambda each: training_alone(each.costs, shape.microbatches, each.node_model.devices)
        )
        prospects = [_prospect_of_batch(each, alones[each.node], now_s) for each in found]
        best = ranked(prospects, self._question_of_batch(state, prospects, shape, now_s), self._options)
        with_room = [each for each in best if self._has_room(each.candidate, task)]
        if not with_room and self._may_wait_for_room(found[0], task, waited_s / state.slo_s):
            tokens = sum(task.microbatch_tokens)
            reason = f"no node has room for the activations of {tokens} tokens"
            return Wait(now_s + self._options.offload_after * state.slo_s, reason)
        best = with_room or best
        if self._options.has("deferral") and state.demand.inference_rate.per_s(now_s) >= MIN_RATE_PER_S:
            expected = _expected(state, found, now_s)
            slices = {each.node: each.node_model.num_slices for each in found}
            ops = _by_node(found, lambda each: _ops_of(each.costs, shape, slices[each.node]), by=slices)
            shares = [late_share(each.node, each.forecast, ops[each.node], expected) for each in best]
            if now_s - state.last_late_s < YIELDING * state.slo_s:
                shares = [1.0 for _ in best]
            patience_s = self._options.patience * state.slo_s
            allowed = self._options.late_share + waited_s / patience_s
            if min(shares) > allowed:
                until_s = min(safe_again_s(now_s, expected), now_s + (min(shares) - allowed) * patience_s)
                return Wait(max(until_s, now_s + ASK_AGAIN * state.slo_s), "requests would be late")
            best = [each for each, share in zip(best, shares, strict=True) if share <= allowed]
        return Place(best[0].node, best[0].forecast, offload=not with_room)

    def _question_of_batch(
        self, state: ClusterState, prospects: Sequence[Prospect], shape: TaskShape, now_s: float
    ) -> Question:
        fastest_s = min(prospect.duration_s for prospect in prospects)
        limit_s = (1 + self._options.stretch) * fastest_s
        return Question(
            length=shape.num_tokens,
            limit_s=limit_s,
            opening_s=limit_s,
            unit_s=fastest_s,
            slo_s=state.slo_s,
            now_s=now_s,
        )

    def _has_room(self, candidate: Candidate, task: TrainingTask) -> bool:
        if self._room is None:
            return True
        there = [
            work.num_tokens for each in candidate.node_model.assigned() for work in each.shape.microbatches
        ]
        held = activation_tokens([*there, *task.microbatch_tokens], candidate.node_model.max_in_flight)
        return held <= self._room.tokens

    def _may_wait_for_room(self, candidate: Candidate, task: TrainingTask, waited: float) -> bool:
        """Whether patience is left (`waited`: objectives), and the batch would fit on an empty node."""
        alone = activation_tokens(task.microbatch_tokens, candidate.node_model.max_in_flight)
        is_patient = waited < self._options.offload_after
        return self._room is not None and is_patient and alone <= self._room.tokens

    def _shortlist(
        self, state: ClusterState, nodes: Sequence[int], now_s: float, holder: int | None = None
    ) -> list[Candidate]:
        linger_s = self._options.linger * state.slo_s
        return shortlist(state, nodes, now_s=now_s, linger_s=linger_s, holder=holder)


def _by_node(
    found: Sequence[Candidate], make: Callable[[Candidate], T], by: Mapping[int, Hashable] | None = None
) -> dict[int, T]:
    """By node: what follows from its costs and the layout of its devices, and from what `by` has for it.

    Nodes that are alike share it.
    """
    by_kind: dict[Hashable, T] = {}
    by_node = {}
    for each in found:
        kind = (each.costs.alike, each.node_model.devices, by[each.node] if by else None)
        if kind not in by_kind:
            by_kind[kind] = make(each)
        by_node[each.node] = by_kind[kind]
    return by_node


def _as_known(
    state: ClusterState, place: Place, due: Due, cached: Mapping[int, int], beginnings: tuple[int, ...]
) -> Place:
    """With what the node has of the prompt, and what it may compute of the rest beside decodes."""
    node_model = state.node(place.node).node_model
    return replace(
        place,
        cached_tokens=cached[place.node],
        beginnings=beginnings,
        pace=OWN_PACE if due.tbt_s is None else node_model.token_times.pace(due.tbt_s),
    )


def _prospect_of_request(candidate: Candidate, alone: Alone, now_s: float) -> Prospect:
    forecast = forecast_inference(candidate.node_model.prediction, alone, now_s)
    return Prospect(candidate, forecast, forecast.end_s - now_s, candidate.node_model.exposure_s)


def _prospect_of_batch(candidate: Candidate, alone: Alone, now_s: float) -> Prospect:
    forecast = forecast_training(candidate.node_model.prediction, alone, now_s)
    return Prospect(candidate, forecast, forecast.backward[0].end_s - now_s)


def _objective_s(state: ClusterState) -> float:
    """The part of the objective between the scheduler's decision and the end of the last stage's forward.

    It is the objective without the hops that no forecast has, which may be as long as an op.
    """
    return max(0.0, state.slo_s - ANSWER_HOPS * state.costs.hop_s)


def _expected(state: ClusterState, found: Sequence[Candidate], now_s: float) -> Expected:
    """Expected requests, like those that came."""
    node_models = {candidate.node: candidate.node_model for candidate in found}
    length = max(1, round(state.demand.inference_lengths.mean))
    alones = _by_node(found, lambda each: inference_alone(each.costs, length, each.node_model.devices))

    def response(node: int, at_s: float) -> float:
        return forecast_inference(node_models[node].prediction, alones[node], at_s).end_s - at_s

    return Expected(
        response=response,
        nodes=tuple(node_models),
        slo_s=_objective_s(state),
        batches_per_s=state.demand.training_rate.per_s(now_s),
    )


def _ops_of(costs: Costs, shape: TaskShape, num_slices: Sequence[NumSlices]) -> BatchOps:
    work = max(shape.microbatches, key=lambda work: work.num_tokens)
    return BatchOps(
        tuple(
            OpTimes(costs.forward_s(stage, work), costs.backward_s(stage, work), costs.step_s(stage), cuts)
            for stage, cuts in enumerate(num_slices)
        ),
        len(shape.microbatches),
    )
