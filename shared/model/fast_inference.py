"""Faster forwards without gradients for stages in float32 on the CPU; training is not touched.

Three things cost most when few rows go through a layer, and each is replaced where the replacement gives the
same numbers within 1e-5:

- matrix products: over copies of the weights in faster layouts (`shared.model.products`). The
  copies that this takes go stale when the weights change, which is noticed by itself, except for writes
  through `.data` (see `InferenceWeights.invalidate`), and are made again in the background. Adapters are not
  copied: they are added to the product, and a step that changes only them leaves the copies as they are;
- many small products: query, key and value in one, gate and up in one (the Llama-shaped families);
- many small operations: root mean square norms and rotary embeddings.

Elsewhere than on the CPU, nothing is replaced.

Shape letters: T tokens of the flat row, N query heads, K key and value heads, D head size, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from shared.model.attention import LAYER_ATTRIBUTE, AttentionContext
from shared.model.lora import linear_modules
from shared.model.products import Product, Workshop
from shared.model.products import is_possible as products_possible
from shared.model.stage import Stage

_FUSED_ATTENTIONS: Final = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}
_FUSED_MLPS: Final = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"}


@dataclass(frozen=True, slots=True)
class InferenceWeights:
    """All products of one stage that have copies of its weights."""

    products: tuple[Product, ...]

    def prepare(self) -> None:
        """Copy everything now, rather than in the background of the next forwards."""
        for product in self.products:
            product.prepare()

    @contextmanager
    def moving_to(self, same_values: AbstractContextManager[None]) -> Iterator[None]:
        """Let tensors that are made inside, with the present weights' values, have the copies of these.

        `same_values` puts them in place. They would be copied anew otherwise.
        """
        ready = [product for product in self.products if product.is_current]
        yield
        with same_values:
            for product in ready:
                product.hand_over()

    def invalidate(self) -> None:
        """Forget all copies: needed only after writes that torch does not count, as `p.data.copy_`."""
        for product in self.products:
            product.invalidate()


def enable_fast_inference(stage: Stage) -> InferenceWeights:
    """Replace the forwards of the stage's modules; the handle has no weights where that is not possible.

    Call it once for a stage. Parameters may be changed and swapped afterwards.
    """
    if not _is_possible(stage):
        return InferenceWeights(())
    products: list[Product] = []
    workshop = Workshop()
    fused: set[nn.Module] = set()
    for module in stage.model.modules():
        kind = type(module).__name__
        if kind in _FUSED_ATTENTIONS:
            fused |= _replace(module, _FusedAttention(module, workshop), products)
        elif kind in _FUSED_MLPS:
            fused |= _replace(module, _FusedMLP(module, workshop), products)
    for module in linear_modules(stage.model):
        if module not in fused:
            _replace(module, _FastLinear(module, workshop), products)
    for module in stage.model.modules():
        if type(module).__name__.endswith("RMSNorm") and _is_plain_rms_norm(module):
            module.forward = _FastRMSNorm(module)
        elif "Rotary" in type(module).__name__ and fused:
            module.forward = _FastRotary(module)
    return InferenceWeights(tuple(products))


def _is_possible(stage: Stage) -> bool:
    parameters = stage.parameters()
    on_cpu = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters)
    return on_cpu and products_possible()


def _replace(module: nn.Module, fast: Any, products: list[Product]) -> set[nn.Module]:
    """Give the module its fast forward; returns the linear modules which that forward goes past."""
    module.forward = fast
    products.extend(fast.products)
    return set(fast.replaced)


class _FastLinear:
    replaced: Sequence[nn.Module] = ()

    def __init__(self, module: nn.Module, workshop: Workshop) -> None:
        self._plain: Callable[[Tensor], Tensor] = module.forward
        self._product = Product([module], workshop)
        self.products = (self._product,)

    def __call__(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not self._product.ready():
            return self._plain(inputs)
        return self._product(inputs)


class _FusedMLP:
    def __init__(self, module: Any, workshop: Workshop) -> None:
        self._plain: Callable[[Tensor], Tensor] = module.forward
        self._activation = module.act_fn
        self._gate_up = Product([module.gate_proj, module.up_proj], workshop)
        self._down = module.down_proj
        self.products = (self._gate_up,)
        self.replaced = (module.gate_proj, module.up_proj)

    def __call__(self, inputs_1TH: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not self._gate_up.ready():
            return self._plain(inputs_1TH)
        gate, up = self._gate_up(inputs_1TH).chunk(2, -1)
        output: Tensor = self._down(self._activation(gate).mul_(up))
        return output


class _FusedAttention:
    def __init__(self, module: Any, workshop: Workshop) -> None:
        self._plain: Callable[..., tuple[Tensor, None]] = module.forward
        self._layer: int = getattr(module, LAYER_ATTRIBUTE)
        self._head_dim: int = module.head_dim
        self._num_kv_heads: int = module.config.num_key_value_heads
        self._num_heads: int = module.config.num_attention_heads
        self._num_rotated = self._num_heads + self._num_kv_heads
        self._scaling: float = module.scaling
        self._sliding_window = _sliding_window(module)
        self._query_key_value = Product([module.q_proj, module.k_proj, module.v_proj], workshop)
        self._output = module.o_proj
        self.products = (self._query_key_value,)
        self.replaced = (module.q_proj, module.k_proj, module.v_proj)

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        *,
        attention_context: AttentionContext,
        **others: Any,
    ) -> tuple[Tensor, None]:
        attend_joined = getattr(attention_context, "attend_joined", None)  # contexts for training lack it
        if attend_joined is None or torch.is_grad_enabled() or not self._query_key_value.ready():
            return self._plain(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_context=attention_context,
                **others,
            )
        heads_TXD = self._query_key_value(hidden_states).view(hidden_states.size(1), -1, self._head_dim)
        rotated_TXD = position_embeddings.rotate(heads_TXD, self._num_rotated)
        query_TND, key_value_TXD = rotated_TXD.split((self._num_heads, 2 * self._num_kv_heads), 1)
        output_1TND: Tensor = attend_joined(
            self._layer,
            query_TND,
            key_value_TXD,
            scaling=self._scaling,
            sliding_window=self._sliding_window,
        )
        return self._output(output_1TND.flatten(2)), None


def _sliding_window(module: Any) -> int | None:
    """The window that the module's own forward hands to attention."""
    if type(module).__name__ == "MistralAttention":
        window: int | None = getattr(module.config, "sliding_window", None)
    else:
        window = getattr(module, "sliding_window", None)
    return window


class _FastRMSNorm:
    def __init__(self, module: Any) -> None:
        self._plain: Callable[[Tensor], Tensor] = module.forward
        self._table = module._parameters
        self._epsilon = torch.tensor(module.variance_epsilon)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight = self._table["weight"]
        if torch.is_grad_enabled() or weight is None:
            return self._plain(hidden_states)
        # torch's own `rms_norm` takes twice as long on the CPU: there it is made of a dozen operations
        norm = vector_norm(hidden_states, dim=-1, keepdim=True)
        scale = torch.addcmul(self._epsilon, norm, norm, value=1.0 / hidden_states.size(-1)).rsqrt_()
        return (hidden_states * scale).mul_(weight)


def _is_plain_rms_norm(module: Any) -> bool:
    """Whether it divides by the root mean square and no more; some families add 1 to the weight, for one."""
    if not hasattr(module, "variance_epsilon") or getattr(module, "weight", None) is None:
        return False
    sample = torch.linspace(-3.0, 4.0, 4 * module.weight.numel()).view(4, -1).sin()
    with torch.no_grad():
        return torch.allclose(module(sample), _FastRMSNorm(module)(sample), rtol=1e-6, atol=1e-6)


class _FastRotary:
    def __init__(self, module: Any) -> None:
        self._plain: Callable[..., tuple[Tensor, Tensor]] = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        angles = self._plain(*args, **kwargs)
        return angles if torch.is_grad_enabled() else _Angles(angles)


class _Angles(tuple[Tensor, ...]):
    """Cosine and sine [1, T, D] as the models unpack them, and a rotation in fewer operations."""

    def __init__(self, angles: tuple[Tensor, Tensor]) -> None:
        self._factors: tuple[Tensor, Tensor] | None = None

    def rotate(self, heads_THD: Tensor, num_rotated: int) -> Tensor:
        """Rotary embedding of the first `num_rotated` heads; the others (the values) pass as they are."""
        if self._factors is None:
            self._factors = self._make_factors(heads_THD, num_rotated)
        cos_THD, sin_THD = self._factors
        return torch.addcmul(heads_THD * cos_THD, heads_THD.roll(heads_THD.size(-1) // 2, -1), sin_THD)

    def _make_factors(self, heads_THD: Tensor, num_rotated: int) -> tuple[Tensor, Tensor]:
        """Made once for all layers: rotations for the heads that turn, the identity for the others."""
        cos_1TD, sin_1TD = self
        cos_THD, sin_THD = torch.ones_like(heads_THD), torch.zeros_like(heads_THD)
        first, second = sin_1TD[0].chunk(2, -1)
        cos_THD[:, :num_rotated] = cos_1TD[0].unsqueeze(1)
        sin_THD[:, :num_rotated] = torch.cat((-first, second), -1).unsqueeze(1)
        return cos_THD, sin_THD
