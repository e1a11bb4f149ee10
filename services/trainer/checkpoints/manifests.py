"""The content of checkpoints' manifests, and the checkpoint that a run goes on from. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from services.trainer.ledger.ledger import Ledger, Lineage
from services.trainer.publication.losses import Losses
from shared import checkpoints
from shared.checkpoints import Checkpoint, Manifest
from shared.errors import ConfigurationError
from shared.messages.weights import SavedWeights


@dataclass(frozen=True, slots=True)
class Verdict:
    """A guard's finding about a version."""

    version: int
    losses: Losses
    may_serve: bool
    """It serves; else it was withheld."""
    rise: float = 1.0
    """How many times the lowest held-out loss of all that have served its own is."""
    why_withheld: str = ""
    """Which loss is above which limit; empty: it serves."""
    judged_wall_s: float = 0.0
    """Unix time of the verdict."""
    training_loss: float | None = None
    """The loss of the batch whose step made the version, before that step; None: not known."""

    def noted_in(self, manifest: Manifest) -> Manifest:
        """The version's manifest with this verdict.

        A version that was approved once may serve for good. Nodes that share their weights have a lowest loss
        each, and the lowest of all counts.
        """
        may_serve = manifest.may_serve or self.may_serve
        training_loss = manifest.training_loss if self.training_loss is None else self.training_loss
        noted = {
            "training_loss": training_loss,
            "held_out_loss": self.losses.held_out,
            "samples_loss": self.losses.samples,
            "is_judged": self.losses.are_known,
            "judged_wall_s": self.judged_wall_s,
            "held_out_rise": max(manifest.held_out_rise, self.rise),
            "may_serve": may_serve,
            "why_withheld": "" if may_serve else self.why_withheld,
        }
        return manifest.model_copy(update=noted)

    @classmethod
    def in_manifest(cls, manifest: Manifest) -> Self | None:
        """The verdict that is noted there; None: the version was not judged."""
        if not manifest.is_judged:
            return None
        return cls(
            manifest.version,
            Losses(held_out=manifest.held_out_loss, samples=manifest.samples_loss),
            may_serve=manifest.may_serve,
            rise=manifest.held_out_rise,
            judged_wall_s=manifest.judged_wall_s,
            why_withheld=manifest.why_withheld,
            training_loss=manifest.training_loss,
        )


def served_instead(serving: Checkpoint | None, version: int) -> SavedWeights | None:
    """The weights to serve where stages go on from `version`; None: that version itself.

    `serving`: the approved checkpoint; None: only the model as it was before training is approved.
    """
    served = checkpoints.as_saved(serving)
    return None if served.version == version else served


def only_newest(found: Mapping[int, Checkpoint]) -> dict[int, Checkpoint]:
    """The checkpoint that nodes go on from when they share their weights.

    Raises ConfigurationError when they did not share them: what only one of them has learnt would be lost.
    """
    apart = sorted(node for node, checkpoint in found.items() if checkpoint.manifest.merge == "none")
    if len(found) > 1 and apart:
        raise ConfigurationError(
            f"nodes {apart} of this run were trained apart and cannot be merged now: go on with "
            "LEMIX_MERGE=none, or choose another --name"
        )
    newest = max(found, key=lambda node: found[node].manifest.version, default=None)
    return {} if newest is None else {newest: found[newest]}


def all_apart(found: dict[int, Checkpoint]) -> dict[int, Checkpoint]:
    """The checkpoints that nodes go on from when they train apart: each from its own.

    Raises ConfigurationError when they have shared their weights: one has the checkpoints of all.
    """
    merges = {checkpoint.manifest.merge for checkpoint in found.values()} - {"none"}
    if merges:
        raise ConfigurationError(
            f"the nodes of this run share their weights ({', '.join(sorted(merges))}), and only some have "
            "checkpoints: go on with a LEMIX_MERGE other than none (or schedule=dp), or export the weights "
            "and train them as the model of another --name"
        )
    return found


def ledger_of(found: Iterable[Checkpoint], *, begun_after: int = 0) -> Ledger:
    """The ledger in the nodes' newest checkpoints; a run without any begins after `begun_after`."""
    manifests = [checkpoint.manifest for checkpoint in found]
    return Ledger.restore(
        {manifest.node: lineage_of(manifest) for manifest in manifests},
        skipped={sequence for manifest in manifests for sequence in manifest.rejected},
        watermark=max((manifest.watermark for manifest in manifests), default=begun_after),
        discarded_ids=[batch_id for manifest in manifests for batch_id in manifest.discarded_batch_ids],
        held_out=dict(item for manifest in manifests for item in manifest.held_out_examples.items()),
    )


def lineage_of(manifest: Manifest) -> Lineage:
    """The batches in a checkpoint's weights."""
    return Lineage(
        durable_version=manifest.version,
        sequences=frozenset(manifest.sequences),
        recent_ids=dict.fromkeys(manifest.recent_batch_ids),
        entry=manifest.lineage_entry,
    )


def manifest_of(
    ledger: Ledger,
    node: int,
    version: int,
    *,
    num_stages: int,
    model: str,
    stream: str,
    merge: str = "none",
    settings: Mapping[str, str] | None = None,
    may_serve: bool = True,
    wall_s: float,
) -> Manifest:
    """The manifest of a checkpoint of the node at `version`, without its files.

    Its lineage is still that of the checkpoint before.
    """
    durable = ledger.make_durable(node, version)
    lineage = durable.lineage(node)
    return Manifest(
        node=node,
        version=version,
        num_stages=num_stages,
        model=model,
        stream=stream,
        merge=merge,
        may_serve=may_serve,
        settings=dict(settings or {}),
        watermark=durable.watermark,
        sequences=tuple(sorted(lineage.sequences)),
        rejected=tuple(sorted(durable.skipped)),
        recent_batch_ids=tuple(lineage.recent_ids),
        discarded_batch_ids=tuple(durable.discarded_ids),
        held_out_examples=dict(durable.held_out),
        lineage_entry=ledger.lineage(node).entry,
        sha256_by_file={},
        created_wall_s=wall_s,
    )


def rolled_back(manifest: Manifest, ledger: Ledger, *, merge: str) -> Manifest:
    """The manifest of that checkpoint once nodes are rolled back to it, and `ledger` with them.

    `merge`: the trainer's setting now, which says whether all nodes have. The version may serve, and later
    ones are compared with it: who asks for it knows what it is.
    """
    lineage = ledger.lineage(manifest.node)
    return manifest.model_copy(
        update={
            "merge": merge,
            "watermark": ledger.watermark,
            "sequences": tuple(sorted(lineage.sequences)),
            "rejected": tuple(sorted(ledger.skipped)),
            "discarded_batch_ids": tuple(ledger.discarded_ids),
            "may_serve": True,
            "why_withheld": "",
            "held_out_rise": 1.0,
        }
    )
