"""What the tests with whole processes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.processes import serving


@pytest.fixture(scope="session")
def scripted_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of `mrsa serve --engine scripted`, with `/v1`."""
    with serving("--engine", "scripted", "--state-dir", str(tmp_path_factory.mktemp("state"))) as (_, url):
        yield f"{url}/v1"
