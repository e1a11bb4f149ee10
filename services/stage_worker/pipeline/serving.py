"""The serving half of a stage worker: requests in at stage 0, iterations through, tokens out at the last."""

import logging
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial

from msgspec import structs
from opentelemetry.trace import Span

from services.stage_worker.compute.executor import IterationOutput, ModelFacts, Rows, SequenceChunk
from services.stage_worker.context import WorkerContext
from services.stage_worker.node.node_scheduler import FirstRows, NodeScheduler
from services.stage_worker.pipeline.decode_spans import DecodeSpans
from services.stage_worker.pipeline.disciplines import WorkKind
from services.stage_worker.pipeline.progress import iteration_op
from services.stage_worker.pipeline.sequences import Entered, SequenceTable
from shared import subjects
from shared.bus.base import Incoming
from shared.errors import CarrierError, IterationLostError, LemixError, RefusedError, UnknownSequenceError
from shared.messages.inference import (
    CancelTask,
    InferenceTask,
    Iteration,
    IterationDone,
    IterationForward,
    SampledToken,
    SequenceResult,
    TaskEnded,
    TaskFailed,
    TokensProduced,
)
from shared.messages.training import StageReport, VersionsServed
from shared.messages.weights import PublishVersion, RestoreWeights
from shared.telemetry import traceparent_of
from shared.tensors.ref import TensorRef

ITERATION_TIMEOUT_S = 60.0
"""An iteration that takes longer is lost, and its pipeline with it."""
MAX_EARLY_CANCELS = 256

log = logging.getLogger(__name__)


class Serving:
    """Moves iterations through this stage; on stage 0 it also leads the node (`scheduler`)."""

    def __init__(
        self, context: WorkerContext, facts: ModelFacts, *, is_node_whole: Callable[[], bool]
    ) -> None:
        """`is_node_whole`: iterations can go through all stages (asked on stage 0 only)."""
        settings = self._settings = context.settings
        self._bus = context.bus
        self._clock = context.clock
        self._telemetry = context.telemetry
        self._executor = context.executor
        self._queue = context.queue
        self._progress = context.progress
        self._ignored = context.ignored
        self._is_node_whole = is_node_whole
        self._is_last = settings.stage == settings.num_stages - 1
        self._spans: dict[str, Span] = {}
        self._decode_spans = DecodeSpans(context.telemetry, node=settings.node, stage=settings.stage)
        self._started_s: dict[int, float] = {}
        """When each iteration in flight was started (stage 0)."""
        self._cancelled: deque[str] = deque(maxlen=MAX_EARLY_CANCELS)
        """Tasks that were not here when they were cancelled: they may still come (stage 0)."""
        self.sick_version: int | None = None
        """The last weights version whose logits were not finite (last stage)."""
        self._newest_version = 0
        self._fence = 0
        """The fence of the last restore."""
        self._reported: VersionsServed | None = None
        """The versions that the trainer heard of last (stage 0)."""
        self.sequences = SequenceTable(
            context.executor.begin if self._is_last else None, block_size=settings.kv_block_size
        )
        self.scheduler = NodeScheduler(
            num_blocks=facts.num_kv_blocks,
            block_size=settings.kv_block_size,
            num_in_flight=settings.num_stages,
            token_budget=settings.iteration_tokens,
            max_deferrable_tokens=max(settings.iteration_tokens, settings.max_microbatch_tokens),
            max_waiting=settings.max_waiting,
            vocab_size=facts.vocab_size,
            context_length=facts.context_length,
            num_rows_ahead=facts.num_rows_ahead,
        )

    async def subscribe(self) -> None:
        """Listen to what this stage's place in the pipeline asks for."""
        node, stage = self._settings.node, self._settings.stage
        if stage > 0:
            await self._bus.subscribe(subjects.ITERATION.at(node=node, stage=stage), self._on_iteration)
            return
        await self._bus.subscribe(subjects.ASSIGN.at(node=node), self._on_task)
        await self._bus.subscribe(subjects.CANCEL.at(node=node), self._on_cancel)
        await self._bus.subscribe(subjects.ITERATION_DONE.at(node=node), self._on_iteration_done)
        await self._bus.subscribe(subjects.PUBLISH.at(node=node), self._on_publish)

    async def tick(self) -> None:
        """Once in a while: end what is past its deadline. Raises LemixError when the pipeline is stuck."""
        now_s = self._clock.now_s()
        self._decode_spans.write_quiet(now_s, self._clock.wall_s())
        for task in self.scheduler.expired(now_s):
            await self._fail(task, 504, f"not finished within its {task.timeout_s:g} s")
        oldest_s = min(self._started_s.values(), default=now_s)
        if now_s - oldest_s > ITERATION_TIMEOUT_S:
            raise LemixError(f"an iteration has not come back within {ITERATION_TIMEOUT_S:g} s")
        self.pump()
        self._reported = None  # once more: the last time may have been lost
        await self._report_versions()

    def close(self) -> None:
        """The stage ends: write what is left of traces."""
        self._decode_spans.write_all(self._clock.now_s(), self._clock.wall_s())

    async def reset(self, reason: str) -> None:
        """The pipeline broke behind stage 0: nothing that is in it will come back."""
        self._started_s.clear()
        for task in self.scheduler.reset():
            await self._fail(task, 503, reason)

    def set_version(self, version: int) -> None:
        """Clients are told the version with their tokens."""
        self._newest_version = self.scheduler.newest_version = version

    async def restored(self, message: RestoreWeights, *, is_same: bool) -> None:
        """This stage holds these weights, and keeps those that serve.

        `is_same`: see `NodeScheduler.restored`.
        """
        self._fence, self._reported = message.fence, None
        version = message.served_version
        for task in self.scheduler.restored(version, message.serving, is_same=is_same):
            await self._fail(task, 503, f"its weights are gone: the node went back to {version}")

    # Stage 0

    async def _on_task(self, incoming: Incoming[InferenceTask]) -> None:
        task = incoming.message
        if task.task_id in self._spans:
            log.warning("%s came twice", task.task_id)
            return
        attributes = {"lemix.node": self._settings.node, "lemix.prompt_tokens": len(task.prompt)}
        span = self._telemetry.span("stage.request", traceparent=incoming.traceparent, attributes=attributes)
        self._spans[task.task_id] = span
        if task.task_id in self._cancelled:
            await self._end(task.task_id, "cancelled")
            return
        deadline_s = self._clock.now_s() + task.timeout_s
        try:
            self.scheduler.submit(task, deadline_s=deadline_s, traceparent=traceparent_of(span))
        except RefusedError as refusal:
            await self._fail(task, refusal.code, refusal.reason)
        self.pump()

    async def _on_cancel(self, incoming: Incoming[CancelTask]) -> None:
        task_id = incoming.message.task_id
        if not self.scheduler.remove(task_id):
            self._cancelled.append(task_id)
            return
        await self._end(task_id, "cancelled")
        self.pump()

    async def _on_iteration_done(self, incoming: Incoming[IterationDone]) -> None:
        done = incoming.message
        if not done.lost:
            await self._finish_iteration(done)
        elif done.iteration in self._started_s:  # else the pipeline was reset since
            if done.pipeline_stands:
                await self._lose(done.iteration, done.lost)
            else:
                await self.reset(done.lost)
            self.pump()

    async def _finish_iteration(self, done: IterationDone) -> None:
        self._started_s.pop(done.iteration, None)
        completed = self.scheduler.finish_iteration(done)
        failures = {failure.task_id: failure for failure in done.failed}
        failed = self.scheduler.lose(failures)
        self.pump()
        for task in completed:
            await self._end(task.task_id, "completed")
        for task in failed:
            await self._fail(task, failures[task.task_id].code, failures[task.task_id].reason)
        await self._report_versions()

    async def _lose(self, iteration: int, reason: str) -> None:
        """A stage could not run the iteration: its weights version is gone, or a sequence is not known."""
        self._started_s.pop(iteration, None)
        for task in self.scheduler.lose_iteration(iteration):
            await self._fail(task, 503, reason)

    async def _on_publish(self, incoming: Incoming[PublishVersion]) -> None:
        if not self._ignored.is_other("a publish", incoming.message.fence, self._fence):
            self.scheduler.versions.publish(incoming.message.version)
            self.pump()
            await self._report_versions()

    async def _report_versions(self) -> None:
        """The trainer lets go of what is no longer in use."""
        published, settings = self.scheduler.versions.published, self._settings
        if published is None:
            return
        served = VersionsServed(published=published, in_use=self.scheduler.versions_in_use)
        if served != self._reported:
            self._reported = served
            report = StageReport(node=settings.node, stage=settings.stage, fence=self._fence, event=served)
            await self._bus.publish(subjects.REPORT.at(), report)

    def pump(self) -> None:
        """Start as many iterations as the pipeline takes; none while a stage of the node is missing."""
        if not self._is_node_whole():
            return
        while (first := self.scheduler.next_iteration()) is not None:
            self._started_s[first.iteration.number] = self._clock.now_s()
            self._enqueue(first.iteration, partial(self._run_first, first))

    async def _run_first(self, first: FirstRows) -> None:
        iteration = first.iteration
        try:
            await self._run(iteration, first.tokens, self._version_of(iteration))
        except CarrierError as error:
            log.warning("iteration %d lost: %s", iteration.number, error)
            await self.reset(f"the next stage cannot be reached: {error}")
        except IterationLostError as error:
            log.warning("iteration %d lost: %s", iteration.number, error)
            await self._lose(iteration.number, str(error))
            self.pump()

    async def _fail(self, task: InferenceTask, code: int, reason: str) -> None:
        failure = TaskFailed(task_id=task.task_id, code=code, reason=reason)
        await self._bus.publish(subjects.FAILED.at(gateway=task.gateway), failure)
        await self._end(task.task_id, reason)

    async def _end(self, task_id: str, outcome: str) -> None:
        span = self._spans.pop(task_id)
        span.set_attribute("lemix.outcome", outcome)
        span.end()
        await self._bus.publish(
            subjects.ENDED.at(), TaskEnded(task_ids=(task_id,)), traceparent=traceparent_of(span)
        )

    # Every stage

    async def _on_iteration(self, incoming: Incoming[IterationForward]) -> None:
        forward = incoming.message
        self._enqueue(forward.iteration, partial(self._run_received, forward))

    def _enqueue(self, iteration: Iteration, run: Callable[[], Awaitable[None]]) -> None:
        kind = WorkKind.DEFERRABLE if iteration.deferrable else WorkKind.INFERENCE
        self._queue.put(kind, run, training_turn=iteration.training_turn)

    async def _run_received(self, forward: IterationForward) -> None:
        iteration = forward.iteration
        try:
            await self._run(iteration, forward.hidden, forward.weights_version)
        except (CarrierError, IterationLostError) as error:
            log.warning("iteration %d lost: %s", iteration.number, error)
            lost = IterationDone(
                iteration=iteration.number,
                lost=f"an iteration was lost at stage {self._settings.stage}: {error}",
                pipeline_stands=isinstance(error, IterationLostError),
            )
            await self._bus.publish(subjects.ITERATION_DONE.at(node=self._settings.node), lost)

    async def _run(self, iteration: Iteration, rows: Rows, version: int | None) -> None:
        """`version`: the one with which all stages before have run it, if there is one."""
        entered = await self._enter(iteration, rows)
        chunks = entered.chunks
        op = None if iteration.deferrable else iteration_op(iteration.number, chunks)
        with ExitStack() as spans:
            for chunk in chunks:
                if chunk.traceparent:
                    spans.callback(self._prefill_span(chunk).end)
            began_s = self._clock.now_s()
            with self._progress.doing(op) as handed:
                output = await self._executor.iteration(chunks, rows, iteration.version, entered.states)
                handed.took = output.took
            self._decode_spans.add(chunks, began_s, self._clock.now_s())
        if version != self._version_of(iteration):
            version = None
        if self._is_last:
            await self._publish_results(iteration, output, entered, version)
        else:
            await self._pass_on(iteration, output, version, traceparent=chunks[0].traceparent)

    def _version_of(self, iteration: Iteration) -> int:
        """The weights version with which this stage runs it now."""
        return self._newest_version if iteration.version is None else iteration.version

    async def _enter(self, iteration: Iteration, rows: Rows) -> Entered:
        """See `SequenceTable.enter`. Raises UnknownSequenceError."""
        try:
            return self.sequences.enter(iteration)
        except UnknownSequenceError:
            if isinstance(rows, TensorRef):
                await self._executor.discard(rows)
            raise

    def _prefill_span(self, chunk: SequenceChunk) -> Span:
        attributes = {
            "lemix.node": self._settings.node,
            "lemix.stage": self._settings.stage,
            "lemix.tokens": chunk.num_tokens,
        }
        return self._telemetry.span("stage.prefill", traceparent=chunk.traceparent, attributes=attributes)

    async def _pass_on(
        self, iteration: Iteration, output: IterationOutput, version: int | None, *, traceparent: str
    ) -> None:
        assert output.hidden is not None
        forward = IterationForward(iteration=iteration, hidden=output.hidden, weights_version=version)
        following = subjects.ITERATION.at(node=self._settings.node, stage=self._settings.stage + 1)
        await self._bus.publish(following, forward, traceparent=traceparent)

    async def _publish_results(
        self, iteration: Iteration, output: IterationOutput, entered: Entered, version: int | None
    ) -> None:
        columns = zip(iteration.sequences, entered.chunks, strict=True)
        numbers = {chunk.task_id: number for number, chunk in columns if chunk.produces}
        results = _with_num_cached(output.results, entered)
        tokens = tuple(
            _sampled(numbers[result.task_id], result) for result in results if result.task_id in numbers
        )
        done = IterationDone(
            iteration=iteration.number, tokens=tokens, failed=output.failed, weights_version=version
        )
        own_version = self._version_of(iteration)
        self._note_failures(output.failed, own_version)
        if self._settings.stage == 0:
            await self._finish_iteration(done)
        else:
            await self._bus.publish(subjects.ITERATION_DONE.at(node=self._settings.node), done)
        gateways = {
            chunk.task_id: state.gateway for chunk, state in zip(entered.chunks, entered.states, strict=True)
        }
        await self._publish_tokens(gateways, results, own_version)

    def _note_failures(self, failed: tuple[TaskFailed, ...], version: int) -> None:
        sick = [failure for failure in failed if failure.code == 500]
        if sick and version != self.sick_version:
            self.sick_version = version
            log.error("weights version %d is sick: %s (%s)", version, sick[0].reason, sick[0].task_id)

    async def _publish_tokens(
        self, gateways: Mapping[str, str], results: Iterable[SequenceResult], version: int
    ) -> None:
        by_gateway: dict[str, list[SequenceResult]] = defaultdict(list)
        for result in results:
            if result.prompt or result.token is not None or result.finish is not None:
                by_gateway[gateways[result.task_id]].append(result)
        for gateway, share in by_gateway.items():
            produced = TokensProduced(node=self._settings.node, weights_version=version, results=tuple(share))
            await self._bus.publish(subjects.TOKENS.at(gateway=gateway), produced)


def _sampled(number: int, result: SequenceResult) -> SampledToken:
    token = None if result.token is None else result.token.token
    return SampledToken(sequence=number, token=token, finished=result.finish is not None)


def _with_num_cached(results: Iterable[SequenceResult], entered: Entered) -> list[SequenceResult]:
    """A sequence's first token tells how much of the prompt others had computed."""
    columns = zip(entered.chunks, entered.num_cached, strict=True)
    told = {chunk.task_id: count for chunk, count in columns if count and chunk.produces and not chunk.index}
    return [
        structs.replace(result, num_cached=told[result.task_id])
        if result.task_id in told and result.token is not None
        else result
        for result in results
    ]
