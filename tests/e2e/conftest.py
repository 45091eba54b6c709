"""What the tests with whole processes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.processes import serving


@pytest.fixture(scope="session")
def scripted_url() -> Iterator[str]:
    """Base URL of `mrsa serve --engine scripted`, with `/v1`."""
    with serving("--engine", "scripted") as (_, url):
        yield f"{url}/v1"
