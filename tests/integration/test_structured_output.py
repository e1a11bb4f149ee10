"""JSON of a schema from a node whose model knows nothing of JSON."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from shared.model_files import read_card
from shared.settings import EMBEDDED_MODEL
from shared.structured_output import (
    JSON_OBJECT_SCHEMA,
    JsonInText,
    check_grammar,
    grammar_of,
    grammar_of_text_with,
)
from shared.text import TextTokenizer
from tests.support.models import save_tiny_text_model
from tests.support.node import Answer, running_node
from tests.support.schemas import random_schema

TOKENIZER = TextTokenizer.load(Path(EMBEDDED_MODEL))
ENDS = read_card(Path(EMBEDDED_MODEL), "embedded").eos_token_ids
PROMPT = TOKENIZER.encode("Answer:")
NUM_SCHEMAS = 100
POINT = json.dumps(
    {
        "type": "object",
        "properties": {"x": {"type": "integer", "maximum": 999}, "y": {"enum": ["up", "down"]}},
        "required": ["x", "y"],
        "additionalProperties": False,
    }
)
OF_TEXT: dict[str, Any] = {"temperature": 1.0, "stop_token_ids": ENDS}


def text_of(answer: Answer) -> str:
    assert answer.failure is None, answer.failure
    return TOKENIZER.decode(answer.token_ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_text_model(folder)
    return folder


async def test_a_hundred_random_schemas_give_valid_json(folder: Path, tmp_path: Path) -> None:
    schemas = [random_schema(seed) for seed in range(NUM_SCHEMAS)]
    for schema in schemas:
        check_grammar(grammar_of(json.dumps(schema)))
    async with running_node(folder, 1, tmp_path, kv_tokens=65536) as node:
        answers = await asyncio.gather(
            *(
                node.complete(
                    PROMPT, max_tokens=600, seed=seed, grammar=grammar_of(json.dumps(schema)), **OF_TEXT
                )
                for seed, schema in enumerate(schemas)
            )
        )
        await node.complete(PROMPT, max_tokens=1)
        assert node.num_remembered == 1, "the next iteration has the last one forgotten"
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer.finish == "stop"
        jsonschema.validate(json.loads(text_of(answer)), schema)


@pytest.mark.parametrize("num_stages", [1, 2])
async def test_schemas_and_seeds_alone_decide_whatever_else_is_in_the_batch(
    num_stages: int, folder: Path, tmp_path: Path
) -> None:
    asked: Sequence[dict[str, Any]] = [
        {"grammar": grammar_of(POINT)},
        {"grammar": grammar_of(POINT), "repetition_penalty": 1.3, "top_p": 0.9},
        {"grammar": grammar_of(json.dumps({"type": "string", "maxLength": 9}))},
        {},
        {"top_k": 40},
    ]
    asked = [{"max_tokens": 40, "seed": 3, **OF_TEXT, **one} for one in asked]
    async with running_node(folder, num_stages, tmp_path) as node:
        alone = [await node.complete(PROMPT, **one) for one in asked]
        together = await asyncio.gather(*(node.complete(PROMPT, **one) for one in asked))
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    for one in together[:2]:
        jsonschema.validate(json.loads(text_of(one)), json.loads(POINT))


async def test_json_that_max_tokens_cuts_off_says_length(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 1, tmp_path) as node:
        answer = await node.complete(PROMPT, max_tokens=4, grammar=grammar_of(JSON_OBJECT_SCHEMA), **OF_TEXT)
    assert (answer.finish, len(answer.tokens)) == ("length", 4)
    assert text_of(answer).startswith("{")


async def test_min_tokens_and_ignored_ends_keep_no_whole_text_from_its_end(
    folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, 1, tmp_path) as node:
        for changes in ({"min_tokens": 90}, {"stop_token_ids": ()}, {"stop_token_ids": (), "min_tokens": 90}):
            wanting = {**OF_TEXT, "grammar": grammar_of(POINT), "max_tokens": 200, **changes}
            answer = await node.complete(PROMPT, **wanting)
            assert answer.finish == "stop"
            jsonschema.validate(json.loads(text_of(answer)), json.loads(POINT))


async def test_a_model_that_only_wants_white_space_still_gives_json(folder: Path, tmp_path: Path) -> None:
    blank = [token for token in range(4096) if TOKENIZER.decode([token]).isspace()]
    eager = {"logit_bias": tuple((token, 100.0) for token in blank), "grammar": grammar_of(POINT)}
    async with running_node(folder, 1, tmp_path) as node:
        answer = await node.complete(PROMPT, max_tokens=300, **OF_TEXT | eager)
    assert answer.finish == "stop"
    assert text_of(answer).count("\n") + text_of(answer).count(" ") > 4
    jsonschema.validate(json.loads(text_of(answer)), json.loads(POINT))


@pytest.mark.parametrize("num_stages", [1, 2])
async def test_a_schema_that_cannot_be_used_costs_only_its_own_request(
    num_stages: int, folder: Path, tmp_path: Path
) -> None:
    bad = json.dumps({"type": "array", "uniqueItems": True})
    async with running_node(folder, num_stages, tmp_path) as node:
        refused, good, plain = await asyncio.gather(
            node.complete(PROMPT, max_tokens=9, grammar=grammar_of(bad), **OF_TEXT),
            node.complete(PROMPT, max_tokens=90, grammar=grammar_of(POINT), **OF_TEXT),
            node.complete(PROMPT, max_tokens=9, temperature=0),
        )
        await node.complete(PROMPT, max_tokens=1)
        assert node.num_remembered == 1, "the next iteration has the last one forgotten"
    assert refused.failure is not None
    assert (refused.failure.code, "uniqueItems" in refused.failure.reason) == (400, True)
    assert (good.finish, plain.finish) == ("stop", "length")


async def test_what_begins_like_a_call_goes_on_as_one(folder: Path, tmp_path: Path) -> None:
    call = JsonInText(opening='{"name": "move", "parameters": ', schema=json.loads(POINT), closing="}")
    [brace] = TOKENIZER.encode("{")
    eager = {"logit_bias": ((brace, 100.0),), "grammar": grammar_of_text_with('{"name":', [call])}
    free = {"logit_bias": ((brace, 100.0),)}
    async with running_node(folder, 1, tmp_path) as node:
        held = await node.complete(PROMPT, max_tokens=20, **OF_TEXT | eager)
        loose = await node.complete(PROMPT, max_tokens=20, **OF_TEXT | free)
    assert text_of(held) == text_of(loose) == "{" * 20, "no call has begun: the text is free"
    starting = {"grammar": grammar_of_text_with("{", [call]), "logit_bias": ((brace, 100.0),)}
    async with running_node(folder, 1, tmp_path / "calls") as node:
        answer = await node.complete(PROMPT, max_tokens=80, **OF_TEXT | starting)
    written, _ = json.JSONDecoder().raw_decode(text_of(answer))
    assert written["name"] == "move"
    jsonschema.validate(written["parameters"], json.loads(POINT))
