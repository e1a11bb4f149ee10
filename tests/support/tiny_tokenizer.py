"""A tokenizer for the tiny models: one token for each character, and three special ones."""

import json
import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from tests.support.models import VOCAB_SIZE

_BOS = "<s>"
_SPECIAL_TOKENS = (_BOS, "<|im_start|>", "<|im_end|>")
_CHARACTERS = string.ascii_letters + string.digits + "\n !\"'(),-./:;<=>?[]_{|}"


def save_tiny_tokenizer(folder: Path, chat_template: str) -> None:
    """Save it in `folder`, with this template. It puts `<s>` before every text, unless told not to."""
    words = [*_SPECIAL_TOKENS, *_CHARACTERS]
    words += [f"({number})" for number in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in _SPECIAL_TOKENS])
    tokenizer.post_processor = TemplateProcessing(single=f"{_BOS} $A", special_tokens=[(_BOS, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _BOS, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(chat_template)
