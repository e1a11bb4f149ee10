"""Conversations as text: the chat template of the model's own tokenizer, rendered in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.errors import ConfigurationError, InvalidBatchError
from shared.examples import ChatMessage

_CONFIG = "tokenizer_config.json"
_OWN_FILE = "chat_template.jinja"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation."""

    text: str
    learnt: bool
    """The assistant says it."""


class ChatTemplate:
    """Renders conversations. Raises ConfigurationError when the template itself is wrong."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._template = _compile(source)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The chat template of the model in `folder`, or None when it has none."""
        config = _read_config(folder / _CONFIG)
        own_file = folder / _OWN_FILE
        source = (
            own_file.read_text(encoding="utf-8")
            if own_file.exists()
            else _default(config.get("chat_template"))
        )
        if source is None:
            return None
        return cls(source, {name: _token_text(config[name]) for name in _SPECIAL_TOKENS if config.get(name)})

    def segments(self, messages: Sequence[ChatMessage]) -> list[Segment]:
        """Cut the rendered conversation where the assistant begins and ends.

        Raises InvalidBatchError when the template refuses the conversation, or when a shorter
        conversation is not rendered as the beginning of a longer one.
        """
        segments: list[Segment] = []
        text = ""
        for position, message in enumerate(messages):
            if message.role == "assistant":
                for turns, learnt in ((messages[:position], False), (messages[: position + 1], True)):
                    longer = self._render(turns, add_generation_prompt=not learnt)
                    segments.append(Segment(_continuation(text, longer, position), learnt))
                    text = longer
        rest = _continuation(text, self._render(messages, add_generation_prompt=False), len(messages))
        return [*segments, Segment(rest, learnt=False)]

    def _render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        turns = [message.model_dump() for message in messages]
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidBatchError(f"the chat template refuses the messages: {error}") from error


def _continuation(text: str, longer: str, position: int) -> str:
    if not longer.startswith(text):
        raise InvalidBatchError(
            f"messages.{position}: the chat template renders earlier messages differently once later ones "
            "follow, so what the assistant says cannot be told apart"
        )
    return longer[len(text) :]


def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ConfigurationError(f"the model's chat template is wrong: {error}") from error


def _raise_exception(reason: str) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise TemplateError(reason)


def _to_json(value: object, indent: int | None = None) -> str:
    """As templates expect it: unlike jinja2's own filter, it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    return config if isinstance(config, dict) else {}


def _default(template: object) -> str | None:
    """The template of plain conversations: the only one, or the one named `default`."""
    if isinstance(template, list):
        return next((str(each["template"]) for each in template if each.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _token_text(token: object) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
