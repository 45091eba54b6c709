"""File descriptors are shared out so that neither clients nor the engine take the last one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrsa_server.app import places
from mrsa_server.descriptors import SHORT_CALLS, current_limit, share_out
from mrsa_server.settings import Settings


@given(st.integers(64, 1 << 20), st.integers(1, 100_000), st.booleans())
def test_all_places_together_fit_into_the_limit(limit: int, calls: int, remote: bool) -> None:
    found = share_out(limit, calls, remote=remote)
    assert 1 <= found.calls <= calls
    assert found.connections >= 1
    assert found.backlog >= 1
    if limit >= 128:
        taken = found.connections + found.backlog + (found.calls if remote else 0)
        assert taken < limit - 20


@pytest.mark.parametrize(("limit", "users"), [(4096, 1000), (20_000, 10_000), (1 << 20, 1_000_000)])
def test_an_ordinary_limit_leaves_room_for_many_users(limit: int, users: int) -> None:
    assert share_out(limit, 4096, remote=True).connections >= users
    assert share_out(limit, 4096, remote=False).connections >= users


def test_a_call_takes_a_descriptor_where_the_engine_is_remote_alone() -> None:
    remote = places(Settings(engine="openai", engine_url="http://localhost:1/v1", max_inflight_calls=1000))
    local = places(Settings(engine="scripted", max_inflight_calls=1000))
    assert local.calls == 1000
    assert local.connections - remote.connections >= min(remote.calls, 1000)
    assert remote.connections + remote.calls + SHORT_CALLS < current_limit()
