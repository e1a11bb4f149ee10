"""The running sequences that can have rows in the next iteration, by weights version."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from services.stage_worker.node.sequence import Sequence


@dataclass(slots=True)
class _Line:
    """The sequences of one version by their numbers, longest unserved first."""

    decodes: dict[int, Sequence] = field(default_factory=dict)
    prompts: dict[int, Sequence] = field(default_factory=dict)


class ReadySequences:
    """Every change costs the same, however many sequences run."""

    def __init__(self) -> None:
        self._lines: dict[int | None, _Line] = {}
        """By `Sequence.version`; empty ones are dropped."""
        self.num_prompts = 0
        """Sequences with more rows left than that of their newest token."""

    def __bool__(self) -> bool:
        return bool(self._lines)

    def versions(self) -> list[int | None]:
        """The versions of `Sequence.version` that there are."""
        return list(self._lines)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence with rows left last in line."""
        line = self._lines.setdefault(sequence.version, _Line())
        if sequence.is_decoding:
            line.decodes[sequence.number] = sequence
        else:
            line.prompts[sequence.number] = sequence
            self.num_prompts += 1

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out; False when it is not here."""
        line = self._lines.get(sequence.version)
        if line is None:
            return False
        was_decoding = line.decodes.pop(sequence.number, None) is not None
        was_prompt = line.prompts.pop(sequence.number, None) is not None
        self.num_prompts -= was_prompt
        if not line.decodes and not line.prompts:
            del self._lines[sequence.version]
        return was_decoding or was_prompt

    def decodes(self, is_wanted: Callable[[int | None], bool]) -> Iterator[Sequence]:
        """Sequences of the wanted versions with nothing left but their newest token."""
        return chain.from_iterable(line.decodes.values() for line in self._wanted(is_wanted))

    def prompts(self, is_wanted: Callable[[int | None], bool]) -> Iterator[Sequence]:
        """The others of the wanted versions."""
        return chain.from_iterable(line.prompts.values() for line in self._wanted(is_wanted))

    def _wanted(self, is_wanted: Callable[[int | None], bool]) -> list[_Line]:
        return [line for version, line in self._lines.items() if is_wanted(version)]
