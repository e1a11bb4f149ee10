"""The texts of the demo, bundled with the package (see data/README.md for where they are from)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from lemix.publishing import BatchLine, read_batches
from shared.chat_template_files import load_chat_template
from shared.clock import Clock
from shared.errors import ConfigurationError
from shared.model_files import TOKENIZER_FILES, resolve
from shared.text import TextTokenizer

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoData:
    """The texts that a demo sends, and those that it measures with."""

    prompts: Sequence[str]
    batches: Sequence[BatchLine]
    """A kind of text that the embedded model has not seen."""
    num_batch_tokens: int
    """Tokens of all the batches' texts."""
    held_out: Sequence[str]
    """The same kind of text, in no batch."""
    has_chat: bool
    """Whether the model has a chat template."""

    @classmethod
    def load(cls, *, num_batches: int, run_id: str, model: str, clock: Clock) -> Self:
        """Read the bundled files; `run_id` makes the batches' ids new, so that a server that has
        seen an earlier demo takes them. Raises ConfigurationError when there are too
        few, or the tokenizer of `model` cannot be read.
        """
        folder = resolve(model, TOKENIZER_FILES)
        tokenizer = TextTokenizer.load(folder)
        batches = read_batches(DATA / "bulletins_train.jsonl")
        if num_batches > len(batches):
            raise ConfigurationError(f"{num_batches} training batches are wanted, {len(batches)} are bundled")
        batches = batches[:num_batches]
        return cls(
            prompts=_lines(DATA / "prompts.txt"),
            batches=[_renamed(batch, run_id) for batch in batches],
            num_batch_tokens=sum(len(tokenizer.encode(text)) for batch in batches for text in _texts(batch)),
            held_out=_lines(DATA / "bulletins_heldout.txt"),
            has_chat=load_chat_template(folder, clock) is not None,
        )


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _texts(batch: BatchLine) -> list[str]:
    """Every part of every example; the bundled ones are plain text, and prompt with completion."""
    return [text for example in json.loads(batch.body)["examples"] for text in example.values()]


def _renamed(batch: BatchLine, run_id: str) -> BatchLine:
    batch_id = f"{run_id}-{batch.batch_id}"
    body = json.dumps({**json.loads(batch.body), "id": batch_id}).encode()
    return BatchLine(number=batch.number, batch_id=batch_id, body=body)
