"""The trainer: durable training batches in, microbatches out, weights versions and checkpoints.

    intake/       the durable stream -> batches on nodes
    ledger/       which batches each version contains; what publishers are told
    nodes/        each node: what to feed and restore, when to step and save
    sharing/      for all nodes: when their weights become one
    publication/  which versions may serve: has nodes score examples
    checkpoints/  what is durable, and the way back to it
    defaults      settings that follow from the model
    outbox        sends messages in order

This file puts them together.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

from services.trainer.checkpoints.checkpointing import Checkpointing
from services.trainer.checkpoints.files import CONFIG_FILE, MODEL_FILES, CheckpointFiles
from services.trainer.checkpoints.manifests import all_apart, ledger_of, only_newest
from services.trainer.checkpoints.newest import NewestCheckpoints
from services.trainer.checkpoints.retention import Retention
from services.trainer.checkpoints.rollbacks import Rollbacks
from services.trainer.checkpoints.verdicts import Verdicts
from services.trainer.checkpoints.weights_requests import WeightsRequests
from services.trainer.defaults import training_line, with_defaults
from services.trainer.intake.batch_flow import BatchFlow
from services.trainer.intake.reading import Intake
from services.trainer.ledger.fates import BatchFates
from services.trainer.ledger.pending_batches import BatchBook
from services.trainer.ledger.progress import Progress
from services.trainer.nodes.lease import TrainerLease
from services.trainer.nodes.node_training import NodeTraining
from services.trainer.nodes.runner import ActionRunner
from services.trainer.nodes.stage_listener import Nodes
from services.trainer.nodes.stage_orders import StageOrders
from services.trainer.nodes.weights_checks import WeightsChecks
from services.trainer.outbox import Outbox
from services.trainer.publication.evaluator import Evaluator, GuardExamples
from services.trainer.publication.held_out import read_held_out
from services.trainer.publication.hold_out import HoldOut
from services.trainer.publication.openings import openings
from services.trainer.publication.samples import Samples
from services.trainer.publication.samples_file import read_samples, write_samples
from services.trainer.settings import OF_TRAINING, TrainerSettings
from services.trainer.sharing.runner import Sharing
from services.trainer.streams import REJECTED_STREAM, TRAIN_STREAM
from shared import checkpoints
from shared.bus.base import Bus, Subscription
from shared.clock import Clock
from shared.disk import on_disk
from shared.encoding import ExampleEncoder, LabelledTokens
from shared.health import Health
from shared.model_files import resolve
from shared.subjects import (
    DURABLE_VERSIONS,
    HEARTBEAT,
    LINEAGE,
    LINEAGE_ENTRY,
    NODE_WEIGHTS,
    REPORT,
    ROLLBACK,
    TRAIN_CHECK,
    TRAIN_STATUS,
)
from shared.telemetry import Telemetry

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts that others speak to."""

    fates: BatchFates
    rollbacks: Rollbacks
    actions: ActionRunner
    nodes: Nodes
    checks: WeightsChecks


class Trainer:
    """The edge. Making it fetches and reads the model's small files, which blocks; `run` then works until
    it is cancelled.

    Raises ConfigurationError or UnsupportedModelError when the model's files cannot be used.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        bus: Bus,
        clock: Clock,
        telemetry: Telemetry,
        health: Health | None = None,
        intake: Intake | None = None,
        checks_weights: bool = True,
    ) -> None:
        """`intake`: reads batches for another model than that of the settings (None: for that one).

        `checks_weights`: have nodes show that they serve what they train; False where nothing is computed.
        """
        model_folder = resolve(settings.model, (CONFIG_FILE, *MODEL_FILES))
        settings = with_defaults(settings, model_folder)
        self._bus = bus
        self._clock = clock
        self._telemetry = telemetry
        self._health = health or Health()
        self._checks_weights = checks_weights
        self._hold_out = HoldOut(settings.checkpoint_dir, model=settings.model, share=settings.hold_out_share)
        intake = intake or Intake.load(settings, model_folder, clock)
        self._intake = replace(intake, hold_out=self._hold_out)
        self._examples = _guard_examples(settings, self._intake.encoder)
        self._settings = settings.model_copy(update={"guard_samples": len(self._examples.openings)})
        log.info(training_line(self._settings))
        self._files = CheckpointFiles(
            settings.checkpoint_dir,
            model_folder=model_folder,
            keep=Retention(settings.keep_checkpoints, settings.keep_checkpoint_ages_s),
            merge=settings.merging,
        )

    async def run(self) -> None:
        """Train until cancelled.

        Raises BusError, and ConfigurationError when the run's checkpoints cannot be gone on from, or when
        another trainer takes over.
        """
        stream = await self._bus.ensure_stream(TRAIN_STREAM)
        await self._bus.ensure_stream(REJECTED_STREAM)
        lease = await TrainerLease.take(self._bus)
        found = await on_disk(partial(self._files.load, model=self._settings.model, stream=stream.identity))
        found = only_newest(found) if self._settings.shares_weights else all_apart(found)
        for checkpoint in found.values():
            checkpoints.warn_of_other_settings(checkpoint, self._settings.as_text(OF_TRAINING))
        begun_after = await on_disk(
            partial(self._files.begun_after, stream, self._settings.train_from, has_checkpoints=bool(found))
        )
        newest = NewestCheckpoints(found, shares_weights=self._settings.shares_weights)
        book = BatchBook(ledger_of(found.values(), begun_after=begun_after))
        read = partial(read_samples, self._files.root, model=self._settings.model)
        samples = await on_disk(read) if self._examples.openings else None
        await on_disk(self._hold_out.load)
        async with asyncio.TaskGroup() as tasks:
            outbox = Outbox(self._bus)
            evaluator = Evaluator(
                replace(self._examples, samples=samples),
                name=f"trainer.{lease.term}",
                bus=self._bus,
                clock=self._clock,
                outbox=outbox,
                keep=lambda written: tasks.create_task(self._keep_samples(written)),
                held_out=lambda: self._freeze_hold_out(tasks),
            )
            parts = self._parts(
                book,
                newest,
                evaluator,
                outbox,
                tasks,
                stream=stream.identity,
                begun_after=begun_after,
                lease=lease,
            )
            tasks.create_task(outbox.run())
            if self._settings.is_guarded:
                await evaluator.subscribe()
                tasks.create_task(evaluator.run())
            await self._work(book, parts, tasks, stream=stream.identity)

    def _parts(
        self,
        book: BatchBook,
        newest: NewestCheckpoints,
        evaluator: Evaluator,
        outbox: Outbox,
        tasks: asyncio.TaskGroup,
        *,
        stream: str,
        begun_after: int,
        lease: TrainerLease,
    ) -> "_Parts":
        settings, bus, clock, files = self._settings, self._bus, self._clock, self._files
        progress = Progress(outbox, book, newest.folder_of)
        fates = BatchFates(bus, book=book, outbox=outbox, progress=progress, tasks=tasks)
        verdicts = Verdicts(
            files, evaluator=evaluator, clock=clock, shares_weights=settings.shares_weights, tasks=tasks
        )
        nodes: dict[int, NodeTraining] = {}
        checkpointing = Checkpointing(
            settings,
            bus=bus,
            clock=clock,
            book=book,
            files=files,
            lease=lease,
            newest=newest,
            stream=stream,
            progress=progress,
            verdicts=verdicts,
            acknowledge=fates.acknowledge,
        )
        rollbacks = Rollbacks(
            files, book=book, newest=newest, progress=progress, acknowledge=fates.acknowledge, tasks=tasks
        )
        actions = ActionRunner(
            orders=StageOrders(settings, bus=bus, book=book, outbox=outbox, begun_after=begun_after),
            fates=fates,
            checkpointing=checkpointing,
            rollbacks=rollbacks,
            evaluator=evaluator,
            verdicts=verdicts,
            sharing=self._sharing(book, outbox, nodes, tasks, lease.term),
            tasks=tasks,
        )
        checks = self._weights_checks(outbox, lease.term)
        listener = Nodes(
            settings,
            bus=bus,
            clock=clock,
            book=book,
            actions=actions,
            progress=progress,
            verdicts=verdicts,
            checks=checks if self._checks_weights else None,
            by_number=nodes,
            lease=lease,
        )
        return _Parts(fates, rollbacks, actions, listener, checks)

    def _freeze_hold_out(self, tasks: asyncio.TaskGroup) -> Sequence[LabelledTokens]:
        """The examples that versions are compared on from now on."""
        was_frozen = self._hold_out.is_frozen
        examples = self._hold_out.freeze()
        if examples and not was_frozen:
            tasks.create_task(self._keep_hold_out())
        return examples

    async def _keep_hold_out(self) -> None:
        """Without room on the disk the set is frozen for this trainer's life only."""
        try:
            await on_disk(self._hold_out.save)
        except OSError as error:
            log.error("that the held-out examples are frozen is not saved: %s", error)

    async def _keep_samples(self, samples: Samples) -> None:
        """Without room on the disk they guard this trainer's life only, and are written anew in the next."""
        try:
            await on_disk(partial(write_samples, self._files.root, samples, model=self._settings.model))
        except OSError as error:
            log.error("the samples of version %d are not saved: %s", samples.version, error)

    def _weights_checks(self, outbox: Outbox, term: int) -> WeightsChecks:
        name = f"trainer.{term}-checks"
        return WeightsChecks(self._examples.card, name=name, bus=self._bus, clock=self._clock, outbox=outbox)

    def _sharing(
        self,
        book: BatchBook,
        outbox: Outbox,
        nodes: dict[int, NodeTraining],
        tasks: asyncio.TaskGroup,
        term: int,
    ) -> Sharing | None:
        """None: each node keeps to its own weights."""
        if not self._settings.shares_weights:
            return None
        names = (f"merge-{term}-{number}" for number in count())
        return Sharing(
            self._settings,
            bus=self._bus,
            clock=self._clock,
            book=book,
            outbox=outbox,
            nodes=nodes,
            new_name=partial(next, names),
            tasks=tasks,
        )

    async def _work(self, book: BatchBook, parts: "_Parts", tasks: asyncio.TaskGroup, *, stream: str) -> None:
        """Read the stream for ever, and place, send, evaluate and answer meanwhile."""
        batches = BatchFlow(
            self._intake,
            bus=self._bus,
            telemetry=self._telemetry,
            book=book,
            fates=parts.fates,
            nodes=parts.nodes,
            max_pending=self._settings.max_pending,
        )
        tasks.create_task(parts.nodes.tick())
        tasks.create_task(batches.place())
        subscriptions = await self._listen(parts, stream)
        self._health.begin("training batches are read")
        try:
            await batches.read(
                await self._bus.read_stream(
                    TRAIN_STREAM.name, reader="trainer", after_sequence=book.ledger.watermark
                )
            )
        finally:
            for subscription in subscriptions:
                await subscription.unsubscribe()

    async def _listen(self, parts: "_Parts", stream: str) -> list[Subscription]:
        """Listen to stages, and to requests from anyone."""
        nodes = parts.nodes
        requests = WeightsRequests(
            root=self._files.root,
            model=self._settings.model,
            stream=stream,
            nodes=nodes,
            rollbacks=parts.rollbacks,
            run_all=parts.actions.run_all,
            shares_weights=self._settings.shares_weights,
        )
        await parts.checks.subscribe()
        return [
            await self._bus.respond(NODE_WEIGHTS.at(), nodes.on_status),
            await self._bus.subscribe(HEARTBEAT.at(), nodes.on_heartbeat),
            await self._bus.subscribe(REPORT.at(), nodes.on_report),
            await self._bus.respond(DURABLE_VERSIONS.at(), requests.list_versions),
            await self._bus.respond(LINEAGE.at(), requests.show_lineage),
            await self._bus.respond(LINEAGE_ENTRY.at(), requests.show_lineage_entry),
            await self._bus.respond(ROLLBACK.at(), requests.roll_back),
            await self._bus.respond(TRAIN_CHECK.at(), self._intake.answer_check),
            await self._bus.respond(TRAIN_STATUS.at(), parts.fates.progress.answer),
        ]


def _guard_examples(settings: TrainerSettings, encoder: ExampleEncoder) -> GuardExamples:
    """Collect what versions are evaluated on. Raises ConfigurationError when the file cannot be used."""
    held_out = read_held_out(Path(settings.held_out), encoder) if settings.held_out else []
    prompts = openings(encoder, settings.guard_samples or 0)
    return GuardExamples(card=encoder.card, held_out=held_out, openings=prompts)
