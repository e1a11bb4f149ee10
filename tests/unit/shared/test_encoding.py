"""Examples as tokens: which of them count in the loss, and what cannot be learnt from."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from shared.chat_template import ChatTemplate
from shared.clock import SystemClock
from shared.encoding import ExampleEncoder, warn_once
from shared.errors import InvalidBatchError
from shared.examples import ChatMessage, Conversation, PlainText, Preference, PromptCompletion, TokenIds
from shared.model_files import ModelCard
from shared.text import TextTokenizer

BOS, EOS, A, B, C, USER, ASSISTANT, END = range(8)
VOCABULARY = {word: i for i, word in enumerate(("BOS", "EOS", "a", "b", "c", "user", "assistant", "END"))}
TURNS = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} END {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer() -> TextTokenizer:
    """Words are tokens, and every text begins with BOS."""
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="c"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="BOS $A", special_tokens=[("BOS", BOS)])
    return TextTokenizer(words)


def card(eos: tuple[int, ...] = (EOS,)) -> ModelCard:
    return ModelCard(
        name="m", model_type="llama", vocab_size=8, context_length=8, bos_token_id=BOS, eos_token_ids=eos
    )


def chat_template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {"bos_token": "BOS"}, SystemClock())


def encoder(template: str | None = TURNS, eos: tuple[int, ...] = (EOS,)) -> ExampleEncoder:
    return ExampleEncoder(
        card=card(eos),
        max_tokens=8,
        tokenizer=tokenizer(),
        chat_template=None if template is None else chat_template(template),
    )


def chat(*turns: tuple[str, str]) -> Conversation:
    return Conversation(messages=[ChatMessage(role=role, content=content) for role, content in turns])


def test_of_a_completion_only_its_own_tokens_and_the_end_count() -> None:
    encoded = encoder().encode(PromptCompletion(prompt="a b", completion="c a"))

    assert encoded.tokens == (BOS, A, B, C, A, EOS)
    assert encoded.labels == (C, A, EOS)
    assert encoded.label_rows == (2, 3, 4)


def test_of_a_text_all_tokens_but_the_first_count() -> None:
    encoded = encoder().encode(PlainText(text="a b"))

    assert (encoded.tokens, encoded.labels) == ((BOS, A, B, EOS), (A, B, EOS))


def test_a_model_without_end_token_gets_none_and_an_end_is_not_doubled() -> None:
    assert encoder(eos=()).encode(PlainText(text="a b")).tokens == (BOS, A, B)
    assert encoder(eos=(B,)).encode(PlainText(text="a b")).tokens == (BOS, A, B)


def test_token_ids_are_learnt_as_they_are() -> None:
    encoded = encoder().encode(TokenIds(token_ids=[C, B, A]))

    assert (encoded.tokens, encoded.label_rows) == ((C, B, A), (0, 1))


def test_of_a_conversation_only_what_the_assistant_says_counts() -> None:
    encoded = encoder().encode(chat(("user", "a"), ("assistant", "b c")))

    assert encoded.tokens == (USER, A, END, ASSISTANT, B, C, END)
    assert encoded.labels == (B, C, END)


def test_an_answer_at_the_very_start_counts_but_for_its_first_token() -> None:
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"

    assert encoder(template).encode(chat(("assistant", "a b c"))).labels == (B, C)


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (TokenIds(token_ids=[]), "has 0 tokens, needs at least 2"),
        (TokenIds(token_ids=[1]), "has 1 tokens, needs at least 2"),
        (TokenIds(token_ids=[1] * 9), "has 9 tokens, at most 8"),
        (TokenIds(token_ids=[1, 8]), "token id 8 is not in 0..7"),
        (TokenIds(token_ids=[-1, 1]), "token id -1 is not in 0..7"),
        (TokenIds(token_ids=[1, 2**70]), "is not in 0..7"),
        (chat(("user", "a"), ("user", "b")), "has nothing to learn"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(example, reason: str) -> None:
    with pytest.raises(InvalidBatchError, match=reason):
        encoder().encode(example)


def test_an_empty_completion_without_end_token_teaches_nothing() -> None:
    with pytest.raises(InvalidBatchError, match="has nothing to learn"):
        encoder(eos=()).encode(PromptCompletion(prompt="a b", completion=""))


def test_text_needs_a_tokenizer_and_messages_need_a_template() -> None:
    bare = ExampleEncoder(card=card(), max_tokens=8, tokenizer=None, chat_template=None)

    with pytest.raises(InvalidBatchError, match="no tokenizer"):
        bare.encode(PlainText(text="a"))
    with pytest.raises(InvalidBatchError, match="no chat template"):
        encoder(template=None).encode(chat(("assistant", "a")))


def test_of_a_template_that_rewrites_earlier_turns_the_last_answer_is_learnt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    only_last = "{{ messages[-1].content if messages else '' }}"
    conversation = chat(("assistant", "a b"), ("user", "b"), ("assistant", "b c"))

    warn_once.cache_clear()  # others may have met it in this process
    encoded = [encoder(only_last).encode(conversation) for _ in range(2)]

    assert [each.labels for each in encoded] == [(C,), (C,)]
    assert len([line for line in caplog.messages if "only the last answer is learnt" in line]) == 1


def test_a_template_may_refuse_a_conversation_and_cannot_reach_the_machine() -> None:
    for template in ("{{ raise_exception('roles must alternate') }}", "{{ messages.__class__.__mro__ }}"):
        with pytest.raises(InvalidBatchError, match="the chat template refuses the messages"):
            encoder(template).encode(chat(("assistant", "a")))


def preference(*turns: tuple[str, str], preferred: str, other: str) -> Preference:
    outputs = [[ChatMessage(role="assistant", content=content)] for content in (preferred, other)]
    return Preference(input=chat(*turns), preferred_output=outputs[0], non_preferred_output=outputs[1])


def test_of_a_preference_both_outputs_are_learnt_and_nothing_of_the_input() -> None:
    example = preference(("user", "a"), ("assistant", "b"), ("user", "c"), preferred="a b", other="c")
    spacious = replace(encoder(), max_tokens=64, card=replace(card(), context_length=32))
    preferred, other = spacious.sequences(example)

    asked = (USER, A, END, ASSISTANT, B, END, USER, C, END, ASSISTANT)
    assert (preferred.tokens, preferred.labels) == ((*asked, A, B, END), (A, B, END))
    assert (other.tokens, other.labels) == ((*asked, C, END), (C, END))


def test_an_ordinary_example_is_one_sequence() -> None:
    example = PlainText(text="a b")
    assert encoder().sequences(example) == (encoder().encode(example),)


def test_the_outputs_of_a_preference_are_learnt_at_once_so_they_must_fit_together() -> None:
    example = preference(("user", "a"), preferred="b", other="c")
    assert [len(each.tokens) for each in replace(encoder(), max_tokens=12).sequences(example)] == [6, 6]
    with pytest.raises(InvalidBatchError, match="has 12 tokens with both outputs, at most 11 can"):
        replace(encoder(), max_tokens=11).sequences(example)


def test_the_output_that_is_too_long_is_named() -> None:
    with pytest.raises(InvalidBatchError, match="with non_preferred_output: has 9 tokens, at most 8"):
        replace(encoder(), max_tokens=64).sequences(preference(("user", "a"), preferred="b", other="c a b c"))


class Untouched(TextTokenizer):
    """Must not be asked."""

    def encode(self, text: str) -> list[int]:
        raise AssertionError("it was too long to begin with")

    encode_part = encode


@pytest.mark.parametrize(
    "example",
    [
        PlainText(text="a " * 5_000_000),
        PromptCompletion(prompt="a", completion="a " * 5_000_000),
        Conversation(messages=[ChatMessage(role="assistant", content="a " * 5_000_000)]),
    ],
)
def test_what_is_too_long_in_any_case_is_refused_untokenised(example) -> None:
    words = Untouched(Tokenizer(BPE({"a": 0, " ": 1, "a ": 2}, [("a", " ")])))
    with pytest.raises(InvalidBatchError, match=r"has 1\d+ characters, more than \d+ tokens of at most 2"):
        replace(encoder(), tokenizer=words).encode(example)


def test_a_prompt_that_ends_in_a_space_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()  # others may have met it in this process
    for _ in range(2):
        encoder().encode(PromptCompletion(prompt="a ", completion="b"))
    assert len([line for line in caplog.messages if "end in a space" in line]) == 1
