"""The roofline against published sizes and times worked out by hand."""

import pytest

from shared.profiles.devices import DEVICES
from shared.profiles.models import MODELS
from shared.profiles.roofline import rooflines
from shared.profiles.times import work_of_rows

A100 = DEVICES["a100"]


@pytest.mark.parametrize(
    ("name", "published_params"),
    [
        ("gpt2-small", 124e6),
        ("gpt2-medium", 355e6),
        ("gpt2-large", 774e6),
        ("llama2-7b", 6.74e9),
        ("llama2-13b", 13.02e9),
        ("llama2-70b", 68.98e9),
    ],
)
def test_a_model_has_as_many_parameters_as_is_published(name: str, published_params: float) -> None:
    (whole,) = rooflines(MODELS[name], A100, 1)
    assert whole.num_params == pytest.approx(published_params, rel=0.005)


def test_stages_hold_the_model_and_a_tied_embedding_twice() -> None:
    llama, gpt = MODELS["llama2-7b"], MODELS["gpt2-small"]
    assert (
        sum(stage.num_params for stage in rooflines(llama, A100, 4))
        == rooflines(llama, A100, 1)[0].num_params
    )
    twice = rooflines(gpt, A100, 1)[0].num_params + 50257 * 768
    assert sum(stage.num_params for stage in rooflines(gpt, A100, 4)) == twice


def test_one_token_of_llama2_7b_waits_for_its_weights() -> None:
    """6.61e9 weights of layers and head at 1.63e12 bytes/s are 8.10 ms; 325 kernels are 1.6 ms."""
    (whole,) = rooflines(MODELS["llama2-7b"], A100, 1)
    assert whole.iteration_s(work_of_rows(0, 1)) == pytest.approx(8.10e-3 + 1.625e-3, rel=0.01)


def test_a_long_prompt_of_llama2_7b_computes() -> None:
    """6.48e9 weights times 2 * 2048 at 156e12 flop/s are 170 ms; attention's 1.1e12 flops are 7 ms."""
    (whole,) = rooflines(MODELS["llama2-7b"], A100, 1)
    assert whole.iteration_s(work_of_rows(0, 2048)) == pytest.approx(0.170 + 0.007 + 0.002, rel=0.01)


def test_decoding_a_long_context_reads_its_keys_and_values() -> None:
    """Llama-2 7B keeps 512 KiB a token: 16 sequences of 2000 tokens are 16.8e9 bytes, 10.3 ms."""
    (whole,) = rooflines(MODELS["llama2-7b"], A100, 1)
    short, long = work_of_rows(0, 1) * 16, work_of_rows(1999, 1) * 16
    assert whole.iteration_s(long) - whole.iteration_s(short) == pytest.approx(10.3e-3, rel=0.02)


def test_grouped_heads_keep_fewer_keys() -> None:
    (whole,) = rooflines(MODELS["llama2-70b"], A100, 1)
    assert whole.kv_bytes_per_token == 80 * 2 * 8 * 128 * 2


def test_a_backward_is_twice_its_forward_and_a_step_moves_the_state() -> None:
    first, _ = rooflines(MODELS["llama2-7b"], A100, 2)
    work = work_of_rows(0, 150)
    assert first.backward_s(work) == 2 * first.forward_s(work)
    assert first.step_s() == pytest.approx(first.num_params * 14 / (0.8 * 2039e9), rel=0.01)


def test_only_the_last_stage_pays_for_the_head() -> None:
    stages = rooflines(MODELS["llama2-7b"], A100, 4)
    times = [stage.iteration_s(work_of_rows(0, 150)) for stage in stages]
    assert times[0] == times[1] == times[2] < times[3]
