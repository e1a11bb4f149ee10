"""Where a model keeps its chat templates, as transformers looks for them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.chat_template import DEFAULT, SPECIAL_TOKENS, ChatTemplate
from shared.clock import Clock
from shared.errors import ConfigurationError

_CONFIG = "tokenizer_config.json"
_OLDER_TOKENS = "special_tokens_map.json"
_OWN_FILE = "chat_template.jinja"
_FURTHER_FILES = "additional_chat_templates"


def load_chat_template(folder: Path, clock: Clock, *, chosen: Path | None = None) -> ChatTemplate | None:
    """The chat template of the model in `folder`, or None when it has none.

    `chosen` is a file to use instead of the model's own (LEMIX_CHAT_TEMPLATE).
    Raises ConfigurationError when a file cannot be read or is no template.
    """
    config = _read_object(folder / _CONFIG)
    sources = _chosen_source(chosen) if chosen else _files_of(folder) or _sources_in(config)
    if DEFAULT not in sources:
        return None
    try:
        return ChatTemplate(sources, _special_tokens(folder, config), clock)
    except ConfigurationError as error:
        place = f"LEMIX_CHAT_TEMPLATE: {chosen}" if chosen else folder
        raise ConfigurationError(f"{place}: {error}") from error


def _chosen_source(path: Path) -> dict[str, str]:
    try:
        return {DEFAULT: _read(path)}
    except ConfigurationError as error:
        raise ConfigurationError(f"LEMIX_CHAT_TEMPLATE: {error}") from error


def _files_of(folder: Path) -> dict[str, str]:
    """Templates in files of their own; where there are any, those in the config do not count."""
    own = [(DEFAULT, folder / _OWN_FILE)]
    further = [(path.stem, path) for path in sorted((folder / _FURTHER_FILES).glob("*.jinja"))]
    return {name: _read(path) for name, path in own + further if path.exists()}


def _sources_in(config: Mapping[str, Any]) -> dict[str, str]:
    """The config has one template, or a list of named ones."""
    found = config.get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    named = found if isinstance(found, list) else []
    return {str(each["name"]): str(each["template"]) for each in named}


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    older = {} if "added_tokens_decoder" in config else _read_object(folder / _OLDER_TOKENS)
    tokens = {**config, **older}
    return {name: _token_text(tokens[name]) for name in SPECIAL_TOKENS if tokens.get(name)}


def _token_text(token: object) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty when the file is not there or holds something else."""
    if not path.exists():
        return {}
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    return content if isinstance(content, dict) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
