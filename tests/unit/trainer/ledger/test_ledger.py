"""The ledger: whatever crashes, each batch ends up in exactly one durable lineage, exactly once."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.checkpoints.manifests import ledger_of, manifest_of
from services.trainer.ledger import ledger as ledgers
from services.trainer.ledger.ledger import Ledger
from shared.checkpoints import Checkpoint, Manifest
from tests.unit.trainer.support import NO_FOLDER

NODES = (0, 1)


def manifest(ledger: Ledger, node: int, version: int) -> Manifest:
    return manifest_of(ledger, node, version, num_stages=1, model="m", stream="s", wall_s=0.0)


@dataclass
class Cluster:
    """A stream, nodes with weights and a disk, and a trainer that may die. Weights are lists of ids."""

    stream: list[tuple[int, str | None]]
    """Sequence and batch id; None for a bad batch. Sequences have gaps, ids repeat."""
    ledger: Ledger = field(default_factory=Ledger)
    next_message: int = 0
    waiting: list[str] = field(default_factory=list)
    weights: dict[int, list[str]] = field(default_factory=lambda: {node: [] for node in NODES})
    disk: dict[int, tuple[Manifest, list[str]]] = field(default_factory=dict)

    def saved_weights(self, node: int) -> list[str]:
        return list(self.disk[node][1]) if node in self.disk else []

    def crash_trainer(self) -> None:
        self.ledger = ledger_of(Checkpoint(manifest, NO_FOLDER) for manifest, _ in self.disk.values())
        position = self.ledger.watermark
        self.next_message = sum(sequence <= position for sequence, _ in self.stream)
        self.waiting = []
        self.weights = {node: self.saved_weights(node) for node in NODES}

    def crash_node(self, node: int) -> None:
        lost = self.ledger.lineage(node).applied
        self.ledger = self.ledger.return_to_durable(node)
        self.waiting = [*lost, *self.waiting]
        self.weights[node] = self.saved_weights(node)

    def read(self) -> None:
        if self.next_message == len(self.stream):
            return
        sequence, batch_id = self.stream[self.next_message]
        self.next_message += 1
        if self.ledger.is_done(sequence):
            self.ledger = self.ledger.pass_over(sequence)
            return
        if batch_id is None or self.ledger.knows(batch_id):
            self.ledger = self.ledger.skip(sequence)
        else:
            self.ledger = self.ledger.accept(sequence, batch_id)
            self.waiting.append(batch_id)

    def train(self, node: int) -> None:
        if self.waiting:
            batch_id = self.waiting.pop(0)
            self.weights[node].append(batch_id)
            self.ledger = self.ledger.apply(node, batch_id)

    def save(self, node: int, num_left: int, *, crash: bool) -> None:
        """Save all but the newest `num_left` steps; perhaps die after the rename."""
        lineage = self.ledger.lineage(node)
        version = max(lineage.durable_version, lineage.version - num_left)
        self.disk[node] = (manifest(self.ledger, node, version), self.weights[node][:version])
        if crash:
            self.crash_trainer()
        else:
            self.ledger = self.ledger.make_durable(node, version)

    def reject(self) -> str | None:
        if not self.waiting:
            return None
        batch_id = self.waiting.pop(0)
        self.ledger = self.ledger.skip(self.ledger.pending[batch_id])
        return batch_id


NODE = st.sampled_from(NODES)
STEP = st.one_of(
    st.just(("read",)),
    st.tuples(st.just("train"), NODE),
    st.tuples(st.just("save"), NODE, st.integers(0, 2), st.booleans()),
    st.tuples(st.just("crash node"), NODE),
    st.just(("crash trainer",)),
)
IDS = st.one_of(st.none(), st.sampled_from("abcdefgh"))
STREAM = st.lists(st.tuples(st.integers(1, 3), IDS), max_size=14)


@settings(max_examples=400)
@given(STREAM, st.lists(STEP, max_size=60))
def test_each_batch_is_in_the_durable_lineages_exactly_once(messages, steps) -> None:
    sequences, last = [], 0
    for gap, batch_id in messages:
        last += gap
        sequences.append((last, batch_id))
    cluster = Cluster(sequences)
    for step in steps:
        match step:
            case ("read",):
                cluster.read()
            case ("train", node):
                cluster.train(node)
            case ("save", node, num_left, crash):
                cluster.save(node, num_left, crash=crash)
            case ("crash node", node):
                cluster.crash_node(node)
            case _:
                cluster.crash_trainer()
        for node in NODES:
            assert cluster.ledger.lineage(node).version == len(cluster.weights[node])
    for _ in sequences:
        cluster.read()
        cluster.train(0)
    while cluster.waiting:
        cluster.train(0)
    for node in NODES:
        cluster.save(node, 0, crash=False)

    durable = [batch_id for node in NODES for batch_id in cluster.saved_weights(node)]
    assert sorted(durable) == sorted({batch_id for _, batch_id in sequences if batch_id is not None})
    assert cluster.ledger.watermark == last
    assert not cluster.ledger.skipped
    assert all(not cluster.ledger.lineage(node).sequences for node in NODES)


def test_a_rejected_batch_is_not_read_again_after_a_restart() -> None:
    cluster = Cluster([(1, "a"), (2, "b"), (3, "c")])
    for _ in cluster.stream:
        cluster.read()
    assert cluster.reject() == "a"
    cluster.train(0)
    cluster.save(0, 0, crash=True)

    assert cluster.ledger.watermark == 2
    cluster.read()
    assert cluster.waiting == ["c"]


def test_what_was_skipped_above_the_watermark_stays_skipped() -> None:
    ledger = Ledger().accept(1, "a").skip(2).accept(3, "c").apply(0, "c")

    again = ledger_of([Checkpoint(manifest(ledger, 0, 1), NO_FOLDER)])

    assert again.watermark == 0
    assert [again.is_done(sequence) for sequence in (1, 2, 3)] == [False, True, True]


def test_what_another_node_holds_keeps_the_watermark_back() -> None:
    ledger = Ledger().accept(1, "a").accept(2, "b").accept(3, "c")
    ledger = ledger.apply(0, "a").apply(1, "b").apply(1, "c")

    ledger = ledger.make_durable(1, 2)

    assert ledger.watermark == 0
    assert ledger.lineage(1).sequences == {2, 3}
    assert manifest(ledger, 0, 1).watermark == 3
    assert manifest(ledger, 0, 1).sequences == ()


def test_held_out_examples_are_known_after_a_restart_up_to_a_bound(monkeypatch) -> None:
    monkeypatch.setattr(ledgers, "MAX_HELD_OUT", 2)
    ledger = Ledger()
    for sequence, (batch_id, held_out) in enumerate([("a", (0,)), ("b", ()), ("c", (1, 3)), ("d", (2,))], 1):
        ledger = ledger.accept(sequence, batch_id, held_out).apply(0, batch_id)
    restored = ledger_of([Checkpoint(manifest(ledger, 0, 3), NO_FOLDER)])
    assert restored.held_out == {"c": (1, 3), "d": (2,)}
    assert restored.accept(4, "d").held_out == {"c": (1, 3)}, "it is decided anew for what is not durable"


def test_ids_are_remembered_up_to_a_bound(monkeypatch) -> None:
    monkeypatch.setattr(ledgers, "MAX_RECENT_IDS", 2)
    ledger = Ledger()
    for sequence, batch_id in enumerate("abc", start=1):
        ledger = ledger.accept(sequence, batch_id).apply(0, batch_id)

    ledger = ledger.make_durable(0, 3)

    assert not ledger.knows("a")
    assert ledger.knows("b") and ledger.knows("c")
