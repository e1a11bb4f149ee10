"""Uploaded files: kept below the run's folder until they are deleted."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from services.gateway.http.errors import ApiError
from services.gateway.jobs.paging import Listed
from shared.clock import Clock, IdSource
from shared.disk import on_disk, replace_file, sync
from shared.errors import ConfigurationError
from shared.examples import numbered_lines

PURPOSE: Literal["fine-tune"] = "fine-tune"
"""The only one there is."""
MAX_NAME_CHARACTERS = 255


class FileObject(Listed):
    """OpenAI's `file`."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"] = PURPOSE
    status: Literal["processed"] = "processed"
    status_details: None = None
    expires_at: None = None


class FileDeleted(BaseModel):
    """OpenAI's answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class UploadedFile(BaseModel):
    """The facts about a file; its id, never its name, says where it lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    number: int
    """Counts the files of a run, in the order of their arrival."""
    bytes: int
    created_at: int
    filename: str

    def as_object(self) -> FileObject:
        """The file as clients see it."""
        return FileObject(id=self.id, bytes=self.bytes, created_at=self.created_at, filename=self.filename)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLimits:
    """How much may be kept."""

    max_files: int
    max_file_lines: int


class FileStore:
    """Files below `root`: `<id>.jsonl` is the content; `<id>.json`, written last, makes it a file."""

    def __init__(self, root: Path, limits: FileLimits, *, clock: Clock, ids: IdSource) -> None:
        self._root = root
        self._limits = limits
        self._clock = clock
        self._ids = ids
        self._files: dict[str, UploadedFile] = {}
        self._num_arriving = 0
        self._next_number = 1

    def load(self) -> None:
        """Find what an earlier gateway kept; blocks. Raises ConfigurationError when a record is damaged."""
        self._root.mkdir(parents=True, exist_ok=True)
        found = sorted(map(_read, self._root.glob("file-*.json")), key=lambda file: file.number)
        self._files = {file.id: file for file in found}
        self._next_number = max((file.number for file in found), default=0) + 1
        for path in self._root.glob("file-*.jsonl"):
            if path.stem not in self._files:  # its gateway died before it was whole
                path.unlink()

    def all(self) -> Sequence[UploadedFile]:
        """Oldest first."""
        return list(self._files.values())

    def find(self, file_id: str) -> UploadedFile:
        """The file of that id. Raises ApiError (404)."""
        if file_id not in self._files:
            raise ApiError(404, f"no such file: {file_id!r}", param="id", code="file_not_found")
        return self._files[file_id]

    def path(self, file_id: str) -> Path:
        """Where the content lies. Raises ApiError (404)."""
        return self._root / f"{self.find(file_id).id}.jsonl"

    @contextmanager
    def place_for_one(self) -> Iterator[None]:
        """Room for a file that arrives until the block ends. Raises ApiError when there is none."""
        if len(self._files) + self._num_arriving >= self._limits.max_files:
            message = f"{self._limits.max_files} files are kept at most: delete one first"
            raise ApiError(400, message, param="file", code="too_many_files")
        self._num_arriving += 1
        try:
            yield
        finally:
            self._num_arriving -= 1

    async def add(self, filename: str, content: BinaryIO) -> UploadedFile:
        """Keep what `content` holds. Raises ApiError when it is no JSONL."""
        if len(filename) > MAX_NAME_CHARACTERS:
            message = f"the file's name has more than {MAX_NAME_CHARACTERS} characters"
            raise ApiError(400, message, param="file", code="invalid_value")
        file = UploadedFile(
            id=self._ids.new("file"),
            number=self._next_number,
            bytes=content.seek(0, os.SEEK_END),
            created_at=int(self._clock.wall_s()),
            filename=filename,
        )
        self._next_number += 1
        try:
            await on_disk(partial(self._keep, file, content))
        except OSError as error:
            raise ApiError(503, f"the file cannot be kept: {error.strerror}") from error
        self._files[file.id] = file
        return file

    async def delete(self, file_id: str) -> None:
        """Delete a file. Raises ApiError when there is none, or when the disk refuses."""
        path, file = self.path(file_id), self._files.pop(file_id)
        try:
            await on_disk(partial(_remove, path))
        except OSError as error:
            self._files[file_id] = file
            raise ApiError(503, f"the file cannot be deleted: {error.strerror}") from error

    def _keep(self, file: UploadedFile, content: BinaryIO) -> None:
        self._check(content)
        content.seek(0)
        path = self._root / f"{file.id}.jsonl"
        try:
            with path.open("wb") as kept:
                shutil.copyfileobj(content, kept)
            sync(path)
            replace_file(path.with_suffix(".json"), file.model_dump_json())
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def _check(self, content: BinaryIO) -> None:
        """Check a file. Whether a line can be learnt from is left to the job."""
        content.seek(0)
        num_lines = sum(1 for _ in content)
        if num_lines > self._limits.max_file_lines:
            message = f"the file has {num_lines} lines, at most {self._limits.max_file_lines} are allowed"
            raise ApiError(400, message, param="file", code="too_many_lines")
        content.seek(0)
        for number, line in numbered_lines(content.read()):
            _check_object(number, line)
            return
        raise ApiError(400, "the file holds no example", param="file", code="invalid_file")


def _check_object(number: int, line: bytes) -> None:
    try:
        is_object = isinstance(from_json(line), dict)
    except ValueError:
        is_object = False
    if not is_object:
        message = f"the file is not JSONL: line {number} is no JSON object"
        raise ApiError(400, message, param="file", code="invalid_file")


def _remove(path: Path) -> None:
    """The record first: without it the content is none."""
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    sync(path.parent)


def _read(path: Path) -> UploadedFile:
    try:
        return UploadedFile.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConfigurationError(f"{path} is no record of a file that can be read: {error}") from error
