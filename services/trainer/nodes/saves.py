"""How far a checkpoint of a node has come. Pure."""

from collections.abc import Mapping
from dataclasses import replace

from services.trainer.nodes.decisions import Action, RequestSave, SaveAbandoned, WriteCheckpoint
from services.trainer.nodes.save import Save
from services.trainer.nodes.save_schedule import SaveSchedule
from shared.messages.training import SaveFailed, ShardSaved

SAVE_DEADLINE_S = 600.0


class NodeSaves:
    """One checkpoint at a time: requested, answered and written by every stage, then made durable."""

    def __init__(self, durable_version: int, schedule: SaveSchedule) -> None:
        self.durable_version = durable_version
        self.schedule = schedule
        self._save: Save | None = None
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
        """None is on its way, and none has failed just now."""
        return self._save is None and self.schedule.may_retry(now_s)

    def begin(self, fence: int, num_stages: int) -> None:
        """Note the node's new life, to which saves belong from now on."""
        self._fence, self._num_stages = fence, num_stages

    def request(self, version: int, now_s: float) -> list[Action]:
        """Have every stage save that version."""
        self._save = Save(version, self._num_stages, now_s)
        return [RequestSave(self._fence, version, self._num_stages)]

    def request_if_due(self, version: int, now_s: float, *, is_wanted: bool) -> list[Action]:
        """A step to that version is ordered; `is_wanted`: save it now, unless saves wait to be told."""
        is_due = self.schedule.is_due(version, self.durable_version, now_s, is_wanted=is_wanted)
        return self.request(version, now_s) if is_due and not self.is_saving else []

    def request_if_idle(self, version: int, *, is_idle: bool, now_s: float) -> list[Action]:
        """Time has passed for a node that holds that version.

        A later one, whose batch was skipped, is not waited for: no batch may follow.
        """
        is_saving = self._save is not None and not (self._save.answered and self._save.version > version)
        is_idle = is_idle and version != self.durable_version and not is_saving
        return self.request(version, now_s) if self.schedule.has_rested(now_s, is_idle=is_idle) else []

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
        """Go on when all stages have answered and written, or failed; the node's weights are of `version`."""
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
        self.schedule.written(self._save)
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
        self.schedule.restart()
        return abandoned

    def _abandon(self, reason: str) -> list[Action]:
        assert self._save is not None
        save, self._save = self._save, None
        self.schedule.abandoned(save)
        return [SaveAbandoned(save.version, reason)]
