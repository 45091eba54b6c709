"""Shorthands for the tests of the method."""

from __future__ import annotations

import pytest

from harness.prompts import Templates, load_templates
from harness.types import Message, Problem


@pytest.fixture(scope="session")
def templates() -> Templates:
    return load_templates()


@pytest.fixture
def problem() -> Problem:
    return Problem((Message("system", ("You are terse.",)), Message("user", ("What is 6 times 7?",))))
