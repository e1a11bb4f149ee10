"""Between text and tokens, with the tokenizer of the model. Never loads torch."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram

from shared.errors import ConfigurationError

_SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_NUM_PROBES = 1000
_BEFORE = "\n"
"""Stands for the text before another one; tokens seldom span the end of a line."""
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The decoding of bytes that are no whole character."""

_TOOL_CALL_TAGS = ("<tool_call>", "</tool_call>")
"""Some models declare them as special tokens, which decoding leaves out."""

_LONG_TOKENS = 256
"""Tokens from which decoding them takes longer than handing it to a batch."""

_NUM_CONTEXT_TOKENS = 8
"""Enough of the prompt to decode the first new token as the continuation that it is."""


def _byte_level_alphabet() -> dict[str, int]:
    """The letters that byte-level vocabularies write for bytes: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_level_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _bytes_of(name: str) -> bytes:
    """The bytes of a token that is no whole text, from its name in the vocabulary."""
    if byte := _BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(byte[1])
    if all(letter in _BYTE_OF_LETTER for letter in name):
        return bytes(_BYTE_OF_LETTER[letter] for letter in name)
    return name.encode()


class TextTokenizer:
    """A `tokenizers.Tokenizer` as the services use it."""

    def __init__(self, tokenizer: Tokenizer, *, begins_texts: bool = True) -> None:
        """`begins_texts`: whether it may put special tokens before a text, as its file says."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._begin = _before_a_text(tokenizer) if begins_texts else []
        self._tokens: dict[int, tuple[str, bytes]] = {}
        self._alone: dict[int, str] = {}

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `folder`/tokenizer.json, and whether it begins texts from tokenizer_config.json.

        Raises ConfigurationError when that cannot be done.
        """
        path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
        try:
            options = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
            begins_texts = options.get("add_bos_token") is not False
            return cls(_showing_tool_calls(Tokenizer.from_file(str(path))), begins_texts=begins_texts)
        except Exception as error:  # the library raises bare Exception
            raise ConfigurationError(f"cannot read {path}: {error}{_way_out(folder)}") from error

    def encode(self, text: str) -> list[int]:
        """Tokens of `text` after the special tokens that this tokenizer itself puts before a text, once.

        None follow it: what the model is to go on with has no end yet.
        """
        ids = self._encode(text, add_special_tokens=False)
        return ids if ids[: len(self._begin)] == self._begin else [*self._begin, *ids]

    def encode_part(self, text: str) -> list[int]:
        """Tokens of a text without special tokens around it."""
        return self._encode(text, add_special_tokens=False)

    def encode_next(self, text: str) -> list[int]:
        """Tokens of a text that goes on another one, without the space that some begin each text with."""
        together = self.encode_part(_BEFORE + text)
        before = self._before
        return together[len(before) :] if together[: len(before)] == before else self.encode_part(text)

    @cached_property
    def _before(self) -> list[int]:
        return self.encode_part(_BEFORE)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # A batch releases the interpreter's lock, which a single text holds: seconds for a long one.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    @cached_property
    def max_characters_per_token(self) -> int | None:
        """Characters of the vocabulary's longest token; None: one token can stand for any text."""
        if not isinstance(self._tokenizer.model, (BPE, Unigram)):
            return None  # one token for each unknown word, however long
        return max(map(len, self._tokenizer.get_vocab()))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`, by default without special tokens. A long one releases the interpreter's lock."""
        text: str
        if len(ids) > _LONG_TOKENS:
            (text,) = self._tokenizer.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        else:
            text = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def decode_alone(self, token: int) -> str:
        """The text of `token` with nothing before it; decoded once."""
        text = self._alone.get(token)
        if text is None:
            text = self._alone[token] = self.decode([token])
        return text

    def token_text(self, token: int) -> str:
        """One token as people see it.

        A special token is spelled as in the vocabulary, a piece of a character as `bytes:\\xf0\\x9f`.
        """
        return self._token(token)[0]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token adds to a text, in UTF-8; for a special token, its name."""
        return self._token(token)[1]

    def _token(self, token: int) -> tuple[str, bytes]:
        known = self._tokens.get(token)
        if known is None:
            known = self._tokens[token] = self._spell(token)
        return known

    def _spell(self, token: int) -> tuple[str, bytes]:
        # Behind itself a token shows the space it begins with, which decoders drop from a text's start.
        text = self.decode([token, token]).removeprefix(self.decode([token]))
        if text and _UNFINISHED not in text:
            return text, text.encode()
        name = self._tokenizer.id_to_token(token) or f"<{token}>"
        if not text:
            return name, name.encode()
        raw = _bytes_of(name)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    def stream(self, context: Sequence[int] = ()) -> "TextStream":
        """Decode tokens as they come, as the continuation of `context` (the prompt's tokens)."""
        return TextStream(self, list(context[-_NUM_CONTEXT_TOKENS:]))


def _before_a_text(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    if tokenizer.post_processor is None:
        return []
    marks: list[int] = tokenizer.encode("").ids
    for text in ("a", "A", "0", *islice(tokenizer.get_vocab(), _NUM_PROBES)):
        bare = _ids_or_none(tokenizer, text, add_special_tokens=False)
        whole = _ids_or_none(tokenizer, text, add_special_tokens=True)
        if not (bare and whole) or set(marks) & set(bare):
            continue
        if len(whole) == len(marks) + len(bare):
            places = (place for place in range(len(marks) + 1) if whole[place:][: len(bare)] == bare)
            return whole[: next(places, 0)]
    return []


def _ids_or_none(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int] | None:
    """None where the tokenizer has no token for the text, and none for what is unknown."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except Exception:  # noqa: BLE001  # the library raises bare Exception
        return None
    return ids


def _way_out(folder: Path) -> str:
    """Advice for who has other files of a tokenizer."""
    others = [name for name in _SLOW_TOKENIZER_FILES if (folder / name).exists()]
    if not others or (folder / "tokenizer.json").exists():
        return ""
    return (
        f". From its {others[0]}, transformers makes one: "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


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
        self._decode_alone = tokenizer.decode_alone
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
        self._given = self._decode_alone(token) if self._num_given == 1 else self._decode(self._window)
        return new

    def flush(self) -> str:
        """The text still held: an unfinished character, shown as the replacement character."""
        return self._decode(self._window)[len(self._given) :]
