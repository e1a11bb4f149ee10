"""The base of documents: JSON that is kept on a disk, or read by people and other programs."""

from pydantic import BaseModel, ConfigDict


class Document(BaseModel):
    """A frozen model without unknown keys, checked where it is made and where it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")
