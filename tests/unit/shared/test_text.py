"""Tokens to text, one by one: whole characters only, and in the end the same text."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from shared.errors import ConfigurationError
from shared.settings import EMBEDDED_MODEL
from shared.text import TextTokenizer

BYTE_LEVEL = TextTokenizer.load(Path(EMBEDDED_MODEL))


def sentencepiece_like() -> TextTokenizer:
    """Words with a space mark and bytes as a fallback, as Llama 2 and Mistral have them."""
    words = ["<unk>", "▁Hello", "▁world", "s", "▁"]
    vocab = {piece: place for place, piece in enumerate(words + [f"<0x{byte:02X}>" for byte in range(256)])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(tokenizer)


def streamed(tokenizer: TextTokenizer, ids: list[int], context: list[int] | None = None) -> list[str]:
    stream = tokenizer.stream(context or [])
    return [*(stream.push(token) for token in ids), stream.flush()]


def test_character_over_several_tokens_appears_once_and_whole() -> None:
    text = "naïve 漢字 😀!"
    ids = BYTE_LEVEL.encode(text)
    pieces = streamed(BYTE_LEVEL, ids)
    assert len(ids) > len(text.split())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_stream_to_the_text_they_decode_to() -> None:
    rng = random.Random(2)
    for _ in range(200):
        ids = [rng.randrange(4096) if rng.random() < 0.5 else rng.randrange(1, 257) for _ in range(40)]
        assert "".join(streamed(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


def test_what_never_becomes_a_character_comes_with_the_flush() -> None:
    ids = BYTE_LEVEL.encode("😀")[:-1]
    pieces = streamed(BYTE_LEVEL, ids)
    assert "".join(pieces[:-1]) == ""
    assert set(pieces[-1]) == {"\ufffd"}


def test_continuation_keeps_the_space_before_its_first_word() -> None:
    tokenizer = sentencepiece_like()
    assert tokenizer.decode([2]) == "world"
    assert streamed(tokenizer, [2, 3], context=[1]) == [" world", "s", ""]


def test_character_begun_in_the_prompt_is_finished_in_the_completion() -> None:
    ids = BYTE_LEVEL.encode("😀")
    assert "".join(streamed(BYTE_LEVEL, ids[2:], context=ids[:2])) == "😀"


def test_bytes_that_undo_an_earlier_character_do_not_raise() -> None:
    tokenizer = sentencepiece_like()
    byte = {value: 5 + value for value in range(256)}
    pieces = streamed(tokenizer, [1, byte[0xC3], byte[0xA9], byte[0xFF], 3, 2])
    assert "".join(pieces).startswith("Helloé")
    assert "".join(pieces).endswith("s world")


def test_token_text_is_what_the_token_adds() -> None:
    tokenizer = sentencepiece_like()
    assert [tokenizer.token_text(token) for token in (1, 3, 5 + 0xC3)] == [" Hello", "s", r"bytes:\xc3"]
    assert BYTE_LEVEL.token_text(0) == "<|endoftext|>"


def test_bytes_of_tokens_add_up_to_the_text() -> None:
    text = "naïve 😀 龘 ok"
    ids = BYTE_LEVEL.encode(text)
    assert b"".join(BYTE_LEVEL.token_bytes(token) for token in ids).decode() == text
    texts = [BYTE_LEVEL.token_text(token) for token in BYTE_LEVEL.encode("😀")]
    assert "".join(texts) == r"bytes:\xf0bytes:\x9fbytes:\x98bytes:\x80"
    assert sentencepiece_like().token_bytes(5 + 0xC3) == b"\xc3"
    assert BYTE_LEVEL.token_bytes(0) == b"<|endoftext|>"


def test_different_tokens_are_spelled_differently() -> None:
    texts = [BYTE_LEVEL.token_text(token) for token in range(4096)]
    assert len(set(texts)) == len(texts)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize("special", [True, False])
def test_tags_of_tool_calls_are_shown_even_if_they_are_special_tokens(special: bool, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(Path(EMBEDDED_MODEL) / "tokenizer.json"))
    tags = [AddedToken(tag, normalized=False, special=special) for tag in ("<tool_call>", "</tool_call>")]
    tokenizer.add_tokens([*tags, AddedToken("<|python_tag|>", normalized=False, special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer.load(tmp_path)

    ids = loaded.encode("<|python_tag|><tool_call>{}</tool_call>")

    assert ids == tokenizer.encode("<|python_tag|><tool_call>{}</tool_call>").ids
    assert loaded.decode(ids) == "".join(streamed(loaded, ids)) == "<tool_call>{}</tool_call>"


def test_no_token_of_a_vocabulary_has_more_characters_than_it_says() -> None:
    longest = BYTE_LEVEL.max_characters_per_token
    assert longest == max(len(BYTE_LEVEL.decode([token])) for token in range(1, 4096))


def test_one_token_for_any_unknown_word_has_no_bound() -> None:
    tokenizer = TextTokenizer(Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    assert tokenizer.max_characters_per_token is None


def test_a_long_list_of_tokens_has_the_text_of_its_parts() -> None:
    ids = BYTE_LEVEL.encode("It was near the sea. ") * 100
    assert len(ids) > 256
    assert BYTE_LEVEL.decode(ids) == "".join(BYTE_LEVEL.decode([token]) for token in ids)


def begun_and_ended(folder: Path, **config: object) -> TextTokenizer:
    """A tokenizer whose file puts <s> before a text and </s> behind it."""
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "hi": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_special_tokens(["<s>", "</s>"])
    words.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TextTokenizer.load(folder)


@pytest.mark.parametrize(
    ("text", "config", "ids"),
    [
        ("hi", {}, [0, 2]),
        ("hi", {"add_bos_token": True}, [0, 2]),
        ("<s>hi", {}, [0, 2]),
        ("", {}, [0]),
        ("hi", {"add_bos_token": False}, [2]),
        ("<s>hi", {"add_bos_token": False}, [0, 2]),
    ],
)
def test_a_text_begins_once_and_has_no_end(
    text: str, config: dict[str, object], ids: list[int], tmp_path: Path
) -> None:
    assert begun_and_ended(tmp_path, **config).encode(text) == ids


def test_who_has_other_files_of_a_tokenizer_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*tokenizer\.json: (?!.*transformers makes)"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"From its vocab\.json, transformers makes one"):
        TextTokenizer.load(tmp_path)


def test_a_text_that_goes_on_another_gets_no_space_of_its_own() -> None:
    words = Tokenizer(BPE({"<unk>": 0, "\u2581": 1, "y": 2, "\n": 3, "\u2581y": 4}, [("\u2581", "y")]))
    words.normalizer = Sequence([Prepend("\u2581"), Replace(" ", "\u2581")])
    begins_with_a_space = TextTokenizer(words)
    assert begins_with_a_space.encode_part("y") == [4]
    assert begins_with_a_space.encode_next("y") == [2]
    assert begins_with_a_space.encode_next(" y") == [4]
    assert BYTE_LEVEL.encode_next(" sea") == BYTE_LEVEL.encode_part(" sea")


@pytest.mark.parametrize("known", ["Z", "7"])
def test_a_text_begins_whatever_the_vocabulary_knows(known: str) -> None:
    """No letter is in all of them, and some have no token for what is unknown."""
    words = Tokenizer(WordLevel({"<s>": 0, known: 1}))
    words.add_special_tokens(["<s>"])
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert TextTokenizer(words).encode(known) == [0, 1]
