"""What the commands that ask a running server share: its address, and its errors in words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import httpx

KEY_VARIABLE = "MRSA_API_KEY"  # a secret: it has no flag
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
USUAL_URL = "http://127.0.0.1:8000"


def base_url(given: str | None) -> str:
    """The server's address, with or without a scheme and the API's path."""
    url = (given or USUAL_URL).rstrip("/").removesuffix("/v1")
    return url if "://" in url else f"http://{url}"


def connect(url: str, timeout: httpx.Timeout) -> httpx.Client:
    """A client of the server at an address, with the key of the environment where there is one.

    Raises:
        SystemExit: It can be no key; what would break over it later shows it.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()  # a file that it was read from may end with a newline
    if not (key.isascii() and key.isprintable()):
        raise SystemExit(f"mrsa: {KEY_VARIABLE} is no key: it must be of printable ASCII characters")
    return httpx.Client(base_url=url, timeout=timeout, headers={"authorization": f"Bearer {key}"} if key else None)


def visible(text: str) -> str:
    """A text as a terminal may show it, which does what it reads: of control characters lines and tabs alone stay."""
    return _CONTROL.sub("\ufffd", text)


def message_of(response: httpx.Response) -> str:
    """What a refusal says, and where the key is taken from that it asks for. The response must have been read."""
    hint = f" It is taken from {KEY_VARIABLE}." if response.status_code == 401 else ""
    try:
        return visible(str(response.json()["error"]["message"])) + hint
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}: {visible(response.text[:300])}"


def lines(response: httpx.Response) -> Iterator[bytes]:
    """The lines of a stream. Not httpx's: that ends a line at what a model may write within one, such as U+2028."""
    rest = b""
    for part in response.iter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        yield from whole
    if rest:
        yield rest
