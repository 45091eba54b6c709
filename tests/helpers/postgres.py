"""Debian's PostgreSQL, started for the tests and gone after them."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WANTED = "install PostgreSQL's server (Debian: apt-get install postgresql)"


def find_binaries() -> Path | None:
    """The folder with `initdb` and `pg_ctl`, on the path or where Debian puts it."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else []
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    folders += sorted(versions, key=lambda path: float(path.parent.name), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None)


class Postgres:
    """A server on a Unix socket, in a folder of its own; if not `durable`, a crash of the machine may lose it."""

    def __init__(self, binaries: Path, folder: Path, user: str | None, durable: bool) -> None:
        self._binaries = binaries
        self._folder = folder
        self._user = user
        self._durable = durable
        self._made = 0

    def url(self, database: str) -> str:
        return f"postgresql+asyncpg://postgres@/{database}?host={self._folder}"

    def init(self) -> None:
        self._call("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync")

    def start(self) -> None:
        options = f"-k {self._folder} -c listen_addresses= -c max_connections=200"
        if not self._durable:
            options += " -c fsync=off -c full_page_writes=off"
        self._call("pg_ctl", "--wait", f"--log={self._folder}/log", f"--options={options}", "start")

    def stop(self, mode: str = "immediate") -> None:
        self._call("pg_ctl", "--wait", f"--mode={mode}", "stop")

    def make(self, template: str = "template1") -> str:
        """A fresh database, a copy of another."""
        self._made += 1
        name = f"test_{self._made}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def sql(self, statement: str, database: str = "postgres") -> None:
        words = ("-X", "-q", "-v", "ON_ERROR_STOP=1", "-h", str(self._folder), "-U", "postgres")
        self._call("psql", *words, "-c", statement, database)

    def _call(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        environment = {**os.environ, "PGDATA": str(self._folder / "data")}
        # To a file: the server keeps what `pg_ctl` was given open, and a pipe would never end.
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(
                command, env=environment, user=self._user, cwd=self._folder, stdout=said, stderr=said, check=False
            )
            said.seek(0)
            assert done.returncode == 0, f"{' '.join(command)}: {said.read().decode()}"


@contextmanager
def running(within: Path | None = None, durable: bool = False) -> Iterator[Postgres | None]:
    """A server for the block; None where there is no PostgreSQL. As root it runs as somebody else: it refuses root."""
    binaries = find_binaries()
    if binaries is None:
        yield None
        return
    user = None
    with tempfile.TemporaryDirectory(prefix="mrsa-pg-", dir=within, ignore_cleanup_errors=True) as name:
        if os.geteuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            user = "postgres" if "postgres" in names else "nobody"
            shutil.chown(name, user)
        server = Postgres(binaries, Path(name), user, durable)
        server.init()
        server.start()
        try:
            yield server
        finally:
            server.stop()
