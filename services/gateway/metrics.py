"""Metrics for Prometheus: the gateway's own requests, and the cluster at the moment of the scrape."""

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from services.gateway.access.keys import ServiceClass
from services.gateway.http.errors import RefusedFor
from shared.messages.cluster import ClusterStatus, Heartbeat
from shared.messages.weights import JudgedVersion, NodeWeights, WeightsStatus

_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
Outcome = Literal["completed", "cancelled", "refused", "failed"]
_STAGE_GAUGES = {
    "weights_version": "Optimizer steps that the stage's weights contain",
    "sick_version": "Last weights version whose logits were not finite (last stage)",
    "queued": "Work items in the stage's local queue",
}
_LEADER_GAUGES = {
    "running": "Sequences in the KV cache",
    "waiting": "Sequences not yet admitted",
    "preempted": "How often a sequence lost its KV cache to an older one since the stage's start",
    "kv_blocks_used": "KV-cache blocks in use, the same ones on every stage of the node",
    "kv_blocks_total": "KV-cache blocks there are, on every stage of the node",
}
"""Only stage 0 has them: it admits sequences and allots blocks for its node."""
_NODE_GAUGES = {
    "version": "Optimizer steps that the node's newest weights contain",
    "durable_version": "Weights version of the node's newest checkpoint",
    "published": "Weights version that requests get, where versions are served by number",
    "newest_judged": "Newest weights version that the guard has judged",
    "num_withheld": "Versions that the guard has not let serve, since the trainer's start",
    "training_loss": "Mean loss of the node's newest batch per learnt token, before its step, in nats",
}
_LOSS_GAUGES = {
    "held_out_loss": "Loss on held-out examples per learnt token, in nats",
    "samples_loss": "Loss on what the model wrote itself before it learnt, per token, in nats",
}


class Metrics:
    """The gateway's metrics in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "lemix_requests", "Completion requests by outcome", ["outcome"], registry=self._registry
        )
        self._refused = Counter(
            "lemix_requests_refused",
            "Refused requests, by why: what they say, limits of the key, the gateway, the cluster",
            ["class", "reason"],
            registry=self._registry,
        )
        self._in_time = {
            True: self._by_class("lemix_requests_in_time", "Completed requests that kept their objective"),
            False: self._by_class("lemix_requests_late", "Completed requests that did not"),
        }
        self.running = Gauge("lemix_requests_running", "Completions in progress", registry=self._registry)
        self.prompt_tokens = Counter("lemix_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self.completion_tokens = Counter(
            "lemix_completion_tokens", "Tokens generated", registry=self._registry
        )
        self.ttft_s = self._latency("lemix_ttft_seconds", "From arrival to a choice's first token")
        self.tbt_s = self._latency("lemix_tbt_seconds", "Between two tokens of a choice")
        self.request_s = self._latency("lemix_request_seconds", "From arrival to the end")
        self._scheduler_up = self._gauge("lemix_scheduler_up", "1 when the scheduler answered this scrape")
        self._nodes_ready = self._gauge("lemix_nodes_ready", "Nodes that take requests")
        self._trainer_up = self._gauge("lemix_trainer_up", "1 when the trainer answered this scrape")
        self._nodes = {
            field: self._gauge(f"lemix_weights_{field}", text, "node") for field, text in _NODE_GAUGES.items()
        }
        self._losses = {
            field: self._gauge(f"lemix_weights_{field}", text, "node", "of")
            for field, text in _LOSS_GAUGES.items()
        }
        self._differ = self._gauge(
            "lemix_weights_differ", "1 when the node serves other weights than it trains", "node"
        )
        self._stages = {
            field: self._gauge(f"lemix_stage_{field}", text, "node", "stage")
            for field, text in (_STAGE_GAUGES | _LEADER_GAUGES).items()
        }

    def refused(self, reason: RefusedFor, service_class: ServiceClass) -> None:
        """Count a request that is refused."""
        self.requests.labels("refused").inc()
        self._refused.labels(service_class, reason).inc()

    def ended(self, outcome: Outcome, service_class: ServiceClass, is_in_time: bool | None) -> None:
        """Count a request that is over. `is_in_time`: as its objective has it; None: nobody can say."""
        if outcome == "refused":
            self.refused("cluster", service_class)
            return
        self.requests.labels(outcome).inc()
        if outcome == "completed" and is_in_time is not None:
            self._in_time[is_in_time].labels(service_class).inc()

    def show_cluster(self, status: ClusterStatus | None) -> None:
        """Set the cluster's gauges; None: the scheduler did not answer, so nothing is known."""
        for gauge in self._stages.values():
            gauge.clear()
        self._scheduler_up.set(status is not None)
        nodes = status.nodes if status is not None else ()
        self._nodes_ready.set(sum(node.ready for node in nodes))
        for node in nodes:
            for stage in node.stages:
                self._show_stage(stage)

    def show_weights(self, status: WeightsStatus | None) -> None:
        """Set the gauges of the nodes' weights; None: the trainer did not answer, so nothing is known."""
        for gauge in (*self._nodes.values(), *self._losses.values(), self._differ):
            gauge.clear()
        self._trainer_up.set(status is not None)
        for node in status.nodes if status is not None else ():
            self._show_node(node)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _show_stage(self, stage: Heartbeat) -> None:
        for field in _STAGE_GAUGES if stage.stage else self._stages:
            if (value := getattr(stage, field)) is not None:
                self._stages[field].labels(stage.node, stage.stage).set(value)

    def _show_node(self, node: NodeWeights) -> None:
        for field, gauge in self._nodes.items():
            if (value := getattr(node, field)) is not None:
                gauge.labels(node.node).set(value)
        if node.why_differing is not None:
            self._differ.labels(node.node).set(bool(node.why_differing))
        self._show_losses(node, "served", node)
        if node.judged:
            self._show_losses(node, "judged", node.judged[-1])

    def _show_losses(self, node: NodeWeights, of: str, losses: NodeWeights | JudgedVersion) -> None:
        for field, gauge in self._losses.items():
            if (loss := getattr(losses, field)) is not None:
                gauge.labels(node.node, of).set(loss)

    def _by_class(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["class"], registry=self._registry)

    def _latency(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_LATENCY_BUCKETS, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry)
