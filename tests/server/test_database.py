"""URLs of databases: what those who hand them out write, and what is refused by name."""

from __future__ import annotations

import pytest

from mrsa_server.runs.database import parse_url


@pytest.mark.parametrize(
    ("url", "driver", "query"),
    [
        ("postgres://u:p@h/d", "postgresql+asyncpg", {}),
        ("postgresql://u:p@h/d?sslmode=require", "postgresql+asyncpg", {"ssl": "require"}),
        ("postgresql://u@/d?host=/run/postgresql", "postgresql+asyncpg", {"host": "/run/postgresql"}),
        ("sqlite:///runs.db", "sqlite", {}),
    ],
)
def test_urls_as_they_are_handed_out(url: str, driver: str, query: dict[str, str]) -> None:
    parsed = parse_url(url)
    assert (parsed.drivername, dict(parsed.query)) == (driver, query)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u:secret@h/d?channel_binding=require", "'channel_binding'"),
        ("postgresql://u:secret@h:70000/d", "port"),
        ("postgresql://u:secret@h:0/d", "port"),
        ("sqlite:///runs.db?mode=ro", "'mode'"),
        ("mysql://u:secret@h/d", "not in mysql"),
        ("sqlite://", "file"),
        ("secret", "cannot be read"),
    ],
)
def test_what_cannot_be_opened_is_named_and_nothing_secret(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        parse_url(url)
    assert "secret" not in str(refused.value)
