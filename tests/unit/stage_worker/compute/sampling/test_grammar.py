"""Which tokens a schema lets follow, with the embedded model's tokenizer."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from services.stage_worker.compute.executor import SequenceChunk
from services.stage_worker.compute.logits import LogitPlan
from services.stage_worker.compute.sampling.adjust import adjust_
from services.stage_worker.compute.sampling.grammar import MAX_COMPILED, Grammar, GrammarCompiler, Vocabulary
from services.stage_worker.compute.sampling.sequences import SequenceState
from shared.messages.inference import Sampling
from shared.model_files import read_card
from shared.settings import EMBEDDED_MODEL
from shared.structured_output import grammar_of
from shared.text import TextTokenizer

CARD = read_card(Path(EMBEDDED_MODEL), "embedded")
TOKENIZER = TextTokenizer.load(Path(EMBEDDED_MODEL))
(END,) = CARD.eos_token_ids
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}


def vocabulary(size: int = CARD.vocab_size) -> Vocabulary:
    return Vocabulary.load(EMBEDDED_MODEL, size)


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    it = GrammarCompiler(vocabulary)
    yield it
    it.close()


def begun(compiler: GrammarCompiler, schema: Any) -> Grammar:
    grammar = compiler.begin(grammar_of(json.dumps(schema)))
    until_ready(grammar)
    return grammar


def until_ready(grammar: Grammar) -> None:
    while not grammar.is_ready():
        pass


def read(grammar: Grammar, text: str) -> list[bool]:
    """Let the grammar read the text; before each token and at the end, whether the text might end."""
    may_end = []
    for token in TOKENIZER.encode_part(text):
        may_end.append(not grammar.forbidden[END])
        assert not grammar.forbidden[token], (text, token)
        grammar.consume(token)
        until_ready(grammar)
    return [*may_end, not grammar.forbidden[END]]


@pytest.mark.parametrize(
    "text", ['{"x":1}', '{"x": -12, "y": 3}', '{\n  "x": 1,\n  "y": 0\n}', json.dumps({"x": 5, "y": 6})]
)
def test_the_end_is_allowed_exactly_when_the_object_is_whole(compiler: GrammarCompiler, text: str) -> None:
    may_end = read(begun(compiler, POINT), text)
    assert may_end == [False] * (len(may_end) - 1) + [True]


def test_a_number_may_end_or_go_on(compiler: GrammarCompiler) -> None:
    grammar = begun(compiler, {"type": "integer"})
    read(grammar, "12")
    (digit,) = TOKENIZER.encode_part("3")
    assert not grammar.forbidden[END]
    assert not grammar.forbidden[digit]


def test_when_a_text_is_whole_only_the_end_is_left(compiler: GrammarCompiler) -> None:
    grammar = begun(compiler, POINT)
    read(grammar, '{"x":1,"y":2}')
    assert (~grammar.forbidden).nonzero()[0].tolist() == [END]


def test_white_space_never_goes_on_without_end(compiler: GrammarCompiler) -> None:
    """Even if only white space is ever chosen where it is allowed."""
    grammar = begun(compiler, POINT)
    read(grammar, "{")
    blank = [token for token in range(CARD.vocab_size) if TOKENIZER.decode([token]).isspace()]
    num_blanks = 0
    while allowed := [token for token in blank if not grammar.forbidden[token]]:
        num_blanks += 1
        assert num_blanks <= 17
        grammar.consume(min(allowed, key=lambda token: TOKENIZER.decode([token])))
        until_ready(grammar)
    assert num_blanks >= 1


@pytest.mark.parametrize("size", [4000, CARD.vocab_size, 5000])
def test_the_model_may_have_fewer_or_more_tokens_than_its_tokenizer(size: int) -> None:
    compiler = GrammarCompiler(lambda: vocabulary(size))
    grammar = begun(compiler, POINT)
    compiler.close()
    assert grammar.forbidden.shape == (size,)
    assert grammar.forbidden[CARD.vocab_size :].all()


def test_sequences_of_one_schema_go_their_own_ways(compiler: GrammarCompiler) -> None:
    first, second = begun(compiler, POINT), begun(compiler, POINT)
    read(first, '{"x":1}')
    assert second.forbidden[END]
    read(second, '{"x":2,"y":3}')
    assert len(compiler._compiled) == 1


def test_only_so_many_schemas_stay_compiled(compiler: GrammarCompiler) -> None:
    for number in range(MAX_COMPILED + 3):
        begun(compiler, {"const": number})
    assert len(compiler._compiled) == MAX_COMPILED
    assert grammar_of(json.dumps({"const": 2})) not in compiler._compiled


def test_a_schema_that_cannot_be_used_is_a_failure_with_its_reason(compiler: GrammarCompiler) -> None:
    assert "uniqueItems" in str(begun(compiler, {"type": "array", "uniqueItems": True}).failure)
    assert begun(compiler, POINT).failure is None


def test_a_schema_without_any_text_fails_where_it_gets_stuck(compiler: GrammarCompiler) -> None:
    stuck = {
        "$defs": {"n": {"$ref": "#/$defs/n"}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/n"}},
        "required": ["a"],
    }
    grammar = begun(compiler, stuck)
    for token in TOKENIZER.encode_part('{"a":'):
        if grammar.failure is None:
            grammar.consume(token)
            until_ready(grammar)
    assert "no text can go on" in str(grammar.failure)


def test_a_tokenizer_that_says_nothing_of_bytes_is_a_failure(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    config = {"vocab_size": 2, "max_position_embeddings": 8, "eos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    compiler = GrammarCompiler(lambda: Vocabulary.load(str(tmp_path), 2))
    grammar = begun(compiler, POINT)
    compiler.close()
    assert "tokenizer allows no structured output" in str(grammar.failure)


def test_a_model_without_an_end_token_cannot_write_json(tmp_path: Path) -> None:
    tokenizer = (Path(EMBEDDED_MODEL) / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 4096, "max_position_embeddings": 8}))
    compiler = GrammarCompiler(lambda: Vocabulary.load(str(tmp_path), 4096))
    grammar = begun(compiler, POINT)
    compiler.close()
    assert "eos_token" in str(grammar.failure)


def state_of(grammar: Grammar, **sampling: Any) -> SequenceState:
    return SequenceState("g", Sampling(max_tokens=9, **sampling), grammar)


def drawable(state: SequenceState, index: int) -> list[int]:
    """Tokens that can be drawn."""
    logits = torch.zeros(1, CARD.vocab_size)
    adjust_(logits, [state], [index])
    return (logits[0] > -torch.inf).nonzero().flatten().tolist()


def test_min_tokens_forbids_the_end_unless_nothing_else_is_left(compiler: GrammarCompiler) -> None:
    number, point = begun(compiler, {"type": "integer"}), begun(compiler, POINT)
    read(number, "12")
    read(point, '{"x":1,"y":2}')
    wanting: dict[str, Any] = {"stop_token_ids": (END,), "min_tokens": 100}
    assert END not in drawable(state_of(number, **wanting), 2)
    assert END in drawable(state_of(number), 2)
    assert drawable(state_of(point, **wanting), 9) == [END]


def test_a_whole_text_ends_even_where_the_end_token_is_to_be_ignored(compiler: GrammarCompiler) -> None:
    state = state_of(begun(compiler, POINT), stop_token_ids=())
    assert state.finish_reason(END, 3) == "stop"


def test_a_token_is_put_off_while_its_mask_is_not_known() -> None:
    thread, unknown = ThreadPoolExecutor(1), Future[Any]()
    waiting, plain = state_of(Grammar(unknown, thread)), SequenceState("g", Sampling(max_tokens=9))
    chunks = [
        SequenceChunk(task_id=name, start=0, num_tokens=2, blocks=(0,), produces=True) for name in ("a", "b")
    ]
    results, failures = LogitPlan(chunks, [waiting, plain]).results(torch.zeros(2, 5))
    assert [(one.task_id, one.token is None, one.finish) for one in results] == [
        ("a", True, None),
        ("b", False, None),
    ]
    assert failures == ()
