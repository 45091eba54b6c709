"""vLLM inside this process: token ids in, token ids out, any build of vLLM 0.26 to 0.33.

`vllm` is imported by `start` alone: everything else works without it. What differs between its versions stands in
`_Vllm`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import warnings
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from harness.engine import Delta, EngineDead, EngineError, Vocabulary
from harness.types import Finish, Message, RolloutRequest, Tail, TokenIds
from mrsa_server.engines import UNWATCHED_INTERVAL, CannotServe
from mrsa_server.engines.prompting import ChatMessage, PromptIds, chat_messages
from mrsa_server.engines.tokens import Pieces, Tokens
from mrsa_server.zaya import ARCHITECTURE
from mrsa_server.zaya.checkpoint import examine
from mrsa_server.zaya.ranks import check_ranks

if TYPE_CHECKING:
    from vllm.config import CacheConfig, SchedulerConfig, VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

log = structlog.get_logger("mrsa.engine")
_CHARACTERS_PER_TOKEN = 4  # of English; what has more for each token of the context is counted apart

# Where prefixes of ZAYA1 can be taken up again. Its state takes as much memory as the keys and values of a block: at
# each of them it would halve what the prefix cache holds.
_STATE_TOKENS = 128
_INTERVAL = "prefix_cache_retention_interval"

# Arguments with which what is loaded is not what lies in the folder.
_READ_OTHERWISE = frozenset({"hf_config_path", "hf_overrides", "load_format", "skip_tokenizer_init", "tokenizer"})

_BESIDE_KIB = 1 << 20  # of vLLM's other processes, which start later

INSTALL = "vLLM is not installed: `pip install 'mrsa-server[vllm]'` on a GPU machine, `make venv-cpu` on one without"


class VllmEngine:
    """An `Engine` over `AsyncLLM`. Its scheduler is the queue: every request goes in at once, with its priority.

    Args:
        model: Name or path of the model, as vLLM takes it.
        served_name: What clients call it; `model` where None.
        max_model_len: Longest prompt and generation together; the model's own where None.
        dtype: As vLLM takes it.
        extra: Further fields of vLLM's `AsyncEngineArgs`; they win over what is set here.
    """

    def __init__(
        self,
        model: str,
        *,
        served_name: str | None = None,
        max_model_len: int | None = None,
        dtype: str = "auto",
        extra: Mapping[str, object] | None = None,
    ) -> None:
        self.model = served_name or model
        self.in_process = True
        self._args: dict[str, object] = {
            "model": model,
            "max_model_len": max_model_len,
            "dtype": dtype,
            "enable_prefix_caching": True,
            "scheduling_policy": "priority",
            # What vLLM counts for its log is what it traces: without, it breaks at the first request that it traces.
            "disable_log_stats": not (extra or {}).get("otlp_traces_endpoint"),
            "use_tqdm_on_load": False,
            **(extra or {}),
        }
        self._vocabulary = Vocabulary()
        self._vllm: _Vllm
        self._loading: asyncio.Task[AsyncLLM] | None = None
        self._llm: AsyncLLM | None = None
        self._traces = False  # whether vLLM traces; where it does not, it says so of each request that it could
        self._tokens: Tokens
        self._prompts: PromptIds
        self._numbers = itertools.count()
        self._apart = ThreadPoolExecutor(1, "long prompts")

    @property
    def vocabulary(self) -> Vocabulary:
        """What is known of the tokens; nothing before `start`."""
        return self._vocabulary

    @property
    def memory_tokens(self) -> int | None:
        """Tokens that its KV cache holds; None before `start`."""
        if self._llm is None:
            return None
        cache = self._llm.vllm_config.cache_config
        # vLLM counts blocks, and in later versions tokens too: of one of its engines, with data parallelism.
        tokens = getattr(cache, "kv_cache_size_tokens", None) or (cache.num_gpu_blocks or 0) * cache.block_size
        return tokens * self._llm.vllm_config.parallel_config.data_parallel_size or None

    async def start(self) -> None:
        """Load the model; other tasks go on meanwhile.

        Raises:
            ImportError: vLLM is missing.
            CannotServe: The model is a ZAYA1 that cannot be loaded.
            Exception: vLLM's own, where it cannot load the model.
        """
        await asyncio.to_thread(_check_folder, self._args)
        self._vllm = await asyncio.to_thread(_Vllm)
        self._loading = asyncio.create_task(asyncio.to_thread(self._vllm.load, self._args))
        llm = await asyncio.shield(self._loading)  # a thread cannot be cancelled: `aclose` waits for it
        tokens = Tokens(llm.get_tokenizer())

        # Without threads: a prompt is rendered once for all rollouts of a round, with them it would be once for each.
        async def encode_chat(messages: list[ChatMessage], tools: str | None) -> Sequence[int]:
            return tokens.encode_chat(messages, tools)

        async def encode(text: str) -> Sequence[int]:
            return tokens.encode(text)

        async def plain_ids(tail: Tail) -> tuple[int, ...]:
            return tokens.plain_ids(tail)

        self._prompts = PromptIds(encode_chat, encode, plain_ids)
        self._vocabulary = replace(tokens.vocabulary, context_tokens=llm.model_config.max_model_len)
        self._traces = llm.vllm_config.observability_config.otlp_traces_endpoint is not None
        self._tokens, self._llm = tokens, llm

    async def aclose(self) -> None:
        """Stop the engine's processes; what is still being generated raises `EngineDead`."""
        loading, self._loading, self._llm = self._loading, None, None
        if loading is not None:
            await asyncio.wait((loading,))
            if not loading.cancelled() and loading.exception() is None:
                await asyncio.to_thread(self._vllm.shutdown, loading.result())

    async def healthy(self) -> bool:
        """Whether requests can be served now."""
        return self._llm is not None and not self._llm.errored

    async def decode(self, token_ids: TokenIds) -> str:
        """The text of some ids, special tokens and think markers left out."""
        self._running()
        return self._tokens.decode(token_ids)

    async def count(self, messages: tuple[Message, ...]) -> int | None:
        """Tokens of the rendered prompt."""
        llm = self._running()
        if sum(len(message.text) for message in messages) > _CHARACTERS_PER_TOKEN * llm.model_config.max_model_len:
            # It will hardly fit. To say by how much takes 5 s for the largest body: apart, and one after the other.
            plain = chat_messages(messages, lambda tail: tail.text)
            loop = asyncio.get_running_loop()
            return len(await loop.run_in_executor(self._apart, self._tokens.encode_chat, plain, None))
        return len(await self._prompts.render(messages))

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        """See `harness.engine.Engine`. Once closed or cancelled, the request has left vLLM's scheduler."""
        llm, vllm = self._running(), self._vllm
        prompt = await self._prompts.render(request.messages, request.answer.tools) + request.continuation
        context = llm.model_config.max_model_len
        if len(prompt) >= context:
            raise EngineError(
                f"a prompt of {len(prompt)} tokens leaves no room in the context of {context} tokens", 400
            )
        pieces = Pieces(self._tokens, prompt, request.answer.stop, request.watched)
        request_id = f"{request.run_id}-{request.slot.round}.{request.slot.index}-{next(self._numbers)}"
        done = False
        try:
            salt = {} if request.cache_salt is None else {"cache_salt": request.cache_salt}
            outputs = llm.generate(
                {"type": "token", "prompt_token_ids": list(prompt), **salt},
                vllm.sampling_params(request),
                request_id,
                priority=request.priority,
                trace_headers=dict(request.trace_headers) if self._traces else None,
            )
            async with aclosing(outputs):
                async for output in outputs:
                    done = output.finished
                    completion = output.outputs[0]
                    stop = completion.stop_reason if isinstance(completion.stop_reason, str) else None
                    finish = _finish(completion.finish_reason)
                    for delta in pieces.push(completion.token_ids, output.num_cached_tokens, finish, stop):
                        yield delta
        except vllm.dead as error:
            raise EngineDead(f"vLLM has died: {error}") from error
        except vllm.refused as error:
            raise EngineError(f"vLLM refused the request: {error}", 400) from error
        finally:
            if not done:  # vLLM forgets to abort for a task that is cancelled while it hands the request over.
                await llm.abort(request_id)

    def _running(self) -> AsyncLLM:
        if self._llm is None or self._llm.errored:
            raise EngineDead(f"vLLM is not running {self.model}")
        return self._llm


class _Vllm:
    """The names of vLLM that are used, for any of its versions 0.26 to 0.33.

    Attributes:
        dead: Errors that mean that the engine is gone. Some are of the family `refused` too, so catch these first.
        refused: Errors of one request.

    Raises:
        ImportError: vLLM is missing.
    """

    def __init__(self) -> None:
        # vLLM reads these at its import.
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
        try:
            import vllm
        except ImportError as error:
            raise ImportError(f"{INSTALL} ({error})") from error
        from vllm import exceptions, sampling_params
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        log.info("vLLM imported", version=vllm.__version__)
        self._args, self._llm, self._params = AsyncEngineArgs, AsyncLLM, sampling_params
        self.dead: tuple[type[Exception], ...] = (EngineDeadError,)
        # In 0.26 a refusal is a ValueError, in 0.32 a VLLMError, which EngineDeadError is there too.
        family = getattr(exceptions, "VLLMError", ValueError)
        self.refused: tuple[type[Exception], ...] = (ValueError, EngineGenerateError, family)
        # In 0.26 the interval is the whole engine's, in 0.32 a request has its own.
        self._has_interval = "stream_interval" in sampling_params.SamplingParams.__struct_fields__
        self._holding: Callable[[int], dict[str, int]] | None = None  # once it is known to work

    def load(self, args: Mapping[str, object]) -> AsyncLLM:
        """Start the engine's processes and return when the model is loaded."""
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext

        made = self._args(**(_for_cpu() if current_platform.is_cpu() else {}) | dict(args))
        config = made.create_engine_config(UsageContext.ENGINE_CONTEXT)
        if config.model_config.architecture == ARCHITECTURE:
            _check_ranks(config)
            if _INTERVAL not in args:
                _keep_states(config.cache_config)
        reason = self._hold_back(config.scheduler_config)
        if reason is not None:
            log.warning("vLLM sends every token by itself, which costs the server more", reason=reason)
        return self._llm.from_vllm_config(
            config, enable_log_requests=made.enable_log_requests, disable_log_stats=made.disable_log_stats
        )

    def _hold_back(self, config: SchedulerConfig) -> str | None:
        """Give vLLM's scheduler what `vllm_scheduler` says; why not, where that cannot be."""
        if config.scheduler_cls is not None:
            return f"the scheduler {config.scheduler_cls} was asked for"
        try:
            from mrsa_server.engines import vllm_scheduler
        except (ImportError, AttributeError, TypeError) as error:
            return f"this vLLM has another scheduler: {error}"
        chosen = config.get_scheduler_cls()
        name = vllm_scheduler.standing_for(chosen)
        if name is None:
            return f"the scheduler {chosen.__name__} is not known"
        config.scheduler_cls = f"{vllm_scheduler.__name__}.{name}"
        self._holding = vllm_scheduler.holding
        return None

    def shutdown(self, llm: AsyncLLM) -> None:
        """Stop the engine's processes."""
        # The loop that reads from them says in forty lines that they are gone, which is what is wanted.
        logging.getLogger("vllm.v1.engine.async_llm").setLevel(logging.CRITICAL)
        llm.shutdown()

    def sampling_params(self, request: RolloutRequest) -> SamplingParams:
        """The request in vLLM's words. `Pieces` makes the text; vLLM decodes only where it has to find stop strings.

        Raises:
            EngineError: It cannot be said in them.
        """
        if len(request.stop_ids) > 1:
            raise EngineError(f"stop_ids is a sequence of {len(request.stop_ids)} ids; vLLM stops at single ids only")
        sampling, answer = request.sampling, request.answer
        fields: dict[str, object] = {}
        if answer.json_schema is not None:
            fields["structured_outputs"] = self._params.StructuredOutputsParams(json=answer.json_schema)
        hold = 0 if request.watched else UNWATCHED_INTERVAL
        # Stop strings are found behind the scheduler: what it holds back would be generated in vain.
        if self._holding is not None and not answer.stop:
            fields["extra_args"] = self._holding(hold)
        elif self._has_interval and hold:
            fields["stream_interval"] = hold
        return self._params.SamplingParams(
            max_tokens=request.max_tokens,
            stop_token_ids=list(request.stop_ids),
            stop=list(answer.stop),
            detokenize=bool(answer.stop),
            seed=request.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            output_kind=self._params.RequestOutputKind.DELTA,
            **fields,
        )


def _for_cpu(meminfo: Path = Path("/proc/meminfo")) -> dict[str, object]:
    """Arguments that vLLM's CPU build starts with where its own would not do.

    Args:
        meminfo: What the kernel tells of the memory.
    """
    mended: dict[str, object] = {"worker_cls": "mrsa_server.engines.vllm_cpu.Worker"}
    try:
        lines = (line.split() for line in meminfo.read_text().splitlines())
        kib = {words[0]: int(words[1]) for words in lines if len(words) > 1}
        free, total = kib["MemAvailable:"], kib["MemTotal:"]
    except (OSError, KeyError, ValueError):
        return mended
    # vLLM wants 0.92 of the machine's memory, and does not start where other programs have more than the rest.
    share = (0.9 * free - _BESIDE_KIB) / total
    return {**mended, "gpu_memory_utilization": round(max(share, 0.01), 3)}


def _check_folder(args: Mapping[str, object]) -> None:
    """Say at once what vLLM finds out of a ZAYA1 in a folder after half a minute, and says in two hundred lines.

    Raises:
        CannotServe: It cannot be loaded.
    """
    folder = str(args["model"])
    if not os.path.isdir(folder) or not _READ_OTHERWISE.isdisjoint(args) or any(Path(folder).glob("*.bin")):
        return
    _, fault = examine(Path(folder), folder)
    if fault and not fault.other:
        raise CannotServe("; ".join(fault.texts) + (f"\n    {fault.mend}" if fault.mend else ""))


def _check_ranks(config: VllmConfig) -> None:
    """As `_check_folder`, of how a ZAYA1 is to be divided.

    Raises:
        CannotServe: It cannot be.
    """
    try:
        check_ranks(config.model_config.hf_config, config.parallel_config)
    except ValueError as error:
        raise CannotServe(f"--engine-args: {error}") from error


def _keep_states(config: CacheConfig) -> None:
    """Have the state of ZAYA1 kept at every so many tokens of a prefix, so that what shares a part of it finds it.

    By itself vLLM 0.32 keeps it at the ends of prompts alone, and where two parted once it has seen them part; what an
    aggregation shares ends where it pleases. 0.26 keeps it at every block and cannot be told otherwise.
    """
    if hasattr(config, _INTERVAL):
        block = config.block_size or 1
        setattr(config, _INTERVAL, -(-_STATE_TOKENS // block) * block)


def _finish(reason: str | None) -> Finish | None:
    match reason:
        case None:
            return None
        case "stop":
            return Finish.STOP
        case "length":
            return Finish.LENGTH
        case "abort":  # Not by us: who aborts here has stopped reading.
            raise EngineDead("vLLM is shutting down")
        case _:
            raise EngineError(f"vLLM gave the request up: {reason}")
