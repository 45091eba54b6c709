"""Any OpenAI-compatible server by URL as an engine. What it can do is found by asking it, never by generating.

    ids     it renders and tokenizes (vLLM): prompts are ids, tails are cut in its own tokens
    text    it tokenizes, no more (llama-server): chats are text, the ids of what it says are asked for afterwards
    plain   neither: ids are code points, and how many of them make a token is measured

One connection pool for everything. Closing a generation closes its connection, which is how these servers abort.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import replace
from enum import Enum
from typing import Any

import aiohttp
import httpx
import orjson
import structlog
from httpx_aiohttp import AiohttpTransport
from prometheus_client.parser import text_string_to_metric_families

from harness.engine import Delta, EngineDead, EngineError, GenerationLost, Vocabulary
from harness.types import Message, RolloutRequest, TokenIds
from mrsa_server.engines import LONGEST_WAIT_S, UNWATCHED_INTERVAL, WATCHED_DELTAS_PER_S
from mrsa_server.engines.openai_pace import Pace
from mrsa_server.engines.openai_reply import IdReply, TextReply
from mrsa_server.engines.openai_stream import (
    CLOSE,
    OPEN,
    AnswerOnly,
    Event,
    Frames,
    IdReader,
    TextReader,
    ends_thinking,
    error_text,
    has_ids,
    parse,
)
from mrsa_server.engines.openai_tokens import RemoteTokenizer
from mrsa_server.engines.prompting import ChatMessage, PromptIds, chat_messages, neutralise, tool_definitions

CLOSING = "Give your final answer now, without further reasoning."
CONTINUING = "Go on exactly where you were cut off, repeating nothing."
# uvicorn, in front of vLLM, closes an idle connection after 5 s: one that we might still use must be younger.
_KEEPALIVE_S = 4.0
_END_S = 1.0  # for a body to end after its `[DONE]`
_RATIO = 4.0
_MOST_METRICS = 1 << 22  # bytes
_OF_ROUTERS = (502, 503, 504)  # that have lost a server, or know of none for the moment
_TRANSPORT = (httpx.TransportError, aiohttp.ClientError, OSError)
_UNWATCHED_READS_PER_S = 200.0
# What one stream is taken to make beside many others, where vLLM is asked to join its tokens.
_TOKENS_PER_S = 40.0


log = structlog.get_logger("mrsa.engine")


class Level(Enum):
    """What a server can do, as the header says."""

    IDS = "ids"
    TEXT = "text"
    PLAIN = "plain"


class OpenAIEngine:
    """The harness's Engine over a server's URL.

    `stop_ids` of a request are those of `</think>`; no other sequence is watched for where the server has no ids.

    Args:
        url: Of the server, with `/v1` or without.
        model: Its name there; None for the first that the server lists.
        api_key: Sent as bearer token, and never shown.
        connect_timeout_s: For a connection to open.
        read_timeout_s: Between two reads of an answer.
        silence_s: After so long without a byte for anyone, whether the server is still there is looked up.
        max_connections: Most at once; further generations wait here.
        max_tokens_field: Where the server wants the bound in a chat; `max_completion_tokens` for OpenAI's own models.
        priority: Whether to send priorities to a server that takes ids (vLLM); None for until it refuses one.
        cache_salt: Whether to send the salts of keys, so that none has another's prompts in its cache; None for to a
            server that takes ids, until it refuses one.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        connect_timeout_s: float = 10.0,
        read_timeout_s: float = 600.0,
        silence_s: float = 15.0,
        max_connections: int = 4096,
        max_tokens_field: str = "max_tokens",
        priority: bool | None = None,
        cache_salt: bool | None = None,
    ) -> None:
        self._root = url.rstrip("/").removesuffix("/v1")
        self.model = model or ""
        self.in_process = False
        self.level: Level | None = None
        self._api_key = api_key
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._timeouts = {"connect": connect_timeout_s, "read": read_timeout_s}
        self._max_connections = max_connections
        self._max_tokens_field = max_tokens_field
        self._priority = priority is not False
        self._cache_salt = cache_salt
        self._wishes = {"priority"} if priority is None else set()  # sent until they are refused
        if cache_salt is None:
            self._wishes.add("cache_salt")
        self.memory_tokens: int | None = None  # of the KV cache, where vLLM's metrics tell it
        self._urls: dict[str, httpx.URL] = {}
        self._transport: AiohttpTransport | None = None
        self._watched = Pace(WATCHED_DELTAS_PER_S, LONGEST_WAIT_S)
        self._unwatched = Pace(_UNWATCHED_READS_PER_S, LONGEST_WAIT_S)
        self._silence_s = silence_s
        self._open = 0  # generations
        self._heard = 0.0  # when any of them last brought a byte, on the loop's clock
        self._guard: asyncio.Task[None] | None = None
        self._look: asyncio.Task[bool] | None = None
        self._starting = asyncio.Lock()
        self._vocabulary = Vocabulary()
        self._tokenizer: RemoteTokenizer | None = None
        self._prompts: PromptIds | None = None
        self._prompt_end: tuple[int, ...] = ()
        self._prompt_thinks = False
        self._unmarked = False
        self._seen_characters = 0
        self._seen_tokens = 0

    @property
    def vocabulary(self) -> Vocabulary:
        """What is known of the tokens; the ratio of a plain server is refined by each answer."""
        return self._vocabulary

    async def start(self) -> None:
        """Ask the server what it can do, once.

        Raises:
            EngineDead: It is not there, or not ready; it is asked again at the next use.
            EngineError: It refuses us, or lists no model where none is given.
        """
        if self.level is None:
            async with self._starting:
                if self.level is None:
                    try:
                        await self._probe()
                    except EngineError as error:
                        if error.status is not None and error.status < 500 and error.status != 429:
                            raise
                        raise EngineDead(f"the engine is not ready: {error}") from None

    async def aclose(self) -> None:
        """Close every connection."""
        if self._transport is not None:
            await self._transport.aclose()
            self._transport = None

    async def healthy(self) -> bool:
        """Whether the server answers, and says that it is well as far as it says anything of that.

        A router says so without a server behind it too, but then it lists no model. vLLM's says that it is not as long
        as any of its servers is not, and elsewhere whether one is.
        """
        health, models = await self._status("/health"), await self._status("/v1/models")
        if health >= 500:
            health = await self._status("/readiness")
            return models < 300 and health < 300
        return max(health, models) < 500 and min(health, models) < 300

    async def _status(self, path: str) -> int:
        """The HTTP status of a GET; 599 for none."""
        try:
            async with self._send("GET", path, timeouts={"connect": 5.0, "read": 5.0}) as response:
                return response.status_code
        except (EngineError, EngineDead) as error:
            return getattr(error, "status", None) or 599

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        """Generate up to `request.max_tokens` tokens, in one call to the server.

        Raises:
            EngineError: An HTTP error, a stream without an end, a silence of `read_timeout_s`.
            GenerationLost: A connection that broke, or a router that lost the server behind it.
            EngineDead: No connection, or one of these from a server that is not well.
        """
        await self.start()
        thinking, prompt_tokens = self._prompt_thinks and not request.continuation, None
        if self._prompts is not None:
            async with self._judged():
                prompt = await self._prompts.render(request.messages, request.answer.tools)
            thinking = self._ends_thinking(prompt, request.continuation)
            prompt += request.continuation
            path, body, prompt_tokens = "/v1/completions", self._completion(request, prompt), len(prompt)
            del prompt
        else:
            async with self._judged():
                path, body = "/v1/chat/completions", await self._chat(request)
        reply: IdReply | TextReply | None = None
        frames, pace = Frames(), self._watched if request.watched else self._unwatched
        async with self._judged(), self._guarded(), AsyncExitStack() as stack:
            response = await self._begin(stack, path, body, dict(request.trace_headers))
            yield Delta(prompt_tokens=prompt_tokens, thinking=thinking)
            async for events in _events(response, frames, pace):
                self._heard = asyncio.get_running_loop().time()
                if reply is None:
                    reply = self._reply(request, events, thinking)
                for delta in await reply.take(events):
                    yield delta
                if reply.stopped:
                    break
            if reply is None or not (reply.stopped or reply.reader.finish):
                if frames.done:
                    raise EngineError("the engine's answer was cut: it ended without a finish_reason")
                raise await self._lost("the engine's stream was cut")
            end = await reply.end()
            self._learn(reply)  # Nobody comes back after the last delta.
            for delta in end:
                yield delta

    async def _begin(self, stack: AsyncExitStack, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
        """A generation's response; where it was refused for what may be left out, that of another try without."""
        while True:
            try:
                return await stack.enter_async_context(self._send("POST", path, body, headers=headers))
            except EngineError as error:
                fields = orjson.loads(body)
                said = str(error).lower() if error.status in (400, 422) else ""
                blamed = next((wish for wish in self._wishes if wish in said and wish in fields), None)
                if blamed is None:
                    raise
            if blamed == "priority":
                self._priority = False
            else:
                self._cache_salt = False
                log.warning("the engine takes no cache_salt: prompts of all keys share its cache", reason=said[:200])
            del fields[blamed]
            body = _dumps(fields)

    async def decode(self, token_ids: TokenIds) -> str:
        """The text of some ids, special tokens left out."""
        await self.start()
        if not token_ids:
            return ""
        if self._tokenizer is None:
            return "".join(map(chr, token_ids))
        return await self._tokenizer.decode(token_ids)

    async def count(self, messages: tuple[Message, ...]) -> int | None:
        """Tokens of a rendered prompt; None where the server does not render."""
        await self.start()
        return None if self._prompts is None else len(await self._prompts.render(messages))

    async def _probe(self) -> None:
        listed = await self._models()
        if not self.model:
            self.model = listed
        tokenizer = await RemoteTokenizer.find(self._post, self.model)
        if tokenizer is None:
            self._vocabulary = Vocabulary(tuple(map(ord, OPEN)), tuple(map(ord, CLOSE)), _RATIO, exact=False)
            self.level = Level.PLAIN
            return
        think_open: tuple[int, ...] = ()
        think_close: tuple[int, ...] = ()
        if await tokenizer.renders():
            # A mark of several ids would be found in no prompt, and cannot stop a generation.
            first, last = await tokenizer.single(OPEN), await tokenizer.single(CLOSE)
            if first is not None and last is not None:
                think_open, think_close = (first,), (last,)
            self._prompt_end = await tokenizer.prompt_end()
            self._prompts = PromptIds(tokenizer.encode_chat, tokenizer.encode, tokenizer.plain_ids)
            level = Level.IDS
        else:
            think_open, think_close = tuple(await tokenizer.encode(OPEN)), tuple(await tokenizer.encode(CLOSE))
            self._prompt_thinks = await tokenizer.opens_thinking(OPEN)
            level = Level.TEXT
        if len(think_open) == len(think_close) == 1:
            tokenizer.add_control(think_open + think_close)
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(think_open, think_close, context_tokens=tokenizer.context_tokens)
        self.memory_tokens = await self._find_memory()
        self.level = level

    async def _find_memory(self) -> int | None:
        """Tokens that the KV caches of a vLLM server hold together; None where it does not say."""
        try:
            async with self._send("GET", "/metrics") as response:
                text = (await _body(response, most=_MOST_METRICS)).decode()
            infos = [
                sample.labels
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if sample.name == "vllm:cache_config_info"
            ]
            return sum(int(info["num_gpu_blocks"]) * int(info["block_size"]) for info in infos) or None
        except (EngineError, KeyError, ValueError):  # llama-server has other metrics, most servers none
            return None

    async def _models(self) -> str:
        """The first model that the server lists; a server need not list any where the model is given."""
        try:
            async with self._send("GET", "/v1/models") as response:
                return str(parse(await _body(response))["data"][0]["id"])
        except EngineError as error:
            if self.model and (error.status is None or error.status in (403, 404, 405, 501)):
                return self.model
            raise
        except (KeyError, IndexError, TypeError):
            if self.model:
                return self.model
            raise EngineError("the engine's /v1/models lists no model", 404) from None

    def _reply(self, request: RolloutRequest, events: list[Event], thinking: bool) -> IdReply | TextReply:
        # What a continuation goes on with is the answer; a model that is asked in a new turn thinks again nevertheless.
        only = AnswerOnly(self._unmarked and self._prompts is None) if request.continuation and not thinking else None
        if self._prompts is not None and has_ids(events):
            return IdReply(request, IdReader(self._vocabulary.think_open, self._vocabulary.think_close, only))
        tokenize = None if self._tokenizer is None else self._tokenizer.encode
        return TextReply(request, TextReader(thinking, only), self._vocabulary, tokenize)

    def _ends_thinking(self, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> bool:
        """Whether generation begins inside an open think; one that a message holds does not count."""
        if self._prompt_end and prompt[-len(self._prompt_end) :] == self._prompt_end:
            prompt = self._prompt_end
        return ends_thinking(prompt + continuation, self._vocabulary.think_open, self._vocabulary.think_close)

    def _completion(self, request: RolloutRequest, ids: tuple[int, ...]) -> bytes:
        """The body for /v1/completions, in vLLM's words."""
        body = self._common(request) | {
            "prompt": ids,
            "max_tokens": request.max_tokens,
            "return_token_ids": True,
            "skip_special_tokens": False,  # The text must show the marks at which it is split, and tool calls.
            "spaces_between_special_tokens": False,
        }
        if len(request.stop_ids) == 1:
            body["stop_token_ids"] = list(request.stop_ids)
        if request.answer.json_schema is not None:
            body["structured_outputs"] = {"json": orjson.loads(request.answer.json_schema)}
        interval = round(self._watched.wait_s * _TOKENS_PER_S) if request.watched else UNWATCHED_INTERVAL
        if interval > 1:
            body["stream_interval"] = interval
        if self._priority:
            body["priority"] = request.priority
        return _dumps(body)

    async def _chat(self, request: RolloutRequest) -> bytes:
        """The body for /v1/chat/completions: text, every mark in a candidate broken."""
        messages = chat_messages(request.messages, lambda tail: neutralise(tail.text))
        if request.continuation:
            messages += await self._closing(request.continuation)
        body = self._common(request) | {"messages": messages, self._max_tokens_field: request.max_tokens}
        if self._tokenizer is not None and request.continuation:
            body["chat_template_kwargs"] = {"enable_thinking": False}
        if request.answer.tools is not None:
            body["tools"] = tool_definitions(request.answer.tools)
            body["tool_choice"] = "auto"
        if request.answer.json_schema is not None:
            schema = {"name": "answer", "schema": orjson.loads(request.answer.json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return _dumps(body)

    async def _closing(self, continuation: tuple[int, ...]) -> list[ChatMessage]:
        """What it said so far, and what to do next: no chat can be continued inside a turn everywhere."""
        if self._tokenizer is None:
            text = "".join(map(chr, continuation))
        else:
            text = await self._tokenizer.detokenize(continuation)
        thought, closed, answer = text.rpartition(CLOSE)
        ask = CLOSING if closed and not answer.strip() else CONTINUING
        text = neutralise((answer.strip() or thought).replace(OPEN, "").strip())
        return [{"role": "assistant", "content": text}, {"role": "user", "content": ask}]

    def _common(self, request: RolloutRequest) -> dict[str, object]:
        sampling = request.sampling
        salted = self._prompts is not None if self._cache_salt is None else self._cache_salt
        body: dict[str, object] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        # Open servers have defaults of their own (llama-server: top_k 40); OpenAI's refuses what it does not know.
        for name, off in (
            ("top_k", 0),
            ("min_p", 0.0),
            ("presence_penalty", 0.0),
            ("frequency_penalty", 0.0),
            ("repetition_penalty", 1.0),
        ):
            value = getattr(sampling, name)
            if self.level is not Level.PLAIN or value != off:
                body[name] = value
        if request.cache_salt is not None and salted:
            body["cache_salt"] = request.cache_salt
        if request.seed is not None:
            body["seed"] = request.seed
        if request.answer.stop:
            body["stop"] = list(request.answer.stop)
        return body

    def _learn(self, reply: IdReply | TextReply) -> None:
        """What ends a sequence, or the characters per token, by an answer that the server counted."""
        if isinstance(reply, IdReply):
            if self._tokenizer is not None and reply.end_id is not None:
                self._tokenizer.add_control((reply.end_id,))
            return
        reader = reply.reader
        self._unmarked = self._unmarked or reader.unmarked
        counted = reader.completion_tokens
        dropped = reader.answer is not None and reader.answer.dropped
        if self._tokenizer is not None or counted is None or dropped or not reply.characters:
            return
        # Tokens of a reasoning that the server keeps to itself have no characters here.
        shown = counted if reply.thought else counted - reader.hidden_tokens
        if shown > 0:
            self._seen_characters += reply.characters
            self._seen_tokens += shown
            ratio = min(max(self._seen_characters / self._seen_tokens, 0.25), 16.0)
            self._vocabulary = replace(self._vocabulary, ids_per_token=ratio)

    async def _post(self, path: str, body: bytes) -> dict[str, Any]:
        async with self._send("POST", path, body) as response:
            return parse(await _body(response))

    @asynccontextmanager
    async def _send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        timeouts: dict[str, float] | None = None,
        headers: dict[str, str] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """A response with a good status; leaving the block before its end closes the connection.

        `headers` are sent beside the usual ones.
        """
        request = httpx.Request(
            method,
            self._url(path),
            headers=self._headers | headers if headers else self._headers,
            content=body,
            extensions={"timeout": timeouts or self._timeouts},
        )
        try:
            response = await self._pool().handle_async_request(request)
            try:
                if response.status_code >= 300:
                    raise await self._refusal(response)
                yield response
            finally:
                with suppress(*_TRANSPORT):
                    await _stream(response).aclose()
        except _TRANSPORT as error:
            cause = error.__cause__ or error
            if isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
                raise EngineDead(f"the engine cannot be reached: {type(cause).__name__}") from None
            if isinstance(cause, TimeoutError):
                waited = (timeouts or self._timeouts)["read"]
                raise EngineError(f"the engine was silent for {waited:g} s") from None
            raise await self._lost(f"the connection to the engine broke: {type(cause).__name__}") from None

    @asynccontextmanager
    async def _guarded(self) -> AsyncIterator[None]:
        """Have somebody look after the server while this generation waits for it."""
        self._open += 1
        self._heard = asyncio.get_running_loop().time()
        if self._guard is None:
            self._guard = asyncio.create_task(self._look_after())
        try:
            yield
        finally:
            self._open -= 1
            if not self._open and self._guard is not None:
                self._guard.cancel()
                self._guard = None

    @asynccontextmanager
    async def _judged(self) -> AsyncIterator[None]:
        """Tell a generation's own failure from that of a router that has lost the servers behind it."""
        try:
            yield
        except EngineError as error:
            if (error.status is None or error.status >= 500) and not await self._well():
                raise EngineDead(str(error)) from None
            raise

    async def _well(self) -> bool:
        """As `healthy`, looked up once for all generations that fail at the same time."""
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self.healthy())
        return await asyncio.shield(self._look)

    async def _look_after(self) -> None:
        """Close every connection once nobody listens any more: a server that stops may leave them open, and silent."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._silence_s / 3)
            if clock() - self._heard > self._silence_s and isinstance(await self._lost("it is silent"), EngineDead):
                await self.aclose()

    async def _lost(self, message: str) -> EngineError | EngineDead:
        """A broken stream is one generation's, unless there is no server any more."""
        url = httpx.URL(self._root)
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            async with asyncio.timeout(5):
                _, writer = await asyncio.open_connection(url.host, port)
        except OSError:
            return EngineDead(f"{message}, and it cannot be reached any more")
        writer.close()
        return GenerationLost(message)

    async def _refusal(self, response: httpx.Response) -> EngineError:
        status = response.status_code
        if status in (401, 403):
            # What a server says here may hold a part of the key.
            return EngineError(f"the engine refused our credentials (HTTP {status})", status)
        try:
            said = error_text(orjson.loads(await _body(response, most=65_536)))
        except (ValueError, AttributeError):
            said = ""
        if self._api_key:
            said = said.replace(self._api_key, "***")
        refused = GenerationLost if status in _OF_ROUTERS else EngineError
        return refused(f"the engine answered HTTP {status}" + (f": {said}" if said else ""), status)

    def _url(self, path: str) -> httpx.URL:
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = httpx.URL(self._root + path)
        return url

    def _pool(self) -> AiohttpTransport:
        # The transport alone, without httpx.AsyncClient around it: half the CPU of a call, and no proxy from the
        # environment between us and the engine.
        if self._transport is None:
            secure = self._root.startswith("https:")
            context = httpx.create_ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            connector = aiohttp.TCPConnector(
                limit=self._max_connections, keepalive_timeout=_KEEPALIVE_S, ssl=context, ttl_dns_cache=10
            )
            session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
            self._transport = AiohttpTransport(verify=context, client=session)
        return self._transport


def _dumps(body: dict[str, object]) -> bytes:
    """A body that is kept as long as its generation runs: orjson's own lies in a buffer of up to 64 KB."""
    return bytes(memoryview(orjson.dumps(body)))


async def _events(response: httpx.Response, frames: Frames, pace: Pace) -> AsyncIterator[list[Event]]:
    """The events of each read; one event where the server does not stream."""
    if response.headers.get("content-type", "").startswith("application/json"):
        yield [parse(await _body(response))]
        frames.done = True
        return
    try:
        async with aclosing(pace.read(_below(response))) as reads:
            async for data in reads:
                events = frames.feed(data)
                if events:
                    yield events
                if frames.done:
                    break
            if frames.done:  # A body that is read to its end gives its connection back; waiting for that has a limit.
                with suppress(TimeoutError):
                    async with asyncio.timeout(_END_S):
                        async for _ in reads:
                            pass
    except _TRANSPORT:
        if not frames.done:
            raise


def _below(response: httpx.Response) -> aiohttp.ClientResponse:
    """What aiohttp knows of a response: its socket, which can be left unread for a while."""
    below = response.stream._aiohttp_response  # type: ignore[union-attr]
    assert isinstance(below, aiohttp.ClientResponse)
    return below


async def _body(response: httpx.Response, most: int | None = None) -> bytes:
    body = bytearray()
    async for data in _stream(response):
        body += data
        if most is not None and len(body) > most:
            break
    return bytes(body)


def _stream(response: httpx.Response) -> httpx.AsyncByteStream:
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return response.stream
