"""The model of an engine: what a step costs, who is served first, who waits, what the caches hold."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.speed import Batch, EngineModel, Prefix, Stream
from mrsa_server.machines import MACHINES


def drain(batch: Batch) -> list[tuple[float, Stream]]:
    """All that is reported, with its time."""
    found: list[tuple[float, Stream]] = []
    while (at := batch.next_at()) != inf:
        found += [(at, stream) for stream in batch.due(at)]
    return found


def run(model: EngineModel, *streams: Stream) -> dict[object, float]:
    """When each owner's stream ends, all sent at once."""
    batch = Batch(model)
    for stream in streams:
        batch.enter(0.0, stream)
    return {stream.owner: at for at, stream in drain(batch)}


def test_a_batch_shares_the_engine_until_the_short_one_ends() -> None:
    ends = run(EngineModel(step_s=0.01, stream_s=0.001), Stream(0, 100, owner="short"), Stream(0, 300, owner="long"))
    assert ends["short"] == pytest.approx(100 * 0.012)
    assert ends["long"] == pytest.approx(100 * 0.012 + 200 * 0.011)


def test_the_kv_cache_in_flight_is_read_every_step() -> None:
    ends = run(EngineModel(step_s=0.01, kv_token_s=1e-5), Stream(500, 100, owner="a"))
    assert ends["a"] == pytest.approx(100 * 0.01 + 1e-5 * (500 * 100 + 100 * 100 / 2))


def test_a_batch_reads_the_experts_that_it_touches() -> None:
    model = EngineModel(experts=16, experts_s=0.016)
    assert model.fixed_s(1) == pytest.approx(0.001)
    assert model.fixed_s(2) == pytest.approx(0.001 + 0.001 * 15 / 16)
    assert model.fixed_s(1000) == pytest.approx(0.016)


def test_a_prefill_takes_the_engine_and_a_cached_one_nothing() -> None:
    model = EngineModel(step_s=0.01, prefill_tokens_per_s=1000)
    same = [Prefix("question", 400)]
    first, second, other = (Stream(400, 10, keys, owner=name) for name, keys in (("a", same), ("b", same), ("c", [])))
    ends = run(model, first, second, other)
    assert ends == pytest.approx(dict.fromkeys("abc", 0.8 + 0.1))
    assert (first.cached_tokens, second.cached_tokens) == (0, 400)


def test_a_prompt_pays_for_what_comes_after_the_prefix_that_it_shares() -> None:
    batch = Batch(EngineModel(step_s=0.01, prefill_tokens_per_s=1000, cached_prefixes=3))
    batch.enter(0.0, Stream(300, 1, [Prefix("q", 100), Prefix("qx", 300)]))
    other = Stream(250, 1, [Prefix("q", 100), Prefix("qy", 250)])
    batch.enter(0.0, other)
    assert other.cached_tokens == 100
    late = Stream(300, 1, [Prefix("q", 100), Prefix("qx", 300)])
    batch.enter(0.0, late)
    assert late.cached_tokens == 300
    batch.enter(0.0, Stream(50, 1, [Prefix("z", 50)]))  # the cache holds three: "qy" was used least lately
    again = Stream(250, 1, [Prefix("q", 100), Prefix("qy", 250)])
    batch.enter(0.0, again)
    assert again.cached_tokens == 100


def test_what_waits_is_served_by_priority_and_then_by_age() -> None:
    model = EngineModel(step_s=0.01, streams=1, request_s=0.001)
    streams = [Stream(0, 10, priority=priority, owner=name) for name, priority in (("c", 5), ("a", -1), ("b", 0))]
    ends = run(model, *streams, Stream(0, 10, priority=5, owner="d"))
    assert sorted(ends, key=lambda name: ends[name]) == ["a", "b", "c", "d"]


def test_the_last_by_priority_gives_way_where_the_cache_is_full() -> None:
    model = EngineModel(step_s=0.01, prefill_tokens_per_s=10_000, kv_tokens=1_000)
    batch = Batch(model)
    for name, priority in (("first", 0), ("last", 1)):
        batch.enter(0.0, Stream(300, 400, priority=priority, owner=name))
    ends = {stream.owner: at for at, stream in drain(batch)}
    assert batch.preemptions == 1
    assert ends["first"] == pytest.approx(0.06 + 4.0)
    # Both had 200 tokens when the cache was full; the last one's 500 are computed anew, and 200 are left to generate.
    assert ends["last"] == pytest.approx(0.06 + 4.0 + 0.05 + 2.0)


def test_what_could_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit into a KV cache of 1000 tokens"):
        Batch(EngineModel(step_s=0.01, kv_tokens=1_000)).enter(0.0, Stream(600, 401))


def test_one_that_leaves_makes_the_others_faster() -> None:
    batch = Batch(EngineModel(stream_s=0.01))
    stays, leaves = Stream(0, 100, owner="stays"), Stream(0, 100, owner="leaves")
    batch.enter(0.0, stays)
    batch.enter(0.0, leaves)
    batch.leave(1.0, leaves)  # both have generated 50
    assert drain(batch) == [(pytest.approx(1.5), stays)]


def test_a_mark_in_the_past_is_reported_at_once() -> None:
    batch = Batch(EngineModel(step_s=0.01))
    stream = Stream(0, 100)
    batch.enter(0.0, stream)
    assert batch.due(0.5) == []
    batch.report_at(0.5, stream, 20)
    assert batch.next_at() == 0.5
    assert batch.due(0.5) == [stream]
    batch.report_at(0.5, stream, 100)
    assert batch.next_at() == pytest.approx(1.0)


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(1, 300), st.integers(0, 3), st.floats(0, 3)),
        min_size=1,
        max_size=30,
    ),
    st.integers(700, 3_000),
    st.integers(1, 10),
)
def test_every_stream_ends_once_and_every_token_is_counted(
    streams: list[tuple[int, int, int, float]], kv_tokens: int, most: int
) -> None:
    model = replace(MACHINES["h200"].engine, kv_tokens=kv_tokens, streams=most)
    batch = Batch(model)
    sent = sorted(streams, key=lambda stream: stream[-1])
    ended: list[Stream] = []
    for prompt, tokens, priority, at in sent:
        while (due := batch.next_at()) < at:
            ended += batch.due(due)
            assert batch.size <= most
        batch.enter(at, Stream(prompt, tokens, priority=priority))
    ended += [stream for _, stream in drain(batch)]
    assert len(ended) == len({id(stream) for stream in ended}) == len(streams)
    assert (batch.size, batch.waiting) == (0, 0)
    generated = sum(tokens for _, tokens, _, _ in streams)
    assert batch.tokens == pytest.approx(generated, rel=1e-6)
    if not batch.preemptions:
        assert batch.prefill_tokens == sum(prompt for prompt, *_ in streams)


@pytest.mark.parametrize(
    ("field", "value"),
    [("step_s", -1.0), ("kv_token_s", inf), ("prefill_tokens_per_s", 0.0), ("kv_tokens", 0), ("experts_s", 0.1)],
)
def test_a_bad_constant_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match="experts:" if field == "experts_s" else f"{field}:"):
        EngineModel(**{field: value})  # type: ignore[arg-type]


def test_an_h200_gives_20_000_tokens_a_second_at_full_batch_with_short_contexts() -> None:
    assert MACHINES["h200"].engine.tokens_per_s(256, 500) == pytest.approx(20_000, rel=0.1)
