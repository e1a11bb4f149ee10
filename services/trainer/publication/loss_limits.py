"""How bad a weights version may be, and still serve. Pure."""

from math import inf, isfinite, nan

from services.trainer.publication.losses import Losses


class LossLimits:
    """Compares held-out losses with the lowest one that has served: small rises must not add up."""

    def __init__(self, *, max_rise: float, max_samples_rise: float) -> None:
        """See `PublishingRules`."""
        self._max_rise = max_rise
        self._max_samples_rise = max_samples_rise
        self._lowest_loss = inf
        """The lowest held-out loss of all that have served, back to a rollback."""
        self._restored_rise = 1.0
        """See `rise`: of the restored version, when it was approved."""

    def restart(self, rise: float = 1.0) -> None:
        """Know nothing but the restored version's rise; the lowest loss follows when that is evaluated."""
        self._lowest_loss, self._restored_rise = inf, rise

    def rise(self, held_out: float | None) -> float:
        """How many times the lowest held-out loss of all that have served that is.

        Where that is no number, it is as much as was known of the restored version.
        """
        rise = nan if held_out is None or self._lowest_loss <= 0 else held_out / self._lowest_loss
        return rise if isfinite(rise) else self._restored_rise

    def restored(self, losses: Losses) -> None:
        """Note the losses of the restored version."""
        self._serves(losses, self._restored_rise)

    def served(self, losses: Losses) -> None:
        """Note the losses of a version that is approved."""
        self._serves(losses, 1.0)

    def why_too_bad(self, losses: Losses) -> str:
        """Why a version with these losses must not serve; empty: it may."""
        limit = (1 + self._max_rise) * self._lowest_loss
        if losses.held_out is not None and _exceeds(losses.held_out, limit):
            return f"held-out loss {losses.held_out:.4f} is above {limit:.4f}"
        if _exceeds(losses.samples_rise, self._max_samples_rise):
            return (
                f"its loss on the model's own samples is {losses.samples_rise:.4f} above what it was, more "
                f"than {self._max_samples_rise:g}"
            )
        return ""

    def _serves(self, losses: Losses, rise: float) -> None:
        if losses.held_out is not None:
            self._lowest_loss = min(self._lowest_loss, losses.held_out / rise)


def _exceeds(loss: float, limit: float) -> bool:
    """Whether it is above the limit, or no number."""
    return not (isfinite(loss) and loss <= limit)
