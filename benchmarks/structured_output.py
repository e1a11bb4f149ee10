"""Eight streams that write JSON of a schema against eight that write anything, through one node; and the
time that a schema's compilation and masks take by themselves, for three sizes of vocabulary.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode import BusStreams
from benchmarks.models import SHAPES, text_model_folder, write_tokenizer
from benchmarks.report import spread
from benchmarks.workload import MAX_TOKENS, prompt_tokens
from lemix.launcher import LocalCluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions
from services.stage_worker.sampling.grammar import Grammar, GrammarCompiler, Vocabulary
from shared.bus.nats import NatsBus
from shared.messages.inference import Sampling
from shared.settings import EMBEDDED_MODEL

NUM_ROUNDS = 5
MODEL = "big"
_TEXT = {"type": "string", "maxLength": 60}
_ITEM = {
    "type": "object",
    "properties": {
        "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 99},
        "price": {"type": "number", "minimum": 0},
        "state": {"enum": ["new", "used", "broken"]},
        "note": {"anyOf": [_TEXT, {"type": "null"}]},
    },
    "required": ["sku", "quantity", "price", "state", "note"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "orders": {"type": "array", "items": _ITEM, "minItems": 16},
    "person": {
        "type": "object",
        "properties": {"name": _TEXT, "age": {"type": "integer"}, "tags": {"type": "array", "items": _TEXT}},
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "any_object": {"type": "object"},
    "wide": {"type": "object", "properties": {f"field_{number}": _TEXT for number in range(100)}},
}

_ORDER = {"sku": "ABC-1234", "quantity": 2, "price": 9.5, "state": "used", "note": "careful, it is glass"}
TEXTS: dict[str, Any] = {
    "orders": [_ORDER] * 16,
    "person": {"name": "Ada Lovelace", "age": 36, "tags": ["mathematics", "engines"]},
    "any_object": {"a": [1, 2, {"b": "some text that goes on for a while"}], "c": None, "d": {"e": 1.5e3}},
    "wide": {f"field_{number}": f"value number {number} of many" for number in range(100)},
}
"""The text that is written while masks are measured."""


async def decode(work: Path) -> dict[str, Any]:
    """Alternate rounds of both sides; `orders` has no end within MAX_TOKENS."""
    folder = text_model_folder(MODEL, work / "models")
    prompts = prompt_tokens(SHAPES[MODEL]["vocab_size"])
    plain = Sampling(max_tokens=MAX_TOKENS, temperature=1.0)
    held = Sampling(max_tokens=MAX_TOKENS, temperature=1.0, json_schema=json.dumps(SCHEMAS["orders"]))
    sides = {"with_schema": held, "without": plain}
    options = ClusterOptions(name="structured", runs_dir=work, nodes=1, stages=2, model=str(folder))
    clear(options.run_dir)
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    async with LocalCluster(options) as cluster:
        bus = await NatsBus.connect(cluster.nats_url, name="bench")
        streams = BusStreams(bus)
        await streams.start()
        for sampling in sides.values():
            await streams.run(prompts, sampling)
        for number in range(NUM_ROUNDS):
            for side in sorted(sides, reverse=bool(number % 2)):
                rounds[side].append(await streams.run(prompts, sides[side]))
        await bus.close()
    return {
        side: {kind: spread([one[kind] for one in measured]) for kind in measured[0]}
        for side, measured in rounds.items()
    } | {"with_to_without": _ratios(rounds["with_schema"], rounds["without"])}


def _ratios(held: Sequence[dict[str, float]], plain: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Ratios of the rounds that ran one after the other."""
    return {
        kind: spread([one[kind] / other[kind] for one, other in zip(held, plain, strict=True)])
        for kind in ("decode_tokens_per_s", "tokens_per_s")
    }


def masks(vocabulary: Vocabulary) -> dict[str, Any]:
    """Processor time, so that other work matters little: milliseconds to compile each schema, microseconds
    to read a token and find the next mask.
    """
    compiler = GrammarCompiler(lambda: vocabulary)
    _timed_ms(compiler, {"const": "the vocabulary is loaded"})
    result = {name: _of_schema(compiler, vocabulary, name) for name in SCHEMAS}
    compiler.close()
    return result


def _of_schema(compiler: GrammarCompiler, vocabulary: Vocabulary, name: str) -> dict[str, Any]:
    compile_ms, grammar = _timed_ms(compiler, SCHEMAS[name])
    times_us = []
    for token in vocabulary.tokens.tokenize_str(json.dumps(TEXTS[name])):
        start_s = time.process_time()
        grammar.consume(token)
        _until_ready(grammar)
        times_us.append((time.process_time() - start_s) * 1e6)
    assert grammar.failure is None, grammar.failure
    return {"compile_ms": compile_ms, "token_us": spread(times_us)}


def _timed_ms(compiler: GrammarCompiler, schema: Any) -> tuple[float, Grammar]:
    start_s = time.process_time()
    grammar = compiler.begin(json.dumps(schema))
    _until_ready(grammar)
    return (time.process_time() - start_s) * 1e3, grammar


def _until_ready(grammar: Grammar) -> None:
    while not grammar.is_ready():
        pass


def vocabularies(folder: Path) -> dict[str, Vocabulary]:
    """That of the embedded model, and larger ones of the same kind."""
    config = {"max_position_embeddings": 1, "eos_token_id": 0}
    found = {"4096": Vocabulary.load(EMBEDDED_MODEL, 4096)}
    for size in (32_000, 128_000):
        own = folder / f"vocabulary-{size}"
        own.mkdir(parents=True, exist_ok=True)
        write_tokenizer(own / "tokenizer.json", size)
        (own / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
        found[str(size)] = Vocabulary.load(str(own), size)
    return found


async def main(work: Path) -> dict[str, Any]:
    masked = {size: masks(vocabulary) for size, vocabulary in vocabularies(work / "models").items()}
    return {"masks_by_vocabulary": masked, f"decode_{MODEL}": await decode(work)}
