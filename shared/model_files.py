"""A model's files: where they lie, and what its config says. Never loads torch."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from shared.errors import ConfigurationError, UnsupportedModelError

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_SIZE_KEYS = (_LAYERS_KEYS, ("hidden_size", "n_embd", "d_model"), ("vocab_size",))
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")


FOLDER_ADVICE = "name the folder with config.json, tokenizer.json and the weights as safetensors"
GGUF_ADVICE = (
    "load it with transformers (from_pretrained(folder, gguf_file=...)), save_pretrained model and "
    "tokenizer, and name that folder"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The facts about a model that are needed to ask it something."""

    name: str
    model_type: str
    """Hugging Face's name of the family: `llama`, `gpt2`."""
    vocab_size: int
    context_length: int
    """Tokens that a prompt and its completion may have together."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def resolve(model: str, patterns: tuple[str, ...]) -> Path:
    """The folder of `model`: an existing folder as it is, else a hub snapshot of files like `patterns`.

    Raises ConfigurationError when it is neither, or when the hub cannot be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ConfigurationError(
            f"{model} is a file: {GGUF_ADVICE if folder.suffix == '.gguf' else FOLDER_ADVICE}"
        )
    if folder.is_absolute() or model.startswith(("./", "../")):
        raise ConfigurationError(f"model {model!r}: there is no such folder")
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigurationError(
            f"model {model!r} is neither a folder here nor a model that the hub gave: {reason}"
        ) from error


def name_of(model: str) -> str:
    """The name of `model` for clients: a folder's own name, or the hub name."""
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model


def read_card(folder: Path, name: str) -> ModelCard:
    """Read the card of the model in `folder`.

    Raises ConfigurationError when config.json is missing or no JSON object, and UnsupportedModelError when it
    does not say the size of the vocabulary or of the context, or that the weights are quantised.
    """
    config = _read_config(folder)
    _refuse_quantised(config, folder)
    bos, vocab_size = config.get("bos_token_id"), _first_int(config, ("vocab_size",), folder)
    return ModelCard(
        name=name,
        model_type=str(config.get("model_type", "")),
        vocab_size=vocab_size,
        context_length=_first_int(config, _CONTEXT_KEYS, folder),
        bos_token_id=bos if isinstance(bos, int) else None,
        eos_token_ids=_end_tokens(config, folder, vocab_size),
    )


def _read_config(folder: Path) -> dict[str, object]:
    """Raises ConfigurationError; for what people have instead of a model's folder it says what to do."""
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ConfigurationError(
                f"{folder} is an adapter without its model: merge them with peft (merge_and_unload, then "
                "save_pretrained), and name that folder"
            )
        if any(folder.glob("*.gguf")):
            raise ConfigurationError(f"{folder} holds a GGUF file: {GGUF_ADVICE}")
    return _read_object(folder / "config.json")


def _refuse_quantised(config: dict[str, object], folder: Path) -> None:
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict):
        method = quantised.get("quant_method", "of an unknown kind")
        raise UnsupportedModelError(
            f"{folder} has quantised weights ({method}), which can be neither split nor trained: take the "
            "model in float32, float16 or bfloat16 (or remove quantization_config, if its files are such)"
        )


def _end_tokens(config: dict[str, object], folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text: those of the configs, and the tokenizer's.

    Models come with one that the other does not know, and would never stop.
    """
    generation_file = folder / "generation_config.json"
    generation = _read_object(generation_file) if generation_file.exists() else {}
    both = (_token_ids(each.get("eos_token_id")) for each in (generation, config))
    known = ([token for token in each if 0 <= token < vocab_size] for each in both)
    told = next((tuple(each) for each in known if each), ())
    of_tokenizer = _end_of_tokenizer(folder)
    if of_tokenizer is None or of_tokenizer in told or not 0 <= of_tokenizer < vocab_size:
        return told
    if told:
        log.warning(
            "%s: configs end texts with %s, the tokenizer with %d: all do", folder, told, of_tokenizer
        )
    return (*told, of_tokenizer)


def _end_of_tokenizer(folder: Path) -> int | None:
    """The id of the tokenizer's end token; None where its files do not tell."""
    config_file, file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    config = _read_object(config_file) if config_file.exists() else {}
    token = config.get("eos_token")
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str) or not file.exists():
        return None
    added = _read_object(file).get("added_tokens")
    known = (
        {each.get("content"): each.get("id") for each in added if isinstance(each, dict)}
        if isinstance(added, list)
        else {}
    )
    found = known.get(name)
    return found if isinstance(found, int) else None


def num_layers(folder: Path) -> int | None:
    """Layers of the model in `folder`; None where its config says it under no name that is known here.

    Raises ConfigurationError when config.json is missing or no JSON object.
    """
    config = _read_object(folder / "config.json")
    return next((value for key in _LAYERS_KEYS if isinstance(value := config.get(key), int)), None)


def approximate_num_weights(folder: Path) -> int | None:
    """Weights of the model in `folder` from its config: 12 L h^2 (Kaplan et al., 2020) and the embedding.

    Within a factor of two, but that of experts one is counted; None where the config does not say enough.
    Raises ConfigurationError when config.json is missing or no JSON object.
    """
    config = _read_object(folder / "config.json")
    sizes = [next((config[key] for key in keys if key in config), None) for keys in _SIZE_KEYS]
    if not all(isinstance(size, int) for size in sizes):
        return None
    layers, hidden, vocab = (int(str(size)) for size in sizes)
    return 12 * layers * hidden**2 + vocab * hidden


def _read_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds no JSON object")
    return content


def _first_int(config: dict[str, object], keys: tuple[str, ...], folder: Path) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int):
            return value
    several = (
        " (it describes a text model among others, under text_config)" if "text_config" in config else ""
    )
    raise UnsupportedModelError(f"{folder / 'config.json'} has none of {', '.join(keys)}{several}")


def _token_ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(token for token in values if isinstance(token, int))
