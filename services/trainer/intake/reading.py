"""Turns a message of the training stream into a batch that can be fed, or into the reason why not."""

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Self

from services.trainer.intake.data import (
    MAX_ID_CHARACTERS,
    OWN_ID_PREFIX,
    BatchBody,
    check_id,
    id_in,
    read_body,
)
from services.trainer.intake.microbatches import HeldOutBatch, TrainingBatch, cut
from services.trainer.publication.hold_out import HoldOut
from services.trainer.settings import TrainerSettings
from shared.bus.base import Incoming, StreamMessage
from shared.clock import Clock
from shared.encoding import ExampleEncoder, LabelledTokens
from shared.errors import InvalidBatchError
from shared.messages.lineage import ExampleSource
from shared.messages.training import BatchCheck, BatchChecked, RejectedBatch
from shared.model_files import name_of, read_card

ID_HEADER = "Nats-Msg-Id"

log = logging.getLogger(__name__)


def id_of(sequence: int) -> str:
    """The id of a batch whose publisher gave it none; no publisher may give one like it."""
    return f"{OWN_ID_PREFIX}{sequence}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """Reads, checks, tokenises and cuts batches for one model."""

    encoder: ExampleEncoder
    microbatches: int
    max_microbatch_tokens: int
    hold_out: HoldOut | None = None
    """Examples that do not train; None: all train."""

    @classmethod
    def load(cls, settings: TrainerSettings, model_folder: Path, clock: Clock) -> Self:
        """Build the intake for a model.

        Raises ConfigurationError or UnsupportedModelError when the model's files cannot be used.
        """
        card = read_card(model_folder, name_of(settings.model))
        return cls(
            encoder=ExampleEncoder.load(
                card,
                model_folder,
                clock,
                max_tokens=settings.max_microbatch_tokens,
                chat_template=settings.chat_template,
            ),
            microbatches=settings.microbatches,
            max_microbatch_tokens=settings.max_microbatch_tokens,
        )

    def prepare(self, message: StreamMessage) -> TrainingBatch | HeldOutBatch | RejectedBatch:
        """Blocks while it tokenises and hashes, and while held-out examples are written to the disk."""
        batch_id = message.headers.get(ID_HEADER, "")[:MAX_ID_CHARACTERS]
        try:
            body = read_body(message.body)
            batch_id = body.id or batch_id
            check_id(batch_id)
            return self._cut(batch_id or id_of(message.sequence), message, body)
        except InvalidBatchError as error:
            batch_id = id_in(message.body) or batch_id
            reason = str(error)
        except Exception as error:  # a tokenizer or template may raise anything, and would again
            log.exception("batch %s (%d) cannot be prepared", batch_id, message.sequence)
            reason = f"{type(error).__name__}: {error}"
        return RejectedBatch.of(
            message.body,
            batch_id=batch_id or id_of(message.sequence),
            sequence=message.sequence,
            reason=reason,
        )

    def check(self, body: bytes) -> BatchChecked:
        """Whether a batch of that body would be accepted, and if not, why. Blocks while it tokenises."""
        position: int | None = None
        try:
            examples = read_body(body).examples
            for position in range(len(examples)):
                self.encoder.sequences(examples[position])
        except InvalidBatchError as error:
            return BatchChecked(reason=str(error), example=position)
        except Exception as error:  # a tokenizer or template may raise anything, and would again
            log.exception("a batch cannot be checked")
            return BatchChecked(reason=f"{type(error).__name__}: {error}", example=position)
        return BatchChecked()

    async def answer_check(self, incoming: Incoming[BatchCheck]) -> BatchChecked:
        """Answer whoever asks before publishing."""
        return await asyncio.to_thread(self.check, incoming.message.body)

    def _encode(self, body: BatchBody) -> list[tuple[LabelledTokens, ...]]:
        encoded = []
        for position, example in enumerate(body.examples):
            try:
                encoded.append(self.encoder.sequences(example))
            except InvalidBatchError as error:
                raise InvalidBatchError(f"examples.{position}: {error}") from error
        return encoded

    def _trained(self, body: BatchBody, encoded: Sequence[tuple[LabelledTokens, ...]]) -> list[bool]:
        """Which of the examples train: those that are not held out, whose preferred output is not either."""
        if self.hold_out is None:
            return [True] * len(encoded)
        if body.holds_preferences:
            return [not self.hold_out.bars(preferred) for preferred, _ in encoded]
        return [not is_held_out for is_held_out in self.hold_out.select([example for (example,) in encoded])]

    def _cut(self, batch_id: str, message: StreamMessage, body: BatchBody) -> TrainingBatch | HeldOutBatch:
        encoded = self._encode(body)
        trained = self._trained(body, encoded)
        if not any(trained):
            return HeldOutBatch(batch_id)
        examples = list(compress(encoded, trained))
        return TrainingBatch(
            batch_id=batch_id,
            sequence=message.sequence,
            microbatches=cut(examples, self.microbatches, self.max_microbatch_tokens),
            body=message.body,
            sha256=hashlib.sha256(message.body).hexdigest(),
            learning_rate_multiplier=body.chosen_multiplier,
            beta=body.beta_of_preferences,
            producer=body.producer,
            sources=tuple(ExampleSource(**source.model_dump()) for source in compress(body.sources, trained)),
            held_out=tuple(i for i, trains in enumerate(trained) if body.sources and not trains),
        )
