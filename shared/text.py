"""Between text and tokens, with the tokenizer of the model. Never loads torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from shared.errors import ConfigurationError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What bytes that are no whole character decode to."""

_TOOL_CALL_TAGS = ("<tool_call>", "</tool_call>")
"""Some models declare them as special tokens, which decoding leaves out."""

_NUM_CONTEXT_TOKENS = 8
"""Enough of the prompt to decode the first new token as the continuation that it is."""


class TextTokenizer:
    """A `tokenizers.Tokenizer` as the services use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._token_texts: dict[int, str] = {}

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `folder`/tokenizer.json. Raises ConfigurationError when that cannot be done."""
        path = folder / "tokenizer.json"
        try:
            return cls(_showing_tool_calls(Tokenizer.from_file(str(path))))
        except Exception as error:  # the library raises bare Exception
            raise ConfigurationError(f"cannot read {path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, with the special tokens that this tokenizer itself puts around a text."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def encode_part(self, text: str) -> list[int]:
        """Tokens of a text that goes on another: without special tokens around it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def token_text(self, token: int) -> str:
        """One token as people see it: its text, or the vocabulary's own spelling when it has none.

        Special tokens and pieces of a character have no text of their own.
        """
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = self._spell(token)
        return text

    def _spell(self, token: int) -> str:
        # Behind itself a token shows the space it begins with, which decoders drop from a text's start.
        text = self.decode([token, token]).removeprefix(self.decode([token]))
        if text and _UNFINISHED not in text:
            return text
        return self._tokenizer.id_to_token(token) or f"<{token}>"

    def stream(self, context: Sequence[int] = ()) -> "TextStream":
        """Decode tokens as they come, as the continuation of `context` (the prompt's tokens)."""
        return TextStream(self, list(context[-_NUM_CONTEXT_TOKENS:]))


def _showing_tool_calls(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, whose texts show the tags of tool calls."""
    added = tokenizer.get_added_tokens_decoder().values()
    if not any(token.special and token.content in _TOOL_CALL_TAGS for token in added):
        return tokenizer
    description = json.loads(tokenizer.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in _TOOL_CALL_TAGS
    return Tokenizer.from_str(json.dumps(description))


class TextStream:
    """Gives out text as soon as it is whole characters.

    Decodes a window of the last given-out tokens and those still held, because the text of a
    token may depend on the one before it. `tokenizers.decoders.DecodeStream` does the same, but
    raises on byte sequences that a model is free to produce, and cannot give out what is left.
    """

    def __init__(self, tokenizer: TextTokenizer, context: list[int]) -> None:
        self._decode = tokenizer.decode
        self._window = context
        self._num_given = len(context)
        self._given = self._decode(context).rstrip(_UNFINISHED) if context else ""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._window.append(token)
        text = self._decode(self._window)
        if len(text) <= len(self._given) or text.endswith(_UNFINISHED):
            return ""
        new = text[len(self._given) :]
        self._window = self._window[self._num_given :]
        self._num_given = len(self._window)
        self._given = self._decode(self._window)
        return new

    def flush(self) -> str:
        """The text still held: an unfinished character, shown as the replacement character."""
        return self._decode(self._window)[len(self._given) :]
