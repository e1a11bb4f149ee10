"""`lemix profile` on a tiny model: every op of every stage, and a file that forecasts can start from."""

from pathlib import Path

import pytest
from rich.console import Console

from lemix.profiling.command import ProfileOptions, measure, medians, run_profile
from lemix.profiling.grid import Grid, IterationShape, prefill
from lemix.profiling.pipeline import MeasuredOp
from services.scheduler.costs import AffineCosts
from shared.clock import SystemClock
from shared.errors import ConfigurationError
from shared.profiles.profile import profile_named, stage_times
from shared.profiles.times import work_of_rows
from tests.support.models import VOCAB_SIZE, save_tiny_model


def op(elapsed_s: float, num_tokens: int = 4, stage: int = 0) -> MeasuredOp:
    return MeasuredOp(stage, "iteration", work_of_rows(0, num_tokens), elapsed_s, None)


class FakePipeline:
    """Notes what it is asked to run; each turn takes a second more than the one before."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    async def batch(self, lengths: tuple[int, ...]) -> list[MeasuredOp]:
        self.asked.append(lengths)
        return [op(0.0)]

    async def iteration(self, shape: IterationShape) -> list[MeasuredOp]:
        self.asked.append(shape)
        return [op(float(len(self.asked)), shape.num_tokens)]


def test_a_point_is_the_median_of_its_repeats() -> None:
    points = medians([op(3.0), op(1.0), op(100.0), op(7.0, num_tokens=9)])
    assert [(point.num_tokens, point.elapsed_s) for point in points] == [(4, 3.0), (9, 7.0)]


async def test_repeats_take_turns_in_changing_order_and_the_first_turn_is_lost() -> None:
    pipeline, short, long = FakePipeline(), prefill(0, 1), prefill(0, 2)
    grid = Grid(iterations=(short, long), microbatches=((3,), (4,)), num_repeats=2)
    measured = await measure(pipeline, grid)
    backwards, onwards = [(4,), (3,), short, long, short], [(3,), (4,), short, short, long]
    assert pipeline.asked == [*backwards, *onwards, *backwards]
    assert [op.elapsed_s for op in measured] == [0, 0, 9, 10, 0, 0, 14, 15]


@pytest.mark.parametrize(("family", "num_stages"), [("llama_tied", 2), ("gpt2", 1)])
async def test_a_profile_is_measured_written_and_read(
    family: str, num_stages: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model(family, tmp_path / "model")
    output = tmp_path / "new" / "profile.json"
    options = ProfileOptions(
        model=str(tmp_path / "model"), stages=num_stages, device="cpu", output=output, is_quick=True
    )
    await run_profile(options, Console(), SystemClock())
    assert str(output) in capsys.readouterr().out
    profile = profile_named(str(output), None)
    assert (profile.num_stages, profile.device, profile.vocab_size) == (num_stages, "cpu", VOCAB_SIZE)
    costs, work = AffineCosts(profile, 0.0), work_of_rows(24, 1) * 4
    for stage in range(num_stages):
        kinds = {point.kind for point in profile.stages[stage].points}
        assert kinds == {"iteration", "forward"} | ({"backward"} if stage < num_stages - 1 else set())
        times = stage_times(str(output), stage, num_stages)
        assert costs.iteration_s(stage, work) == times.iteration_s(work) > 0
        assert costs.forward_s(stage, work) == times.forward_s(work) > 0
        assert costs.backward_s(stage, work) == times.backward_s(work)
        assert costs.step_s(stage) == times.step_s() > 0
        assert profile.stages[stage].memory.kv_tokens > 1


async def test_memory_is_counted_from_the_model_s_tensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    save_tiny_model("llama", tmp_path / "model")
    output = tmp_path / "profile.json"
    options = ProfileOptions(
        model=str(tmp_path / "model"), stages=2, device="cpu", output=output, is_quick=True
    )
    await run_profile(options, Console(quiet=True), SystemClock())
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        num_params = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    memory = [stage.memory for stage in profile_named(str(output), 2).stages]
    assert sum(own.weights_bytes for own in memory) == 4 * num_params
    assert [own.training_bytes for own in memory] == [3 * own.weights_bytes for own in memory]


async def test_a_file_that_cannot_be_written_is_the_user_s_mistake(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    options = ProfileOptions(
        model=str(tmp_path / "model"), stages=2, device="cpu", output=tmp_path, is_quick=True
    )
    with pytest.raises(ConfigurationError, match="output"):
        await run_profile(options, Console(quiet=True), SystemClock())
