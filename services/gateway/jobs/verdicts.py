"""A guard's verdicts on the versions that hold a job's steps, and how the job ends by them. Pure."""

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import NamedTuple

from services.gateway.jobs.happenings import Failed, Succeeded
from services.gateway.jobs.job import Job, JobError, Note, VersionVerdict
from services.gateway.jobs.transitions import Outcome, after
from shared.messages.weights import JudgedVersion, NodeWeights, WeightsStatus

ALL_NODES = -1
"""Stands for the number of a node where all of them are one model."""
ADVICE = (
    "The steps stay in the weights that train on; `lemix weights rollback` takes them out. Lower the "
    "learning rate (learning_rate_multiplier, LEMIX_LEARNING_RATE), or raise the limit "
    "(LEMIX_MAX_SAMPLES_RISE, LEMIX_MAX_HELD_OUT_RISE): docs/versions.md"
)


class _Wanted(NamedTuple):
    """A node that learnt from the job, with the version that holds it all."""

    number: int
    version: int
    node: NodeWeights | None
    """None: it is not there."""

    @property
    def is_served(self) -> bool:
        node = self.node
        return not (node is None or node.awaits_verdict(self.version) or node.withholds(self.version))


def after_verdicts(job: Job, status: WeightsStatus, now_s: int) -> Outcome:
    """The job after the trainer has told of all weights: new verdicts are noted, and the last one ends it."""
    if job.status != "running":
        return Outcome(job)
    new = list(_new_verdicts(job, status))
    if new:
        newest = {number: judged.version for number, judged in new}
        job = job.model_copy(update={"judged_versions": job.judged_versions | newest})
    verdicts = tuple(_verdict(number, judged) for number, judged in new)
    ended = _ended(job, status, now_s) if job.awaits_verdict else Outcome(job)
    return ended._replace(notes=(*map(_note, verdicts), *ended.notes), verdicts=verdicts)


def _new_verdicts(job: Job, status: WeightsStatus) -> Iterator[tuple[int, JudgedVersion]]:
    """By node, oldest first: those on versions that may hold steps of the job."""
    newest = dict(job.judged_versions)
    for node in status.nodes:
        if not (status.shares_weights or _has_learnt(node.node, job)):
            continue
        number = ALL_NODES if status.shares_weights else node.node
        known = newest.get(number, (job.first_version or 0) - 1)
        for each in node.judged:
            is_of_job = job.first_version is not None and each.judged_wall_s >= (job.started_at or 0)
            if is_of_job and each.version > known:
                newest[number] = known = each.version
                yield number, each


def _has_learnt(node: int, job: Job) -> bool:
    """Whether weights of that node have steps of the job."""
    applied = (step.node for step in job.open.values() if step.applied_version is not None)
    return node in job.durable_versions or node in applied


def _verdict(number: int, judged: JudgedVersion) -> VersionVerdict:
    return VersionVerdict(
        node=None if number == ALL_NODES else number,
        version=judged.version,
        train_loss=judged.training_loss,
        held_out_loss=judged.held_out_loss,
        samples_loss=judged.samples_loss,
        why_withheld=judged.why_withheld,
    )


def _note(verdict: VersionVerdict) -> Note:
    what = f"is withheld: {verdict.why_withheld}" if verdict.why_withheld else "is served"
    return Note(
        level="warn" if verdict.why_withheld else "info",
        message=f"Version {verdict.version} {what}",
        metrics={"weights_version": verdict.version, **metrics_of(verdict)},
    )


def metrics_of(verdict: VersionVerdict) -> dict[str, int | float]:
    """The losses that are numbers, in OpenAI's words where there are any."""
    losses = {
        "train_loss": verdict.train_loss,
        "full_valid_loss": verdict.held_out_loss,
        "samples_loss": verdict.samples_loss,
    }
    return {name: loss for name, loss in losses.items() if loss is not None and isfinite(loss)}


def _ended(job: Job, status: WeightsStatus, now_s: int) -> Outcome:
    """The job, which awaits its verdict; as it is while there is none."""
    wanted = _wanted(job, status)
    withholds = (each.node for each in wanted if each.node and each.node.withholds(each.version))
    serves = [each.is_served for each in wanted]
    if any(serves) if status.shares_weights else all(serves):
        return after(job, Succeeded(), now_s)
    node = next(withholds, None)
    return Outcome(job) if node is None else after(job, Failed(_withheld(node)), now_s)


def _wanted(job: Job, status: WeightsStatus) -> list[_Wanted]:
    if status.shares_weights:
        newest = max(job.durable_versions.values(), default=0)
        return [_Wanted(node.node, newest, node) for node in status.nodes]
    nodes = {node.node: node for node in status.nodes}
    return [_Wanted(number, version, nodes.get(number)) for number, version in job.durable_versions.items()]


def awaited(job: Job, status: WeightsStatus) -> dict[int, int | None]:
    """The nodes that a job waits for, by their newest versions; None: the node is not there."""
    waiting = (each for each in _wanted(job, status) if not each.is_served)
    return {each.number: None if each.node is None else each.node.version for each in waiting}


def no_verdict(nodes: Mapping[int, int | None], waited_s: float) -> JobError:
    """Why a job fails that has waited so long for these nodes, as `awaited` tells them."""
    absent = ", ".join(str(number) for number, version in nodes.items() if version is None)
    if absent or not nodes:
        who = f"of the nodes that learnt the job, {absent} is not there" if absent else "no node is there"
        return JobError(
            code="node_gone",
            message=(
                f"All steps are durable, but {who}, for {waited_s:g} s now. Checkpoints keep the steps: they "
                "are served again once as many nodes run as before"
            ),
        )
    return JobError(
        code="not_judged",
        message=(
            "All steps are durable, but the guard has not judged a version with them, though nothing has "
            f"trained for {waited_s:g} s: the trainer's log says why. `lemix status` shows what is served"
        ),
    )


def _withheld(node: NodeWeights) -> JobError:
    return JobError(
        code="withheld_by_guard",
        message=(
            f"Version {node.newest_judged}, which holds what the job taught, is not served: "
            f"{node.why_newest_withheld}. Requests get version {node.published}. {ADVICE}"
        ),
    )
