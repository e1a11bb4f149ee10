"""Heartbeats of stages, for tests that play them."""

from shared.messages.cluster import Heartbeat


def heartbeat(
    node: int,
    stage: int = 0,
    *,
    num_stages: int = 1,
    instance: str = "a",
    ready: bool = True,
    whole: bool = True,
) -> Heartbeat:
    """The heartbeat of an idle stage."""
    return Heartbeat(
        node=node,
        stage=stage,
        num_stages=num_stages,
        instance=instance,
        model="m",
        device="cpu",
        ready=ready,
        whole=ready and whole,
        weights_version=0,
        checkpoint="",
        fence=0,
        running=0,
        waiting=0,
        queued=0,
        kv_blocks_used=0,
        kv_blocks_total=8,
    )
