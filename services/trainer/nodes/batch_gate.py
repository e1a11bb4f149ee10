"""Whether further batches may begin on a node. Pure."""


class BatchGate:
    """Closed for a while when nodes do something together, and for good when training has failed here."""

    def __init__(self, *, max_skips: int) -> None:
        """`max_skips`: after so many skipped batches in a row no further one begins."""
        self.is_paused = False
        """No further batch begins for now."""
        self.halt_reason = ""
        """Why training here has stopped, until a restart or a rollback; empty while it trains."""
        self._max_skips = max_skips
        self._num_skips = 0
        """Batches skipped since one was applied."""

    @property
    def is_open(self) -> bool:
        return not (self.is_paused or self.halt_reason)

    def applied(self) -> None:
        """Note that a batch was applied."""
        if not self.halt_reason:
            self._num_skips = 0

    def skipped(self) -> str:
        """Note that a batch was skipped; returns why training must stop, or an empty text."""
        self._num_skips += 1
        if self._num_skips < self._max_skips:
            return ""
        return f"the gradients of {self._num_skips} batches in a row were not finite"

    def rolled_back(self) -> None:
        """Note that the weights are older ones now: whatever went wrong since does not count."""
        self._num_skips, self.halt_reason = 0, ""
