"""Train the small language model that LeMix carries, from the text of the running Python itself.

    python tools/train_embedded_model.py shared/model/embedded

The text is the language reference (`pydoc_data.topics`) and the docstrings of the standard
library. Both belong to Python and are under the PSF License Agreement; nothing is downloaded and
no other text is read. The result is in Hugging Face format: a byte-level BPE tokenizer and a small
Llama with separate input and output embeddings, in bfloat16.
"""

import ast
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

END_OF_TEXT = "<|endoftext|>"
NUM_TOKENS_IN_VOCABULARY = 4096
NUM_TOKENS_IN_SEQUENCE = 256
MAX_TOKENS_IN_CONTEXT = 1024
NUM_SEQUENCES_IN_BATCH = 8
NUM_WARMUP_STEPS = 50
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.1
HELD_OUT_FRACTION = 0.02
MIN_DOCUMENT_CHARS = 20
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def docstrings(source: str) -> Iterator[str]:
    """Every docstring in one source file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def standard_library_sources() -> Iterator[str]:
    """The standard library's own source files, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="replace")


def collect_documents() -> list[str]:
    """All distinct documents, in an order that depends only on the Python version."""
    found = list(topics.values())
    for source in standard_library_sources():
        found.extend(docstrings(source))
    return sorted({text.strip() for text in found if len(text) >= MIN_DOCUMENT_CHARS})


def split_documents(documents: list[str], seed: int) -> tuple[list[str], list[str]]:
    """(documents to train on, documents held out)."""
    shuffled = random.Random(seed).sample(documents, len(documents))
    num_held_out = round(len(shuffled) * HELD_OUT_FRACTION)
    return shuffled[num_held_out:], shuffled[:num_held_out]


def train_tokenizer(documents: list[str]) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS_IN_VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return bpe


def pack(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """One long row of token ids, an end-of-text token before every document."""
    text = "".join(END_OF_TEXT + document for document in documents)
    return torch.tensor(tokenizer.encode(text).ids)


def build_model(end_of_text_id: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=NUM_TOKENS_IN_VOCABULARY,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS_IN_CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=end_of_text_id,
        eos_token_id=end_of_text_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    return LlamaForCausalLM(config)


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < NUM_WARMUP_STEPS:
        return (step + 1) / NUM_WARMUP_STEPS
    progress = (step - NUM_WARMUP_STEPS) / max(1, num_steps - NUM_WARMUP_STEPS)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def sequences_at(tokens: Tensor, starts: Tensor) -> Tensor:
    return tokens[starts[:, None] + torch.arange(NUM_TOKENS_IN_SEQUENCE)]


def loss_of(model: LlamaForCausalLM, sequences: Tensor) -> Tensor:
    """Mean next-token loss in nats a token, computed in bfloat16 where that is safe."""
    with torch.autocast("cpu", torch.bfloat16):
        loss: Tensor = model(input_ids=sequences, labels=sequences).loss
    return loss


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Loss over the held-out text, cut into whole sequences."""
    starts = torch.arange(0, len(tokens) - NUM_TOKENS_IN_SEQUENCE, NUM_TOKENS_IN_SEQUENCE)
    losses = [loss_of(model, sequences_at(tokens, start[None])) for start in starts]
    return torch.stack(losses).mean().item()


def save_weights(model: LlamaForCausalLM, folder: Path) -> None:
    """Write bfloat16 weights under another name, then rename: a reader never sees half a file."""
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    unfinished = folder / "model.safetensors.unfinished"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / "model.safetensors")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=MAX_TOKENS_IN_CONTEXT,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder, save_jinja_files=False)


def save_configuration(model: LlamaForCausalLM, folder: Path) -> None:
    model.config.save_pretrained(folder)
    GenerationConfig.from_model_config(model.config).save_pretrained(folder)


def build_optimizers(model: LlamaForCausalLM) -> list[Optimizer]:
    """Muon for the matrices between the embeddings, AdamW for everything else."""
    inner: list[Parameter] = []
    rest: list[Parameter] = []
    for name, parameter in model.named_parameters():
        is_inner = parameter.ndim == 2 and name.startswith("model.layers.")
        (inner if is_inner else rest).append(parameter)
    muon = Muon(inner, PEAK_LEARNING_RATE, WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(rest, PEAK_LEARNING_RATE, (0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    return [muon, adamw]


def apply_gradients(model: LlamaForCausalLM, optimizers: list[Optimizer], factor: float) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * factor
        optimizer.step()
        optimizer.zero_grad()


def train(model: LlamaForCausalLM, tokens: Tensor, num_steps: int, seed: int) -> Iterator[tuple[int, float]]:
    """Train in place on random sequences; yields (steps done, loss of the last step)."""
    optimizers = build_optimizers(model)
    generator = torch.Generator().manual_seed(seed)
    last_start = len(tokens) - NUM_TOKENS_IN_SEQUENCE
    for step in range(num_steps):
        starts = torch.randint(last_start, (NUM_SEQUENCES_IN_BATCH,), generator=generator)
        loss = loss_of(model, sequences_at(tokens, starts))
        loss.backward()
        apply_gradients(model, optimizers, learning_rate_factor(step, num_steps))
        yield step + 1, loss.item()


def main(folder: Path, num_steps: int = 2000, steps_between_saves: int = 200, seed: int = 0) -> None:
    """Collect, tokenise, train, and save; prints the held-out loss at every save."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    training_documents, held_out_documents = split_documents(collect_documents(), seed)
    tokenizer = train_tokenizer(training_documents)
    training_tokens = pack(tokenizer, training_documents)
    held_out_tokens = pack(tokenizer, held_out_documents)
    print(f"{len(training_tokens)} tokens to train on, {len(held_out_tokens)} held out")
    model = build_model(tokenizer.get_vocab()[END_OF_TEXT])
    save_tokenizer(tokenizer, folder)
    save_configuration(model, folder)
    started_s = time.monotonic()
    for step, loss in train(model, training_tokens, num_steps, seed):
        if step % steps_between_saves == 0 or step == num_steps:
            save_weights(model, folder)
            held_out = held_out_loss(model, held_out_tokens)
            elapsed_s = time.monotonic() - started_s
            print(f"{step=} {loss=:.3f} {held_out=:.3f} {elapsed_s=:.0f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
