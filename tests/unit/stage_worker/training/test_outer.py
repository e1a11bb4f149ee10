"""The outer step against Nesterov's SGD of torch."""

import pytest
import torch
from torch.nn import Parameter

from services.stage_worker.training.outer import outer_state, outer_step, without_outer
from shared.messages.weights import OuterStep


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_equals_torchs_sgd_on_what_the_mean_has_moved(momentum: float) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = Parameter(torch.randn(5, generator=generator))
    sgd = torch.optim.SGD([plain], lr=0.7, momentum=momentum, nesterov=momentum > 0)
    state = outer_state({"w": plain}, {})
    for _ in range(4):
        mean = plain.detach() + torch.randn(5, generator=generator)
        plain.grad = plain.detach() - mean
        sgd.step()
        result = {"w": mean.clone()}
        state = outer_step(state, result, OuterStep(learning_rate=0.7, momentum=momentum))
        torch.testing.assert_close(result["w"], plain.detach())
        state = outer_state(result, state.named())  # as through a checkpoint


def test_its_state_stays_until_the_step_is_held() -> None:
    state = outer_state({"w": torch.ones(2)}, {"outer_momentum.w": torch.full((2,), 3.0)})
    mean = {"w": torch.zeros(2)}
    after = outer_step(state, mean, OuterStep(learning_rate=0.5, momentum=0.5))
    assert state.weights["w"].tolist() == [1.0, 1.0]
    assert state.momentum["w"].tolist() == [3.0, 3.0]
    assert after.momentum["w"].tolist() == [2.5, 2.5]  # 0.5 * 3 + 1
    assert mean["w"].tolist() == [-0.125, -0.125]  # 1 - 0.5 * (1 + 0.5 * 2.5)
    mean["w"].zero_()
    assert after.weights["w"].tolist() == [-0.125, -0.125]


def test_an_optimizers_own_state_is_told_apart() -> None:
    saved = {"outer_momentum.a.b": torch.zeros(1), "exp_avg.a.b": torch.ones(1)}
    assert without_outer(saved).keys() == {"exp_avg.a.b"}
