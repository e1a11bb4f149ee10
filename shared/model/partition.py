"""How the layers of a model are cut into pipeline stages. Pure: numbers in, ranges out."""

from dataclasses import dataclass

from shared.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRange:
    """The layers `first` to `end - 1` of the whole model, which stage `stage` of `num_stages` owns."""

    stage: int
    num_stages: int
    first: int
    end: int

    @property
    def is_first(self) -> bool:
        """Whether this stage owns the input embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage owns the final norm and the head."""
        return self.stage == self.num_stages - 1

    @property
    def num_layers(self) -> int:
        """How many layers this stage owns."""
        return self.end - self.first


def partition(
    num_layers: int, num_stages: int, *, layer_cost: float = 1.0, head_cost: float = 0.0
) -> tuple[LayerRange, ...]:
    """Cut `num_layers` equal layers into contiguous stages so that the dearest stage is as cheap as can be.

    The head belongs to the last stage; both costs are in one unit, whatever it is. Every stage gets at
    least one layer. Among equal cuts the most even one is taken.

    Raises:
        ConfigurationError: `num_stages` is below 1 or above `num_layers`.
    """
    if not 1 <= num_stages <= num_layers:
        raise ConfigurationError(
            f"num_stages={num_stages}: a model of {num_layers} layers can have 1 to {num_layers} stages"
        )

    def dearest_then_unevenness(counts: tuple[int, ...]) -> tuple[float, float]:
        costs = [count * layer_cost for count in counts]
        costs[-1] += head_cost
        return max(costs), sum(cost * cost for cost in costs)

    most_in_last = num_layers - num_stages + 1 if num_stages > 1 else num_layers
    least_in_last = 1 if num_stages > 1 else num_layers
    cuts = (
        (*_spread(num_layers - in_last, num_stages - 1), in_last)
        for in_last in range(least_in_last, most_in_last + 1)
    )
    return _ranges(min(cuts, key=dearest_then_unevenness))


def _spread(num_layers: int, num_stages: int) -> tuple[int, ...]:
    if num_stages == 0:
        return ()
    each, extra = divmod(num_layers, num_stages)
    return tuple(each + (stage < extra) for stage in range(num_stages))


def _ranges(counts: tuple[int, ...]) -> tuple[LayerRange, ...]:
    ends = [sum(counts[: stage + 1]) for stage in range(len(counts))]
    return tuple(
        LayerRange(stage=stage, num_stages=len(counts), first=end - count, end=end)
        for stage, (count, end) in enumerate(zip(counts, ends, strict=True))
    )
