"""Shapes of known models: what a roofline needs, without their weights and without torch."""

from dataclasses import dataclass

from shared.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Numbers from a model's published config.json. Norms and biases, some 0.1 % of it, are left out."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    mlp_matrices: int
    """2: up and down; 3: gate too (SwiGLU)."""
    vocab_size: int
    context_length: int
    num_positions: int = 0
    """Rows of a learned table of positions; 0: positions are rotations."""
    is_tied: bool = False
    """The head is the embedding: held once where one stage has both."""

    @property
    def kv_size(self) -> int:
        """Numbers in one token's keys of one layer; its values are as many."""
        return self.hidden_size // self.num_heads * self.num_kv_heads

    @property
    def layer_params(self) -> int:
        attention = 2 * self.hidden_size * (self.hidden_size + self.kv_size)
        return attention + self.mlp_matrices * self.hidden_size * self.intermediate_size

    @property
    def head_params(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def embedding_params(self) -> int:
        return (self.vocab_size + self.num_positions) * self.hidden_size


def _gpt2(num_layers: int, hidden_size: int, num_heads: int) -> ModelShape:
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        intermediate_size=4 * hidden_size,
        mlp_matrices=2,
        vocab_size=50257,
        context_length=1024,
        num_positions=1024,
        is_tied=True,
    )


def _llama2(
    num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, intermediate_size: int
) -> ModelShape:
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        mlp_matrices=3,
        vocab_size=32000,
        context_length=4096,
    )


MODELS = {
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and the published configs.
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    # Touvron et al. 2023, "Llama 2", and the published configs; the 70B shares keys among 8 heads each (GQA).
    "llama2-7b": _llama2(32, 4096, 32, 32, 11008),
    "llama2-13b": _llama2(40, 5120, 40, 40, 13824),
    "llama2-70b": _llama2(80, 8192, 64, 8, 28672),
}


def model_shape(name: str) -> ModelShape:
    """The shape of a known model. Raises ConfigurationError, naming the choices."""
    if name not in MODELS:
        raise ConfigurationError(f"model {name!r} has no analytic profile; choices: {', '.join(MODELS)}")
    return MODELS[name]
