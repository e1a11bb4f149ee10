"""Log-probabilities of tokens under the model itself: at temperature 1, before a request changes anything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.messages.inference import TokenLogprob

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON cannot say (as OpenAI has it)."""


def logprobs(logits_RV: Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of each row's token, with the `num_top` likeliest of the row."""
    logprobs_RV = torch.log_softmax(logits_RV.float(), dim=-1).clamp(min=LEAST_LOGPROB)
    own_R1 = torch.tensor(tokens, device=logits_RV.device).unsqueeze(1)
    chosen = logprobs_RV.gather(1, own_R1).squeeze(1).tolist()
    values, ids = logprobs_RV.topk(min(max(1, *num_top), logprobs_RV.shape[1]), dim=-1)
    return [
        TokenLogprob(
            token=token, logprob=logprob, top=tuple(zip(top_ids[:count], top_values[:count], strict=True))
        )
        for token, logprob, top_ids, top_values, count in zip(
            tokens, chosen, ids.tolist(), values.tolist(), num_top, strict=True
        )
    ]
