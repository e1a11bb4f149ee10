"""Chat templates give the text that transformers' `apply_chat_template` gives."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from shared.chat_template import ChatTemplate, Segment
from shared.chat_template_files import load_chat_template
from shared.clock import SystemClock
from shared.errors import ChatTemplateError, ConfigurationError, RewrittenTurnsError
from shared.examples import ChatMessage, Conversation
from shared.settings import EMBEDDED_MODEL
from tests.support.chat_templates import CHATML, GEMMA, LLAMA_3, MISTRAL, QWEN, WITH_GENERATION

MOMENT = datetime(2026, 2, 3, 4, 5, 6)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
QUESTION = {"role": "user", "content": " Wie ist das Wetter in Zürich? "}
CHAT = [{"role": "system", "content": "Be brief."}, QUESTION]
LONGER_CHAT = [
    *CHAT,
    {"role": "assistant", "content": "Sunny.", "reasoning_content": "\nIt is June.\n"},
    {"role": "user", "content": "<b>And</b> 'tomorrow'? 🌦"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Das Wetter in einer Stadt, in °C",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def call(arguments: object) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }


RESULT = {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": 21}'}
TOOL_CHAT = [QUESTION, call({"city": "Zürich"}), RESULT]


class FixedClock(SystemClock):
    """It is always MOMENT."""

    def wall_s(self) -> float:
        return MOMENT.timestamp()


@pytest.fixture(autouse=True)
def _transformers_at_that_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return MOMENT

    monkeypatch.setattr(chat_template_utils, "datetime", Then)


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, TOKENS, FixedClock())


def model(folder: Path, **files: str) -> Path:
    """A model's folder with the embedded model's tokenizer and these further files."""
    shutil.copy(Path(EMBEDDED_MODEL) / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENS))
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def by_transformers(
    folder: Path, messages: list[Any], tools: Any = None, prompt: bool = True, **variables: Any
) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **variables
    )
    return str(text)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    "chat", [[QUESTION], CHAT, LONGER_CHAT, LONGER_CHAT[:-1]], ids=["one", "two", "longer", "answered"]
)
@pytest.mark.parametrize(
    "source",
    [CHATML, LLAMA_3, MISTRAL, QWEN, GEMMA, WITH_GENERATION],
    ids=["chatml", "llama3", "mistral", "qwen", "gemma", "generation"],
)
def test_conversations_are_rendered_as_transformers_does(source, chat, prompt, tmp_path: Path) -> None:
    folder = model(tmp_path, **{"chat_template.jinja": source})

    assert template(source).render(chat, add_generation_prompt=prompt) == by_transformers(
        folder, chat, prompt=prompt
    )


@pytest.mark.parametrize("chat", [[QUESTION], CHAT, TOOL_CHAT], ids=["one", "two", "called"])
@pytest.mark.parametrize("source", [LLAMA_3, MISTRAL, QWEN], ids=["llama3", "mistral", "qwen"])
def test_tools_are_rendered_as_transformers_does(source, chat, tmp_path: Path) -> None:
    folder = model(tmp_path, **{"chat_template.jinja": source})

    assert template(source).render(chat, tools=TOOLS) == by_transformers(folder, chat, TOOLS)


@pytest.mark.parametrize("source", [LLAMA_3, MISTRAL, QWEN], ids=["llama3", "mistral", "qwen"])
def test_arguments_in_a_string_are_decoded(source: str) -> None:
    as_string = [QUESTION, call('{"city": "Zürich"}'), RESULT]
    as_object = [QUESTION, call({"city": "Zürich"}), RESULT]

    assert template(source).render(as_string, tools=TOOLS) == template(source).render(as_object, tools=TOOLS)


@pytest.mark.parametrize(
    ("source", "variables", "shown"),
    [
        (QWEN, {"enable_thinking": False}, "<think>\n\n</think>"),
        (LLAMA_3, {"date_string": "1 May 2024"}, "Today Date: 1 May 2024"),
        (CHATML, {"enable_thinking": False, "self": 1}, "assistant"),
    ],
    ids=["qwen", "llama3", "unknown to the template"],
)
def test_variables_reach_the_template_as_in_transformers(source, variables, shown, tmp_path: Path) -> None:
    folder = model(tmp_path, **{"chat_template.jinja": source})
    text = template(source).render(CHAT, variables=variables)

    assert shown in text
    asked = {name: value for name, value in variables.items() if name != "self"}  # Python's own name there
    assert text == by_transformers(folder, CHAT, **asked)


@pytest.mark.parametrize(("given", "seen"), [("", "{}"), ("[1]", '"[1]"'), ("{not", '"{not"')])
def test_arguments_that_are_no_object_stay_as_they_are(given: str, seen: str) -> None:
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"

    assert template(source).render([call(given)]) == seen


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ("", '{"b": "ü<", "a": 1}'),
        ("ensure_ascii=False", '{"b": "ü<", "a": 1}'),
        ("ensure_ascii=True", '{"b": "\\u00fc<", "a": 1}'),
        ("indent=1", '{\n "b": "ü<",\n "a": 1\n}'),
        ("separators=(',', ':'), sort_keys=True", '{"a":1,"b":"ü<"}'),
    ],
)
def test_to_json_takes_the_options_that_templates_use(options: str, seen: str) -> None:
    source = f"{{{{ messages[0].content | tojson({options}) }}}}"

    assert template(source).render([{"content": {"b": "ü<", "a": 1}}]) == seen


def test_the_clock_that_is_handed_in_tells_the_date() -> None:
    assert template("{{ strftime_now('%d %b %Y %H:%M:%S') }}").render([]) == "03 Feb 2026 04:05:06"


def test_a_refused_conversation_says_why() -> None:
    with pytest.raises(ChatTemplateError, match=r"refuses the messages: .*roles must alternate"):
        template(MISTRAL).render([QUESTION, QUESTION])


@pytest.mark.parametrize(
    ("source", "given"),
    [
        ("{{ given.key.further }}", {}),
        ("{{ given | dictsort }}", [1]),
        ("{{ given + 1 }}", "a"),
        ("{{ 1 / given }}", 0),
        ("{{ strftime_now(given) }}", "\ud800"),
        ("{% macro again(n) %}{{ again(n) }}{% endmacro %}{{ again(given) }}", 1),
    ],
)
def test_values_that_a_template_does_not_expect_are_refused(source: str, given: object) -> None:
    with pytest.raises(ChatTemplateError, match="refuses the messages"):
        template(source).render([QUESTION], variables={"given": given})


def test_generation_blocks_do_not_stop_training() -> None:
    chat = [ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content="b")]

    learnt = [
        segment.text
        for segment in template(WITH_GENERATION).segments(Conversation(messages=chat))
        if segment.learnt
    ]

    assert learnt == ["b<|im_end|>\n"]


NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": json.dumps(TOKENS | {"chat_template": NAMED})},
        {"chat_template.jinja": "plain", "additional_chat_templates__tool_use.jinja": "tools"},
        {
            "tokenizer_config.json": json.dumps(TOKENS | {"chat_template": "not this"}),
            "chat_template.jinja": "plain",
            "additional_chat_templates__tool_use.jinja": "tools",
        },
        {"chat_template.jinja": "{{ 'tools' if tools else 'plain' }}"},
    ],
    ids=["named", "files", "files first", "one for both"],
)
def test_tools_choose_the_template_that_transformers_chooses(files, tmp_path: Path) -> None:
    folder = model(tmp_path, **files)
    found = load_chat_template(folder, FixedClock())

    assert found is not None
    for tools, text in ((None, "plain"), (TOOLS, "tools")):
        assert found.render([QUESTION], tools=tools) == by_transformers(folder, [QUESTION], tools) == text


def test_special_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}{{ sep_token }}"
    as_object = {
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
        "unk_token": None,
    }
    files = {
        "tokenizer_config.json": json.dumps(as_object),
        "special_tokens_map.json": json.dumps({"sep_token": "|"}),
        "chat_template.jinja": source,
    }
    folder = model(tmp_path, **files)
    found = load_chat_template(folder, FixedClock())

    assert found is not None
    assert found.render([QUESTION]) == by_transformers(folder, [QUESTION]) == "<s></s>False|"


def test_a_chosen_file_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    folder = model(tmp_path, **{"chat_template.jinja": "own", "chosen.jinja": "chosen {{ bos_token }}"})
    found = load_chat_template(folder, FixedClock(), chosen=folder / "chosen.jinja")

    assert found is not None
    assert found.render([QUESTION], tools=TOOLS) == "chosen <s>"


@pytest.mark.parametrize(("content", "reason"), [(None, "cannot read"), ("{% for %}", "template is wrong")])
def test_a_chosen_file_that_cannot_be_used_is_named(content, reason: str, tmp_path: Path) -> None:
    chosen = tmp_path / "mine.jinja"
    if content is not None:
        chosen.write_text(content)

    with pytest.raises(ConfigurationError, match=f"^LEMIX_CHAT_TEMPLATE: .*{reason}") as raised:
        load_chat_template(Path(EMBEDDED_MODEL), FixedClock(), chosen=chosen)
    assert "mine.jinja" in str(raised.value)


def test_a_model_may_have_no_template(tmp_path: Path) -> None:
    assert load_chat_template(model(tmp_path), FixedClock()) is None


def conversation(*messages: dict[str, Any], tools: list[dict[str, Any]] | None = None) -> Conversation:
    return Conversation.model_validate({"messages": list(messages), "tools": tools})


def learnt_of(segments: list[Segment]) -> list[str]:
    return [segment.text for segment in segments if segment.learnt]


def text_of(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


ANSWER = {"role": "assistant", "content": "Sunny."}
LATER = {"role": "user", "content": "And tomorrow?"}


def test_a_conversation_with_tools_is_learnt_as_it_is_rendered_at_inference() -> None:
    qwen, chat = template(QWEN), [QUESTION, call('{"city": "Zürich"}'), RESULT, ANSWER]
    segments = qwen.segments(conversation(*chat, tools=TOOLS))
    assert text_of(segments) == qwen.render(chat, tools=TOOLS, add_generation_prompt=False)
    called, answered = learnt_of(segments)
    assert called.startswith('\n<tool_call>\n{"name": "weather"') and called.endswith("<|im_end|>\n")
    assert answered == "Sunny.<|im_end|>\n"
    for number, learnt in ((1, called), (3, answered)):
        prompt = qwen.render(chat[:number], tools=TOOLS)
        whole = qwen.render(chat[: number + 1], tools=TOOLS, add_generation_prompt=False)
        assert whole == prompt + learnt


def test_what_has_no_weight_is_read_and_not_learnt() -> None:
    chat = [QUESTION, ANSWER | {"weight": 0}, LATER, ANSWER | {"content": "Rain.", "weight": 1}]
    segments = template(CHATML).segments(conversation(*chat))
    assert learnt_of(segments) == ["Rain.<|im_end|>\n"]
    assert "Sunny.<|im_end|>" in text_of(segments)


@pytest.mark.parametrize(
    ("messages", "tools", "field"),
    [
        ([QUESTION, ANSWER], TOOLS, "tools"),
        ([QUESTION, call("{}")], None, r"messages\.1\.tool_calls"),
        ([QUESTION | {"name": "Anna"}, ANSWER], None, r"messages\.0\.name"),
        ([QUESTION, ANSWER | {"reasoning_content": "It is June."}], None, r"messages\.1\.reasoning_content"),
    ],
)
def test_what_a_template_has_no_words_for_is_refused_by_name(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, field: str
) -> None:
    with pytest.raises(ChatTemplateError, match=rf"^{field}: the model's chat template has no words"):
        template(CHATML).segments(conversation(*messages, tools=tools))


THOUGHTFUL = ANSWER | {"reasoning_content": "It is June."}
OPENS_A_THOUGHT = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")


def test_of_a_template_that_drops_earlier_thoughts_the_last_answer_is_learnt() -> None:
    qwen, chat = template(QWEN), [QUESTION, THOUGHTFUL, LATER, THOUGHTFUL]
    with pytest.raises(RewrittenTurnsError, match="renders earlier messages differently"):
        qwen.segments(conversation(*chat))
    prompt, answer = qwen.last_answer(conversation(*chat))
    assert prompt == Segment(qwen.render(chat[:3]), learnt=False)
    assert answer == Segment("<think>\nIt is June.\n</think>\n\nSunny.<|im_end|>\n", learnt=True)


@pytest.mark.parametrize("said", ["Sunny.", "end", "im", "|"])
def test_an_answer_follows_the_thought_that_the_prompt_opens(said: str) -> None:
    r1, chat = template(OPENS_A_THOUGHT), [QUESTION, ANSWER | {"content": said}]
    with pytest.raises(RewrittenTurnsError):
        r1.segments(conversation(*chat))
    prompt, answer = r1.last_answer(conversation(*chat))
    assert prompt.text == r1.render([QUESTION]) and prompt.text.endswith("<think>\n")
    assert answer == Segment(f"{said}<|im_end|>\n", learnt=True)


def test_thoughts_are_said_under_either_name() -> None:
    thinking = CHATML.replace("message['content']", "(message.thinking or '') + message['content']")
    chat = conversation(QUESTION, ANSWER | {"reasoning_content": "June. "})
    assert learnt_of(template(thinking).segments(chat)) == ["June. Sunny.<|im_end|>\n"]


def test_a_conversation_without_anything_to_learn_has_no_last_answer() -> None:
    with pytest.raises(ChatTemplateError, match="nothing that is to be learnt"):
        template(CHATML).last_answer(conversation(QUESTION, ANSWER | {"weight": 0}))
