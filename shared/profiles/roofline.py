"""How long a known model's stage takes on a known device, from what it computes and what it moves.

Each of an op's parts takes as long as the slower of its arithmetic and its memory traffic (Williams et al.
2009, "Roofline"); the parts follow one another, and each kernel pays for its launch.
"""

from dataclasses import dataclass

from shared.model.partition import LayerRange, partition
from shared.profiles.devices import DeviceLimits
from shared.profiles.models import ModelShape
from shared.profiles.times import Work

ATTAINED_FLOPS = 0.5
"""Share of the peak. Large models train at 42 % to 56 % of it (Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models", table 5)."""
ATTAINED_BANDWIDTH = 0.8
"""Share of the peak: about what copying kernels reach (Deakin et al. 2018, "BabelStream")."""
LAUNCH_S = 5e-6
"""A kernel's launch from an eager framework: 3 to 10 microseconds (Zhang et al. 2020, "A Study of Single and
Multi-device Synchronization Methods in Nvidia GPUs"; Fernandez et al. 2023, "The Framework Tax")."""
KERNELS_PER_LAYER = 10
"""Two norms, keys-queries-values, positions, attention, its output, two of the MLP, two sums."""
KERNELS_OF_HEAD = 5
"""Norm, product, softmax or loss, sampling, and the choice's copy to the host."""
KERNELS_PER_STEP = 20
"""AdamW over all of a stage's tensors at once, in a few launches for each of its operations."""

WEIGHT_BYTES = 2
"""Weights, gradients and both of AdamW's moments are kept in 16 bits, as the paper's released code does for
Llama; its GPT are in 32 bits, ours are not."""
TRAINED_BYTES = 4 * WEIGHT_BYTES
"""A parameter's weight, gradient and two moments."""
STEP_BYTES = 7 * WEIGHT_BYTES
"""AdamW reads all four and writes three of them."""
ACTIVATION_BYTES = 34
"""For each token, layer and hidden number that a backward needs, attention's squares not kept (Korthikanti
et al. 2022, equation 2 without its quadratic term)."""
LOGIT_BYTES = 6
"""For each token and word of the vocabulary: the logit in 16 bits and its gradient's 32."""
BACKWARD_FLOPS = 2
"""Times the forward's: one product for the inputs' gradient, one for the weights'."""
USABLE_MEMORY = 0.9
"""Share of the device: the rest is the framework's context and fragments (vLLM's default share too)."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Implements `StageTimes` for the stage that owns `layers`.

    `forward_s` never includes a backward: whoever runs both in one op, as the last stage does, adds them.
    """

    model: ModelShape
    device: DeviceLimits
    layers: LayerRange

    def iteration_s(self, work: Work) -> float:
        """Only each sequence's last row goes through the head."""
        kernels = self._layers_s(work.num_tokens) + self._launches_s
        return kernels + self._attention_s(work) + self._head_s(work.num_sequences)

    def forward_s(self, work: Work) -> float:
        """All rows go through the head, and activations are kept for the backward."""
        kept_s = self._moved_s(work.num_tokens * self.activation_bytes_per_token)
        kernels = self._layers_s(work.num_tokens) + self._launches_s
        return kernels + self._attention_s(work) + self._head_s(work.num_tokens) + kept_s

    def backward_s(self, work: Work) -> float:
        """Twice the forward: each product has two gradients, and a kernel for each."""
        return BACKWARD_FLOPS * self.forward_s(work)

    def step_s(self) -> float:
        """AdamW only moves numbers."""
        return self._moved_s(STEP_BYTES * self.num_params) + KERNELS_PER_STEP * LAUNCH_S

    @property
    def num_params(self) -> int:
        """Those that this stage holds: an embedding tied to the head is held at both ends."""
        model, layers = self.model, self.layers
        has_own_head = layers.is_last and not (layers.is_first and model.is_tied)
        ends = layers.is_first * model.embedding_params + has_own_head * model.head_params
        return layers.num_layers * model.layer_params + ends

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * WEIGHT_BYTES * self.model.kv_size * self.layers.num_layers

    @property
    def activation_bytes_per_token(self) -> int:
        """Kept from a token's forward to its backward."""
        of_layers = ACTIVATION_BYTES * self.model.hidden_size * self.layers.num_layers
        return of_layers + self.layers.is_last * LOGIT_BYTES * self.model.vocab_size

    @property
    def _launches_s(self) -> float:
        kernels = KERNELS_PER_LAYER * self.layers.num_layers + KERNELS_OF_HEAD * self.layers.is_last
        return kernels * LAUNCH_S

    def _layers_s(self, num_rows: int) -> float:
        return self._product_s(self.layers.num_layers * self.model.layer_params, num_rows)

    def _head_s(self, num_rows: int) -> float:
        return self._product_s(self.model.head_params, num_rows) if self.layers.is_last else 0.0

    def _product_s(self, num_params: int, num_rows: int) -> float:
        """`num_rows` rows times `num_params` weights, which are read once."""
        return max(self._computed_s(2 * num_params * num_rows), self._moved_s(WEIGHT_BYTES * num_params))

    def _attention_s(self, work: Work) -> float:
        """Prefill computes, decoding reads keys and values; each has little of the other: they are added."""
        flops = 4 * work.num_pairs * self.model.hidden_size * self.layers.num_layers
        return self._computed_s(flops) + self._moved_s(work.num_context_tokens * self.kv_bytes_per_token)

    def _computed_s(self, flops: float) -> float:
        return flops / (ATTAINED_FLOPS * self.device.flops_per_s)

    def _moved_s(self, num_bytes: float) -> float:
        return num_bytes / (ATTAINED_BANDWIDTH * self.device.bytes_per_s)


def rooflines(model: ModelShape, device: DeviceLimits, num_stages: int) -> tuple[Roofline, ...]:
    """All stages of one node. Raises ConfigurationError when the model has too few layers."""
    cuts = partition(model.num_layers, num_stages, layer_cost=model.layer_params, head_cost=model.head_params)
    return tuple(Roofline(model, device, layers) for layers in cuts)
