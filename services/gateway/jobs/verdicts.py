"""A guard's verdicts on the versions that hold a job's steps, and how the job ends by them. Pure."""

from collections.abc import Iterable, Iterator
from math import isfinite

from services.gateway.jobs.job import (
    Failed,
    Job,
    JobError,
    Note,
    Outcome,
    Succeeded,
    VersionVerdict,
    after,
)
from shared.messages.weights import JudgedVersion, NodeWeights, WeightsStatus

ALL_NODES = -1
"""Stands for the number of a node where all of them are one model."""
ADVICE = (
    "The steps stay in the weights that train on; `lemix weights rollback` takes them out. Lower the "
    "learning rate (learning_rate_multiplier, LEMIX_LEARNING_RATE), or raise the limit "
    "(LEMIX_MAX_SAMPLES_RISE, LEMIX_MAX_HELD_OUT_RISE): docs/versions.md"
)


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
        number = ALL_NODES if status.shares_weights else node.node
        known = newest.get(number, (job.first_version or 0) - 1)
        for each in node.judged:
            is_of_job = job.first_version is not None and each.judged_wall_s >= (job.started_at or 0)
            if is_of_job and each.version > known:
                newest[number] = known = each.version
                yield number, each


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
    wanted = list(_wanted(job, status))
    withholds = next((node for node, version in wanted if node and node.withholds(version)), None)
    serves = [node is not None and _serves(node, version) for node, version in wanted]
    if any(serves) if status.shares_weights else all(serves):
        return after(job, Succeeded(), now_s)
    return Outcome(job) if withholds is None else after(job, Failed(_withheld(withholds)), now_s)


def _wanted(job: Job, status: WeightsStatus) -> Iterable[tuple[NodeWeights | None, int]]:
    """The nodes that learnt from the job, each with the version that holds it all; None: it is not there."""
    if status.shares_weights:
        newest = max(job.durable_versions.values(), default=0)
        return [(node, newest) for node in status.nodes]
    nodes = {node.node: node for node in status.nodes}
    return [(nodes.get(number), version) for number, version in job.durable_versions.items()]


def _serves(node: NodeWeights, version: int) -> bool:
    return not (node.awaits_verdict(version) or node.withholds(version))


def _withheld(node: NodeWeights) -> JobError:
    return JobError(
        code="withheld_by_guard",
        message=(
            f"Version {node.newest_judged}, which holds what the job taught, is not served: "
            f"{node.why_newest_withheld}. Requests get version {node.published}. {ADVICE}"
        ),
    )
