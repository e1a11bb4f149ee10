"""One pipeline stage of a model: its forward, and its parameters by the names of the whole model.

Shape letters: T tokens of the flat row, H hidden size, R rows of logits, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from shared.model.attention import AttentionContext
from shared.model.partition import LayerRange

Slot: TypeAlias = tuple[dict[str, nn.Parameter | None], str]
"""A module's own table of parameters, and the parameter's name in it."""


class Stage:
    """The layers of one `LayerRange`, with the embedding on the first stage and the head on the last.

    Built by `shared.model.loader.load_stage`. `model` is the Hugging Face model without the modules of the
    other stages; `slots` says, for each global parameter name, where the parameter hangs (a tied
    embedding hangs twice when one stage is the whole model).
    """

    def __init__(
        self,
        model: Any,
        layers: LayerRange,
        slots: Mapping[str, tuple[Slot, ...]],
        *,
        tied_embedding_name: str | None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.config = model.config
        self.hidden_size: int = model.config.hidden_size
        self.vocab_size: int = model.config.vocab_size
        self.tied_embedding_name = tied_embedding_name
        """The embedding's global name when it is tied to the head and this stage holds a copy, else None.

        With more than one stage the first and the last hold one copy each, under this same name; the
        gradient of either is the sum of both.
        """
        self.adapter_names: tuple[str, ...] = ()
        """Parameters of an adapter (`shared.model.lora`); with one, they alone are trained."""
        self._slots = dict(slots)
        self._run = model if layers.is_last else model.base_model

    def forward(
        self, inputs: Tensor, positions_T: Tensor, context: AttentionContext, logit_rows: Tensor | None = None
    ) -> Tensor:
        """Run the stage over one flat row of tokens.

        `inputs`: token ids [T] int64 on the first stage, else hidden states [T, H]. `positions_T`: each
        token's place in its own sequence, int64. `logit_rows` [R] int64: the rows whose logits the last
        stage computes, all when None; other stages ignore it. Returns hidden states [T, H], or on the last
        stage logits [R, V]. Differentiable unless under `no_grad`.

        Raises:
            UnsupportedModelError: the model wants something of attention that LeMix does not do.
        """
        arguments: dict[str, Any] = {
            "input_ids" if self.layers.is_first else "inputs_embeds": inputs.unsqueeze(0),
            "position_ids": positions_T.unsqueeze(0),
            "use_cache": False,
            "attention_context": context,
        }
        if not self.layers.is_last:
            hidden: Tensor = self._run(**arguments).last_hidden_state
            return hidden[0]
        if logit_rows is not None:
            arguments["logits_to_keep"] = logit_rows
        logits: Tensor = self._run(**arguments).logits
        return logits[0]

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """The parameters now in place, by their names in the whole model's state dict."""
        return {name: self.parameter(name) for name in self._slots}

    def base_tensors(self) -> dict[str, nn.Parameter]:
        """The parameters now in place that are not an adapter's: those of the model as it is published."""
        return {name: self.parameter(name) for name in self._slots if name not in self.adapter_names}

    def trainable_tensors(self) -> dict[str, nn.Parameter]:
        """The parameters now in place that training changes: the adapter's, or all where there is none."""
        return {name: self.parameter(name) for name in self.adapter_names or self._slots}

    @property
    def tied_across_stages(self) -> str | None:
        """The tied embedding's name when it trains and another stage holds the other copy, else None."""
        is_shared = self.layers.num_stages > 1 and not self.adapter_names
        return self.tied_embedding_name if is_shared else None

    def module_name(self, module: nn.Module) -> str:
        """The name in the whole model of a module that has a weight of its own."""
        names = (
            name
            for name, slots in self._slots.items()
            for table, local_name in slots
            if table is module._parameters and local_name == "weight"
        )
        return next(names).removesuffix(".weight")

    def add_adapter(self, slots: Mapping[str, Slot]) -> None:
        """Take in the parameters of an adapter; from now on they alone are trained."""
        self._slots.update({name: (slot,) for name, slot in slots.items()})
        self.adapter_names = tuple(slots)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters now in place, each once, in the order of `named_tensors`."""
        return list(self.named_tensors().values())

    def parameter(self, global_name: str) -> nn.Parameter:
        """The parameter now in place under that name; KeyError when another stage owns it."""
        table, name = self._slots[global_name][0]
        parameter = table[name]
        assert parameter is not None
        return parameter

    def set_parameter(self, global_name: str, parameter: nn.Parameter) -> None:
        """Put another parameter in place; graphs already recorded keep the one they saw.

        Shape, dtype and device must be those of the old one, which is not checked: this runs for every
        parameter whenever the weights version changes. KeyError when another stage owns the name.
        """
        for table, name in self._slots[global_name]:
            table[name] = parameter

    def to(self, device: str) -> "Stage":
        """Move all tensors to `device`, in place."""
        self.model.to(device)
        return self
