"""Stop strings: what of a growing text may be shown, and where it ends."""

from collections.abc import Sequence


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Divide text into what may be shown and what must be held, and say whether it is stopped.

    Stopped: the shown part ends before the earliest stop string. Otherwise the held part is the
    longest end of `text` that may be the beginning of a stop string.
    """
    if not stops:
        return text, "", False
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    if found:
        return text[: min(found)], "", True
    num_held = max((_overlap(text, stop) for stop in stops), default=0)
    cut = len(text) - num_held
    return text[:cut], text[cut:], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
