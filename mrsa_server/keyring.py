"""API keys: who asks, what for, and how much. A line of a key is `id:sha256:scopes:limits`; the secret is in no file.

A secret has 256 random bits, so that a bare SHA-256 of it tells nothing. Only the commands `mrsa keys` and a client's
request ever hold one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path

import structlog

from mrsa_server.settings import Settings

_PREFIX = "sk-mrsa-"
_LONGEST_SECRET = 512  # characters; ours have 51
_LOOK_S = 1.0  # between looks at the file
_MOST_FILE_BYTES = 4 * 2**20
_MOST = 10**12
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,13}", re.ASCII)

log = structlog.get_logger("mrsa.keys")


class Scope(StrEnum):
    """What a key may do; `admin` may everything, and sees the runs of every key."""

    INFERENCE = "inference"
    RUNS_READ = "runs:read"
    RUNS_WRITE = "runs:write"
    METRICS = "metrics"
    ADMIN = "admin"


_SCOPES = re.compile(f"({'|'.join(Scope)})(,({'|'.join(Scope)}))*", re.ASCII)


class BadKeys(ValueError):
    """Keys cannot be read; says which line, and never what stands in it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key may use; None for no limit.

    Attributes:
        runs_per_minute: Runs that begin.
        tokens_per_minute: Tokens that its runs generate, and those of prompts that no cache held.
        concurrent_runs: Runs in flight and waiting.
    """

    runs_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_runs: int | None = None


_LIMITS = tuple(one.name for one in fields(Limits))


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key; several may have one `id`, as while a secret is exchanged, and then differ in the secret alone."""

    id: str
    digest: bytes = field(repr=False)
    scopes: frozenset[Scope]
    limits: Limits = Limits()

    @property
    def line(self) -> str:
        """As it stands in a file."""
        scopes = ",".join(scope for scope in Scope if scope in self.scopes)
        limits = ",".join(f"{name}={value}" for name, value in asdict(self.limits).items() if value is not None)
        return f"{self.id}:{self.digest.hex()}:{scopes}:{limits}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request; `key_id` is None where the server is open and nobody has a name."""

    key_id: str | None
    scopes: frozenset[Scope]
    limits: Limits = Limits()

    def may(self, scope: Scope) -> bool:
        """Whether it may do something."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def sees(self, key_id: str | None) -> bool:
        """Whether what the key of this id has made is there for it; None is what was made without a key."""
        return Scope.ADMIN in self.scopes or key_id == self.key_id

    @property
    def only(self) -> str | None:
        """The key whose runs alone it sees; None for those of all."""
        return None if Scope.ADMIN in self.scopes else self.key_id


def maker(key_id: str | None) -> Caller:
    """Who made something, as far as that one sees what others made; None for one without a key."""
    return Caller(key_id, frozenset())


ANYBODY = Caller(None, frozenset((Scope.ADMIN,)))  # on a server without keys


def read_keys(text: str, beside: Iterable[ApiKey] = ()) -> tuple[ApiKey, ...]:
    """Keys, a line each; blank lines and those that begin with `#` are left out.

    Args:
        text: The lines.
        beside: Keys from elsewhere, that these must not contradict.

    Raises:
        BadKeys: A line is none, or two contradict each other.
    """
    found: list[ApiKey] = []
    known = _Known(beside)
    for number, line in enumerate(text.splitlines(), 1):
        if (line := line.strip()) and not line.startswith("#"):
            try:
                key = _read_line(line)
                known.add(key)
            except ValueError as error:
                raise BadKeys(f"line {number}: {error}") from None
            found.append(key)
    return tuple(found)


def _read_line(line: str) -> ApiKey:
    name, _, rest = line.partition(":")
    digest, _, rest = rest.partition(":")
    if not _ID.fullmatch(name):
        raise ValueError("the id must be 1 to 64 of A-Z, a-z, 0-9, _, . and -, and begin with a letter or digit")
    if not _DIGEST.fullmatch(digest):
        raise ValueError("what follows the id must be the SHA-256 of the secret, 64 digits of 0-9a-f")
    scopes = _SCOPES.match(rest)
    if scopes is None or rest[scopes.end() :][:1] not in ("", ":"):
        raise ValueError(f"the scopes must be some of {', '.join(Scope)}, with commas between them")
    limits = _read_limits(rest[scopes.end() + 1 :])
    return ApiKey(name, bytes.fromhex(digest), frozenset(map(Scope, scopes[0].split(","))), limits)


def _read_limits(text: str) -> Limits:
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        if name not in _LIMITS or name in found:
            raise ValueError(f"the limits must be some of {', '.join(_LIMITS)}, each once and with =NUMBER")
        if not (_NUMBER.fullmatch(value) and 1 <= int(value) <= _MOST):
            raise ValueError(f"{name} must be a whole number between 1 and {_MOST}")
        found[name] = int(value)
    return Limits(**found)


class _Known:
    """Keys that go together. There may be ten thousand, so that none is compared with each other one."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._by_digest = {key.digest: key for key in keys}
        self._by_id = {key.id: key for key in self._by_digest.values()}

    def add(self, key: ApiKey) -> None:
        """Take another one.

        Raises:
            ValueError: It contradicts one that is there.
        """
        if (other := self._by_digest.get(key.digest)) is not None:
            raise ValueError(f"the secret is that of another key, {other.id}")
        other = self._by_id.get(key.id)
        if other is not None and (other.scopes, other.limits) != (key.scopes, key.limits):
            raise ValueError(f"keys of one id, {key.id}, must have the same scopes and limits")
        self._by_digest[key.digest] = self._by_id[key.id] = key


def new_key(name: str, scopes: Iterable[Scope], limits: Limits) -> tuple[ApiKey, str]:
    """A new key and its secret, which is to be had here alone."""
    secret = _PREFIX + secrets.token_urlsafe(32)
    return ApiKey(name, _digest(secret), frozenset(scopes), limits), secret


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("latin-1")).digest()


class KeyRing:
    """The keys of a server, some from a file that may change while it runs.

    Args:
        file: Where keys are; None for no file.
        given: Keys beside those of the file.

    Raises:
        BadKeys: The file cannot be read, or there is no key in it.
    """

    def __init__(self, file: Path | None = None, given: Sequence[ApiKey] = ()) -> None:
        self._file = file
        self._given = tuple(given)
        self._text = None if file is None else _read_file(file)
        self._take(self._all(self._text))
        if self._text is not None and not self._keys:
            raise BadKeys(f"{file}: there is no key in it")

    @classmethod
    def of(cls, settings: Settings) -> KeyRing:
        """The keys that the settings name.

        Raises:
            BadKeys: They cannot be read.
        """
        given: tuple[ApiKey, ...] = ()
        if settings.keys is not None:
            try:
                given = read_keys("\n".join(settings.keys.get_secret_value().split()))
            except BadKeys as error:
                raise BadKeys(f"MRSA_KEYS: {error}") from None
            if not given:
                raise BadKeys("MRSA_KEYS: there is no key in it")
        return cls(settings.keys_file, given)

    @property
    def open(self) -> bool:
        """Whether there never were keys, so that anybody may ask; a file that has lost all of them opens nothing."""
        return self._file is None and not self._given

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all keys, each once."""
        return tuple(dict.fromkeys(key.id for key in self._keys))

    def find(self, secret: str) -> Caller | None:
        """Whose secret it is; None for nobody's. It takes as long for one key as for another, and for none."""
        if len(secret) > _LONGEST_SECRET:
            return None
        digest = _digest(secret)
        found: ApiKey | None = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return None if found is None else Caller(found.id, found.scopes, found.limits)

    def knows(self, key_id: str) -> bool:
        """Whether there is a key of this id, and it was not taken away."""
        return key_id in self._by_id

    def limits(self, key_id: str | None) -> Limits:
        """What a key may use; a key that is gone has no limits, and nobody who asks with it."""
        found = self._by_id.get(key_id)
        return Limits() if found is None else found[0].limits

    def salt(self, key_id: str | None) -> str | None:
        """What keeps the caches of a key's prompts apart from those of others; None where there are no keys.

        The same at every server that has the key. Nobody who has not its digest can make it.
        """
        if self.open:
            return None
        digests = [key.digest for key in self._by_id.get(key_id, ())]
        # A key that is gone has no digest: what its runs still ask shares its cache with nobody but them.
        return hmac.digest(min(digests, default=_GONE), f"cache:{key_id}".encode(), "sha256").hex()

    async def keep(self) -> None:
        """Take over what the file says, for as long as the server lives; what cannot be read changes nothing.

        It has to say the same at two looks: whoever writes it in place empties it first.
        """
        said, seen = "", self._text
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._file is None:
                return
            try:
                text = await asyncio.to_thread(_read_file, self._file)
                last, seen = seen, text
                if text == last and text != self._text:
                    before = self.ids
                    # As for all that is long: others are served meanwhile.
                    self._take(await asyncio.to_thread(self._all, text))
                    self._text = text
                    log.info("keys were read anew", keys=len(self._keys), gone=sorted(set(before) - set(self.ids)))
                said = ""
            except BadKeys as error:
                if str(error) != said:
                    log.error("keys cannot be read; those before stay", reason=str(error))
                said = str(error)

    def _all(self, text: str | None) -> tuple[ApiKey, ...]:
        if text is None:
            return self._given
        try:
            return (*self._given, *read_keys(text, self._given))
        except BadKeys as error:
            raise BadKeys(f"{self._file}: {error}") from None

    def _take(self, keys: tuple[ApiKey, ...]) -> None:
        by_id: dict[str | None, list[ApiKey]] = {}
        for key in keys:
            by_id.setdefault(key.id, []).append(key)
        self._keys, self._by_id = keys, by_id


_GONE = secrets.token_bytes(32)


def _read_file(path: Path) -> str:
    try:
        # To open a pipe would wait for somebody to write into it, and to read one takes away what is in it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadKeys(f"{path}: is no file")
            raw = file.read(_MOST_FILE_BYTES + 1)
        if len(raw) > _MOST_FILE_BYTES:
            raise BadKeys(f"{path}: is longer than {_MOST_FILE_BYTES} bytes")
        return raw.decode()
    except OSError as error:
        raise BadKeys(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadKeys(f"{path}: is no text in UTF-8") from None
