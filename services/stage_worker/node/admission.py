"""Admission to the KV cache: a task enters, waits, or is refused with a reason; nothing is dropped."""

from collections import OrderedDict

from services.stage_worker.node.blocks import BlockAllocator
from services.stage_worker.node.sequence import Sequence
from shared.errors import RefusedError
from shared.messages.inference import InferenceTask


class Admission:
    """The waiting line in front of the KV cache, first come, first served.

    A sequence is admitted with all the blocks that it can ever need, so that no running one is evicted.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        max_waiting: int,
        vocab_size: int,
        context_length: int | None = None,
    ) -> None:
        """`context_length`: tokens of prompt and completion together; None: no limit but the cache's."""
        self._allocator = allocator
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._max_waiting = max_waiting
        self._line: OrderedDict[int, Sequence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._line)

    def offer(self, sequence: Sequence) -> None:
        """Put a sequence in line. Raises RefusedError when it can never run, or the line is full."""
        self.check_words(sequence.task)
        if self._blocks_for(sequence.task) > self._allocator.num_blocks:
            capacity = self._allocator.num_blocks * self._allocator.block_size
            wanted = len(sequence.task.prompt) + sequence.task.sampling.max_tokens
            reason = f"prompt and max_tokens want {wanted} tokens of KV cache; a node has {capacity}"
            raise RefusedError(reason, code=400)
        if len(self._line) >= self._max_waiting:
            raise RefusedError(f"{self._max_waiting} requests are already waiting on this node", code=429)
        self._line[sequence.number] = sequence

    def check_words(self, task: InferenceTask) -> None:
        """Raises RefusedError when the model does not know the task's tokens, or cannot read so many."""
        if not task.prompt:
            raise RefusedError("the prompt is empty", code=400)
        if min(task.prompt) < 0 or max(task.prompt) >= self._vocab_size:
            raise RefusedError(f"the model's tokens are 0 to {self._vocab_size - 1}", code=400)
        for token, _ in task.sampling.logit_bias:
            if not 0 <= token < self._vocab_size:
                reason = f"logit_bias: {token} is none of the model's tokens, 0 to {self._vocab_size - 1}"
                raise RefusedError(reason, code=400)
        wanted, limit = len(task.prompt) + task.sampling.max_tokens, self._context_length
        if limit is not None and wanted > limit:
            raise RefusedError(
                f"prompt and max_tokens make {wanted} tokens; the model reads {limit}", code=400
            )

    def admit(self) -> list[Sequence]:
        """Give the sequences at the head of the line their blocks, as many as fit now."""
        admitted = []
        while self._line:
            sequence = next(iter(self._line.values()))
            wanted = self._blocks_for(sequence.task)
            if wanted > self._allocator.num_free:
                break
            del self._line[sequence.number]
            sequence.blocks = [*self._allocator.allocate(wanted)]
            admitted.append(sequence)
        return admitted

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out of the line; False when it is not there."""
        return self._line.pop(sequence.number, None) is not None

    def waiting(self) -> list[Sequence]:
        """The line, first come first."""
        return list(self._line.values())

    def _blocks_for(self, task: InferenceTask) -> int:
        # The last generated token is never fed back, so its row is never cached.
        return self._allocator.needed(len(task.prompt) + max(task.sampling.max_tokens - 1, 0))
