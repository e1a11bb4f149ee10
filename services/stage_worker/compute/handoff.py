"""The tensors of one stage on their way from and to the node's other stages."""

import torch
from torch import Tensor

from services.stage_worker.compute.local_stages import LocalStages
from services.stage_worker.context import is_inside
from services.stage_worker.settings import StageWorkerSettings
from shared.errors import CarrierError
from shared.messages.cluster import LinkAnswer, LinkOffer, LinkPurpose
from shared.tensors import shm
from shared.tensors.links import IncomingLinks, OutgoingLink, SharedMemoryLink
from shared.tensors.local import LocalLink
from shared.tensors.point_to_point import CollectiveLink
from shared.tensors.ref import TensorRef

NUM_TIED_SLOTS = 2
"""One end of the pipeline may gather its next batch while the other still reads the one before."""
_ELEMENT_BYTES = 4


class Handoff:
    """The links of one stage. Whatever touches tensors belongs to the compute thread."""

    def __init__(
        self, settings: StageWorkerSettings, instance: str, device: torch.device, local: LocalStages
    ) -> None:
        self._settings = settings
        self._instance = instance
        self._local = local
        self._incoming = IncomingLinks(
            device, local.tensors, host=settings.collective_host, timeout_s=settings.collective_timeout_s
        )
        self._outgoing: dict[tuple[int, LinkPurpose], OutgoingLink] = {}
        self._offered_to: dict[tuple[int, LinkPurpose], str] = {}
        """The instance that each link was offered to last."""
        self._without_memory: set[str] = set()
        """Instances that cannot open an arena of this host."""

    def offer(
        self, peer: int, instance: str, purpose: LinkPurpose, *, hidden_size: int, vocab_size: int
    ) -> LinkOffer:
        """Prepare a link to the stage `peer`; it replaces the one before. Raises CarrierError.

        By the cheapest carrier that the peer has not refused: see `connect`.
        """
        if (peer, purpose) in self._outgoing:
            self._outgoing.pop((peer, purpose)).close()
        name = f"lemix-{self._instance}-{peer}-{instance}-{purpose}"
        num_slots = NUM_TIED_SLOTS if purpose == "tied" else 2 * self._settings.num_stages + 2
        link: OutgoingLink
        if instance in self._local:
            link = LocalLink(self._local.tensors, name)
        elif instance in self._without_memory:
            link = CollectiveLink(
                name,
                host=self._settings.collective_host,
                num_unread=num_slots,
                timeout_s=self._settings.collective_timeout_s,
            )
        else:
            rows = vocab_size if purpose == "tied" else self._max_rows
            path = self._settings.shm_dir / f"{name}.arena"
            slot_bytes = rows * hidden_size * _ELEMENT_BYTES
            link = SharedMemoryLink(path, slot_bytes=slot_bytes, num_slots=num_slots)
        self._outgoing[peer, purpose], self._offered_to[peer, purpose] = link, instance
        return link.offer(self._settings.stage, self._instance, purpose)

    @property
    def _max_rows(self) -> int:
        return max(self._settings.max_iteration_tokens, self._settings.max_microbatch_tokens)

    def connect(self, peer: int, purpose: LinkPurpose, answer: LinkAnswer) -> None:
        """The peer has answered the offer; what refuses shared memory is offered a connection next time."""
        self._outgoing[peer, purpose].connect(answer)
        if not answer.accepted:
            self._without_memory.add(self._offered_to[peer, purpose])

    def is_lost(self, peer: int, purpose: LinkPurpose) -> bool:
        """Whether the link has broken. Any thread may ask."""
        link = self._outgoing.get((peer, purpose))
        return link is not None and link.is_lost

    def accept(self, offer: LinkOffer) -> LinkAnswer:
        """Prepare to take tensors from a peer; messages must not lead this process to any file there is."""
        shm_dir = self._settings.shm_dir
        if offer.carrier == shm.CARRIER and not is_inside(offer.place, shm_dir):
            return LinkAnswer(accepted=False, reason=f"{offer.place} is not in this stage's {shm_dir}")
        return self._incoming.accept(offer)

    def put(self, peer: int, tensor: Tensor, purpose: LinkPurpose = "activations") -> TensorRef:
        """Hand over a tensor that nobody writes to any more. Raises CarrierError when that cannot be done."""
        return self._outgoing[peer, purpose].put(tensor)

    def take(self, ref: TensorRef) -> Tensor:
        """Raises CarrierError; StaleTensorError when it is gone."""
        return self._incoming.take(ref)

    def take_rows(self, ref: TensorRef, num_rows: int, hidden_size: int) -> Tensor:
        """Activations [num_rows, hidden_size]. Raises CarrierError when they are not there, or others."""
        hidden = self.take(ref)
        if hidden.shape != (num_rows, hidden_size) or not hidden.is_floating_point():
            raise CarrierError(
                f"{ref.dtype} {list(ref.shape)} for {num_rows} rows of {hidden_size} activations"
            )
        return hidden

    def discard(self, ref: TensorRef) -> None:
        """Give back the room of a tensor that nobody wants any more."""
        self._incoming.discard(ref)

    def close(self) -> None:
        """Leave nothing behind."""
        for link in self._outgoing.values():
            link.close()
        self._incoming.close()
