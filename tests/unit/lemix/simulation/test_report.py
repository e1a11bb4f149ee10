import json
from dataclasses import asdict
from io import StringIO
from pathlib import Path

from rich.console import Console

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.metrics import RunMetrics, metrics_of
from lemix.simulation.record import Op, OpLog, RequestRecord, RunRecord, event_lines
from lemix.simulation.report import metrics_table, write_run
from lemix.simulation.trace import TraceRow
from lemix.simulation.workload import WorkloadOptions

OPTIONS = SimulationOptions(nodes=1, stages=1, profile="gpt2-small@a100", policy="lemix", seed=7)


def run(error: str = "") -> RunRecord:
    request = RequestRecord(
        arrived_s=0.0, lengths=(5,), ended_s=0.25, nodes=(0,), token_times_s=((0.25,),), error=error
    )
    log = OpLog()
    log.append(Op(0, 0, "iteration", 0.05, 0.25, 5))
    return RunRecord(num_nodes=1, num_stages=1, ended_s=0.25, requests=(request,), batches=(), ops=log)


def shown(metrics: RunMetrics) -> str:
    output = StringIO()
    Console(width=120, file=output).print(metrics_table(metrics))
    return output.getvalue()


def row_of(text: str, name: str) -> str:
    (row,) = [line for line in text.splitlines() if name in line]
    return row


def test_the_table_says_what_was_measured() -> None:
    text = shown(metrics_of(run(), slo_s=0.3))
    assert "1 of 1 answered" in row_of(text, "requests  ")
    assert "100.0 % within 300.0 ms" in row_of(text, "SLO attainment")
    assert "250.0, 250.0, 250.0 ms" in row_of(text, "TTFT")
    assert " 5.00 " in row_of(text, "tasks per node-second")  # one in 0.2 s
    assert "-, - " in row_of(text, "forecast error")


def test_the_table_says_what_failed() -> None:
    assert "0 of 1 answered, 1 failed" in shown(metrics_of(run("lost"), slo_s=0.3))


def test_a_run_is_written_with_all_that_made_it(tmp_path: Path) -> None:
    workload = WorkloadOptions(num_tasks=1, trace=(TraceRow(0.0, 5, 1),))
    metrics = metrics_of(run(), slo_s=0.3)
    write_run(tmp_path / "new", options=OPTIONS, workload=workload, record=run(), metrics=metrics)
    summary = json.loads((tmp_path / "new" / "run.json").read_text())
    assert summary["options"]["seed"] == 7
    assert summary["options"]["policy"] == "lemix"
    assert summary["workload"]["num_tasks"] == summary["workload"]["trace"] == 1
    assert summary["metrics"] == asdict(metrics) | {"idle_share_by_stage": list(metrics.idle_share_by_stage)}
    assert {"python", "lemix"} <= set(summary["versions"])
    assert (tmp_path / "new" / "events.jsonl").read_text() == "".join(event_lines(run()))
    assert (tmp_path / "new" / "timeline.png").stat().st_size > 0
