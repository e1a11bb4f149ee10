"""Admission to the KV cache: a task enters, waits, or is refused with a reason; nothing is dropped."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable

from services.stage_worker.node.kv_blocks import KVBlocks
from services.stage_worker.node.prefix_cache import Key
from services.stage_worker.node.sequence import Sequence
from shared.errors import RefusedError
from shared.messages.inference import InferenceTask


class Admission:
    """The waiting line in front of the KV cache, first come, first served.

    A sequence is admitted with blocks for the tokens that it has, while each running one can still get
    another block. Those that wait for the first one of several that begin alike let others pass.
    """

    def __init__(
        self,
        blocks: KVBlocks,
        *,
        max_waiting: int,
        vocab_size: int,
        context_length: int | None = None,
    ) -> None:
        """`context_length`: tokens of prompt and completion together; None: no limit but the cache's."""
        self._blocks = blocks
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._max_waiting = max_waiting
        self._line: OrderedDict[int, Sequence] = OrderedDict()
        self._waiting_for: defaultdict[Key, dict[int, Sequence]] = defaultdict(dict)
        """Those that will share the block with this content."""

    def __len__(self) -> int:
        return len(self._line) + sum(map(len, self._waiting_for.values()))

    def offer(self, sequence: Sequence) -> None:
        """Put a sequence in line. Raises RefusedError when it can never run, or the line is full."""
        self.check_words(sequence.task)
        if self._most_blocks(sequence.task) > self._blocks.num_blocks:
            capacity = self._blocks.num_blocks * self._blocks.block_size
            wanted = sequence.task.most_tokens
            reason = f"prompt and max_tokens want {wanted} tokens of KV cache; a node has {capacity}"
            raise RefusedError(reason, code=400)
        if len(self) >= self._max_waiting:
            raise RefusedError(f"{self._max_waiting} requests are already waiting on this node", code=429)
        self._line[sequence.number] = sequence

    def check_words(self, task: InferenceTask) -> None:
        """Raises RefusedError when the model does not know the task's tokens, or cannot read so many."""
        if len(task.prompt) <= task.num_given:
            raise RefusedError("the prompt is empty", code=400)
        if min(task.prompt) < 0 or max(task.prompt) >= self._vocab_size:
            raise RefusedError(f"the model's tokens are 0 to {self._vocab_size - 1}", code=400)
        for token, _ in task.sampling.logit_bias:
            if not 0 <= token < self._vocab_size:
                reason = f"logit_bias: {token} is none of the model's tokens, 0 to {self._vocab_size - 1}"
                raise RefusedError(reason, code=400)
        wanted, limit = task.most_tokens, self._context_length
        if limit is not None and wanted > limit:
            raise RefusedError(
                f"prompt and max_tokens make {wanted} tokens; the model reads {limit}", code=400
            )

    def put_back(self, sequence: Sequence) -> None:
        """Put a sequence first in line: it was here before all others."""
        self._line[sequence.number] = sequence
        self._line.move_to_end(sequence.number, last=False)

    def admit(self, version_of: Callable[[Sequence], int], *, num_running: int) -> list[Sequence]:
        """Give the sequences at the head of the line their blocks, as many as fit now.

        `version_of`: the weights version that a sequence would run with now.
        """
        for key in self._blocks.settled():
            for sequence in reversed(self._waiting_for.pop(key, {}).values()):
                self.put_back(sequence)
        admitted: list[Sequence] = []
        while self._line:
            sequence = next(iter(self._line.values()))
            reserve = num_running + len(admitted)
            placement, key = self._blocks.place(sequence, version_of(sequence), reserve=reserve)
            if placement == "no room":
                break
            del self._line[sequence.number]
            if placement == "placed":
                admitted.append(sequence)
            else:
                self._waiting_for[key][sequence.number] = sequence
        return admitted

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the line, if it is there."""
        self._line.pop(sequence.number, None)
        for key, waiting in list(self._waiting_for.items()):
            waiting.pop(sequence.number, None)
            if not waiting:
                del self._waiting_for[key]

    def _most_blocks(self, task: InferenceTask) -> int:
        # The last generated token is never fed back, so its row is never cached.
        return self._blocks.needed(max(len(task.prompt), task.most_tokens - 1))
