"""Subscriptions: a reader that falls behind costs text, not objects, and sees everything in order."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.events import DeadlineReached, RolloutDelta, RolloutStarted
from harness.types import Slot
from mrsa_server.runs.runner import Item, Subscription

DELTAS = st.builds(
    lambda index, text, answer: RolloutDelta(Slot(0, index), text, answer, 1),
    st.integers(0, 3),
    st.text(min_size=1, max_size=3),
    st.booleans(),
)
FACTS = st.one_of(
    st.builds(DeadlineReached), st.builds(lambda index: RolloutStarted(Slot(0, index), (), 9), st.integers(0, 3))
)


def texts(items: list[Item]) -> dict[tuple[Slot, bool], str]:
    found: dict[tuple[Slot, bool], str] = {}
    for item in items:
        if isinstance(item, RolloutDelta):
            key = (item.slot, item.answer)
            found[key] = found.get(key, "") + item.text
    return found


@given(st.lists(st.one_of(DELTAS, FACTS, st.none())))
async def test_a_reader_gets_every_text_and_every_fact_in_order(items: list[Item | None]) -> None:
    subscription, got = Subscription(), []
    for item in items:
        if item is None:  # the reader comes by
            if subscription._items:
                got += await subscription.next()
        else:
            subscription.put(item)
    subscription.end(None)
    while read := await subscription.next():
        got += read
    put = [item for item in items if item is not None]
    assert texts(got) == texts(put)
    assert [item for item in got if not isinstance(item, RolloutDelta)] == [
        item for item in put if not isinstance(item, RolloutDelta)
    ]


async def test_a_reader_waits_until_something_comes_or_its_time_is_over() -> None:
    subscription = Subscription()
    with pytest.raises(TimeoutError):
        await subscription.next(0.01)
    reading = asyncio.create_task(subscription.next(5))
    await asyncio.sleep(0)
    subscription.put(DeadlineReached())
    subscription.put(DeadlineReached())
    assert len(await reading) == 2
    reading = asyncio.create_task(subscription.next())
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait((reading,))
    subscription.end(None)
    assert await subscription.next(0.01) == []


async def test_unread_deltas_of_a_rollout_are_one_item() -> None:
    subscription = Subscription()
    for number in range(1000):
        subscription.put(RolloutDelta(Slot(0, number % 4), str(number), False, number))
    items = await subscription.next()
    assert len(items) == 4
    assert isinstance(items[0], RolloutDelta)
    assert items[0].tokens == 996
    assert items[0].text.startswith("048")
