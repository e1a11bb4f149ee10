"""Which tokens may come next in a text that is held to a JSON Schema, by llguidance. Never loads torch."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Self

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shared.errors import UnsupportedSchemaError
from shared.model_files import CONFIG_FILES, TOKENIZER_FILES, name_of, read_card, resolve
from shared.structured_output import LIMITS, raise_error_of

MAX_COMPILED = 32
"""Schemas that stay compiled: those used last."""

PATIENCE_S = 0.005
"""The compute thread waits no longer for one sequence's mask: all others wait with it."""

Forbidden = NDArray[np.bool_]
"""[vocabulary]."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The model's tokens as llguidance must know them."""

    tokens: LLTokenizer
    end_tokens: tuple[int, ...]
    size: int
    """Size of the model's logits; the tokenizer may know more tokens, or fewer."""

    @classmethod
    def load(cls, model: str, size: int) -> Self:
        """Raises UnsupportedSchemaError when nothing can be held to a schema with this model's tokenizer."""
        try:
            folder = resolve(model, CONFIG_FILES + TOKENIZER_FILES)
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            num_known = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
            ends = read_card(folder, name_of(model)).eos_token_ids
            tokens = LLTokenizer(tokenizer.to_str(), n_vocab=max(size, num_known), eos_token=list(ends))
        except Exception as error:  # the libraries raise bare Exception
            raise UnsupportedSchemaError(
                f"this model's tokenizer allows no structured output: {error}"
            ) from error
        return cls(tokens, ends, size)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a text is in its grammar: the matcher has read it, and `forbidden` cannot follow."""

    matcher: LLMatcher
    vocabulary: Vocabulary
    forbidden: Forbidden

    @classmethod
    def of(cls, matcher: LLMatcher, vocabulary: Vocabulary) -> Self:
        """Raises UnsupportedSchemaError when nothing can follow."""
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        raise_error_of(matcher)
        forbidden = np.unpackbits(mask, bitorder="little")[: vocabulary.size] == 0
        return cls(matcher, vocabulary, forbidden)

    def after(self, token: int) -> Self:
        self.matcher.consume_token(token)
        return self.of(self.matcher, self.vocabulary)


class Grammar:
    """The grammar of one sequence, which moves on with its tokens.

    It is compiled, and every mask computed, in another thread while the device computes logits.
    """

    def __init__(self, beginning: Future[_Place], thread: Executor) -> None:
        self._place = beginning
        self._thread = thread

    def is_ready(self) -> bool:
        """Whether it is known what may follow; waits a little for it."""
        wait([self._place], timeout=PATIENCE_S)
        return self._place.done()

    # Below here: when it is ready.

    @property
    def failure(self) -> str | None:
        """Why the text cannot go on. Raises what is no fault of the schema."""
        error = self._place.exception()
        if error is None or isinstance(error, UnsupportedSchemaError):
            return None if error is None else str(error)
        raise error

    @property
    def forbidden(self) -> Forbidden:
        """Tokens that cannot follow."""
        return self._place.result().forbidden

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """They may follow when the text is whole."""
        return self._place.result().vocabulary.end_tokens

    def consume(self, token: int) -> None:
        """The text goes on with this token."""
        self._place = self._thread.submit(_after, self._place, token)


def _after(place: Future[_Place], token: int) -> _Place:
    return place.result().after(token)


class GrammarCompiler:
    """Compiles grammars for one model's vocabulary."""

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        """`load` is called in a thread, when the first grammar comes."""
        self._load = load
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._compiling = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
        self._masking = ThreadPoolExecutor(max_workers=1, thread_name_prefix="masks")

    def begin(self, text: str) -> Grammar:
        """A grammar, given as llguidance reads it, where a text begins."""
        return Grammar(self._compiling.submit(self._begin, text), self._masking)

    def close(self) -> None:
        for thread in (self._compiling, self._masking):
            thread.shutdown(wait=False, cancel_futures=True)

    # Below here: in the thread that compiles.

    def _begin(self, text: str) -> _Place:
        if self._vocabulary is None:
            self._vocabulary = self._load()
        matcher = self._compiled.pop(text, None) or self._compile(text, self._vocabulary)
        self._compiled[text] = matcher
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return _Place.of(matcher.deep_copy(), self._vocabulary)

    def _compile(self, text: str, vocabulary: Vocabulary) -> LLMatcher:
        matcher = LLMatcher(vocabulary.tokens, text, log_level=0, limits=LIMITS)
        raise_error_of(matcher)
        return matcher
