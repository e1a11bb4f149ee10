"""What transformers itself answers."""

from typing import Any

import torch


def greedy_reference(model: Any, prompt: list[int], max_tokens: int) -> tuple[list[int], list[float]]:
    """Tokens of `generate()`; log-probabilities of all tokens but the first under one plain forward."""
    inputs = torch.tensor([prompt], device=model.device)
    everything = torch.ones_like(inputs)  # else generate() takes token 0 for padding
    whole = model.generate(inputs, attention_mask=everything, max_new_tokens=max_tokens, do_sample=False)[0]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(whole.unsqueeze(0)).logits[0], dim=-1)
    chosen = logprobs[:-1].gather(1, whole[1:].unsqueeze(1)).squeeze(1).tolist()
    return whole[len(prompt) :].tolist(), chosen
