"""The ledger under any sequence of what can happen: every accepted batch is in exactly one place."""

from abc import abstractmethod
from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.trainer.checkpoints.manifests import ledger_of, lineage_of, manifest_of, rolled_back
from services.trainer.ledger.ledger import Ledger
from shared.checkpoints import Checkpoint, Manifest
from tests.unit.trainer.support import NO_FOLDER

NODES = (0, 1, 2)
NODE = st.sampled_from(NODES)


class Batches(RuleBasedStateMachine):
    """A model that keeps plain lists beside the ledger. Batch `bN` stands at sequence N."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.fed: set[str] = set()
        """Every id that was ever accepted."""
        self.skipped: set[str] = set()
        self.discarded: set[str] = set()
        self.lineage_file: list[tuple[int | None, tuple[str, ...]]] = []
        """The place of the entry before, and batches."""
        self.applied: dict[int, list[str]] = {node: [] for node in NODES}
        """Since the node's newest checkpoint."""

    @abstractmethod
    def durable(self, node: int) -> list[str]:
        """What the weights of the node's newest checkpoint contain."""

    @abstractmethod
    def ever_durable(self) -> list[str]:
        """What the weights of all nodes' newest checkpoints contain."""

    def trains(self, node: int) -> bool:
        return True

    def held(self) -> set[str]:
        return {batch_id for applied in self.applied.values() for batch_id in applied}

    def waiting(self) -> list[str]:
        held = self.held()
        return [batch_id for batch_id in self.ledger.pending if batch_id not in held]

    def manifest(self, node: int, version: int) -> Manifest:
        """With the batches that it is the first to contain in a new entry of the lineage file."""
        lineage = self.ledger.lineage(node)
        made = manifest_of(self.ledger, node, version, num_stages=1, model="m", stream="s", wall_s=0.0)
        self.lineage_file.append((made.lineage_entry, lineage.applied[: version - lineage.durable_version]))
        return made.model_copy(update={"lineage_entry": len(self.lineage_file) - 1})

    def told(self, entry: int | None) -> list[str]:
        """The batches that the lineage file tells of, back from that entry."""
        if entry is None:
            return []
        older, batch_ids = self.lineage_file[entry]
        return [*self.told(older), *batch_ids]

    def restart(self, newest: Iterable[Manifest]) -> None:
        """The trainer starts from the disk; what was skipped and not written there may come again."""
        self.ledger = ledger_of(Checkpoint(manifest, NO_FOLDER) for manifest in newest)
        self.applied = {node: [] for node in NODES}
        self.skipped = {each for each in self.skipped if self.ledger.is_done(int(each[1:]))}
        self.fed = {each for each in self.fed if self.ledger.is_done(int(each[1:]))}

    @rule(count=st.integers(1, 4))
    def accept(self, count: int) -> None:
        """Read the next messages that are not done; after a crash that may be some that were read before."""
        for _ in range(count):
            self.accept_next()

    def accept_next(self) -> None:
        sequence = self.ledger.read_up_to + 1
        while self.ledger.is_done(sequence):
            self.ledger = self.ledger.pass_over(sequence)
            sequence += 1
        assert not self.ledger.knows(f"b{sequence}"), "what is not done would be applied a second time"
        self.ledger = self.ledger.accept(sequence, f"b{sequence}")
        self.fed.add(f"b{sequence}")

    @precondition(lambda self: self.waiting() and any(map(self.trains, NODES)))
    @rule(data=st.data())
    def apply(self, data: st.DataObject) -> None:
        node = st.sampled_from([node for node in NODES if self.trains(node)])
        some = data.draw(st.lists(st.sampled_from(self.waiting()), min_size=1, max_size=4, unique=True))
        for batch_id in some:
            self.apply_on(data.draw(node), batch_id)

    def apply_on(self, node: int, batch_id: str) -> None:
        self.ledger = self.ledger.apply(node, batch_id)
        self.applied[node].append(batch_id)

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def skip(self, data: st.DataObject) -> None:
        batch_id = data.draw(st.sampled_from(self.waiting()))
        self.ledger = self.ledger.skip(self.ledger.pending[batch_id])
        self.skipped.add(batch_id)

    @invariant()
    def every_accepted_batch_is_in_exactly_one_place(self) -> None:
        places = [*self.waiting(), *self.held(), *self.ever_durable(), *self.skipped, *self.discarded]
        assert sorted(places) == sorted(self.fed)

    @invariant()
    def the_ledger_says_the_same(self) -> None:
        for node in filter(self.trains, NODES):
            lineage = self.ledger.lineage(node)
            assert list(lineage.recent_ids) == self.durable(node) == self.told(lineage.entry)
            assert list(lineage.applied) == self.applied[node]
            assert lineage.version == len(self.durable(node)) + len(self.applied[node])
        done = {each for each in self.fed if each not in self.ledger.pending}
        assert all(self.ledger.is_done(int(each[1:])) for each in done)
        assert not any(self.ledger.is_done(sequence) for sequence in self.ledger.pending.values())


class Apart(Batches):
    """Each node has weights, and checkpoints, of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.disk: dict[int, list[tuple[Manifest, list[str]]]] = {node: [] for node in NODES}
        """Each node's checkpoints, newest last, with what their weights contain."""

    def durable(self, node: int) -> list[str]:
        return self.disk[node][-1][1] if self.disk[node] else []

    def ever_durable(self) -> list[str]:
        return [batch_id for node in NODES for batch_id in self.durable(node)]

    @rule(node=NODE)
    def roll_back(self, node: int) -> None:
        """A stage of the node has restarted."""
        assert self.ledger.only_applied_by(node) == tuple(self.applied[node])
        self.ledger = self.ledger.return_to_durable(node)
        self.applied[node] = []

    @rule(node=NODE, num_left=st.integers(0, 2), dies=st.booleans())
    def make_durable(self, node: int, num_left: int, dies: bool) -> None:
        """Perhaps the trainer dies between the rename and its own account of it."""
        num_saved = max(0, len(self.applied[node]) - num_left)
        saved, self.applied[node] = self.applied[node][:num_saved], self.applied[node][num_saved:]
        version = len(self.durable(node)) + num_saved
        manifest = self.manifest(node, version)
        self.disk[node].append((manifest, self.durable(node) + saved))
        if dies:
            self.crash()
        else:
            self.ledger = self.ledger.make_durable(node, version, entry=manifest.lineage_entry)

    @precondition(lambda self: any(self.disk.values()))
    @rule(data=st.data(), dies=st.booleans())
    def go_back(self, data: st.DataObject, dies: bool) -> None:
        """To an older checkpoint, for good; perhaps the trainer dies when that is decided."""
        node = data.draw(st.sampled_from([node for node in NODES if self.disk[node]]))
        place = data.draw(st.integers(0, len(self.disk[node]) - 1))
        manifest, contents = self.disk[node][place]
        self.discarded |= {*self.durable(node), *self.applied[node]} - set(contents)
        after = self.ledger.roll_back([node], lineage_of(manifest))
        self.disk[node][place:] = [(rolled_back(manifest, after, merge="none"), contents)]
        self.applied[node] = []
        if dies:
            self.crash()
        else:
            self.ledger = after

    @rule()
    def crash(self) -> None:
        self.restart(self.disk[node][-1][0] for node in NODES if self.disk[node])


class Merged(Batches):
    """All nodes descend from one checkpoint, and their weights become one at times."""

    def __init__(self) -> None:
        super().__init__()
        self.disk: list[tuple[Manifest, list[str]]] = []
        """The checkpoints of all nodes, newest last, with what their weights contain."""
        self.joined = set(NODES)
        """Nodes that hold it, or descend from it."""
        self.num_shared = 0
        """Steps since then that all of these contain."""

    def durable(self, node: int) -> list[str]:
        return self.ever_durable()

    def ever_durable(self) -> list[str]:
        return self.disk[-1][1] if self.disk else []

    def trains(self, node: int) -> bool:
        return node in self.joined

    @precondition(lambda self: not self.num_shared)
    @rule(nodes=st.sets(NODE, min_size=1))
    def join(self, nodes: set[int]) -> None:
        for node in nodes - self.joined:
            self.ledger = self.ledger.join(node)
            self.joined.add(node)

    @precondition(lambda self: self.joined)
    @rule(nodes=st.lists(NODE, max_size=4))
    def share(self, nodes: list[int]) -> None:
        """A merge, or a step of all; just before, these nodes have applied a batch each."""
        for node in filter(self.trains, nodes):
            self.accept_next()
            self.apply_on(node, self.waiting()[0])
        self.ledger = self.ledger.share(sorted(self.joined))
        shared = list(dict.fromkeys(each for node in sorted(self.joined) for each in self.applied[node]))
        for node in self.joined:
            self.applied[node] = list(shared)
        self.num_shared = len(shared)

    @precondition(lambda self: self.num_shared)
    @rule(data=st.data(), dies=st.booleans())
    def make_durable(self, data: st.DataObject, dies: bool) -> None:
        """One node writes the checkpoint of all; nodes may be lost meanwhile, or the trainer."""
        leader, *others = sorted(self.joined)
        lost = data.draw(st.sets(st.sampled_from(others))) if others else set()
        num_saved = data.draw(st.integers(1, self.num_shared))
        saved = self.applied[leader][:num_saved]
        version = len(self.durable(leader)) + num_saved
        manifest = self.manifest(leader, version)
        for node in lost:
            self.lose(node)
        self.disk.append((manifest, self.durable(leader) + saved))
        if dies:
            self.crash()
            return
        self.ledger = self.ledger.make_durable(leader, version, entry=manifest.lineage_entry)
        self.num_shared -= num_saved
        for node in self.joined:
            self.applied[node] = self.applied[node][num_saved:]
        if lost:
            self.give_up()

    @precondition(lambda self: self.joined)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        """A node is lost; where it shares steps that are not durable, all go back."""
        self.lose(data.draw(st.sampled_from(sorted(self.joined))))
        if self.num_shared:
            self.give_up()

    @precondition(lambda self: self.disk)
    @rule(data=st.data(), dies=st.booleans())
    def go_back(self, data: st.DataObject, dies: bool) -> None:
        """All to an older checkpoint, for good; perhaps the trainer dies when that is decided."""
        place = data.draw(st.integers(0, len(self.disk) - 1))
        manifest, contents = self.disk[place]
        gone = {*self.ever_durable(), *self.held()} - set(contents)
        nodes = {*self.ledger.lineages, manifest.node}
        assert self.ledger.num_contained(nodes) - manifest.version == len(gone)
        after = self.ledger.roll_back(nodes, lineage_of(manifest))
        self.disk[place:] = [(rolled_back(manifest, after, merge="average"), contents)]
        self.discarded |= gone
        self.applied = {node: [] for node in NODES}
        self.joined, self.num_shared = set(), 0
        if dies:
            self.crash()
        else:
            self.ledger = after

    @rule()
    def crash(self) -> None:
        self.restart([self.disk[-1][0]] if self.disk else [])
        self.joined, self.num_shared = set(), 0

    def give_up(self) -> None:
        for node in sorted(self.joined):
            self.lose(node)
        self.num_shared = 0

    def lose(self, node: int) -> None:
        """What only this node had applied waits again."""
        mine, self.applied[node] = self.applied[node], []
        self.joined.remove(node)
        held = self.held()
        assert self.ledger.only_applied_by(node) == tuple(each for each in mine if each not in held)
        self.ledger = self.ledger.return_to_durable(node)

    @invariant()
    def who_has_not_joined_holds_nothing_of_its_own(self) -> None:
        assert not any(self.ledger.lineage(node).applied for node in NODES if not self.trains(node))


TestApart = Apart.TestCase
TestMerged = Merged.TestCase
TestApart.settings = TestMerged.settings = settings(max_examples=150, stateful_step_count=40)
