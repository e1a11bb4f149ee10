"""A run of the live study: real services over NATS, on emulated devices, driven to the end."""

import math

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.workload import WorkloadOptions
from lemix.studies.real_cluster import run_cluster


async def test_a_run_serves_and_trains_all_and_tells_what_services_add() -> None:
    options = SimulationOptions(
        nodes=1, profile="llama2-13b@a100", policy="round_robin", trainer_settings={"microbatches": 1}
    )
    record, overheads = await run_cluster(
        options, WorkloadOptions(num_tasks=12, training_rate=0.25, rate_per_s=8.0)
    )
    assert (record.num_nodes, record.num_stages) == (1, 2)
    assert [request.error for request in record.requests] == [""] * 9
    assert [batch.node for batch in record.batches] == [0] * 3
    kinds = {op.kind for op in record.ops}
    assert kinds == {"iteration", "forward", "backward", "step"}
    assert all(math.isfinite(overhead_s) for overhead_s in overheads)
