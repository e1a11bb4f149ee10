"""Examples that a run holds out by itself: the first of those that are published, on its disk.

Which ones is decided by a hash of the example, so that it is the same in every batch, epoch and life of the
trainer. The set grows until versions are compared on it; then it is frozen. What is in it never trains.
"""

import logging
import threading
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from pydantic import ValidationError

from services.trainer.publication.stored_example import StoredExample
from shared.disk import replace_file
from shared.documents import Document
from shared.encoding import LabelledTokens
from shared.errors import ConfigurationError

HOLD_OUT_FILE = "held_out.json"
MIN_EXAMPLES = 16
"""Fewer say too little of a version to judge it by them: the set is not frozen before it has so many."""
MAX_EXAMPLES = 256
"""More would cost time at each evaluation."""
MAX_REFUSED = 10_000
"""Examples that the disk has refused, which are remembered. With so many the set does not grow any more."""

log = logging.getLogger(__name__)


def is_chosen(example: LabelledTokens, share: float) -> bool:
    """Whether the example belongs to that share of all examples: decided by its hash."""
    return int.from_bytes(_digest(example)[:8]) < share * 2**64


class _Stored(Document):
    model: str
    is_frozen: bool
    examples: tuple[StoredExample, ...]


class HoldOut:
    """The set. `select` and `save` block while they write, and may be called from any thread."""

    def __init__(self, folder: Path, *, model: str, share: float) -> None:
        """`folder`: the run's checkpoints; `share`: of the published examples; 0: no further ones."""
        self._path = folder / HOLD_OUT_FILE
        self._model = model
        self._share = share
        self._lock = threading.Lock()
        self._examples: dict[bytes, LabelledTokens] = {}
        """By digest."""
        self._frozen: tuple[LabelledTokens, ...] = ()
        """The examples that versions are compared on; empty: the set may still grow."""
        self._refused: set[bytes] = set()
        """Digests of examples that the disk did not take: they train, so they are never held out later."""

    def load(self) -> None:
        """Go on with the set of the run's earlier life. Raises ConfigurationError when it is damaged."""
        if not self._path.exists():
            return
        try:
            stored = _Stored.model_validate_json(self._path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigurationError(f"cannot read {self._path}: {error}") from error
        if stored.model == self._model:
            examples = [each.labelled for each in stored.examples]
            self._examples = {_digest(example): example for example in examples}
            self._frozen = tuple(examples) if stored.is_frozen and self._share else ()

    def select(self, examples: Sequence[LabelledTokens]) -> list[bool]:
        """Which of these examples are held out, and must not train. New ones are on the disk when it returns.

        What the disk refuses to hold is not held out.
        """
        with self._lock:
            self._add([example for example in examples if self._is_wanted(example)])
            return [self._is_held_out(example) for example in examples]

    def bars(self, example: LabelledTokens) -> bool:
        """Whether the example must not train by another way than `select`: it is held out, or may yet be."""
        with self._lock:
            return self._is_held_out(example) or self._is_wanted(example)

    @property
    def is_frozen(self) -> bool:
        """Whether versions are compared on it, so that it must not grow."""
        return bool(self._frozen)

    def freeze(self) -> tuple[LabelledTokens, ...]:
        """The examples to compare versions on: from the first call that finds enough, always the same.

        `save` should follow that call. Until then there are none.
        """
        if not self.is_frozen and self._share and len(self._examples) >= MIN_EXAMPLES:
            self._frozen = tuple(self._examples.values())
            log.info("versions are compared on %d examples that are held out", len(self._frozen))
        return self._frozen

    def save(self) -> None:
        """Have the disk hold the set as it is. Raises OSError."""
        with self._lock:
            self._write(self._examples)

    def _is_held_out(self, example: LabelledTokens) -> bool:
        return bool(self._examples) and _digest(example) in self._examples

    def _is_wanted(self, example: LabelledTokens) -> bool:
        return self._may_grow and is_chosen(example, self._share) and _digest(example) not in self._refused

    @property
    def _may_grow(self) -> bool:
        has_room = len(self._examples) < MAX_EXAMPLES and len(self._refused) < MAX_REFUSED
        return self._share > 0 and has_room and not self.is_frozen

    def _add(self, wanted: Sequence[LabelledTokens]) -> None:
        new = {digest: each for each in wanted if (digest := _digest(each)) not in self._examples}
        grown = dict(list((self._examples | new).items())[:MAX_EXAMPLES])
        if len(grown) == len(self._examples):
            return
        try:
            self._write(grown)
        except OSError as error:
            log.error("%d examples are trained that should be held out: %s", len(new), error)
            self._refused |= new.keys()
        else:
            self._examples = grown

    def _write(self, examples: dict[bytes, LabelledTokens]) -> None:
        stored = _Stored(
            model=self._model,
            is_frozen=self.is_frozen,
            examples=tuple(map(StoredExample.of, examples.values())),
        )
        replace_file(self._path, stored.model_dump_json() + "\n", mode=0o600)  # corrections are private


def _digest(example: LabelledTokens) -> bytes:
    return sha256(repr((example.tokens, example.label_rows)).encode()).digest()
