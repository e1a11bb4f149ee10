"""The samples that guard a run, on its disk: they are written once, and later versions compared with them."""

from pathlib import Path
from typing import Self

from pydantic import ValidationError

from services.trainer.publication.samples import Samples
from services.trainer.publication.stored_example import StoredExample
from shared.disk import replace_file
from shared.documents import Document
from shared.errors import ConfigurationError

SAMPLES_FILE = "samples.json"


class _Stored(Document):
    model: str
    version: int
    loss: float
    examples: tuple[StoredExample, ...]

    @classmethod
    def of(cls, samples: Samples, model: str) -> Self:
        examples = tuple(map(StoredExample.of, samples.examples))
        return cls(model=model, version=samples.version, loss=samples.loss, examples=examples)

    @property
    def samples(self) -> Samples:
        return Samples(self.version, self.loss, tuple(each.labelled for each in self.examples))


def write_samples(folder: Path, samples: Samples, *, model: str) -> None:
    """Keep them in the run's folder of checkpoints. Raises OSError."""
    replace_file(folder / SAMPLES_FILE, _Stored.of(samples, model).model_dump_json() + "\n")


def read_samples(folder: Path, *, model: str) -> Samples | None:
    """Those of the run; None: it has none of this model. Raises ConfigurationError when they are damaged."""
    path = folder / SAMPLES_FILE
    if not path.exists():
        return None
    try:
        stored = _Stored.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    return stored.samples if stored.model == model else None
