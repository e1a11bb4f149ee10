"""The ledger under any sequence of what can happen: every accepted batch is in exactly one place."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.trainer.checkpoint_files import ledger_of, lineage_of, manifest_of, rolled_back
from services.trainer.versions import Ledger
from shared.checkpoints import Checkpoint, Manifest
from tests.unit.trainer.support import NO_FOLDER

NODES = (0, 1)
NODE = st.sampled_from(NODES)


class Batches(RuleBasedStateMachine):
    """A model that keeps plain lists beside the ledger. Batch `bN` stands at sequence N."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.last_sequence = 0
        self.fed: set[str] = set()
        """Every id that was ever accepted."""
        self.skipped: set[str] = set()
        self.discarded: set[str] = set()
        self.applied: dict[int, list[str]] = {node: [] for node in NODES}
        """Since the node's newest checkpoint."""
        self.disk: dict[int, list[tuple[Manifest, list[str]]]] = {node: [] for node in NODES}
        """Each node's checkpoints, newest last, with what their weights contain."""

    def durable(self, node: int) -> list[str]:
        return self.disk[node][-1][1] if self.disk[node] else []

    def waiting(self) -> list[str]:
        held = {batch_id for applied in self.applied.values() for batch_id in applied}
        return [batch_id for batch_id in self.ledger.pending if batch_id not in held]

    @rule()
    def accept(self) -> None:
        """Read the next message that is not done; after a crash that may be one that was read before."""
        sequence = self.ledger.read_up_to + 1
        while self.ledger.is_done(sequence):
            self.ledger = self.ledger.pass_over(sequence)
            sequence += 1
        assert not self.ledger.knows(f"b{sequence}"), "what is not done would be applied a second time"
        self.ledger = self.ledger.accept(sequence, f"b{sequence}")
        self.last_sequence = max(self.last_sequence, sequence)
        self.fed.add(f"b{sequence}")

    @precondition(lambda self: self.waiting())
    @rule(node=NODE, data=st.data())
    def apply(self, node: int, data: st.DataObject) -> None:
        batch_id = data.draw(st.sampled_from(self.waiting()))
        self.ledger = self.ledger.apply(node, batch_id)
        self.applied[node].append(batch_id)

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def skip(self, data: st.DataObject) -> None:
        batch_id = data.draw(st.sampled_from(self.waiting()))
        self.ledger = self.ledger.skip(self.ledger.pending[batch_id])
        self.skipped.add(batch_id)

    @rule(node=NODE)
    def roll_back(self, node: int) -> None:
        """A stage of the node has restarted."""
        self.ledger = self.ledger.roll_back(node)
        self.applied[node] = []

    @rule(node=NODE, num_left=st.integers(0, 2), dies=st.booleans())
    def make_durable(self, node: int, num_left: int, dies: bool) -> None:
        """Perhaps the trainer dies between the rename and its own account of it."""
        num_saved = max(0, len(self.applied[node]) - num_left)
        saved, self.applied[node] = self.applied[node][:num_saved], self.applied[node][num_saved:]
        version = len(self.durable(node)) + num_saved
        manifest = manifest_of(self.ledger, node, version, num_stages=1, model="m", stream="s", wall_s=0.0)
        self.disk[node].append((manifest, self.durable(node) + saved))
        if dies:
            self.crash()
        else:
            self.ledger = self.ledger.make_durable(node, version)

    @precondition(lambda self: any(self.disk.values()))
    @rule(data=st.data(), dies=st.booleans())
    def go_back(self, data: st.DataObject, dies: bool) -> None:
        """To an older checkpoint, for good; perhaps the trainer dies when that is decided."""
        node = data.draw(st.sampled_from([node for node in NODES if self.disk[node]]))
        place = data.draw(st.integers(0, len(self.disk[node]) - 1))
        manifest, contents = self.disk[node][place]
        self.discarded |= {*self.durable(node), *self.applied[node]} - set(contents)
        after = self.ledger.go_back(node, lineage_of(manifest))
        self.disk[node][place:] = [(rolled_back(manifest, after), contents)]
        self.applied[node] = []
        if dies:
            self.crash()
        else:
            self.ledger = after

    @rule()
    def crash(self) -> None:
        """The trainer starts again from the disk; what was skipped and not written there may come again."""
        newest = [Checkpoint(self.disk[node][-1][0], NO_FOLDER) for node in NODES if self.disk[node]]
        self.ledger = ledger_of(newest)
        self.applied = {node: [] for node in NODES}
        self.skipped = {each for each in self.skipped if self.ledger.is_done(int(each[1:]))}
        self.fed = {each for each in self.fed if self.ledger.is_done(int(each[1:]))}

    @invariant()
    def every_accepted_batch_is_in_exactly_one_place(self) -> None:
        places = [
            *self.waiting(),
            *(batch_id for node in NODES for batch_id in (*self.durable(node), *self.applied[node])),
            *self.skipped,
            *self.discarded,
        ]
        assert sorted(places) == sorted(self.fed)

    @invariant()
    def the_ledger_says_the_same(self) -> None:
        for node in NODES:
            lineage = self.ledger.lineage(node)
            assert list(lineage.recent_ids) == self.durable(node)
            assert list(lineage.applied) == self.applied[node]
            assert lineage.version == len(self.durable(node)) + len(self.applied[node])
        done = {each for each in self.fed if each not in self.ledger.pending}
        assert all(self.ledger.is_done(int(each[1:])) for each in done)
        assert not any(self.ledger.is_done(sequence) for sequence in self.ledger.pending.values())


TestBatches = Batches.TestCase
TestBatches.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
