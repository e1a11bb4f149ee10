"""A simulation is of what its options say, whatever the services' variables are set to."""

import pytest

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.run import simulate
from lemix.simulation.workload import WorkloadOptions


def test_the_environment_changes_no_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    options = SimulationOptions(nodes=1, profile="gpt2-small@rtx6000ada", policy="round_robin")
    workload = WorkloadOptions(num_tasks=20, rate_per_s=200.0)
    expected, metrics = simulate(options, workload)
    for name, value in {
        "MAX_ITERATION_TOKENS": "8",
        "DISCIPLINE": "fifo",
        "MICROBATCHES": "1",
        "KV_BLOCK_SIZE": "0",
        "MODEL": "/nowhere",
    }.items():
        monkeypatch.setenv(f"LEMIX_{name}", value)
    record, same_metrics = simulate(options, workload)
    assert (record.requests, record.batches) == (expected.requests, expected.batches)
    assert same_metrics == metrics
