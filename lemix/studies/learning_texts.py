"""The texts of the learning study: bundled bulletins, dealt out to requests and training batches."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random

from lemix.demo_data import DATA
from lemix.publishing import read_batches
from lemix.simulation.workload import Workload
from shared.errors import ConfigurationError
from shared.settings import EMBEDDED_MODEL
from shared.text import TextTokenizer

Text = tuple[int, ...]
"""Token ids."""


@cache
def bulletins() -> tuple[Text, ...]:
    """The bundled examples, as the embedded model reads them."""
    tokenizer = TextTokenizer.load(Path(EMBEDDED_MODEL))
    batches = [json.loads(batch.body) for batch in read_batches(DATA / "bulletins_train.jsonl")]
    return tuple(
        tuple(tokenizer.encode("".join(example.values())))
        for batch in batches
        for example in batch["examples"]
    )


def with_texts(workload: Workload, texts: Sequence[Text], rng: Random) -> Workload:
    """The same requests and batches at the same times, each sequence one of the texts.

    Raises ConfigurationError when there are too few of them.
    """
    lengths = [*(task.lengths for task in workload.requests), *(task.lengths for task in workload.batches)]
    num_wanted = sum(map(len, lengths))
    if num_wanted > len(texts):
        raise ConfigurationError(f"{num_wanted} texts are wanted, there are {len(texts)}")
    rest = iter(rng.sample(texts, num_wanted))
    batches = [(batch, _take(rest, len(batch.lengths))) for batch in workload.batches]
    requests = [(request, _take(rest, len(request.lengths))) for request in workload.requests]
    return Workload(
        requests=tuple(
            replace(request, lengths=_lengths(taken), prompts=taken) for request, taken in requests
        ),
        batches=tuple(replace(batch, lengths=_lengths(taken), examples=taken) for batch, taken in batches),
        release=workload.release,
    )


def _take(texts: Iterator[Text], count: int) -> tuple[Text, ...]:
    return tuple(islice(texts, count))


def _lengths(texts: Sequence[Text]) -> tuple[int, ...]:
    return tuple(map(len, texts))
