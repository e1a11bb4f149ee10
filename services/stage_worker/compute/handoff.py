"""The tensors of one stage on their way from and to the node's other stages."""

import logging

import torch
from torch import Tensor

from services.stage_worker.compute.local_stages import LocalStages
from services.stage_worker.context import is_inside
from services.stage_worker.settings import StageWorkerSettings
from shared.errors import CarrierError
from shared.messages.cluster import LinkAnswer, LinkOffer, LinkPurpose
from shared.tensors import cuda_ipc, shm
from shared.tensors.collective import hardware_name
from shared.tensors.cuda_ipc import CudaIpcLink
from shared.tensors.gpu_memory import FindGpu, gpu_named
from shared.tensors.links import IncomingLinks, OutgoingLink, SharedMemoryLink
from shared.tensors.local import LocalLink
from shared.tensors.point_to_point import CollectiveLink
from shared.tensors.ref import TensorRef

NUM_TIED_SLOTS = 2
"""One end of the pipeline may gather its next batch while the other still reads the one before."""
SLOTS_PER_STAGE = 3
"""As many microbatches and as many iterations may be on their way as the node has stages; a microbatch of
preferences has two tensors.
"""
SPARE_SLOTS = 3
_ELEMENT_BYTES = 4

log = logging.getLogger(__name__)


class Handoff:
    """The links of one stage. Whatever touches tensors belongs to the compute thread."""

    def __init__(
        self,
        settings: StageWorkerSettings,
        instance: str,
        device: torch.device,
        local: LocalStages,
        find_gpu: FindGpu = gpu_named,
    ) -> None:
        self._settings = settings
        self._instance = instance
        self._local = local
        self._device = device
        self._gpu = find_gpu(hardware_name(device), device)
        self._incoming = IncomingLinks(
            device,
            local.tensors,
            host=settings.collective_host,
            timeout_s=settings.collective_timeout_s,
            find_gpu=find_gpu,
        )
        self._outgoing: dict[tuple[int, LinkPurpose], OutgoingLink] = {}
        self._offered: dict[tuple[int, LinkPurpose], tuple[str, str]] = {}
        """(instance, carrier) of each link's last offer."""
        self._refused: set[tuple[str, str]] = set()
        """(instance, carrier): what a peer cannot open, or this process cannot make."""

    def offer(
        self, peer: int, instance: str, purpose: LinkPurpose, *, hidden_size: int, vocab_size: int
    ) -> LinkOffer:
        """Prepare a link to the stage `peer`; it replaces the one before. Raises CarrierError.

        By the cheapest carrier that the peer has not refused: see `connect`.
        """
        if (peer, purpose) in self._outgoing:
            self._outgoing.pop((peer, purpose)).close()
        name = f"lemix-{self._instance}-{peer}-{instance}-{purpose}"
        rows = vocab_size if purpose == "tied" else self._max_rows
        room = SLOTS_PER_STAGE * self._settings.num_stages + SPARE_SLOTS
        num_slots = NUM_TIED_SLOTS if purpose == "tied" else room
        link = self._cheapest(name, instance, rows * hidden_size * _ELEMENT_BYTES, num_slots)
        offer = link.offer(self._settings.stage, self._instance, purpose)
        self._outgoing[peer, purpose], self._offered[peer, purpose] = link, (instance, offer.carrier)
        return offer

    def _cheapest(self, name: str, instance: str, slot_bytes: int, num_slots: int) -> OutgoingLink:
        """A link by the cheapest carrier that nobody has refused. Raises CarrierError."""
        settings = self._settings
        path = settings.shm_dir / f"{name}.arena"
        if instance in self._local:
            return LocalLink(self._local.tensors, name)
        if self._gpu is not None and (instance, cuda_ipc.CARRIER) not in self._refused:
            try:
                return CudaIpcLink(self._gpu, path, slot_bytes=slot_bytes, num_slots=num_slots)
            except CarrierError as error:
                self._refused.add((instance, cuda_ipc.CARRIER))
                log.warning("%s; activations go through host memory", error)
        if (instance, shm.CARRIER) not in self._refused:
            return SharedMemoryLink(path, slot_bytes=slot_bytes, num_slots=num_slots)
        return CollectiveLink(
            name,
            device=self._device,
            host=settings.collective_host,
            num_unread=num_slots,
            timeout_s=settings.collective_timeout_s,
        )

    @property
    def _max_rows(self) -> int:
        return max(self._settings.iteration_tokens, self._settings.max_microbatch_tokens)

    def connect(self, peer: int, purpose: LinkPurpose, answer: LinkAnswer) -> None:
        """The peer has answered the offer; who refuses is offered the next carrier next time."""
        self._outgoing[peer, purpose].connect(answer)
        if not answer.accepted:
            self._refused.add(self._offered[peer, purpose])

    def is_lost(self, peer: int, purpose: LinkPurpose) -> bool:
        """Whether the link has broken. Any thread may ask."""
        link = self._outgoing.get((peer, purpose))
        return link is not None and link.is_lost

    def accept(self, offer: LinkOffer) -> LinkAnswer:
        """Prepare to take tensors from a peer; messages must not lead this process to any file there is."""
        shm_dir = self._settings.shm_dir
        if offer.carrier in (shm.CARRIER, cuda_ipc.CARRIER) and not is_inside(offer.place, shm_dir):
            return LinkAnswer(accepted=False, reason=f"{offer.place} is not in this stage's {shm_dir}")
        return self._incoming.accept(offer)

    def put(self, peer: int, tensor: Tensor, purpose: LinkPurpose = "activations") -> TensorRef:
        """Hand over a tensor that nobody writes to any more. Raises CarrierError when that cannot be done."""
        return self._outgoing[peer, purpose].put(tensor)

    def put_both(self, peer: int, tensor: Tensor, other: Tensor) -> tuple[TensorRef, TensorRef]:
        """Hand over two tensors of activations, or none of them. Raises CarrierError."""
        first = self.put(peer, tensor)
        try:
            return first, self.put(peer, other)
        except Exception:
            self._outgoing[peer, "activations"].take_back(first)
            raise

    def receive(self, ref: TensorRef) -> Tensor:
        """Raises CarrierError; StaleTensorError when it is gone."""
        return self._incoming.take(ref)

    def receive_rows(self, ref: TensorRef, num_rows: int, hidden_size: int) -> Tensor:
        """Activations [num_rows, hidden_size]. Raises CarrierError when they are not there, or others."""
        hidden = self.receive(ref)
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
