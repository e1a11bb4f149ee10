"""Which older checkpoints go when there is a new one, and what verdicts have to do with it."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.trainer.checkpoints.checkpointing import Checkpointing
from services.trainer.checkpoints.manifests import Verdict, ledger_of
from services.trainer.checkpoints.newest import NewestCheckpoints
from services.trainer.checkpoints.verdicts import Verdicts
from services.trainer.intake.microbatches import TrainingBatch
from services.trainer.ledger.pending_batches import BatchBook, Pending
from services.trainer.ledger.progress import Progress
from services.trainer.nodes.decisions import Action, Restore, WriteCheckpoint
from services.trainer.nodes.lease import TrainerLease
from services.trainer.outbox import Outbox
from services.trainer.publication.losses import Losses
from services.trainer.settings import TrainerSettings
from shared import checkpoints
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.clock import SystemClock
from shared.telemetry import NoTelemetry
from tests.unit.trainer.checkpoints.test_files import files_of, load, save, shards

DEADLINE_S = 60.0


class Node:
    """One stage's worth of a node: only what a checkpoint needs of it."""

    node, life = 0, SimpleNamespace(fence=1, is_rolling_back=False)

    def __init__(self) -> None:
        self.has_heard = asyncio.Event()
        self.restored_to: tuple[int, float, bool] | None = None

    def checkpoint_written(self, version: int, failure: str, now_s: float) -> list[Action]:
        assert failure == ""
        self.has_heard.set()
        return []

    def restored(
        self, fence: int, failure: str, now_s: float, *, served: int, rise: float, is_judged: bool
    ) -> list[Action]:
        self.restored_to = (served, rise, is_judged)
        return []


async def no_ack() -> None:
    pass


class Run:
    """Node 0 has checkpoints of versions 1 to 3, of which two are kept, and has applied one batch since.

    Of nothing is it said that it may serve.
    """

    def __init__(self, tmp_path: Path, bus: MemoryBus, tasks: asyncio.TaskGroup) -> None:
        self.files = files_of(tmp_path)
        for version in (1, 2, 3):
            save(self.files, version, may_serve=False)
        newest = load(self.files)
        book = BatchBook(ledger_of(newest.values()))
        book.admit(Pending(TrainingBatch("b", 1, (), b"", ""), NoTelemetry(), parent="", ack=no_ack))
        book.apply(0, book.pop_waiting().batch.batch_id)
        self.newest = NewestCheckpoints(newest, shares_weights=False)
        self.evaluator = SimpleNamespace(versions=set(), drop=lambda node: None)
        self.verdicts = Verdicts(
            self.files, evaluator=self.evaluator, clock=SystemClock(), shares_weights=False, tasks=tasks
        )
        self.node = Node()
        self.checkpointing = Checkpointing(
            TrainerSettings(held_out="examples"),
            bus=bus,
            clock=SystemClock(),
            book=book,
            files=self.files,
            lease=TrainerLease(bus, term=1),
            newest=self.newest,
            stream="s",
            progress=Progress(Outbox(bus), book, self.newest.folder_of),
            verdicts=self.verdicts,
            acknowledge=lambda acks: None,
        )

    async def write(self) -> None:
        """Version 4."""
        folder = self.files.temporary(0, 4, fence=1)
        self.files.begin(folder)
        action = WriteCheckpoint(4, 2, dict(enumerate(shards(folder))))
        await self.checkpointing.write(self.node, action)
        await self.checkpointing.prune(0)

    def versions(self) -> dict[int, bool]:
        """Of the checkpoints that there are, and whether they may serve."""
        manifests = [each.manifest for each in checkpoints.checkpoints(self.files.root, 0)]
        return {manifest.version: manifest.may_serve for manifest in manifests}


async def test_old_checkpoints_go_and_the_new_one_is_the_newest(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        run = Run(tmp_path, MemoryBus(MemoryBroker(), ""), tasks)
        await run.write()

    assert run.versions() == {4: False, 3: False}
    assert run.newest.folder_of(0) == run.files.root / "node-0" / "step-00000004"


async def test_what_is_evaluated_by_the_time_others_are_done_with_the_files_stays(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        run = Run(tmp_path, MemoryBus(MemoryBroker(), ""), tasks)
        async with asyncio.timeout(DEADLINE_S), run.files.in_use:
            tasks.create_task(run.write())
            await run.node.has_heard.wait()
            run.evaluator.versions.add(2)

    assert run.versions() == {4: False, 3: False, 2: False}


async def test_a_verdict_that_comes_before_its_checkpoint_is_in_it(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        run = Run(tmp_path, MemoryBus(MemoryBroker(), ""), tasks)
        run.verdicts.add(0, Verdict(4, Losses(held_out=0.5), may_serve=True))
        run.verdicts.add(1, Verdict(3, Losses(held_out=0.5), may_serve=True))
        await run.write()

    assert run.versions() == {4: True, 3: False}
    assert run.verdicts.undecided == {4, 3}


async def test_a_version_that_serves_without_a_loss_was_not_judged_and_serves_after_a_crash(
    tmp_path: Path,
) -> None:
    async with asyncio.TaskGroup() as tasks:
        run = Run(tmp_path, MemoryBus(MemoryBroker(), ""), tasks)
        run.verdicts.add(0, Verdict(3, Losses(), may_serve=True, training_loss=1.0))

    assert run.verdicts.of(0) == ()
    assert run.versions()[3]
    (newest, *_) = checkpoints.checkpoints(run.files.root, 0)
    assert run.files.verdict_on(newest) is None


async def test_a_node_that_goes_back_has_shown_nothing(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        run = Run(tmp_path, MemoryBus(MemoryBroker(), ""), tasks)
        run.verdicts.add(0, Verdict(4, Losses(held_out=0.5), may_serve=True))
    run.verdicts.forget(0)
    await run.write()

    assert run.versions() == {4: False, 3: False}
    assert run.verdicts.undecided == set()


@pytest.mark.parametrize("version", [2, 3])
async def test_a_node_is_restored_to_serve_what_may_with_what_is_known_of_its_loss(
    version: int, tmp_path: Path
) -> None:
    async with asyncio.TaskGroup() as tasks:
        run = Run(tmp_path, MemoryBus(MemoryBroker(), ""), tasks)
        run.verdicts.add(0, Verdict(version, Losses(held_out=0.5), may_serve=True, rise=1.25))
    await run.checkpointing.restore(run.node, Restore(fence=1, num_stages=0))

    assert run.node.restored_to == (version, 1.25, version == 3)


async def test_why_a_version_was_withheld_is_known_after_a_restart(tmp_path: Path) -> None:
    losses = Losses(held_out=0.5, samples=0.75)
    withheld = Verdict(3, losses, may_serve=False, why_withheld="it is bad", training_loss=0.25)
    async with asyncio.TaskGroup() as tasks:
        run = Run(tmp_path, MemoryBus(MemoryBroker(), ""), tasks)
        run.files.note_verdict(0, withheld)  # by the trainer before
        for fence in (1, 2):
            await run.checkpointing.restore(run.node, Restore(fence=fence, num_stages=0))

    (told,) = run.verdicts.of(0)
    assert (told.version, told.why_withheld) == (3, "it is bad")
    assert (told.training_loss, told.held_out_loss, told.samples_loss) == (0.25, 0.5, 0.75)
