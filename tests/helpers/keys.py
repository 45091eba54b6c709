"""Keys for servers that tests start."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import SecretStr

from mrsa_server.keyring import Limits, Scope, new_key


class Client(NamedTuple):
    """A key: its line for the server, and what its client sends."""

    line: str
    secret: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.secret}"}


def client(name: str, *scopes: Scope, **limits: int) -> Client:
    """A key; without scopes one for asking and reading."""
    usual = (Scope.INFERENCE, Scope.RUNS_READ, Scope.RUNS_WRITE)
    key, secret = new_key(name, scopes or usual, Limits(**limits))
    return Client(key.line, secret)


def ring(*clients: Client) -> SecretStr:
    """The setting `keys`."""
    return SecretStr("\n".join(one.line for one in clients))
