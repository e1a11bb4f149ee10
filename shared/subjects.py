"""Every subject with the type that travels on it and what it means: the protocol on one page."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from shared.messages.base import Done, Message
from shared.messages.cluster import (
    ClusterStatus,
    Heartbeat,
    LinkAnswer,
    LinkOffer,
    Rendezvous,
    RendezvousRequest,
    StageStopped,
    StatusRequest,
)
from shared.messages.events import StageProgress
from shared.messages.inference import (
    CancelTask,
    InferenceTask,
    IterationDone,
    IterationForward,
    Placed,
    TaskEnded,
    TaskFailed,
    TokensProduced,
)
from shared.messages.lineage import (
    LineageEntry,
    LineageEntryRequest,
    LineageRequest,
    VersionLineage,
)
from shared.messages.training import (
    BatchCheck,
    BatchChecked,
    BatchesAsked,
    BatchesNow,
    BatchProgress,
    CheckForward,
    MicrobatchBackward,
    MicrobatchForward,
    StageReport,
    StepAhead,
    StepOrder,
    TiedGradient,
    TrainedReport,
    TrainingTask,
)
from shared.messages.weights import (
    DurableVersions,
    DurableVersionsRequest,
    KeepVersion,
    MergeWeights,
    PublishVersion,
    ReduceGradients,
    ReleaseVersion,
    RestoreWeights,
    RollBackWeights,
    RolledBack,
    SaveWeights,
    WeightsRequest,
    WeightsStatus,
)

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

HEARTBEAT_S = 1.0
"""Seconds between two heartbeats; three missed ones mean a lost stage."""

PROGRESS_EVERY_S = 0.05
"""Between two reports of a stage's ops at least. A stage that has something to tell does so by then."""


@dataclass(frozen=True, slots=True)
class Subject(Generic[M]):
    """A concrete NATS subject and the type of its messages."""

    name: str
    message: type[M]


@dataclass(frozen=True, slots=True)
class RequestSubject(Generic[M, R]):
    """A concrete NATS subject whose messages are answered."""

    name: str
    message: type[M]
    reply: type[R]


@dataclass(frozen=True, slots=True)
class Topic(Generic[M]):
    """A family of subjects: `at` fills in the places."""

    pattern: str
    message: type[M]
    meaning: str

    def at(self, **places: int | str) -> Subject[M]:
        return Subject(self.pattern.format(**places), self.message)


@dataclass(frozen=True, slots=True)
class RequestTopic(Generic[M, R]):
    """A family of subjects with answers."""

    pattern: str
    message: type[M]
    reply: type[R]
    meaning: str

    def at(self, **places: int | str) -> RequestSubject[M, R]:
        return RequestSubject(self.pattern.format(**places), self.message, self.reply)


# Tasks
SUBMIT = RequestTopic(
    "lemix.task.submit", InferenceTask, Placed, "gateway -> scheduler: place and forward a request"
)
PLACE = RequestTopic(
    "lemix.task.place", TrainingTask, Placed, "trainer -> scheduler: choose a node for a batch"
)
ENDED = Topic("lemix.task.ended", TaskEnded, "stage 0, trainer -> scheduler: tasks left their node")
ASSIGN = Topic("lemix.node.{node}.assign", InferenceTask, "scheduler, trainer -> stage 0: run this request")
CANCEL = Topic("lemix.node.{node}.cancel", CancelTask, "gateway, trainer -> stage 0: stop this request")
TOKENS = Topic("lemix.gateway.{gateway}.tokens", TokensProduced, "last stage -> gateway, trainer: new tokens")
FAILED = Topic(
    "lemix.gateway.{gateway}.failed",
    TaskFailed,
    "scheduler, stage 0 -> gateway, trainer: no answer will come",
)

# Inside a node
ITERATION = Topic(
    "lemix.node.{node}.stage.{stage}.iteration", IterationForward, "stage s-1 -> s: run an iteration"
)
ITERATION_DONE = Topic(
    "lemix.node.{node}.sampled", IterationDone, "last stage -> stage 0: tokens of an iteration"
)
FORWARD = Topic(
    "lemix.node.{node}.stage.{stage}.forward", MicrobatchForward, "trainer, stage s-1 -> s: microbatch"
)
CHECK = Topic(
    "lemix.node.{node}.stage.{stage}.check", CheckForward, "trainer, stage s-1 -> s: score with these weights"
)
BACKWARD = Topic("lemix.node.{node}.stage.{stage}.backward", MicrobatchBackward, "stage s+1 -> s: gradient")
STEP_AHEAD = Topic("lemix.node.{node}.step_ahead", StepAhead, "trainer -> stage 0: how to step on a batch")
STEP = Topic(
    "lemix.node.{node}.stage.{stage}.step", StepOrder, "trainer -> stage 0 -> stage: step, or skip it"
)
TRAINED = Topic("lemix.node.{node}.trained", TrainedReport, "stage -> stage 0: gradients are there, stepped")
TIED = Topic(
    "lemix.node.{node}.stage.{stage}.tied", TiedGradient, "first <-> last stage: tied embedding's gradient"
)
LINK = RequestTopic(
    "lemix.node.{node}.stage.{stage}.link", LinkOffer, LinkAnswer, "producer -> consumer: open my arena"
)

# Weights
RESTORE = RequestTopic(
    "lemix.node.{node}.stage.{stage}.restore", RestoreWeights, Done, "trainer -> stage: hold these"
)
SAVE = RequestTopic(
    "lemix.node.{node}.stage.{stage}.save", SaveWeights, Done, "trainer -> stage: write a shard"
)
MERGE = RequestTopic(
    "lemix.node.{node}.stage.{stage}.merge", MergeWeights, Done, "trainer -> stage: hold the nodes' mean"
)
REDUCE = Topic(
    "lemix.node.{node}.stage.{stage}.reduce",
    ReduceGradients,
    "trainer -> stage: average the nodes' gradients",
)
RENDEZVOUS = RequestTopic(
    "lemix.node.{node}.stage.{stage}.rendezvous",
    RendezvousRequest,
    Rendezvous,
    "the same stage of another node -> stage: where do we meet",
)
DURABLE_VERSIONS = RequestTopic(
    "lemix.weights.durable",
    DurableVersionsRequest,
    DurableVersions,
    "lemix -> trainer: which durable versions are there",
)
ROLLBACK = RequestTopic(
    "lemix.weights.rollback", RollBackWeights, RolledBack, "lemix -> trainer: go back to an older version"
)
LINEAGE = RequestTopic(
    "lemix.weights.lineage", LineageRequest, VersionLineage, "lemix -> trainer: what a version has learnt"
)
LINEAGE_ENTRY = RequestTopic(
    "lemix.weights.lineage.entry",
    LineageEntryRequest,
    LineageEntry,
    "lemix -> trainer: what was learnt before that",
)
KEEP = RequestTopic(
    "lemix.node.{node}.stage.{stage}.keep", KeepVersion, Done, "trainer -> stage: keep these, to serve them"
)
PUBLISH = Topic("lemix.node.{node}.publish", PublishVersion, "trainer -> stage 0: serve this version")
RELEASE = Topic(
    "lemix.node.{node}.stage.{stage}.release", ReleaseVersion, "trainer -> stage: keep it no longer"
)
NODE_WEIGHTS = RequestTopic(
    "lemix.weights.nodes",
    WeightsRequest,
    WeightsStatus,
    "gateway, ingest, lemix -> trainer: what each node trains and serves",
)
REPORT = Topic("lemix.train.report", StageReport, "stage -> trainer: what happened in training")

# Training batches, for whoever published them
TRAIN_PROGRESS = Topic("lemix.train.progress", BatchProgress, "trainer -> ingest: what became of a batch")
TRAIN_CHECK = RequestTopic(
    "lemix.train.check", BatchCheck, BatchChecked, "ingest -> trainer: can this batch be learnt from"
)
TRAIN_STATUS = RequestTopic(
    "lemix.train.status", BatchesAsked, BatchesNow, "ingest -> trainer: how do these batches stand"
)

# Cluster
HEARTBEAT = Topic("lemix.cluster.heartbeat", Heartbeat, "stage -> scheduler, trainer: I am here")
NEIGHBOUR = Topic("lemix.node.{node}.heartbeat", Heartbeat, "stage -> the node's other stages: I am here")
PROGRESS = Topic("lemix.cluster.progress", StageProgress, "stage -> scheduler: what I do and have done")
STOPPED = Topic("lemix.cluster.stopped", StageStopped, "stage -> scheduler: I am leaving")
STATUS = RequestTopic(
    "lemix.cluster.status",
    StatusRequest,
    ClusterStatus,
    "gateway, ingest, lemix -> scheduler: how do things stand",
)

# Durable: the body is the publisher's own JSON or MessagePack (services/trainer/intake/data.py)
BATCHES = "lemix.train.batches"
BATCHES_STREAM = "LEMIX_TRAIN"
REJECTED = "lemix.train.rejected"
REJECTED_STREAM = "LEMIX_REJECTED"
FENCE_BUCKET = "lemix-fences"
"""The key-value bucket of leases."""
FENCE_STREAM = f"KV_{FENCE_BUCKET}"
"""The stream behind it."""
TRAINER_LEASE = "trainer"
"""The key of the lease by which a trainer leads all nodes; its value: empty, or `AllowedFences`."""
