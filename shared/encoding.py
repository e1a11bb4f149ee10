"""Examples as tokens: what a stage computes on, and which next tokens count in the loss."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

from shared.chat_template import ChatTemplate, Segment
from shared.chat_template_files import load_chat_template
from shared.clock import Clock
from shared.errors import ChatTemplateError, InvalidBatchError, RewrittenTurnsError
from shared.examples import (
    AnyExample,
    Conversation,
    Example,
    PlainText,
    Preference,
    PromptCompletion,
    TokenIds,
)
from shared.model_files import ModelCard
from shared.text import TextTokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """One example; the token after each of `label_rows` counts in the loss."""

    tokens: tuple[int, ...]
    label_rows: tuple[int, ...]

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(self.tokens[row + 1] for row in self.label_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleEncoder:
    """Turns examples into tokens of one model."""

    card: ModelCard
    max_tokens: int
    """Tokens that can be learnt at once; no sequence may be longer than the model's context either."""
    tokenizer: TextTokenizer | None
    """None: the model has none, so that only token ids can be learnt."""
    chat_template: ChatTemplate | None

    @classmethod
    def load(
        cls,
        card: ModelCard,
        model_folder: Path,
        clock: Clock,
        *,
        max_tokens: int,
        chat_template: Path | None = None,
    ) -> Self:
        """For the model in `model_folder`.

        `chat_template` is a file to use instead of the model's own template.
        Raises ConfigurationError when the model's files cannot be used.
        """
        has_tokenizer = (model_folder / "tokenizer.json").exists()
        return cls(
            card=card,
            max_tokens=max_tokens,
            tokenizer=TextTokenizer.load(model_folder) if has_tokenizer else None,
            chat_template=load_chat_template(model_folder, clock, chosen=chat_template),
        )

    def sequences(self, example: AnyExample) -> tuple[LabelledTokens, ...]:
        """The sequences that an example is learnt from: one, or of a preference both answers', the preferred
        one's first. Raises InvalidBatchError when it cannot be learnt from.
        """
        if not isinstance(example, Preference):
            return (self.encode(example),)
        pair = tuple(self._encode_output(*each) for each in example.conversations.items())
        num_tokens = sum(len(each.tokens) for each in pair)
        if num_tokens > self.max_tokens:
            raise InvalidBatchError(
                f"has {num_tokens} tokens with both outputs, at most {self.max_tokens} can be learnt at once"
            )
        return pair

    def _encode_output(self, name: str, conversation: Conversation) -> LabelledTokens:
        try:
            return self.encode(conversation)
        except InvalidBatchError as error:
            raise InvalidBatchError(f"with {name}: {error}") from error

    def encode(self, example: Example) -> LabelledTokens:
        """The example as tokens. Raises InvalidBatchError when it cannot be learnt from."""
        encoded = self._encode(example)
        self._check(encoded)
        return encoded

    def _encode(self, example: Example) -> LabelledTokens:
        match example:
            case TokenIds(token_ids=tokens):
                return _all_but_first(tokens)
            case PlainText(text=text):
                self._check_size(len(text))
                return _all_but_first(self._ended(self._text_tokenizer.encode(text)))
            case PromptCompletion(prompt=prompt, completion=completion):
                self._check_size(len(prompt) + len(completion))
                if prompt.endswith(" "):
                    warn_once(
                        "some prompts end in a space: most models have it at the beginning of the next word, "
                        "and learn less from such examples"
                    )
                tokenizer = self._text_tokenizer
                answer = self._ended(tokenizer.encode_next(completion))
                return _joined([(tokenizer.encode(prompt), False), (answer, True)])
            case Conversation():
                return self._encode_conversation(example)

    def _encode_conversation(self, conversation: Conversation) -> LabelledTokens:
        if self.chat_template is None:
            raise InvalidBatchError("messages cannot be used: the model has no chat template")
        try:
            segments = _segments(self.chat_template, conversation)
        except ChatTemplateError as error:
            raise InvalidBatchError(str(error)) from error
        self._check_size(sum(len(part.text) for part in segments))
        # The template writes the special tokens, so the tokenizer must not put its own around each piece.
        tokenizer, parts, is_begun = self._text_tokenizer, [], False
        for part in segments:
            encode = tokenizer.encode_next if is_begun else tokenizer.encode_part
            parts.append((encode(part.text), part.learnt))
            is_begun = is_begun or bool(part.text)
        return _joined(parts)

    def _check_size(self, num_characters: int) -> None:
        """Refuse before it costs time what has too many tokens in any case."""
        longest = self._text_tokenizer.max_characters_per_token
        if longest is not None and num_characters > self._max_length * longest:
            raise InvalidBatchError(
                f"has {num_characters} characters, more than {self._max_length} tokens of at most {longest}"
            )

    @property
    def _max_length(self) -> int:
        """Most tokens of a sequence."""
        return min(self.card.context_length, self.max_tokens)

    @property
    def _text_tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise InvalidBatchError("the model has no tokenizer: only token_ids can be used")
        return self.tokenizer

    def _ended(self, tokens: Sequence[int]) -> list[int]:
        ends = self.card.eos_token_ids
        return [*tokens, *ends[:1]] if not tokens or tokens[-1] not in ends else list(tokens)

    def _check(self, encoded: LabelledTokens) -> None:
        num_tokens = len(encoded.tokens)
        if num_tokens > self._max_length:
            raise InvalidBatchError(
                f"has {num_tokens} tokens, at most {self._max_length} can be learnt at once"
            )
        if num_tokens < 2:
            raise InvalidBatchError(f"has {num_tokens} tokens, needs at least 2")
        for token in encoded.tokens:
            if not 0 <= token < self.card.vocab_size:
                raise InvalidBatchError(f"token id {token} is not in 0..{self.card.vocab_size - 1}")
        if not encoded.label_rows:
            raise InvalidBatchError("has nothing to learn: no token of a completion or of the assistant")


def _segments(template: ChatTemplate, conversation: Conversation) -> list[Segment]:
    """Cut out all answers, or the last one alone where the template rewrites earlier turns (Qwen 3's does).

    Raises ChatTemplateError.
    """
    try:
        return template.segments(conversation)
    except RewrittenTurnsError as error:
        warn_once(f"of some conversations only the last answer is learnt: {error}")
        return template.last_answer(conversation)


@lru_cache(maxsize=128)
def warn_once(line: str) -> None:
    """Log the line for the first of many examples."""
    log.warning(line)


def _all_but_first(tokens: Sequence[int]) -> LabelledTokens:
    return LabelledTokens(tuple(tokens), tuple(range(len(tokens) - 1)))


def _joined(parts: Sequence[tuple[Sequence[int], bool]]) -> LabelledTokens:
    """Put parts together; the tokens of a learnt part count, but for the example's first token."""
    tokens: list[int] = []
    learnt: list[bool] = []
    for part, counts in parts:
        tokens.extend(part)
        learnt.extend([counts] * len(part))
    rows = tuple(row for row in range(len(tokens) - 1) if learnt[row + 1])
    return LabelledTokens(tuple(tokens), rows)
