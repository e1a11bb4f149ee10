"""The routes of files, in OpenAI's words."""

import asyncio
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse
from pydantic import Field
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from services.gateway.http.bodies import bounded_stream, is_upload
from services.gateway.http.errors import ApiError
from services.gateway.jobs.files import PURPOSE, FileDeleted, FileObject
from services.gateway.jobs.fine_tuning import FineTuning
from services.gateway.jobs.paging import ObjectList, Page, cut, list_object
from services.gateway.openai.schema import unsupported
from services.gateway.settings import GatewaySettings

FORM_BYTES = 1 << 16
"""Bytes of a multipart body beside the file."""
MAX_FIELDS = 8
CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")
"""Charsets of names in multipart bodies. Others can spell what is no text (`utf-7`: half a surrogate)."""
MAX_FILES_LISTED = 10_000


_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "additionalProperties": False,
                "properties": {
                    "file": {
                        "type": "string",
                        "format": "binary",
                        "description": "one example a line",
                    },
                    "purpose": {"const": PURPOSE},
                },
            }
        }
    },
}


class FilesPage(Page):
    """Which files are wanted."""

    limit: Annotated[int, Field(ge=1, le=MAX_FILES_LISTED)] = MAX_FILES_LISTED
    order: Literal["asc", "desc"] = "desc"
    """By the time of their arrival."""
    purpose: str | None = None


class JsonLines(FileResponse):
    """The content of a file."""

    media_type = "application/jsonl"


def add_files(app: FastAPI, fine_tuning: FineTuning, settings: GatewaySettings) -> None:
    """Serve uploads, lists and contents of files."""
    _add_uploads(app, fine_tuning, settings)
    _add_files(app, fine_tuning)


def _add_uploads(app: FastAPI, fine_tuning: FineTuning, settings: GatewaySettings) -> None:
    @app.post("/v1/files", openapi_extra={"requestBody": _FORM})
    async def upload(request: Request) -> FileObject:
        with fine_tuning.files.place_for_one():
            form = await _read_form(request, settings)
            try:
                file = _uploaded(form, settings.max_file_bytes)
                kept = await fine_tuning.files.add(file.filename or "file", file.file)
            finally:
                await form.close()
        return kept.as_object()


def _add_files(app: FastAPI, fine_tuning: FineTuning) -> None:
    files = fine_tuning.files

    @app.get("/v1/files")
    async def list_files(page: Annotated[FilesPage, Query()]) -> ObjectList[FileObject]:
        found = files.all() if page.purpose in (None, PURPOSE) else []
        ordered = found if page.order == "asc" else found[::-1]
        numbers = cut([file.id for file in ordered], page)
        data = [ordered[number].as_object() for number in numbers]
        return list_object(data, has_more=numbers.stop < len(ordered))

    @app.get("/v1/files/{file_id}")
    async def show_file(file_id: str) -> FileObject:
        return files.find(file_id).as_object()

    @app.get("/v1/files/{file_id}/content", response_class=JsonLines)
    async def file_content(file_id: str) -> JsonLines:
        return JsonLines(files.path(file_id))

    @app.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str) -> FileDeleted:
        return await fine_tuning.delete_file(file_id)


async def _read_form(request: Request, settings: GatewaySettings) -> FormData:
    """The body's parts, to be closed; a file lies in memory, or when larger in a file without a name.

    Raises ApiError when it is no multipart body, too large, or too slow.
    """
    if not is_upload(request.headers):
        raise ApiError(415, "expected a body of type multipart/form-data")
    _check_charset(request.headers)
    stream = bounded_stream(request, settings.max_file_bytes + FORM_BYTES)
    parser = MultiPartParser(request.headers, stream, max_files=1, max_fields=MAX_FIELDS)
    try:
        async with asyncio.timeout(settings.request_timeout_s):
            return await parser.parse()
    except TimeoutError as error:
        message = f"the file did not arrive within {settings.request_timeout_s:g} s"
        raise ApiError(408, message, param="file") from error
    except MultiPartException as error:
        raise ApiError(400, f"the multipart body is wrong: {error.message}") from error


def _check_charset(headers: Headers) -> None:
    """Raises ApiError (400) for names in another charset than UTF-8."""
    _, options = parse_options_header(headers["content-type"])
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in CHARSETS:
        raise ApiError(400, f"the multipart body is wrong: charset {charset!r} is not utf-8")


def _uploaded(form: FormData, max_bytes: int) -> UploadFile:
    """The file to keep. Raises ApiError naming what is wrong."""
    for name in form:
        if name not in ("file", "purpose"):
            raise unsupported(name)
    for name in ("file", "purpose"):
        if name not in form:
            raise ApiError(
                400, f"parameter {name!r} is required", param=name, code="missing_required_parameter"
            )
    file, purpose = form["file"], form["purpose"]
    if purpose != PURPOSE:
        message = f"parameter 'purpose': only {PURPOSE!r} is supported"
        raise ApiError(400, message, param="purpose", code="invalid_value")
    if not isinstance(file, UploadFile):
        raise ApiError(400, "parameter 'file': expected a file", param="file", code="invalid_value")
    if file.size is not None and file.size > max_bytes:
        raise ApiError(413, f"the file is larger than {max_bytes} bytes", param="file")
    return file
