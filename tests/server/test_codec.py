"""Events and traces come back from their bytes as they were."""

from __future__ import annotations

import re
import types
from array import array
from dataclasses import fields, is_dataclass, replace
from enum import StrEnum
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.events import Event, RolloutFinished, SetsDrawn
from harness.markovian_rsa import init, replay
from harness.prompts import Templates, load_templates
from harness.scripted import run_virtual
from harness.types import (
    AggregationSet,
    Agreement,
    AnswerRules,
    Finish,
    Params,
    Rollout,
    Sampling,
    Slot,
    Tail,
    TokenIds,
    Trace,
    Usage,
)
from mrsa_server.runs.codec import KINDS, Undecodable, decode, decode_trace, encode, encode_trace
from tests.helpers.runs import PROBLEM, World, go, params_of_runs, property_of_runs

ids = st.lists(st.integers(0, 2**32 - 1), max_size=40)
any_ids = st.one_of(ids.map(lambda found: array("I", found)), ids.map(tuple))
# Lone surrogates too: half of a character is what a server sends that cuts its text into deltas at any place.
text = st.text(st.characters(), max_size=40)
numbers = st.floats(allow_nan=False)
GIVEN: dict[object, st.SearchStrategy[Any]] = {
    str: text,
    int: st.integers(),
    float: numbers,
    bool: st.booleans(),
    TokenIds: any_ids,
    AggregationSet: st.lists(st.integers(0, 99)).map(AggregationSet),
    Slot: st.builds(Slot, st.integers(0, 99), st.integers(0, 99)),
    Sampling: st.builds(Sampling, st.floats(0, 2), st.floats(0.1, 1), top_k=st.integers(0, 99), seeded=st.booleans()),
    Agreement: st.builds(Agreement, st.floats(0.1, 1), st.integers(2, 3)),
    AnswerRules: st.builds(AnswerRules, st.none() | st.integers(1), st.lists(text).map(tuple), text, st.none() | text),
    Params: params_of_runs.flatmap(
        lambda params: st.builds(
            replace,
            st.just(params),
            budget_tokens=st.none() | st.integers(1),
            deadline_s=st.none() | st.floats(0.1),
            seed=st.integers(0),
            quorum=st.none() | st.integers(1, params.population),
            stop_when_agreed=st.just(Agreement(min_votes=2)) if params.population > 1 else st.none(),
            sampling=st.builds(Sampling, st.floats(0, 2), seeded=st.booleans()),
        )
    ),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type; a type that is new in an event fails here, and has to be thought of."""
    if hint in GIVEN:
        return GIVEN[hint]
    if get_origin(hint) is types.UnionType:
        return st.one_of(*(st.none() if one is types.NoneType else values(one) for one in get_args(hint)))
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), max_size=4).map(tuple)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return st.sampled_from(hint)
    assert is_dataclass(hint), hint
    return dataclass(hint)


def dataclass(cls: Any) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls) if cls is not RolloutFinished else {"rollout": Rollout}
    kept = {field.name for field in fields(cls)} & hints.keys()
    if cls.__name__ == "Problem":
        return st.builds(cls, values(hints["messages"]).filter(bool), values(hints["answer"]))
    return st.builds(cls, **{name: values(hints[name]) for name in kept})


@pytest.mark.parametrize("cls", get_args(Event), ids=lambda cls: cls.__name__)
def test_every_event_comes_back_as_it_was(cls: type[Event]) -> None:
    @given(dataclass(cls))
    def check(event: Event) -> None:
        found = decode(*encode(event))
        assert found == event
        assert type(found) is cls

    check()


def test_every_event_has_a_kind_of_its_own() -> None:
    assert set(KINDS) == set(get_args(Event))
    assert len(set(KINDS.values())) == len(KINDS)
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", kind) for kind in KINDS.values())


def test_sets_are_sets_again() -> None:
    found = decode(*encode(SetsDrawn(((AggregationSet((0, 2)),),))))
    assert isinstance(found, SetsDrawn)
    assert type(found.sets[0][0]) is AggregationSet


def test_a_trace_is_stored_apart() -> None:
    rollout = Rollout(Slot(0, 0), Tail(array("I", [1]), "a"), "", Finish.STOP, Usage(), 1.0)
    whole = RolloutFinished(rollout, Trace(array("I", range(9999)), (0, 9999), (9999, 9999)))
    assert encode(whole) == encode(RolloutFinished(rollout))


@given(ids, st.tuples(*[st.integers(0, 2**40)] * 4))
def test_a_trace_comes_back_as_it_was(ids: list[int], spans: tuple[int, int, int, int]) -> None:
    trace = Trace(array("I", ids), spans[:2], spans[2:])
    assert decode_trace(encode_trace(trace)) == trace


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("rollout_evaporated", b"{}"),
        ("run_failed", b'{"reason":"x","blame":"y"}'),
        ("run_failed", b'{"rea'),
        ("run_failed", b"x\x9cnothing"),
        ("run_failed", b"[]"),
        ("topped_up", b'{"slots":[[1]]}'),
    ],
)
def test_what_this_version_cannot_read_is_refused(kind: str, body: bytes) -> None:
    with pytest.raises(Undecodable):
        decode(kind, body)


def test_a_damaged_trace_is_refused() -> None:
    with pytest.raises(Undecodable):
        decode_trace(b"short")
    with pytest.raises(Undecodable):
        decode_trace(encode_trace(Trace(array("I", range(99)), (0, 9), (9, 9)))[:-9])


def test_a_field_that_is_newer_than_a_body_takes_its_default() -> None:
    assert decode("run_finished", b'{"candidates":[[0,1]],"votes":[1]}') == decode(
        *encode(decode("run_finished", b'{"candidates":[[0,1]],"votes":[1],"partial":false,"stopped":null}'))
    )


@pytest.fixture(scope="session")
def templates() -> Templates:
    return load_templates()


@property_of_runs
@given(key=st.integers(0), params=params_of_runs, failing=st.sampled_from([0, 20, 60]))
def test_a_decoded_log_replays_to_the_live_state(key: int, params: Params, failing: int, templates: Templates) -> None:
    start = init("run", PROBLEM, params, templates)
    state, events = run_virtual(go(start, World(key, failing=failing)))
    log = [start.started, *events]
    assert replay([decode(*encode(event)) for event in log], templates) == state
