"""What the last stage makes of an iteration's logits: which rows it needs, and each sequence's result."""

from collections.abc import Sequence

from torch import Tensor

from services.stage_worker import sampling
from shared.messages.inference import SequenceChunk, SequenceResult, TokenLogprob


class LogitPlan:
    """Made from the chunks before the forward, which needs `rows` only; `results` reads the logits of those.

    Shape letters: R rows of logits, V vocabulary.
    """

    def __init__(self, chunks: Sequence[SequenceChunk]) -> None:
        self._chunks = chunks
        self.rows: list[int] = []
        """Rows of the iteration whose logits are needed, in the order of the chunks."""
        self._scored: list[slice] = []
        """Per chunk, the places in `rows` that predict its targets."""
        self._drawing: list[int | None] = []
        """Per chunk, the place in `rows` that draws its token."""
        first = 0
        for chunk in chunks:
            self._add(chunk, first)
            first += chunk.num_tokens

    def _add(self, chunk: SequenceChunk, first: int) -> None:
        start = len(self.rows)
        self.rows.extend(range(first, first + len(chunk.targets)))
        self._scored.append(slice(start, len(self.rows)))
        draws = chunk.produces and chunk.sampling.max_tokens > 0
        self._drawing.append(len(self.rows) if draws else None)
        if draws:
            self.rows.append(first + chunk.num_tokens - 1)

    def results(self, logits_RV: Tensor) -> tuple[SequenceResult, ...]:
        """A result for each chunk that has something to tell: scored prompt tokens, a new token, its end."""
        tokens = self._tokens(logits_RV)
        told = self._with_logprobs(logits_RV, tokens)
        results = []
        for chunk, scored, place in zip(self._chunks, self._scored, self._drawing, strict=True):
            if scored.start < scored.stop or chunk.produces:
                results.append(_result(chunk, tuple(told[scored]), None if place is None else told[place]))
        return tuple(results)

    def _tokens(self, logits_RV: Tensor) -> list[int]:
        """The token of each row: the known target, or a draw."""
        tokens = [-1] * len(self.rows)
        for chunk, scored in zip(self._chunks, self._scored, strict=True):
            tokens[scored] = chunk.targets
        drawing = [
            (chunk, place)
            for chunk, place in zip(self._chunks, self._drawing, strict=True)
            if place is not None
        ]
        if drawing:
            places = [place for _, place in drawing]
            rows = logits_RV if len(places) == len(self.rows) else logits_RV[places]
            drawn = sampling.draw(
                rows, [chunk.sampling for chunk, _ in drawing], [chunk.index for chunk, _ in drawing]
            )
            for place, token in zip(places, drawn, strict=True):
                tokens[place] = token
        return tokens

    def _with_logprobs(self, logits_RV: Tensor, tokens: list[int]) -> list[TokenLogprob]:
        wanted = [
            place
            for chunk, scored, drawing in zip(self._chunks, self._scored, self._drawing, strict=True)
            if chunk.sampling.num_logprobs is not None
            for place in (*range(scored.start, scored.stop), *([] if drawing is None else [drawing]))
        ]
        told = [TokenLogprob(token=token) for token in tokens]
        if wanted:
            counts = self._num_top()
            scored = sampling.logprobs(
                logits_RV[wanted], [tokens[place] for place in wanted], [counts[place] for place in wanted]
            )
            for place, logprob in zip(wanted, scored, strict=True):
                told[place] = logprob
        return told

    def _num_top(self) -> list[int]:
        counts = []
        for chunk, scored, drawing in zip(self._chunks, self._scored, self._drawing, strict=True):
            num_rows = scored.stop - scored.start + (drawing is not None)
            counts.extend([chunk.sampling.num_logprobs or 0] * num_rows)
        return counts


def _result(
    chunk: SequenceChunk, prompt: tuple[TokenLogprob, ...], token: TokenLogprob | None
) -> SequenceResult:
    finish = None
    if chunk.produces:
        finish = (
            "length" if token is None else sampling.finish_reason(token.token, chunk.index, chunk.sampling)
        )
    return SequenceResult(task_id=chunk.task_id, prompt=prompt, token=token, index=chunk.index, finish=finish)
