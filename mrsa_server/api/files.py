"""`/v1/files`: what batches are made of, and what they end with. Nothing of a file is ever whole in memory.

A file that comes in is kept on the disk of this server until it is whole, and then in the store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

import orjson
from fastapi import APIRouter, Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response, StreamingResponse

from mrsa_server.api.auth import caller_of, needs
from mrsa_server.api.batches_wire import LONGEST_S, file_object, parse_expiry
from mrsa_server.api.errors import ApiError, BadRequest
from mrsa_server.api.query import integer, one_of, page, query
from mrsa_server.api.sse import ClientGone
from mrsa_server.keyring import Caller, Scope
from mrsa_server.runs.patience import promptly
from mrsa_server.runs.record import FilePurpose
from mrsa_server.runs.store_errors import StoreUnavailable

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.file_store import FileStore, StoredFile

router = APIRouter()

_FORM_BYTES = 65_536  # around the file
_FIELD_BYTES = 4_096
_FIELDS = 8
_SLOWEST = 65_536  # bytes a second that an upload has to bring after `body_timeout_s`
_READ_BYTES = 1 << 18
_MOST_FILES = 10_000  # on a page, as OpenAI's
_NAME_CHARACTERS = 255
_KNOWN = {"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"}


@dataclass(frozen=True, slots=True)
class FilesService:
    """What the routes need of the server; `files` is None where nothing is stored."""

    files: FileStore | None
    max_file_bytes: int
    body_timeout_s: float


def not_stored() -> ApiError:
    """What a server without a store says."""
    message = "This server stores nothing, and so has no files and no batches: start it with --state-dir DIR or "
    return ApiError(404, "runs_not_stored", message + "MRSA_DATABASE_URL.")


def _files(request: Request) -> tuple[FilesService, FileStore]:
    service: FilesService = request.app.state.files
    if service.files is None:
        raise not_stored()
    return service, service.files


@router.post("/v1/files")
@needs(Scope.INFERENCE)
async def upload_file(request: Request) -> Response:
    """Store a file of requests, sent as a form: `file`, `purpose` (batch) and `expires_after`."""
    service, files = _files(request)
    try:
        form = await _form(request, service)
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    try:
        return _json(file_object(await _keep(files, form, service.max_file_bytes, caller_of(request).key_id)))
    finally:
        await form.close()


async def _keep(files: FileStore, form: FormData, max_bytes: int, key_id: str | None) -> StoredFile:
    for name, count in ((name, len(form.getlist(name))) for name in form):
        if name not in _KNOWN:
            raise BadRequest(f"{name[:64]}: is not a parameter here", name[:64], "unknown_parameter")
        if count > 1:
            raise BadRequest(f"{name}: must be given once", name)
    found = form.get("file")
    if not isinstance(found, UploadFile):
        raise BadRequest("file: is required, as a file of the form", "file", "missing_required_parameter")
    if "purpose" not in form:
        raise BadRequest("purpose: is required", "purpose", "missing_required_parameter")
    if form["purpose"] != "batch":
        raise BadRequest("purpose: must be batch: files are stored for batches alone", "purpose")
    filename = found.filename or "file"
    if len(filename) > _NAME_CHARACTERS or not filename.isprintable():
        raise BadRequest(f"file: its name must be printable and at most {_NAME_CHARACTERS} characters", "file")
    if found.size is not None and found.size > max_bytes:
        raise _too_large(max_bytes)
    given = [form.get(f"expires_after[{part}]") for part in ("anchor", "seconds")]
    keep_s = parse_expiry(*(part if isinstance(part, str) else None for part in given))
    now = time.time()
    # Without a word about it, a month, as OpenAI's: batches have read theirs long before.
    async with promptly(files):
        writing = await files.begin(filename, "batch", now, now + (keep_s or LONGEST_S), key_id)
    try:
        while data := await found.read(_READ_BYTES):
            async with promptly(files):
                await writing.write(data)
        async with promptly(files):
            return await writing.close()
    except StoreUnavailable:  # what is half done is swept away later
        raise
    except BaseException:
        with suppress(StoreUnavailable):
            await files.delete(writing.file_id)
        raise


async def _form(request: Request, service: FilesService) -> FormData:
    """A form with one file, bounded in size and in time while it arrives.

    Raises:
        ApiError: It is none, too large, or too slow.
        ClientGone: The client left before its end.
    """
    kind, _, _ = request.headers.get("content-type", "").lower().partition(";")
    if kind.strip() != "multipart/form-data":
        raise BadRequest("The content-type must be multipart/form-data.", code="invalid_content_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise BadRequest("The body must not be compressed.", code="invalid_content_encoding")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:18]) > service.max_file_bytes + _FORM_BYTES:
        raise _too_large(service.max_file_bytes)
    parser = MultiPartParser(
        request.headers,
        _arriving(request, service),
        max_files=1,
        max_fields=_FIELDS,
        max_part_size=_FIELD_BYTES,
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise BadRequest(f"The form cannot be read: {error.message}", code="invalid_form") from None
    except UnicodeError:
        raise BadRequest("The form cannot be read: its names must be UTF-8.", code="invalid_form") from None


async def _arriving(request: Request, service: FilesService) -> AsyncGenerator[bytes, None]:
    clock = asyncio.get_running_loop().time
    began, arrived = clock(), 0
    while True:
        try:
            async with asyncio.timeout_at(began + service.body_timeout_s + arrived / _SLOWEST):
                message = await request.receive()
        except TimeoutError:
            raise ApiError(
                408,
                "request_timeout",
                f"The body has to arrive within {service.body_timeout_s:g} s and a second for each {_SLOWEST} bytes.",
                headers=(("connection", "close"),),
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        body: bytes = message.get("body", b"")
        arrived += len(body)
        if arrived > service.max_file_bytes + _FORM_BYTES:
            raise _too_large(service.max_file_bytes)
        yield body
        if not message.get("more_body", False):
            return


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, "request_too_large", f"file: must be at most {max_bytes} bytes.", "file")


@router.get("/v1/files")
@needs(Scope.INFERENCE)
async def list_files(request: Request) -> Response:
    """A page of files, the newest first unless `order` is `asc`; by `purpose`, from the file `after` on."""
    caller, (_, files) = caller_of(request), _files(request)
    asked = query(request, {"purpose", "limit", "order", "after"})
    limit = integer(asked, "limit", 1, _MOST_FILES, _MOST_FILES)
    order = one_of(asked.get("order", "desc"), "order", ("desc", "asc"))
    after = None
    if "after" in asked:
        after = await find_file(files, asked["after"], caller)
        if after is None:
            raise BadRequest(f"after: there is no file {asked['after'][:128]!r}", "after")
    purpose = asked.get("purpose")
    if purpose is not None and purpose not in get_args(FilePurpose):
        return _json(page([], more=False))  # OpenAI has more of them, and here are none of those
    found = await files.list_files(
        cast("FilePurpose | None", purpose),
        after=after,
        order="asc" if order == "asc" else "desc",
        limit=limit + 1,
        key_id=caller.only,
    )
    return _json(page([file_object(file) for file in found[:limit]], more=len(found) > limit))


@router.get("/v1/files/{file_id}")
@needs(Scope.INFERENCE)
async def get_file(request: Request, file_id: str) -> Response:
    """What is known of a file."""
    _, files = _files(request)
    return _json(file_object(await _found(request, files, file_id)))


@router.get("/v1/files/{file_id}/content")
@needs(Scope.INFERENCE)
async def file_content(request: Request, file_id: str) -> Response:
    """What is in a file."""
    _, files = _files(request)
    file = await _found(request, files, file_id)
    headers = {
        "content-length": str(file.bytes),
        "content-disposition": "attachment",  # a browser is to show nothing that a client has written
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(files.pieces(file_id), headers=headers, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}")
@needs(Scope.INFERENCE)
async def delete_file(request: Request, file_id: str) -> Response:
    """Forget a file. A batch that has read it goes on; one that has not fails."""
    _, files = _files(request)
    file = await _found(request, files, file_id)
    await files.delete(file.file_id)
    return _json({"id": file_id, "object": "file", "deleted": True})


async def _found(request: Request, files: FileStore, file_id: str) -> StoredFile:
    file = await find_file(files, file_id, caller_of(request))
    if file is None:
        raise ApiError(404, "not_found", f"There is no file {file_id[:128]!r}.")
    return file


async def find_file(files: FileStore, file_id: str, caller: Caller) -> StoredFile | None:
    """A file by a name that a client gave; None where there is none that it sees."""
    if not (file_id.isascii() and file_id.isprintable() and len(file_id) <= 128):
        return None
    file = await files.get(file_id)
    return file if file is not None and caller.sees(file.key_id) else None


def _json(body: object) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
