"""Files of clients, and those that are made for them: in pieces, so that nobody ever holds a whole one in memory.

A file is there for others once all of it is: what an upload or a writer left half done is swept away later.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import and_, delete, func, insert, or_, select, update

from mrsa_server.runs import codec, tables
from mrsa_server.runs.record import FilePurpose
from mrsa_server.runs.store import RunStore
from mrsa_server.runs.store_errors import NoSuchFile
from mrsa_server.runs.transactions import whole

PIECE_BYTES = 1 << 20
_HALF_DONE_S = 6 * 3600.0  # longer than anybody writes on one file
_SWEPT = 100  # files in one transaction

_files = tables.files.c
_chunks = tables.file_chunks.c
_DONE = "processed"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file, without what is in it.

    Attributes:
        file_id: Its name.
        filename: The client's name for it.
        purpose: What it is for.
        bytes: Its length.
        created_at: Unix seconds.
        expires_at: When it is deleted, Unix seconds; None for when somebody does.
    """

    file_id: str
    filename: str
    purpose: FilePurpose
    bytes: int
    created_at: float
    expires_at: float | None


class Writing:
    """A file that is being written: `write` and then `close`, or it never was."""

    def __init__(self, store: FileStore, file_id: str) -> None:
        self.file_id = file_id
        self.bytes = 0
        self._store = store
        self._pieces = 0
        self._buffer = bytearray()

    async def write(self, data: bytes) -> None:
        """Add to its end.

        Raises:
            NoSuchFile: It was swept away.
            StoreUnavailable: The file is lost.
        """
        self.bytes += len(data)
        self._buffer += data
        while len(self._buffer) >= PIECE_BYTES:
            piece = bytes(self._buffer[:PIECE_BYTES])
            del self._buffer[:PIECE_BYTES]
            await self._put(piece)

    async def flush(self) -> None:
        """Write what is still held here, so that `bytes` are in the store. Raises as `write`."""
        if self._buffer:
            piece = bytes(self._buffer)
            self._buffer.clear()
            await self._put(piece)

    async def close(self) -> StoredFile:
        """From here on it is there for others. Raises as `write`."""
        await self.flush()
        return await self._store.finish(self.file_id, self.bytes)

    async def _put(self, piece: bytes) -> None:
        # In a thread: to deflate a piece takes some 20 ms.
        await self._store.put(self.file_id, self._pieces, await asyncio.to_thread(codec.deflate, piece))
        self._pieces += 1


class FileStore:
    """The files in the database of a store of runs."""

    def __init__(self, store: RunStore) -> None:
        self.transactions = store.transactions
        self._database = store.database

    @whole("write")
    async def begin(self, filename: str, purpose: FilePurpose, created_at: float, expires_at: float | None) -> Writing:
        """A new file, to be written.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        file_id = f"file-{uuid.uuid4().hex}"
        async with self._database.writing() as connection:
            await connection.execute(
                insert(tables.files).values(
                    file_id=file_id,
                    filename=filename,
                    purpose=purpose,
                    bytes=0,
                    created_at=created_at,
                    expires_at=expires_at,
                    status="uploading",
                )
            )
        return Writing(self, file_id)

    @whole("write")
    async def put(self, file_id: str, number: int, body: bytes) -> None:
        """A piece of a file that is being written, deflated.

        Raises:
            NoSuchFile: It was swept away.
            StoreUnavailable: The file is lost.
        """
        found = select(_files.file_id).where(_files.file_id == file_id).with_for_update()
        async with self._database.writing() as connection:
            if (await connection.execute(found)).first() is None:
                raise NoSuchFile(file_id)
            await connection.execute(insert(tables.file_chunks).values(file_id=file_id, number=number, body=body))

    @whole("write")
    async def finish(self, file_id: str, length: int) -> StoredFile:
        """A file is whole; it may be said twice.

        Raises:
            NoSuchFile: It was swept away.
            StoreUnavailable: Nobody knows; the same again is safe.
        """
        done = update(tables.files).where(_files.file_id == file_id).values(bytes=length, status=_DONE)
        async with self._database.writing() as connection:
            row = (await connection.execute(done.returning(*_COLUMNS))).first()
        if row is None:
            raise NoSuchFile(file_id)
        return StoredFile(**row._mapping)

    @whole("read")
    async def get(self, file_id: str) -> StoredFile | None:
        """A file; None where there is none, or none any more.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        query = select(*_COLUMNS).where(_files.file_id == file_id, self._there())
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).first()
        return None if row is None else StoredFile(**row._mapping)

    @whole("read")
    async def list_files(
        self,
        purpose: FilePurpose | None = None,
        *,
        after: StoredFile | None = None,
        order: Literal["asc", "desc"] = "desc",
        limit: int = 100,
    ) -> list[StoredFile]:
        """Files by their age, from the one `after` on; fewer than `limit` are the last.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        query = select(*_COLUMNS).where(self._there())
        if purpose is not None:
            query = query.where(_files.purpose == purpose)
        if order == "desc":
            query = query.order_by(_files.created_at.desc(), _files.file_id.desc())
        else:
            query = query.order_by(_files.created_at, _files.file_id)
        if after is not None:
            age, name = _files.created_at, _files.file_id
            further = age < after.created_at if order == "desc" else age > after.created_at
            twin = name < after.file_id if order == "desc" else name > after.file_id
            query = query.where(or_(further, and_(age == after.created_at, twin)))
        async with self._database.reading() as connection:
            return [StoredFile(**row._mapping) for row in await connection.execute(query.limit(limit))]

    async def pieces(self, file_id: str) -> AsyncIterator[bytes]:
        """What is in a file, piece by piece; nothing for one that is not there.

        Raises:
            NoSuchFile: It was deleted while it was read.
            StoreUnavailable: The database does not answer.
        """
        file = await self.get(file_id)
        number, left = 0, 0 if file is None else file.bytes
        while left > 0:
            body = await self._piece(file_id, number)
            if body is None:
                raise NoSuchFile(file_id)
            piece = await asyncio.to_thread(codec.inflate, body)
            number, left = number + 1, left - len(piece)
            yield piece

    @whole("write")
    async def delete(self, file_id: str) -> bool:
        """Forget a file, whole or half done.

        Returns:
            Whether there was one.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        async with self._database.writing() as connection:
            return bool((await connection.execute(delete(tables.files).where(_files.file_id == file_id))).rowcount)

    @whole("prune")
    async def sweep(self) -> int:
        """Delete files whose time is over, and what was left half done; how many, a hundred at most.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        over = _files.expires_at <= self._database.now
        half_done = and_(_files.status != _DONE, _files.created_at < self._database.now - _HALF_DONE_S)
        query = select(_files.file_id).where(or_(over, half_done)).limit(_SWEPT)
        async with self._database.reading() as connection:
            found = list((await connection.execute(query)).scalars())
        if found:
            async with self._database.writing() as connection:
                await connection.execute(delete(tables.files).where(_files.file_id.in_(found)))
        return len(found)

    def _there(self) -> Any:
        return and_(_files.status == _DONE, func.coalesce(_files.expires_at, 1e18) > self._database.now)

    @whole("read")
    async def _piece(self, file_id: str, number: int) -> bytes | None:
        query = select(_chunks.body).where(_chunks.file_id == file_id, _chunks.number == number)
        async with self._database.reading() as connection:
            found: bytes | None = (await connection.execute(query)).scalar()
        return found


_COLUMNS: Sequence[Any] = [
    _files[name] for name in ("file_id", "filename", "purpose", "bytes", "created_at", "expires_at")
]
