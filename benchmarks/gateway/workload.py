"""The load that the processes of this benchmark agree on: how many streams, how fast, and which tokens."""

import json
import re
import shutil
from pathlib import Path

from shared.settings import EMBEDDED_MODEL
from shared.text import TextTokenizer

NUM_STREAMS = 1000
TOKENS_PER_S = 5000
"""The rate of all streams together."""
NUM_TOKENS = 50
"""The tokens of each stream."""
SEQUENCES_PER_ITERATION = 32
"""Tokens in one message."""
PROMPT_CHARACTERS = 20_000
PROMPT_EVERY_S = 0.5
CONTEXT_LENGTH = 131_072

PUBLISHED, RECEIVED, PROMPTED = "published.npy", "received.npy", "prompted.npy"
"""Files in a round's folder: monotonic seconds of each token, of each stream; and of each long prompt."""


def model_folder(base: Path) -> Path:
    """The embedded model's files without its weights, and with room for long prompts."""
    folder = base / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for path in Path(EMBEDDED_MODEL).glob("*.json"):
        shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT_LENGTH}))
    return folder


def words(folder: Path) -> list[int]:
    """Tokens that are small letters, perhaps behind a space: as long in JSON as in the text."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(token for text, token in vocabulary.items() if re.fullmatch("Ġ?[a-z]+", text))


def tokens_of(stream: int, known: list[int]) -> list[int]:
    """The tokens of a stream, which differ from those of the next stream."""
    return [known[(stream * 37 + index) % len(known)] for index in range(NUM_TOKENS)]


def text_ends(tokens: list[int], tokenizer: TextTokenizer) -> list[int]:
    """Characters of the text up to each token, that included."""
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(tokenizer.token_text(token)))
    return ends[1:]
