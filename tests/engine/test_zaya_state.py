"""The state by itself, against tokens that remember their own past: any steps, drafts, and prefixes that are shared."""

from __future__ import annotations

import itertools
import random
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.engine

WIDTH = 2


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """Torch and vLLM warn of themselves when they are imported."""
    with warnings.catch_warnings(action="ignore"):
        import mrsa_server.zaya.state  # noqa: F401


BLOCKS = 64


@dataclass
class Sequence:
    """Tokens are numbers; a block that is shared lies in two tables."""

    tokens: list[int]
    blocks: list[int]
    computed: int = 0
    drafts: int = 0  # of the last step, which may yet be rejected


@dataclass
class Memory:
    """One layer's pages and what makes its steps; what was never written is NaN."""

    window: int
    drafts: int
    block_size: int
    pages: Any = None
    builder: Any = None
    free: Any = field(default_factory=lambda: itertools.count(1))
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        import torch

        from mrsa_server.zaya.state import StepsBuilder

        ring = self.window + 1 + self.drafts
        layer = SimpleNamespace(window=self.window, ring=ring)
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={"x": layer}, max_cudagraph_capture_size=None),
            scheduler_config=SimpleNamespace(max_num_seqs=16),
        )
        spec = SimpleNamespace(block_size=self.block_size)
        self.builder = StepsBuilder(spec, ["x"], config, torch.device("cpu"))
        self.pages = torch.full((BLOCKS, self.window + ring, WIDTH), float("nan"))

    def step(self, work: list[tuple[Sequence, int]], padding: int = 0) -> None:
        """So many more tokens for some sequences; each token must find those before it."""
        import torch

        from mrsa_server.zaya.state import move

        lengths = [count for _, count in work] + [0] * padding
        start = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        table = torch.zeros(len(lengths), max(len(one.blocks) for one, _ in work), dtype=torch.int32)
        for row, (one, _) in zip(table, work, strict=False):
            row[: len(one.blocks)] = torch.tensor(one.blocks)
        ends = [one.computed + count for one, count in work] + [0] * padding
        batch = SimpleNamespace(
            num_reqs=len(lengths),
            query_start_loc=start,
            query_start_loc_cpu=start,
            seq_lens=torch.tensor(ends, dtype=torch.int32),
            block_table_tensor=table,
            max_query_len=max(lengths),
        )
        new = [token for one, count in work for token in one.tokens[one.computed : one.computed + count]]
        rows = torch.tensor([[token, -token] for token in new] + [[0.5, 0.5]] * padding).float()
        past = torch.full((self.window, len(rows), WIDTH), float("nan"))
        move(self.pages, rows, past, self.builder.build(0, batch))
        at = 0
        for one, count in work:
            for place in range(one.computed, one.computed + count):
                for distance in range(1, self.window + 1):
                    token = one.tokens[place - distance] if place >= distance else 0
                    assert past[distance - 1, at].tolist() == [token, -token]
                at += 1
            one.computed += count
        assert not past.isnan().any()

    def more(self, one: Sequence, count: int) -> None:
        one.tokens += itertools.islice(self.numbers, max(one.computed + count - len(one.tokens), 0))
        while len(one.blocks) * self.block_size < one.computed + count:
            one.blocks.append(next(self.free))


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    window=st.integers(1, 3),
    drafts=st.integers(0, 2),
    block_size=st.integers(8, 12),
    ones=st.booleans(),
)
def test_each_token_finds_those_before_it(seed: int, window: int, drafts: int, block_size: int, ones: bool) -> None:
    draw = random.Random(seed)
    memory = Memory(window, drafts, block_size)
    alive = [Sequence([], []) for _ in range(draw.randint(1, 3))]
    for _ in range(draw.randint(1, 8)):
        work = []
        for one in draw.sample(alive, draw.randint(1, len(alive))):
            rejected = draw.randint(0, one.drafts)
            one.computed -= rejected
            del one.tokens[one.computed :]
            one.drafts = draw.randint(0, drafts) if not ones and one.computed else 0
            count = 1 if ones else 1 + one.drafts if one.drafts else draw.choice((1, 2, 5, block_size, 17))
            memory.more(one, count)
            work.append((one, count))
        for one, count in list(work):  # who goes on behind a block that is whole after this step, in this step
            whole = (one.computed + count - one.drafts) // block_size
            if whole and draw.random() < 0.5 and len(alive) < 6:
                shared = draw.randint(1, whole)
                other = Sequence(one.tokens[: shared * block_size], one.blocks[:shared], shared * block_size)
                alive.append(other)
                more = 1 if ones else draw.choice((1, 2, 9))
                memory.more(other, more)
                work.insert(draw.randint(0, len(work)), (other, more))
        if max(one.blocks[-1] for one, _ in work) >= BLOCKS:
            return
        memory.step(work, padding=draw.randint(0, 2) if ones else 0)


def test_a_sequence_that_does_not_move_is_not_touched() -> None:
    memory = Memory(window=2, drafts=0, block_size=8)
    still, moving = Sequence([], []), Sequence([], [])
    for one in (still, moving):
        memory.more(one, 13)
        memory.step([(one, 13)])
    before = memory.pages.clone()
    for count in (1, 5, 1):
        memory.more(moving, count)
        memory.step([(moving, count)])
    changed = (memory.pages.nan_to_num() != before.nan_to_num()).flatten(1).any(1).nonzero().flatten().tolist()
    assert set(changed) <= {0, *moving.blocks}
    assert not set(changed) & set(still.blocks)


def test_steps_of_one_token_each_lie_where_a_cuda_graph_reads_them() -> None:
    """Those of fewer requests in the beginning of the same memory, what is beyond the batch without effect."""
    import torch

    memory = Memory(window=2, drafts=0, block_size=8)
    found = []
    for requests, padding in ((3, 0), (1, 2)):
        start = torch.arange(requests + padding + 1, dtype=torch.int32).clamp(max=requests)
        batch = SimpleNamespace(
            num_reqs=requests + padding,
            query_start_loc=start,
            query_start_loc_cpu=start,
            seq_lens=torch.tensor([9] * requests + [0] * padding, dtype=torch.int32),
            block_table_tensor=torch.tensor([[5, 6]] * (requests + padding), dtype=torch.int32),
            max_query_len=1,
        )
        steps = memory.builder.build(0, batch)
        found.append([part.data_ptr() for part in (steps.before.block, steps.before.row, steps.block, steps.row)])
        assert steps.before.block.tolist() == [6] * requests + [0] * padding
        assert steps.known.squeeze(-1).any(1).tolist() == [True] * requests + [False] * padding
    assert found[0] == found[1]


@pytest.mark.parametrize("length", [1, 300])
def test_a_step_writes_no_more_rows_than_it_has_to(length: int) -> None:
    import torch

    memory = Memory(window=2, drafts=0, block_size=16)
    one = Sequence([], [])
    memory.more(one, length)
    start = torch.tensor([0, length], dtype=torch.int32)
    batch = SimpleNamespace(
        num_reqs=1,
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_table_tensor=torch.tensor([one.blocks], dtype=torch.int32),
        max_query_len=length,
    )
    steps = memory.builder.build(0, batch)
    written = len(steps.before.block) + (len(steps.after.block) if steps.after else 0)
    # Two at the end of each block that it may touch, and three where it stands.
    assert written == (1 if length == 1 else 2 * (300 // 16 + 2) + 3)


@pytest.mark.parametrize(
    ("page_dtype", "block_size", "drafts", "least"),
    [("bfloat16", 16, 0, None), ("bfloat16", 16, 1, 32), ("uint8", 16, 0, 32), ("uint8", 32, 0, None)],
)
def test_blocks_hold_the_state_of_the_real_model_or_say_how_large_they_must_be(
    page_dtype: str, block_size: int, drafts: int, least: int | None
) -> None:
    import torch

    from mrsa_server.zaya.state import CcaState

    layer = SimpleNamespace(width=1536, window=2, kept=5 + drafts, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    layer.page_dtype = getattr(torch, page_dtype)
    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=block_size))
    if least is None:
        assert CcaState.get_kv_cache_spec(layer, config).sliding_window == 3
    else:
        with pytest.raises(ValueError, match=f"--block-size {least} or more"):
            CcaState.get_kv_cache_spec(layer, config)
