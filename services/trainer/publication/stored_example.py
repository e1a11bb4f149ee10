"""An example as the run's files hold it."""

from typing import Self

from shared.documents import Document
from shared.encoding import LabelledTokens


class StoredExample(Document):
    """Tokens, and the rows whose next token counts in the loss."""

    tokens: tuple[int, ...]
    label_rows: tuple[int, ...]

    @classmethod
    def of(cls, example: LabelledTokens) -> Self:
        """The example to be written."""
        return cls(tokens=example.tokens, label_rows=example.label_rows)

    @property
    def labelled(self) -> LabelledTokens:
        """The example that was read."""
        return LabelledTokens(self.tokens, self.label_rows)
