"""Collects an answer while it is sent; when it is whole, it is handed on to be remembered."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from services.gateway.feedback.answers import Json, StoredAnswer
from services.gateway.generation import Usage, Versions
from services.gateway.http.errors import ApiError
from services.gateway.http.streaming import EventEncoder
from services.gateway.text.detokenise import Piece


class Recorder:
    """One answer."""

    def __init__(
        self,
        begun: StoredAnswer,
        message_of: Callable[[Sequence[Piece]], Json],
        keep: Callable[[StoredAnswer], None],
    ) -> None:
        """`begun`: the answer before it has choices; `message_of`: the message of one choice."""
        self._begun = begun
        self._message_of = message_of
        self._keep = keep
        self._pieces: defaultdict[int, list[Piece]] = defaultdict(list)

    def piece(self, index: int, piece: Piece) -> None:
        """A choice has one more piece."""
        self._pieces[index].append(piece)

    def end(self, versions: Versions | None) -> None:
        """The answer is whole."""
        assert versions is not None, "a whole answer has been computed"
        choices = tuple(self._message_of(self._pieces[index]) for index in sorted(self._pieces))
        self._keep(self._begun.model_copy(update={"versions": tuple(versions), "choices": choices}))

    def whole(self, pieces: Sequence[Sequence[Piece]], versions: Versions | None) -> None:
        """All pieces of an answer are there, choice by choice."""
        for index, of_choice in enumerate(pieces):
            self._pieces[index].extend(of_choice)
        self.end(versions)


class RecordedEvents:
    """The events of a stream, whose answer is remembered when it is whole."""

    def __init__(self, events: EventEncoder, recorder: Recorder) -> None:
        self._events = events
        self._recorder = recorder

    def opening(self, versions: Versions | None) -> bytes:
        """As `events` has it."""
        return self._events.opening(versions)

    def piece(self, index: int, piece: Piece, versions: Versions | None) -> bytes:
        """As `events` has it."""
        self._recorder.piece(index, piece)
        return self._events.piece(index, piece, versions)

    def ending(self, versions: Versions | None, usage: Usage) -> bytes:
        """As `events` has it."""
        self._recorder.end(versions)
        return self._events.ending(versions, usage)

    def failure(self, error: ApiError) -> bytes:
        """As `events` has it: an answer that is not whole is not remembered."""
        return self._events.failure(error)


def recorded(events: EventEncoder, recorder: Recorder | None) -> EventEncoder:
    """The events, with a recorder if there is one."""
    return events if recorder is None else RecordedEvents(events, recorder)
