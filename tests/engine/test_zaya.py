"""Our ZAYA1 on vLLM says what transformers' says: to 1e-4 in each logprob, and token for token."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrsa_server.zaya.checkpoint import read
from tests.helpers.tiny_zaya import VOCABULARY, random_zaya, write_tiny_zaya

pytestmark = pytest.mark.engine

LARGEST_DIFFERENCE = 1e-4
RETENTION = "prefix_cache_retention_interval"
BLOCK_TOKENS = 32  # the least that vLLM's attention takes on CPU


@dataclass(frozen=True)
class Ask:
    """One request: after `after` steps of the engine, given up again after so many tokens of its own."""

    prompt: tuple[int, ...]
    tokens: int
    after: int = 0
    aborted_at: int | None = None


@dataclass(frozen=True)
class Said:
    """What was answered: the tokens, for each which others were likely and how much, and how much was cached."""

    tokens: tuple[int, ...]
    likely: Any
    logprobs: Any
    cached_tokens: int


class Served:
    """vLLM in this process, one step at a time."""

    def __init__(self, folder: Path, **extra: Any) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from mrsa_server.zaya import register

        register()
        args = {
            "model": str(folder),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "block_size": BLOCK_TOKENS,
            "kv_cache_memory_bytes": 1 << 27,
            "max_num_batched_tokens": 512,
            "max_num_seqs": 16,
            "max_logprobs": -1,
            "enable_prefix_caching": True,
            "distributed_executor_backend": "uni",
            "use_tqdm_on_load": False,
        }
        if hasattr(EngineArgs, RETENTION):  # later than vLLM 0.26, which keeps the state at every block as here
            args[RETENTION] = None
        self.engine = LLMEngine.from_engine_args(EngineArgs(**args | extra))
        self._count = 0

    @property
    def scheduler(self) -> Any:
        return self.engine.engine_core.engine_core.scheduler

    def forget(self) -> None:
        for _ in range(3):  # what was aborted is let go a step later
            if self.engine.reset_prefix_cache():
                return
            self.engine.step()
        raise AssertionError("blocks are still held")

    def answer(self, asks: list[Ask], likely: int = -1) -> list[Said]:
        """Logprobs of the `likely` most likely tokens, by default of all."""
        import torch
        from vllm import SamplingParams

        said: dict[str, Said] = {}
        names = []
        step = 0
        waiting = list(enumerate(asks))
        while waiting or self.engine.has_unfinished_requests():
            for item in [item for item in waiting if item[1].after <= step]:
                waiting.remove(item)
                names.append((f"{self._count}", item[0]))
                params = SamplingParams(
                    temperature=0, max_tokens=item[1].tokens, ignore_eos=True, logprobs=likely, detokenize=False
                )
                self.engine.add_request(names[-1][0], {"prompt_token_ids": list(item[1].prompt)}, params)
                self._count += 1
            for output in self.engine.step():
                index = dict(names)[output.request_id]
                completion = output.outputs[0]
                if output.finished:
                    likely_ids = torch.tensor([sorted(place) for place in completion.logprobs])
                    logprobs = torch.tensor(
                        [[place[i].logprob for i in sorted(place)] for place in completion.logprobs]
                    )
                    said[output.request_id] = Said(
                        tuple(completion.token_ids), likely_ids, logprobs, output.num_cached_tokens or 0
                    )
                elif asks[index].aborted_at == len(completion.token_ids):
                    self.engine.abort_request([output.request_id])
                    said[output.request_id] = Said(tuple(completion.token_ids), None, None, 0)
            step += 1
        return [said[name] for name, _ in sorted(names, key=lambda pair: pair[1])]

    def close(self) -> None:
        with warnings.catch_warnings(action="ignore"):
            self.engine.engine_core.shutdown()
            del self.engine
            gc.collect()


class Shared:
    """The one engine that tests hand on: where one in this process ends, all that are up lose their groups of ranks."""

    def __init__(self) -> None:
        self._up: tuple[str, Served] | None = None

    def take(self, name: str, folder: Path, **extra: Any) -> Served:
        """The engine of that name, started if it is not the one that is up."""
        if self._up is None or self._up[0] != name:
            self.end()
            with warnings.catch_warnings(action="ignore"):
                self._up = name, Served(folder, **extra)
        return self._up[1]

    def end(self) -> None:
        if self._up is not None:
            self._up[1].close()
            self._up = None


SHARED = Shared()


@contextmanager
def serving(folder: Path, **extra: Any) -> Iterator[Served]:
    """Start and stop one. What torch and vLLM warn of and leave open is theirs."""
    SHARED.end()
    with warnings.catch_warnings(action="ignore"):
        served = Served(folder, **extra)
        yield served
    served.close()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(f"{length} {seed}")
    return tuple(draw.randrange(VOCABULARY) for _ in range(length))


def expect_same(reference: Any, asks: list[Ask], said: list[Said]) -> float:
    """The largest difference, of all logprobs of all tokens."""
    import torch

    worst = 0.0
    for ask, answer in zip(asks, said, strict=True):
        assert len(answer.tokens) == (ask.tokens if ask.aborted_at is None else ask.aborted_at)
        with torch.no_grad():
            logits = reference(torch.tensor([[*ask.prompt, *answer.tokens]])).logits[0, len(ask.prompt) - 1 : -1]
        logprobs = logits.float().log_softmax(-1)
        assert tuple(logprobs.argmax(-1).tolist()) == answer.tokens
        if answer.logprobs is not None:
            worst = max(worst, (logprobs.gather(1, answer.likely) - answer.logprobs).abs().max().item())
    assert worst <= LARGEST_DIFFERENCE
    return worst


@dataclass
class Tiny:
    folder: Path
    reference: Any = field(repr=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Eight layers."""
    return write(tmp_path_factory.mktemp("zaya"))


def write(folder: Path, **config: Any) -> Tiny:
    with warnings.catch_warnings(action="ignore"):
        return Tiny(folder, write_tiny_zaya(folder, **config))


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    yield
    SHARED.end()


@pytest.fixture
def wide(tiny: Tiny) -> Served:
    """Room for all at once."""
    return SHARED.take("wide", tiny.folder)


@pytest.fixture
def narrow(tiny: Tiny) -> Served:
    """19 tokens a step: prompts come in chunks that fit nothing, between tokens of others."""
    return SHARED.take("narrow", tiny.folder, max_num_batched_tokens=19, max_num_seqs=6)


LENGTHS = (1, 2, 3, 5, 17, 30, 31, 32, 33, 34, 63, 64, 65, 90, 200, 300)


def test_prompts_of_mixed_lengths_in_one_batch(wide: Served, tiny: Tiny) -> None:
    wide.forget()
    asks = [Ask(prompt(length), 12) for length in LENGTHS]
    said = wide.answer(asks)
    assert {answer.cached_tokens for answer in said} == {0}
    expect_same(tiny.reference, asks, said)


def test_the_answers_depend_on_more_than_the_last_tokens(wide: Served) -> None:
    """Else the comparisons here would say nothing."""
    said = wide.answer([Ask(prompt(length, seed), 12) for length in (3, 40, 200) for seed in range(3)])
    assert len({answer.tokens for answer in said}) == 9


def test_a_prompt_alone_is_what_it_is_among_others(wide: Served, tiny: Tiny) -> None:
    for length in (1, 33, 300):
        wide.forget()
        asks = [Ask(prompt(length), 40)]
        expect_same(tiny.reference, asks, wide.answer(asks))


def test_a_hit_in_the_prefix_cache_is_a_miss_but_faster(wide: Served, tiny: Tiny) -> None:
    wide.forget()
    asks = [Ask(prompt(length), 12) for length in LENGTHS]
    cold, warm = wide.answer(asks), wide.answer(asks)
    expect_same(tiny.reference, asks, warm)
    for length, before, after in zip(LENGTHS, cold, warm, strict=True):
        assert after.cached_tokens == (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert after.tokens == before.tokens
        assert (after.logprobs - before.logprobs).abs().max() < LARGEST_DIFFERENCE


@pytest.mark.parametrize("length", [33, 34])
def test_a_request_goes_on_behind_a_block_that_another_fills_in_the_same_step(
    narrow: Served, tiny: Tiny, length: int
) -> None:
    """It may: keys and values are written before they are read."""
    narrow.forget()
    asks = [Ask(prompt(1), 1), Ask(prompt(length), 3), Ask(prompt(length), 3)]
    said = narrow.answer(asks)
    assert [answer.cached_tokens for answer in said] == [0, 0, 32]
    expect_same(tiny.reference, asks, said)


def test_a_shared_prefix_is_found_at_any_block_of_it(wide: Served, tiny: Tiny) -> None:
    """Also in the midst of what was one chunk, and in what was generated."""
    wide.forget()
    first = Ask(prompt(200), 100)
    told = wide.answer([first])[0].tokens
    whole = first.prompt + told
    cuts = (31, 32, 33, 96, 100, 199, 200, 201, 230, 256, 290)
    for cut in cuts:
        asks = [Ask((*whole[:cut], *prompt(5, seed=cut)), 6)]
        said = wide.answer(asks)
        assert said[0].cached_tokens == cut // BLOCK_TOKENS * BLOCK_TOKENS
        expect_same(tiny.reference, asks, said)


@pytest.mark.parametrize("tokens", [7, 32, 33, 64, 65])
def test_chunks_of_any_size(tiny: Tiny, tokens: int) -> None:
    with serving(tiny.folder, max_num_batched_tokens=tokens, max_num_seqs=4) as served:
        asks = [Ask(prompt(length), 8, after) for length, after in ((300, 0), (64, 1), (1, 3), (65, 4), (129, 4))]
        expect_same(tiny.reference, asks, served.answer(asks))


@pytest.mark.parametrize(
    ("extra", "cached"),
    [
        pytest.param({"enable_prefix_caching": False}, [0, 0, 0], id="no-prefix-cache"),
        pytest.param({"disable_hybrid_kv_cache_manager": True}, [0, 32, 192], id="one-group-of-all-layers"),
        pytest.param({RETENTION: 128}, [0, 32, 192], id="kept-every-128-tokens"),
        pytest.param({"block_size": 64}, [0, 0, 192], id="larger-blocks"),
    ],
)
def test_however_the_cache_is_kept(tiny: Tiny, extra: dict[str, Any], cached: list[int]) -> None:
    with serving(tiny.folder, max_num_batched_tokens=77, **extra) as served:
        asks = [Ask(prompt(length), 8) for length in (1, 64, 200)]
        expect_same(tiny.reference, asks, served.answer(asks))
        said = served.answer(asks)
        assert [answer.cached_tokens for answer in said] == cached
        expect_same(tiny.reference, asks, said)


def test_preempted_requests_go_on_as_if_nothing_had_been(tiny: Tiny) -> None:
    with serving(tiny.folder, num_gpu_blocks_override=18, max_model_len=256) as served:
        preempted: list[str] = []
        preempt: Callable[..., None] = served.scheduler._preempt_request

        def note(request: Any, *args: Any, **kwargs: Any) -> None:
            preempted.append(request.request_id)
            preempt(request, *args, **kwargs)

        served.scheduler._preempt_request = note
        asks = [Ask(prompt(length), 90) for length in (60, 61, 90, 33)]
        expect_same(tiny.reference, asks, served.answer(asks))
    assert preempted


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_whatever_comes_when(narrow: Served, tiny: Tiny, data: st.DataObject) -> None:
    """Prompts that share prefixes, chunked, beside others' tokens, some given up; on a cache that is warm or cold."""
    if data.draw(st.booleans(), label="cold"):
        narrow.forget()
    asks: list[Ask] = []
    for index in range(data.draw(st.integers(1, 5), label="requests")):
        length = data.draw(st.integers(1, 120) | st.integers(1, 300), label="length")
        ids = prompt(length, data.draw(st.integers(0, 2), label="words"))
        if asks and data.draw(st.booleans(), label="shares a prefix"):
            other = asks[data.draw(st.integers(0, len(asks) - 1), label="of")].prompt
            ids = (other[: data.draw(st.integers(1, len(other)), label="shared")] + prompt(9, index))[:300]
        tokens = data.draw(st.integers(1, 10), label="tokens")
        aborted = data.draw(st.none() | st.integers(1, tokens - 1), label="aborted") if tokens > 1 else None
        asks.append(Ask(ids, tokens, data.draw(st.integers(0, 12), label="after"), aborted))
    expect_same(tiny.reference, asks, narrow.answer(asks))


def apart(module: str, folder: Path) -> None:
    """Pass a test that must not share a process with others."""
    command = [sys.executable, "-m", f"tests.engine.{module}", str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(find_spec("numba") is None, reason="vLLM makes drafts by numba")
def test_drafts_that_are_rejected_leave_nothing_behind(tmp_path: Path) -> None:
    apart("drafts", tmp_path)


def test_experts_without_tokens_and_the_one_that_does_nothing(tmp_path: Path) -> None:
    import torch

    model = write(tmp_path, num_hidden_layers=3, num_experts=6)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        for layer in model.reference.model.layers:
            layer.mlp.gate.balancing_biases[1] = -9.0
            layer.mlp.gate.balancing_biases[-1] = 0.2
        model.reference.save_pretrained(tmp_path)
    chosen: list[Any] = []
    gates = [layer.mlp.gate for layer in model.reference.model.layers]
    hooks = [gate.register_forward_hook(lambda _, __, output: chosen.append(output[1:3])) for gate in gates]
    with serving(tmp_path) as served:
        asks = [Ask(prompt(length), 8) for length in (1, 40, 150)]
        expect_same(model.reference, asks, served.answer(asks))
    for hook in hooks:
        hook.remove()
    weights, ids = (torch.cat([pair[at].flatten() for pair in chosen]) for at in range(2))
    assert 0.05 < (weights == 0).float().mean() < 0.95
    assert 1 not in ids[weights > 0]
    assert len(ids[weights > 0].unique()) > 1


SHAPES = pytest.mark.parametrize(
    "config",
    [
        pytest.param({"layer_types": ["hybrid_sliding", "hybrid"] * 2, "sliding_window": 40}, id="sliding"),
        pytest.param({"attention_bias": True, "lm_head_bias": True, "tie_word_embeddings": False}, id="biases"),
        pytest.param({"cca_time0": 4, "cca_time1": 3}, id="longer-convolutions"),
        pytest.param({"num_attention_heads": 8, "num_key_value_heads": 1, "num_experts": 16}, id="one-key-head"),
        pytest.param({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128}, id="as-many-key-heads"),
    ],
)


@SHAPES
def test_other_shapes_of_it(tmp_path: Path, config: dict[str, Any]) -> None:
    model = write(tmp_path, num_hidden_layers=4, **config)
    with serving(tmp_path, max_num_batched_tokens=77) as served:
        asks = [Ask(prompt(length), 8) for length in (1, 2, 31, 90, 200)]
        for _ in range(2):
            expect_same(model.reference, asks, served.answer(asks))


def weights_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@SHAPES
def test_what_transformers_writes_passes_the_check_of_a_folder(tmp_path: Path, config: dict[str, Any]) -> None:
    write(tmp_path, num_hidden_layers=4, **config)
    checkpoint = read(tmp_path)
    assert checkpoint.problems() == ()
    assert checkpoint.weight_bytes == sum(weight.nbytes for weight in weights_of(tmp_path).values())


def test_compiled_it_says_the_same(tmp_path: Path) -> None:
    model = write(tmp_path, num_hidden_layers=2)
    with serving(tmp_path, enforce_eager=False, max_num_batched_tokens=77) as served:
        asks = [Ask(prompt(length), 8) for length in (1, 33, 90, 200)]
        for _ in range(2):
            expect_same(model.reference, asks, served.answer(asks))


@pytest.mark.skipif(psutil.virtual_memory().available < 12e9, reason="needs 12 GB of memory")
def test_the_shape_of_the_real_one(tmp_path: Path) -> None:
    """ZAYA1-8B but for its depth: two layers of forty, with its whole vocabulary. 4 GB on disk."""
    from transformers import ZayaConfig

    try:
        with warnings.catch_warnings(action="ignore"):
            reference = random_zaya(ZayaConfig(num_hidden_layers=2), seed=0)
            reference.save_pretrained(tmp_path)
        with serving(tmp_path, max_num_batched_tokens=100, max_logprobs=50) as served:
            asks = [Ask(prompt(length), 6) for length in (1, 40, 64, 150)]
            for _ in range(2):
                expect_same(reference, asks, served.answer(asks, likely=50))
    finally:
        shutil.rmtree(tmp_path)  # pytest would keep it for three runs


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_two_ranks_say_what_one_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of the first are the current token's, those of the second the previous one's; with biases."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = write(tmp_path, num_hidden_layers=3, attention_bias=True)
    with serving(tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp") as served:
        asks = [Ask(prompt(length), 8) for length in (1, 33, 90, 200)]
        for _ in range(2):
            expect_same(model.reference, asks, served.answer(asks))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, to interpret its kernels")
def test_the_second_model_runner_says_the_same(tmp_path: Path) -> None:
    apart("second_runner", tmp_path)


def test_the_model_refuses_ranks_that_it_cannot_be_divided_between() -> None:
    """Also in a plain `vllm serve`."""
    from types import SimpleNamespace

    with warnings.catch_warnings(action="ignore"):
        from mrsa_server.zaya.model import ZayaForCausalLM

    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(num_key_value_heads=2)),
        parallel_config=SimpleNamespace(tensor_parallel_size=4),
        compilation_config=None,
        quant_config=None,
    )
    with pytest.raises(ValueError, match="tensor_parallel_size=4 does not divide the 2 key-value heads"):
        ZayaForCausalLM(vllm_config=config)
