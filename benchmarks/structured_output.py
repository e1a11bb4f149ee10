"""Eight streams that write JSON of a schema against eight that write anything, in one stage; and the time
that a schema's compilation and masks take by themselves, for three sizes of vocabulary.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import schema_over_http
from benchmarks.models import SHAPES, text_model_folder, write_tokenizer
from benchmarks.report import spread
from benchmarks.workload import BATCH_SIZE, MAX_TOKENS, prompt_tokens
from services.stage_worker.compute.executor import SequenceChunk
from services.stage_worker.compute.sampling.grammar import Grammar, GrammarCompiler, Vocabulary
from services.stage_worker.compute.torch_executor import TorchExecutor
from services.stage_worker.settings import StageWorkerSettings
from shared.messages.inference import Sampling, SequenceStart
from shared.settings import EMBEDDED_MODEL
from shared.structured_output import grammar_of

NUM_STEPS = 48
PROMPT_LENGTH = 16
BLOCKS = 5
"""Blocks of 16 tokens, for each sequence."""
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


class Streams:
    """Eight sequences in a stage that holds the whole model, one token of each a step."""

    def __init__(self, executor: TorchExecutor, name: str, sampling: Sampling, first_block: int) -> None:
        self._executor, self._name = executor, name
        start = SequenceStart(
            sequence=0, task_id=name, gateway="bench", sampling=sampling, num_prompt_tokens=PROMPT_LENGTH
        )
        self._states = [executor.begin(start) for _ in range(BATCH_SIZE)]
        self._blocks = [
            tuple(range(at, at + BLOCKS)) for at in range(first_block, first_block + 8 * BLOCKS, BLOCKS)
        ]
        self._length, self._index = 0, 0
        self._newest: list[int] = []

    async def begin(self) -> None:
        """Read the prompts, and draw the first token of each."""
        prompts = [prompt[:PROMPT_LENGTH] for prompt in prompt_tokens(SHAPES[MODEL]["vocab_size"])]
        self._newest = await self._run(prompts)

    async def step(self) -> tuple[float, float]:
        """Milliseconds that a step takes by the clock, and of processor time in all threads."""
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        self._index += 1
        self._newest = await self._run([[token] for token in self._newest])
        return 1e3 * (time.perf_counter() - start_s), 1e3 * (time.process_time() - start_cpu_s)

    async def _run(self, rows: list[list[int]]) -> list[int]:
        for state in self._states:
            while not state.is_ready():
                pass
        chunks = [
            SequenceChunk(
                task_id=f"{self._name}-{number}",
                start=self._length,
                num_tokens=len(tokens),
                blocks=blocks,
                produces=True,
                index=self._index,
            )
            for number, (tokens, blocks) in enumerate(zip(rows, self._blocks, strict=True))
        ]
        self._length += len(rows[0])
        flat = [token for tokens in rows for token in tokens]
        output = await self._executor.iteration(chunks, flat, states=self._states)
        return [result.token.token for result in output.results if result.token is not None]


async def decode(work: Path) -> dict[str, Any]:
    """Steps of both sides in turn, so that other work meets both alike; `orders` has no early end."""
    folder = text_model_folder(MODEL, work / "models")
    settings = StageWorkerSettings(
        node=0, stage=0, num_stages=1, model=str(folder), run_dir=work, kv_tokens=4096
    )
    executor = TorchExecutor(settings, "bench")
    await executor.load()
    plain = Sampling(max_tokens=MAX_TOKENS, temperature=1.0)
    grammar = grammar_of(json.dumps(SCHEMAS["orders"]))
    held = Sampling(max_tokens=MAX_TOKENS, temperature=1.0, grammar=grammar)
    sides = {
        "with_schema": Streams(executor, "held", held, 0),
        "without": Streams(executor, "plain", plain, 8 * BLOCKS),
    }
    for streams in sides.values():
        await streams.begin()
    steps: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for number in range(NUM_STEPS):
        for side in sorted(sides, reverse=bool(number % 2)):
            steps[side].append(await sides[side].step())
    await executor.close()
    medians = {
        side: {
            "clock_ms": median(clock_ms for clock_ms, _ in each),
            "processor_ms": median(processor_ms for _, processor_ms in each),
        }
        for side, each in steps.items()
    }
    ratios = {kind: medians["with_schema"][kind] / medians["without"][kind] for kind in medians["without"]}
    return {"step_of_8_streams": medians, "with_to_without": ratios}


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
    grammar = compiler.begin(grammar_of(json.dumps(schema)))
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
    return {
        "masks_by_vocabulary": masked,
        f"decode_{MODEL}": await decode(work),
        f"chat_{MODEL}": await schema_over_http.measure(MODEL, work, SCHEMAS["orders"]),
    }
