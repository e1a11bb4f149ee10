"""When a node saves, and how far a checkpoint of it has come. Pure."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf

from services.trainer.nodes.decisions import Action, RequestSave, SaveAbandoned, WriteCheckpoint
from services.trainer.nodes.save import Save
from shared.messages.training import SaveFailed, ShardSaved

SAVE_DEADLINE_S = 600.0


class NodeSaves:
    """One checkpoint at a time: requested, answered and written by every stage, then made durable."""

    def __init__(
        self, durable_version: int, *, every: int | None, idle_s: float, bytes_per_s: float = inf
    ) -> None:
        """`every`: applied batches between two checkpoints; None: only when told. `idle_s`: without work for
        so long there is one, too. Neither comes before the last one's bytes are `bytes_per_s` in the mean.
        """
        self.durable_version = durable_version
        self._every = every
        self._idle_s = idle_s
        self._bytes_per_s = bytes_per_s
        self._within_bound_from_s = -inf
        self._save: Save | None = None
        self._from_version = 0
        """After a failed checkpoint, the next occasion."""
        self._not_before_s = -inf
        """After a failed checkpoint: when it may be told to try again."""
        self._idle_since_s: float | None = None
        self._fence = 0
        self._num_stages = 0

    @property
    def version(self) -> int | None:
        """The version that is being saved."""
        return None if self._save is None else self._save.version

    @property
    def is_saving(self) -> bool:
        return self._save is not None

    @property
    def is_unanswered(self) -> bool:
        """Whether a stage may not know yet that it has to save."""
        return self._save is not None and not self._save.answered

    @property
    def is_writing(self) -> bool:
        """Whether all shards are there, and the manifest is on its way to the disk."""
        return self._save is not None and self._save.writing

    @property
    def waits_for_stages(self) -> bool:
        return self._save is not None and not self._save.writing

    def may_request(self, now_s: float) -> bool:
        """None is on its way, and after a failure `idle_s` have passed since that one was requested."""
        return self._save is None and now_s >= self._not_before_s

    def is_within_bound(self, now_s: float) -> bool:
        """Whether another checkpoint would not write too many bytes a second."""
        return now_s >= self._within_bound_from_s

    def begin(self, fence: int, num_stages: int) -> None:
        """Note the node's new life, to which saves belong from now on."""
        self._fence, self._num_stages = fence, num_stages

    def request(self, version: int, now_s: float) -> list[Action]:
        """Have every stage save that version."""
        self._save = Save(version, self._num_stages, now_s)
        return [RequestSave(self._fence, version, self._num_stages)]

    def request_if_due(self, version: int, now_s: float, *, is_wanted: bool) -> list[Action]:
        """A step to that version is ordered; `is_wanted`: save it now, unless saves wait to be told."""
        is_due = self._every is not None and (is_wanted or version - self.durable_version >= self._every)
        may_save = self._save is None and version >= self._from_version and self.is_within_bound(now_s)
        return self.request(version, now_s) if is_due and may_save else []

    def request_if_idle(self, version: int, *, is_idle: bool, now_s: float) -> list[Action]:
        """Time has passed for a node that holds that version.

        A later one, whose batch was skipped, is not waited for: no batch may follow.
        """
        has_news = self._every is not None and version != self.durable_version
        is_saving = self._save is not None and not (self._save.answered and self._save.version > version)
        if not (is_idle and has_news) or is_saving:
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        elif now_s >= self._idle_since_s + self._idle_s and self.is_within_bound(now_s):
            self._idle_since_s = None
            return self.request(version, now_s)
        return []

    def reached(self, version: int, now_s: float) -> None:
        """The node's weights are of that version: if it is to be saved, stages write from now on."""
        if self._save is not None and self._save.version == version:
            self._save = replace(self._save, requested_s=now_s)

    def answered(self, refusals: Mapping[int, str]) -> None:
        """Every stage was asked; `refusals` says which do not save, and why."""
        assert self._save is not None
        self._save = self._save.with_answers(refusals)

    def reported(self, stage: int, event: ShardSaved | SaveFailed) -> None:
        """A stage has written its share, or could not."""
        if self._save is None or self._save.version != event.version:
            return
        match event:
            case ShardSaved():
                self._save = self._save.with_shard(stage, event)
            case SaveFailed(reason=reason):
                self._save = self._save.with_failure(stage, reason)

    def settle(self, version: int) -> list[Action]:
        """Go on when all stages have told; the node's weights are of `version`."""
        save = self._save
        if save is None or save.writing or not save.is_settled:
            return []
        if save.failure:
            return self._abandon(save.failure)
        if version < save.version:
            return []  # another stage's StepDone is still on its way
        self._save = replace(save, writing=True)
        return [WriteCheckpoint(save.version, save.num_stages, save.shards)]

    def written(self, failure: str) -> list[Action]:
        """The checkpoint is durable, or is not (`failure` says why)."""
        assert self._save is not None
        if failure:
            return self._abandon(failure)
        self._within_bound_from_s = self._save.requested_s + self._save.num_bytes / self._bytes_per_s
        self.durable_version, self._save = self._save.version, None
        return []

    def give_up_if_late(self, version: int, now_s: float) -> list[Action]:
        """Time has passed for a node that holds that version."""
        if not self.waits_for_stages or self._save is None or self._save.version > version:
            return []
        is_late = now_s - self._save.requested_s > SAVE_DEADLINE_S
        return self._abandon(f"not written within {SAVE_DEADLINE_S:g} s") if is_late else []

    def adopt(self, durable_version: int) -> None:
        """That is the version of the node's newest checkpoint now, whoever has written it."""
        self.durable_version = durable_version

    def closed(self, reason: str) -> list[Action]:
        """The node begins anew."""
        abandoned = self._abandon(reason) if self._save is not None else []
        self._from_version, self._idle_since_s = 0, None
        return abandoned

    def _abandon(self, reason: str) -> list[Action]:
        assert self._save is not None
        version, self._not_before_s = self._save.version, self._save.requested_s + self._idle_s
        self._save, self._from_version = None, version + 1
        return [SaveAbandoned(version, reason)]
