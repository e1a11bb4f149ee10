"""Conversations as text: the chat template of the model's own tokenizer, rendered in a sandbox.

Templates see what transformers' `apply_chat_template` shows them, so both give the same text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from types import MappingProxyType
from typing import NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.clock import Clock
from shared.errors import ChatTemplateError, ConfigurationError, RewrittenTurnsError
from shared.examples import ChatMessage, Conversation

DEFAULT = "default"
"""Name of the template of plain conversations."""
TOOL_USE = "tool_use"
"""Name of the template of conversations with tools; models without it use the default one."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names under which templates find the tokens of their model."""
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
_OPTIONS = ("chat_template", "continue_final_message", "tokenize")
"""In transformers, options of `apply_chat_template`; templates never see them."""
RESERVED_NAMES = frozenset((*_GIVEN, *SPECIAL_TOKENS, *_OPTIONS))
"""Names that no variable may have: templates know them from the conversation and the model, or not at all."""

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys under which clients send the thoughts of an earlier answer; templates read one of the first two."""

_TEMPLATE_FAULTS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""Errors that a template may raise when it does not expect the values that it is given."""

Json = Mapping[str, object]
_NO_VARIABLES: Json = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation."""

    text: str
    learnt: bool
    """The assistant says it."""


class ChatTemplate:
    """Renders conversations for one model."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], clock: Clock) -> None:
        """`sources`: templates by name; DEFAULT must be there. `clock`: for templates that tell the date.

        Raises ConfigurationError when a template is wrong.
        """
        self._sources = dict(sources)
        self._templates = {name: _compile(source) for name, source in sources.items()}
        self._special_tokens = dict(special_tokens)
        self._clock = clock

    def source(self, *, with_tools: bool) -> str:
        """The Jinja text that renders conversations with tools, or without."""
        return self._sources[self._name(with_tools)]

    def render(
        self,
        messages: Sequence[Json],
        *,
        tools: Sequence[Json] | None = None,
        add_generation_prompt: bool = True,
        variables: Json = _NO_VARIABLES,
    ) -> str:
        """The conversation as the model is to read it.

        `messages` and `tools` are as in OpenAI's API. `add_generation_prompt` ends the text where the
        assistant's answer begins. `variables`: what else the template may ask for, such as `enable_thinking`;
        RESERVED_NAMES among them are overridden.
        Raises ChatTemplateError when the template refuses the conversation.
        """
        return self._render(messages, tools, add_generation_prompt, self._now(), variables)

    def segments(self, conversation: Conversation) -> list[Segment]:
        """Cut the rendered conversation where the assistant begins and ends.

        Raises ChatTemplateError when the template refuses the conversation, has no words for part of it, or
        does not render a shorter conversation as the beginning of a longer one.
        """
        messages, tools = conversation.messages, conversation.tools
        self._check_words_for(conversation)
        turns = _turns(messages)
        now = self._now()  # one for all pieces: they are compared
        segments: list[Segment] = []
        text = ""
        for position, message in enumerate(messages):
            if message.role == "assistant":
                for end, is_said in ((position, False), (position + 1, True)):
                    longer = self._render(turns[:end], tools, not is_said, now)
                    learnt = is_said and message.is_learnt
                    segments.append(Segment(_continuation(text, longer, position), learnt))
                    text = longer
        rest = _continuation(text, self._render(turns, tools, False, now), len(messages))
        return [*segments, Segment(rest, learnt=False)]

    def last_answer(self, conversation: Conversation) -> list[Segment]:
        """Cut off what the assistant says last of what is learnt, after all before it as at inference.

        For templates that render earlier turns otherwise once later ones follow. Where they also begin an
        answer otherwise than they render it (with an opened thought), what they begin it with stays.
        Raises ChatTemplateError when the template refuses the conversation, or nothing is learnt.
        """
        messages, tools = conversation.messages, conversation.tools
        self._check_words_for(conversation)
        learnt = [position for position, message in enumerate(messages) if message.is_learnt]
        if not learnt:
            raise ChatTemplateError("the assistant says nothing that is to be learnt")
        turns, now, last = _turns(messages), self._now(), learnt[-1]
        prompt = self._render(turns[:last], tools, True, now)
        said = self._render(turns[: last + 1], tools, False, now)
        if said.startswith(prompt):
            begin = len(prompt)
        else:
            before = self._render(turns[:last], tools, False, now)
            begin = _place_of(
                messages[last], said, prompt, after=len(before) if said.startswith(before) else 0
            )
        if begin <= 0:
            raise ChatTemplateError(f"messages.{last}: the chat template does not render it as it was said")
        return [Segment(prompt, learnt=False), Segment(said[begin:], learnt=True)]

    def _check_words_for(self, conversation: Conversation) -> None:
        """Raises ChatTemplateError, naming the field, for what the template would leave out unsaid."""
        messages, tools = conversation.messages, conversation.tools
        source = self.source(with_tools=bool(tools))
        unsaid = ["tools"] if tools and "tools" not in source else []
        for position, message in enumerate(messages):
            if message.tool_calls and "tool_calls" not in source:
                unsaid.append(f"messages.{position}.tool_calls")
            unsaid += [f"messages.{position}.{field}" for field in self._unsaid_of(messages, position, tools)]
        if unsaid:
            raise ChatTemplateError(f"{unsaid[0]}: the model's chat template has no words for it")

    def _unsaid_of(
        self, messages: Sequence[ChatMessage], position: int, tools: Sequence[Json] | None
    ) -> list[str]:
        """Fields of a message without which it would be rendered just the same."""
        turns, now = _turns(messages[: position + 1]), self._now()
        present = [field for field in ("name", "reasoning_content") if field in turns[-1]]
        if not present:
            return []
        whole = self._render(turns, tools, False, now)
        return [
            field
            for field in present
            if self._render([*turns[:-1], _without(turns[-1], field)], tools, False, now) == whole
        ]

    def _render(
        self,
        messages: Sequence[Json],
        tools: Sequence[Json] | None,
        add_generation_prompt: bool,
        now: datetime,
        variables: Json = _NO_VARIABLES,
    ) -> str:
        given = {
            "messages": [_as_templates_expect(message) for message in messages],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": now.strftime,
            **self._special_tokens,
        }
        try:
            return self._templates[self._name(bool(tools))].render({**variables, **given})
        except _TEMPLATE_FAULTS as error:
            raise ChatTemplateError(f"the chat template refuses the messages: {error}") from error

    def _name(self, with_tools: bool) -> str:
        return TOOL_USE if with_tools and TOOL_USE in self._templates else DEFAULT

    def _now(self) -> datetime:
        """Local time, as in transformers."""
        return datetime.fromtimestamp(self._clock.wall_s())


def _turns(messages: Sequence[ChatMessage]) -> list[dict[str, object]]:
    return [message.model_dump(exclude={"weight"}, exclude_none=True) for message in messages]


def _place_of(message: ChatMessage, said: str, prompt: str, *, after: int) -> int:
    """Where the message's text begins in `said`, which begins like the prompt, but not as far; -1: nowhere.

    It is not taken for a mark around it that reads like it.
    """
    text = (message.content or "").strip()
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, said, strict=False)))
    within = said.rfind(text, after, common + len(text))
    return within if within >= 0 else said.find(text, common)


def _without(turn: Json, field: str) -> Json:
    return {key: value for key, value in turn.items() if key != field}


def _continuation(text: str, longer: str, position: int) -> str:
    if not longer.startswith(text):
        raise RewrittenTurnsError(
            f"messages.{position}: the chat template renders earlier messages differently once later ones "
            "follow, so what the assistant says cannot be told apart"
        )
    return longer[len(text) :]


def _as_templates_expect(message: Json) -> dict[str, object]:
    """A message without empty keys, with its thoughts under the usual keys and its calls decoded."""
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[key] for key in _REASONING_KEYS if key in present), None)
    if reasoning is not None:
        present = {"thinking": reasoning, **present, "reasoning_content": reasoning}
    calls = present.get("tool_calls")
    if isinstance(calls, Sequence):
        present["tool_calls"] = [_decoded_call(call) for call in calls]
    return present


def _decoded_call(call: object) -> object:
    """OpenAI's clients send a call's arguments as JSON in a string; templates expect them decoded."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    return {**call, "function": {**function, "arguments": _decoded(function.get("arguments"))}}


def _decoded(arguments: object) -> object:
    if not isinstance(arguments, str):
        return arguments
    try:
        decoded = json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError):
        return arguments
    return decoded if isinstance(decoded, dict) else arguments


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks for trainers what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    # Jinja's own filter escapes for HTML. This one takes the options of `json.dumps` that templates use.
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ConfigurationError(f"the chat template is wrong: {error}") from error


def _raise_exception(reason: str) -> NoReturn:
    """Templates call this to refuse a conversation."""
    raise TemplateError(reason)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
