"""Steps that go ahead of the host give, token for token, what iterations give that run as they come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.stage_worker.compute.attention.chunks import Chunk
from services.stage_worker.compute.executor import Took
from services.stage_worker.compute.graphs import run_again
from services.stage_worker.compute.iterations import IterationRunner
from services.stage_worker.compute.kv_cache import PagedKVCache
from services.stage_worker.compute.logits import Results
from services.stage_worker.compute.op_timer import CudaTimer
from services.stage_worker.compute.readback import Readback
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.compute.sampling.step import Drawing
from services.stage_worker.compute.tokens import Asked, TokenRunner
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.node.node_scheduler import FirstRows, NodeScheduler
from services.stage_worker.pipeline.sequences import SequenceTable
from services.stage_worker.training.optimizers import OptimizerSettings
from shared.messages.inference import InferenceTask, IterationDone, SampledToken, Sampling
from shared.model.loader import load_stage, model_partition, read_config
from shared.model.stage import Stage
from tests.support.models import VOCAB_SIZE, save_tiny_model
from tests.support.played_cuda import PlayedCuda

BLOCK_SIZE = 4

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 7))},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.3, "seed": 8, "top_p": 0.8, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 9))},
    {"temperature": 0.7, "seed": 5, "top_k": 9, "min_p": 0.05},
    {"temperature": 1.2, "seed": 4, "min_tokens": 3, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 3))},
]
HOST_SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.9, "seed": 2, "frequency_penalty": 0.7},
    {"temperature": 0.0, "num_logprobs": 2},
    {"temperature": 1.1, "seed": 1, "logit_bias": ((5, 2.0),)},
]


class CountingRunner(IterationRunner):
    """Counts the steps that went ahead."""

    num_ahead = 0

    def draw_on(
        self, pieces: Sequence[Chunk], rows: Sequence[int], drawings: Sequence[Drawing]
    ) -> Readback | None:
        self.num_ahead += 1
        return super().draw_on(pieces, rows, drawings)


class LastStage:
    """The one stage of a node; `steps`: decode rows go by static steps, and ahead of the host."""

    def __init__(self, stage: Stage, *, num_blocks: int, steps: bool) -> None:
        self.stage, config = stage, stage.config
        cache = PagedKVCache(
            stage.layers.num_layers,
            num_blocks,
            BLOCK_SIZE,
            config.num_key_value_heads,
            config.hidden_size // config.num_attention_heads,
        )
        self.weights = StageWeights(stage, OptimizerSettings(), version=0, in_place=True)
        self.iterations = CountingRunner(stage, cache, self.weights, torch.float32)
        if steps:
            self.iterations.use_steps(run_again)
        self.tokens = TokenRunner(self.iterations, block_size=BLOCK_SIZE)
        self.table = SequenceTable(self._begin, block_size=BLOCK_SIZE)
        self.took: list[Took] = []

    def _begin(self, start: Any) -> SequenceState:
        return SequenceState(start.gateway, start.sampling, None, set(start.prompt))

    def run(self, first: FirstRows) -> tuple[dict[str, int], Results]:
        entered = self.table.enter(first.iteration)
        numbers = [chunk.task_id for chunk in entered.chunks if chunk.produces]
        places = {
            task_id: number
            for task_id, number in zip(
                [chunk.task_id for chunk in entered.chunks], first.iteration.sequences, strict=True
            )
            if task_id in numbers
        }
        asked = Asked(entered.chunks, entered.states, first.tokens)
        results, took = self.tokens.run(asked, first.iteration.version)
        self.took.append(took)
        return places, results

    def publish(self, version: int) -> None:
        """As a step of training: in place."""
        with torch.no_grad():
            for name, parameter in sorted(self.stage.named_tensors().items()):
                noise = torch.Generator().manual_seed(version + len(name))
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.02)
        self.weights.version = version
        self.tokens.forget()


class Course:
    """One scheduler, whose iterations run on several stages: all must give the same results."""

    def __init__(self, stages: Sequence[LastStage], *, num_blocks: int, token_budget: int) -> None:
        self.stages = stages
        self.scheduler = NodeScheduler(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            num_in_flight=1,
            token_budget=token_budget,
            max_deferrable_tokens=32,
            max_waiting=64,
            vocab_size=VOCAB_SIZE,
            num_rows_ahead=1,
        )
        self.version = 0
        self.num_submitted = 0

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> None:
        task = InferenceTask(
            task_id=f"t{self.num_submitted}",
            gateway="g",
            prompt=tuple(prompt),
            sampling=sampling,
            timeout_s=9.0,
        )
        self.num_submitted += 1
        self.scheduler.submit(task, deadline_s=9.0, traceparent="")

    def iterate(self) -> bool:
        first = self.scheduler.next_iteration()
        if first is None:
            return False
        (numbers, expected), *others = [stage.run(first) for stage in self.stages]
        for _, results in others:
            assert by_task(results) == by_task(expected)
        tokens = tuple(
            SampledToken(
                sequence=numbers[one.task_id],
                token=one.token and one.token.token,
                finished=one.finish is not None,
            )
            for one in expected[0]
            if one.task_id in numbers
        )
        done = IterationDone(iteration=first.iteration.number, tokens=tokens, weights_version=self.version)
        self.scheduler.finish_iteration(done)
        return True

    def publish(self) -> None:
        self.version += 1
        self.scheduler.newest_version = self.version
        for stage in self.stages:
            stage.publish(self.version)


def by_task(results: Results) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is told of each task; log-probabilities may differ by rounding."""
    told = {
        one.task_id: (
            one.token and one.token.token,
            one.token and pytest.approx(one.token.logprob, abs=1e-4),
            one.index,
            one.finish,
        )
        for one in results[0]
    }
    return told, {one.task_id: one for one in results[1]}


@dataclass(frozen=True)
class Models:
    """The same model twice, made new for each course: loading takes longer than most of them."""

    stages: tuple[Stage, Stage]
    weights: dict[str, Tensor]

    def course(self, *, num_blocks: int = 40, token_budget: int = 16) -> Course:
        for stage in self.stages:
            with torch.no_grad():
                for name, parameter in stage.named_tensors().items():
                    parameter.copy_(self.weights[name])
        stages = [
            LastStage(stage, num_blocks=num_blocks, steps=steps)
            for stage, steps in zip(self.stages, (False, True), strict=True)
        ]
        return Course(stages, num_blocks=num_blocks, token_budget=token_budget)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model("llama_tied", folder)
    (layers,) = model_partition(read_config(folder), 1)
    stages = load_stage(folder, layers), load_stage(folder, layers)
    return Models(stages, {name: each.clone() for name, each in stages[0].named_tensors().items()})


@settings(max_examples=12)
@given(data=st.data())
def test_steps_ahead_change_no_result(data: st.DataObject, models: Models) -> None:
    """With random arrivals, cancels, preemptions, prefix hits, pieces of prompts and published versions."""
    num_blocks, token_budget = data.draw(st.sampled_from([8, 40])), data.draw(st.sampled_from([3, 16]))
    course = models.course(num_blocks=num_blocks, token_budget=token_budget)
    kinds = SAMPLINGS + HOST_SAMPLINGS if data.draw(st.booleans()) else SAMPLINGS
    for _ in range(data.draw(st.integers(3, 10))):
        match data.draw(st.sampled_from(["submit", "submit", "cancel", "publish"])):
            case "submit":
                shared = data.draw(st.integers(0, 9))
                prompt = [*range(shared), *data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=6))]
                sampling = Sampling(
                    max_tokens=data.draw(st.integers(1, 12)), **data.draw(st.sampled_from(kinds))
                )
                course.submit(prompt, sampling)
            case "cancel" if course.num_submitted:
                course.scheduler.remove(f"t{data.draw(st.integers(0, course.num_submitted - 1))}")
            case "publish":
                course.publish()
        for _ in range(data.draw(st.integers(0, 6))):
            course.iterate()
    while course.iterate():
        pass
    assert course.scheduler.num_running == 0


def count_forwards(stage: LastStage, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    calls: list[None] = []
    forward = stage.stage.forward

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return forward(*args, **kwargs)

    monkeypatch.setattr(stage.stage, "forward", counted)
    return lambda: len(calls)


def test_one_forward_for_each_token_and_all_but_the_first_go_ahead(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks come early enough, so that no sequence waits for its next one."""
    course = models.course()
    num_forwards = count_forwards(course.stages[1], monkeypatch)
    for number in range(3):
        course.submit([number, 7, 9][: number + 1], Sampling(max_tokens=20, temperature=0.0))
    while course.iterate():
        pass
    assert num_forwards() == 20  # a prompt's pieces, then 19 steps
    assert course.stages[1].iterations.num_ahead == 18
    assert course.stages[0].iterations.num_ahead == 0


def test_a_sequence_that_ends_or_comes_costs_the_others_no_second_forward(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = models.course()
    course.submit([1, 2], Sampling(max_tokens=12, temperature=0.0))
    course.submit([3], Sampling(max_tokens=12, temperature=0.0))
    for _ in range(4):
        course.iterate()
    num_forwards = count_forwards(course.stages[1], monkeypatch)
    course.scheduler.remove("t1")
    course.iterate()
    assert num_forwards() == 1  # the step ahead of this one: what was asked for had run
    course.submit([4, 5], Sampling(max_tokens=12, temperature=0.0))
    course.iterate()
    assert num_forwards() == 2  # the prompt alone


def test_an_iteration_takes_the_time_of_its_own_step_also_where_that_was_launched_before(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    course, cuda = models.course(), PlayedCuda()
    stage = course.stages[1]
    monkeypatch.setattr(stage.tokens, "_timer", CudaTimer(torch.device("cuda"), cuda))
    steps_ms = iter([10.0, 20.0, 40.0, 80.0])

    def slowly(launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            launched = launch(*arguments)
            if launched is not None:
                cuda.launch("step", next(steps_ms))
            return launched

        return run

    for name in ("draw", "draw_on", "run"):
        monkeypatch.setattr(stage.iterations, name, slowly(getattr(stage.iterations, name)))
    course.submit([1, 2, 3], Sampling(max_tokens=3, temperature=0.0))
    while course.iterate():
        pass
    assert stage.iterations.num_ahead == 1
    taken_s = [sum(part.wait_s() for part in took) for took in stage.took]
    assert taken_s == pytest.approx([0.01, 0.02, 0.04])


def test_rows_that_the_host_must_look_at_go_as_they_come(models: Models) -> None:
    course = models.course()
    for kind in HOST_SAMPLINGS:
        course.submit([1, 2], Sampling(max_tokens=5, **kind))
    while course.iterate():
        pass
    assert course.stages[1].iterations.num_ahead == 0


def test_sick_weights_fail_the_sequences_of_a_step_ahead(models: Models) -> None:
    course = models.course()
    course.submit([1, 2], Sampling(max_tokens=9, temperature=0.0))
    for _ in range(3):
        course.iterate()
    for stage in course.stages:
        with torch.no_grad():
            next(iter(stage.stage.named_tensors().values())).fill_(float("nan"))
        stage.tokens.forget()
    first = course.scheduler.next_iteration()
    assert first is not None
    for stage in course.stages:
        _, (results, failed) = stage.run(first)
        assert results == ()
        assert [one.code for one in failed] == [500]
