"""An OpenAI-compatible server that costs next to nothing: what it says, how slowly, and how it fails are switches.

Level 1 speaks as `vllm serve` does (token ids, /tokenize, /detokenize, /v1/completions), level 2 as llama-server (text
with /tokenize and /detokenize), level 3 as a plain OpenAI server. One asyncio.Protocol, no task a call: on 2 cores it
must not be the thing that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import random
import re
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import TracebackType
from typing import Any, cast

import httptools
import orjson

THINK, END_THINK, IM_START, IM_END = 256, 257, 258, 259
SPECIAL = {"<think>": THINK, "</think>": END_THINK, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
_NAMES = {token: name for name, token in SPECIAL.items()}
_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
MODEL = "fake"
CONTEXT = 131_072
_DRIPS = 24  # writes of the fault `drip` that hold a byte each
_DRIP_S = 0.02  # between them


def encode(text: str) -> list[int]:
    """Bytes are ids 0 to 255; each special mark is one id."""
    ids: list[int] = []
    for part in _SPLIT.split(text):
        if part in SPECIAL:
            ids.append(SPECIAL[part])
        else:
            ids += part.encode()
    return ids


def decode(ids: list[int]) -> str:
    """Special tokens included; broken UTF-8 replaced."""
    return b"".join(map(_bytes, ids)).decode(errors="replace")


def _bytes(token: int) -> bytes:
    return bytes((token,)) if token < 256 else _NAMES[token].encode()


def chat_template(messages: list[dict[str, Any]], tools: Any = None, think: bool = False) -> str:
    """ChatML; refuses a role `bad`, as a template that raises does."""
    turns = [f"<|im_start|>tools\n{orjson.dumps(tools).decode()}<|im_end|>\n"] if tools else []
    for message in messages:
        if message["role"] == "bad":
            raise ValueError("unknown role")
        turns.append(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n")
    return "".join(turns) + "<|im_start|>assistant\n" + ("<think>" if think else "")


@dataclass(frozen=True, slots=True)
class Script:
    """What the server does.

    Attributes:
        level: 1, 2 or 3, as the header says.
        ids: Level 1 without ids: an old vLLM that knows no `return_token_ids`.
        delay_s: Seconds that a generation takes; its pieces come in `writes` equal steps of that, 0 for one write each.
        piece: Characters (level 1: ids) in one event of a stream.
        interval: Level 1: put as many ids into an event as the request's `stream_interval` says, as vLLM does.
        reasoning: What it thinks; empty for a model that does not.
        answers: In place of the one answer, several in turn.
        think: Where the thinking stands: `content` (markers in the text), `field`, or `prompt` (the template opens it).
        field: Name of the field for `think="field"`.
        rethink: Think also where only the answer is asked for.
        token_ids: The one thing that /tokenize gives, whatever it is; empty for true ids.
        linger: Leave the connection open after the stream's end, as a server that forgets it does.
        fault: 400, 429, 500, 503, hang, reset (the connection ends in the middle), abort (likewise, with a TCP reset),
            stall (silence in the middle), drip (byte by byte), truncate, garbage or error (an error frame).
        fault_every: Each k-th generation has the fault.
        faults: One of these, drawn anew for each generation that has any.
        fault_share: How many generations have one of them.
        tokens_fault_share: How many requests for ids and texts have one of `tokens_faults`, a status or hang.
        json: Answer with application/json though a stream was asked for.
        down: Status of every answer, as while a model is loading.
        api_key: Without it in the header everything is a 401.
        raw: Bytes of an SSE body, written as they are in place of an answer, one write each.
        empty: A router without a server behind it: well by itself, 503 whatever else it is asked.
        partly: vLLM's router with a server that is ill beside one that is well.
        refuses_priority: A priority other than 0 is a 400, as without vLLM's scheduling policy.
        refuses_salt: A cache_salt is a 400.
        kv_blocks: Level 1: blocks of 16 tokens in the KV cache of each of its engines, told by its metrics.
    """

    level: int = 3
    ids: bool = True
    delay_s: float = 0.0
    writes: int = 1
    piece: int = 4
    interval: bool = False
    reasoning: str = ""
    answer: str = "The answer is \\boxed{42}."
    answers: tuple[str, ...] = ()
    think: str = "content"
    field: str = "reasoning_content"
    tool_calls: tuple[tuple[str, str], ...] = ()
    rethink: bool = False
    token_ids: tuple[Any, ...] = ()
    linger: bool = False
    fault: str | None = None
    fault_every: int = 1
    faults: tuple[str, ...] = ()
    fault_share: float = 0.0
    tokens_fault_share: float = 0.0
    tokens_faults: tuple[str, ...] = ("500", "hang")
    json: bool = False
    down: int | None = None
    empty: bool = False
    partly: bool = False
    api_key: str | None = None
    raw: tuple[bytes, ...] = ()
    refuses_priority: bool = False
    refuses_salt: bool = False
    kv_blocks: tuple[int, ...] = ()


@dataclass(slots=True)
class Stats:
    """Counters since the start: of generations, but `paths` of every request."""

    calls: int = 0
    open: int = 0
    most_open: int = 0
    aborted: int = 0
    connections: int = 0
    paths: Counter[str] = field(default_factory=Counter)


class FakeUpstream:
    """The server; an async context manager in tests.

    It keeps the last bodies in `requests` and traces in `traces`; `seed` draws the faults.
    """

    def __init__(
        self, script: Script | None = None, port: int = 0, keep: int = 64, seed: int = 0, host: str = "127.0.0.1"
    ) -> None:
        self.script = script or Script()
        self.host = host
        self.port = port
        self.stats = Stats()
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.traces: list[tuple[str, str]] = []
        self._keep = keep
        self._draws = random.Random(seed)
        self._server: asyncio.Server | None = None
        self.protocols: set[_Connection] = set()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def generations(self) -> list[dict[str, Any]]:
        """Bodies of the generations among `requests`."""
        return [body for path, body in self.requests if path.endswith("completions")]

    def change(self, **changes: Any) -> None:
        self.script = replace(self.script, **changes)

    def fault(self) -> str | None:
        """Of the generation that was counted last."""
        script = self.script
        if script.faults:
            return self._draws.choice(script.faults) if self._draws.random() < script.fault_share else None
        return script.fault if self.stats.calls % script.fault_every == 0 else None

    def tokens_fault(self) -> str | None:
        """Of a request for ids or texts."""
        share = self.script.tokens_fault_share
        return self._draws.choice(self.script.tokens_faults) if share and self._draws.random() < share else None

    def seen(self, path: str, body: dict[str, Any], trace: str) -> None:
        if self._keep:
            if trace:
                self.traces.append((path, trace))
                del self.traces[: -self._keep]
            self.requests.append((path, body))
            del self.requests[: -self._keep]

    async def __aenter__(self) -> FakeUpstream:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), self.host, self.port, backlog=4096)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for protocol in list(self.protocols):
            protocol.transport.abort()
        await self._server.wait_closed()


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, upstream: FakeUpstream) -> None:
        self._upstream = upstream
        self._timer: asyncio.TimerHandle | None = None
        self._generating = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._parser = httptools.HttpRequestParser(self)
        self._upstream.protocols.add(self)
        self._upstream.stats.connections += 1

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.protocols.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._generating:
            self._end()
            self._upstream.stats.aborted += 1

    def on_message_begin(self) -> None:
        self._body: list[bytes] = []
        self._key = self._trace = b""

    def on_url(self, url: bytes) -> None:
        self._path = url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self._key = value
        elif name.lower() == b"traceparent":
            self._trace = value

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        path, stats, script = self._path, self._upstream.stats, self._upstream.script
        if path == "/stats":
            return self._json({name: getattr(stats, name) for name in Stats.__slots__})
        stats.paths[path] += 1
        if script.down is not None:
            return self._error(script.down, "Loading model")
        if script.api_key is not None and self._key != f"Bearer {script.api_key}".encode():
            return self._error(401, f"Incorrect API key provided: {self._key.decode()}")
        if script.empty and path != "/health":
            return self._error(503, "No available workers")
        body: dict[str, Any] = orjson.loads(b"".join(self._body)) if self._body else {}
        self._upstream.seen(path, body, self._trace.decode())
        if path == "/v1/models":
            self._json({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        elif path == "/health":
            self._json({}, 503 if script.partly else 200)
        elif path == "/readiness" and script.partly:
            self._json({"status": "ready", "healthy_workers": 1, "total_workers": 2})
        elif path == "/metrics" and script.kv_blocks:
            self._text(_metrics(script.kv_blocks))
        elif path == "/v1/chat/completions" or (path == "/v1/completions" and script.level == 1):
            self._generate(path, body)
        elif path in ("/tokenize", "/detokenize", "/apply-template") and script.level < 3:
            if fault := self._upstream.tokens_fault():
                return None if fault == "hang" else self._error(int(fault), "the fault that was asked for")
            try:
                self._json(_tokens(script, path, body))
            except (KeyError, ValueError) as error:
                self._error(400, f"bad request: {error}")
        else:
            self._error(404, "Not Found")

    def _generate(self, path: str, body: dict[str, Any]) -> None:
        stats, script = self._upstream.stats, self._upstream.script
        stats.calls += 1
        stats.open += 1
        stats.most_open = max(stats.most_open, stats.open)
        self._generating = True
        fault = self._upstream.fault()
        if fault is not None and fault.isdigit():
            self._end()
            return self._error(int(fault), "the fault that was asked for")
        if script.refuses_priority and body.get("priority"):
            self._end()
            return self._error(400, "Got priority 5 but Priority scheduling is not enabled.")
        if script.refuses_salt and "cache_salt" in body:
            self._end()
            return self._error(400, "Parameter 'cache_salt' is not supported here.")
        if fault == "hang":
            return
        if script.answers:
            script = replace(script, answer=script.answers[stats.calls % len(script.answers)])
        events = list(_events(script, path, body))
        if script.raw:
            pieces = list(script.raw)
        elif not body.get("stream") or script.json:
            return self._later(script.delay_s, lambda: self._json(_join(events, path), ends=True))
        else:
            frames = [b"data: %b\n\n" % orjson.dumps(event) for event in events] + [b"data: [DONE]\n\n"]
            writes = min(script.writes or len(frames), len(frames))
            cuts = [round(i * len(frames) / writes) for i in range(writes + 1)]
            pieces = [b"".join(frames[a:b]) for a, b in pairwise(cuts)]
        if fault == "garbage":
            pieces[0] = b"data: {nonsense\n\n"
        elif fault == "error":
            pieces[-1:] = [b'data: {"error": {"message": "the engine fell over", "code": 500}}\n\ndata: [DONE]\n\n']
        elif fault in ("reset", "abort", "stall", "truncate"):
            pieces = [pieces[0][: len(pieces[0]) // 2]]
        elif fault == "drip":
            first = b"".join(pieces)
            pieces = [first[at : at + 1] for at in range(_DRIPS)] + [first[_DRIPS:]]
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        step = _DRIP_S if fault == "drip" else script.delay_s / len(pieces)

        def write(at: int) -> None:
            self.transport.write(b"%x\r\n%b\r\n" % (len(pieces[at]), pieces[at]))
            if at + 1 < len(pieces):
                return self._later(step, lambda: write(at + 1))
            if fault == "stall":
                return
            self._end()
            if fault == "reset":
                self.transport.close()
            elif fault == "abort":
                self._reset()
            elif not script.linger:
                self.transport.write(b"0\r\n\r\n")

        self._later(step, lambda: write(0))

    def _reset(self) -> None:
        """End the connection by a TCP reset, at which what is on its way is lost."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        with socket.fromfd(descriptor, socket.AF_INET, socket.SOCK_STREAM) as twin:
            twin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _later(self, delay_s: float, what: Any) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, what)

    def _end(self) -> None:
        self._generating = False
        self._upstream.stats.open -= 1

    def _json(self, body: Any, status: int = 200, ends: bool = False) -> None:
        if ends:
            self._end()
        data = orjson.dumps(body)
        self.transport.write(
            b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (status, len(data), data)
        )

    def _text(self, text: str) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {len(text)}\r\n\r\n"
        self.transport.write((head + text).encode())

    def _error(self, status: int, message: str) -> None:
        self._json({"error": {"message": message, "type": "fault", "param": None, "code": status}}, status)


def _metrics(kv_blocks: tuple[int, ...]) -> str:
    """As vLLM 0.32 writes them, cut to what is of interest and one more."""
    lines = ["# HELP vllm:num_requests_running Requests in execution.", "# TYPE vllm:num_requests_running gauge"]
    lines += ['vllm:num_requests_running{engine="0",model_name="m"} 0.0']
    lines += ["# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig"]
    lines += ["# TYPE vllm:cache_config_info gauge"]
    for number, blocks in enumerate(kv_blocks):
        lines += [f'vllm:cache_config_info{{block_size="16",engine="{number}",num_gpu_blocks="{blocks}"}} 1.0']
    return "\n".join(lines) + "\n"


def _tokens(script: Script, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """/tokenize, /detokenize and /apply-template in the words of vLLM or llama-server."""
    think = script.think == "prompt"
    if script.level == 2:
        if path == "/apply-template":
            return {"prompt": chat_template(body["messages"], None, think)}
        if path == "/detokenize":
            return {"content": decode(body["tokens"])}
        return {"tokens": encode(body.get("content", ""))}
    if path == "/detokenize":
        return {"prompt": decode(body["tokens"])}
    text = body["prompt"] if "prompt" in body else chat_template(body["messages"], body.get("tools"), think)
    ids = encode(text)
    if script.token_ids:
        return {"tokens": script.token_ids[0]}
    return {"tokens": ids, "count": len(ids), "max_model_len": CONTEXT}


def _events(script: Script, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a generation, its usage last."""
    if path == "/v1/completions":
        yield from _completion_events(script, body)
        return
    limit: int = body.get("max_tokens") or body.get("max_completion_tokens") or CONTEXT
    thinks = bool(script.reasoning) and (script.rethink or body["messages"][-2:][0]["role"] != "assistant")
    deltas: list[tuple[str, str]] = []
    if thinks and script.think == "field":
        deltas = [(script.field, part) for part in _cut(script.reasoning, script.piece)]
        deltas += [("content", part) for part in _cut(script.answer, script.piece)]
    else:
        opened = "" if script.think == "prompt" else "<think>"
        text = f"{opened}{script.reasoning}</think>{script.answer}" if thinks else script.answer
        deltas = [("content", part) for part in _cut(text, script.piece)]
    for stop in body.get("stop") or ():
        whole = "".join(text for _, text in deltas)
        if stop in whole:
            deltas = [("content", part) for part in _cut(whole[: whole.index(stop)], script.piece)]
    finish = "length" if len(deltas) > limit else "tool_calls" if script.tool_calls else "stop"
    deltas = deltas[:limit]
    yield _chunk({"role": "assistant", "content": ""})
    for name, text in deltas:
        yield _chunk({name: text})
    for index, (name, arguments) in enumerate(script.tool_calls):
        yield _chunk({"tool_calls": [{"index": index, "id": f"c{index}", "function": {"name": name, "arguments": ""}}]})
        for part in _cut(arguments, script.piece):
            yield _chunk({"tool_calls": [{"index": index, "function": {"arguments": part}}]})
    yield _chunk({}, finish)
    prompt = sum(len(message["content"]) for message in body["messages"])
    yield _usage(prompt // 4 + 1, len(deltas))


def _completion_events(script: Script, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    prompt: list[int] = body["prompt"]
    opened = _last(prompt, THINK) > _last(prompt, END_THINK)
    closed = _last(prompt, END_THINK) > _last(prompt, THINK)
    ids = encode(script.answer)
    if script.reasoning and (script.rethink or not closed):
        ids = [*([] if opened else [THINK]), *encode(script.reasoning), END_THINK, *ids]
    ids.append(IM_END)
    finish, reason = "stop", None
    for at, token in enumerate(ids):
        if token in body.get("stop_token_ids", ()):
            ids, reason = ids[: at + 1], token
            break
    if len(ids) > body["max_tokens"]:
        ids, finish, reason = ids[: body["max_tokens"]], "length", None
    kept = ids[:-1] if finish == "stop" else ids
    stream = codecs.getincrementaldecoder("utf-8")(errors="replace")
    # As vLLM: the first id goes out alone.
    piece = max(script.piece, body.get("stream_interval") or 1) if script.interval else script.piece
    cuts = [0, *range(1 if script.interval else piece, len(ids), piece), len(ids)]
    for at, end in pairwise(cuts):
        part = ids[at:end]
        last = end == len(ids)
        text = stream.decode(b"".join(map(_bytes, kept[at:end])), final=last)
        choice: dict[str, Any] = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish if last else None}
        choice["stop_reason"] = reason if last else None
        if script.ids and body.get("return_token_ids"):
            choice["token_ids"] = part
            choice["prompt_token_ids"] = prompt if at == 0 else None
        yield {
            "id": "cmpl-b1f4e1d0a3c94b0d9c1be0a2b3c4d5e6",
            "object": "text_completion",
            "created": 1764000000,
            "model": MODEL,
            "choices": [choice],
            "usage": None,
        }
    yield _usage(len(prompt), len(ids), 16)


def _chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c-0", "object": "chat.completion.chunk", "created": 0, "model": MODEL, "choices": [choice]}


def _usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if cached:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return {"id": "c-0", "object": "chat.completion.chunk", "created": 0, "model": MODEL, "choices": [], "usage": usage}


def _join(events: list[dict[str, Any]], path: str) -> dict[str, Any]:
    """The events as the one body of a call that does not stream."""
    choices = [choice for event in events for choice in event["choices"]]
    finish = choices[-1]["finish_reason"]
    if path == "/v1/completions":
        choice = {**choices[-1], "text": "".join(choice["text"] for choice in choices)}
        if "token_ids" in choice:
            choice["token_ids"] = [token for choice in choices for token in choice["token_ids"]]
        return {"id": "cmpl-0", "model": MODEL, "choices": [choice], "usage": events[-1]["usage"]}
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for choice in choices:
        for name, value in choice["delta"].items():
            if name == "tool_calls":
                calls = message.setdefault("tool_calls", [])
                for call in value:
                    if call["index"] == len(calls):
                        calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
                    else:
                        calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            elif name != "role":
                message[name] = message.get(name, "") + value
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "c-0", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": events[-1]["usage"]}


def _cut(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def _last(ids: list[int], token: int) -> int:
    return len(ids) - 1 - ids[::-1].index(token) if token in ids else -1


def main() -> None:
    parser = argparse.ArgumentParser(description="A fake OpenAI-compatible server.")
    parser.add_argument("--port", type=int, default=8099)
    parser.add_argument("--level", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--delay", type=float, default=1.0, help="seconds a generation")
    parser.add_argument("--writes", type=int, default=1, help="writes that a generation comes in; 0: one an event")
    parser.add_argument("--piece", type=int, default=4, help="characters (level 1: ids) in an event")
    parser.add_argument("--interval", action="store_true", help="level 1: keep to the requests' stream_interval")
    parser.add_argument("--varied", action="store_true", help="answer in letters that do not repeat themselves")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of four characters that the answer has")
    parser.add_argument(
        "--think", default=None, choices=("content", "field", "prompt"), help="think as long as it answers"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--answers", nargs="*", default=(), help="what it answers in turn, in place of so many tokens")
    parser.add_argument("--fault", default=None, help="as of the script")
    parser.add_argument("--fault-every", type=int, default=1)
    parser.add_argument("--faults", default="", help="several, with commas between them")
    parser.add_argument("--fault-share", type=float, default=0.0)
    parser.add_argument("--tokens-fault-share", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of the faults that are drawn")
    options = parser.parse_args()
    letters = random.Random(0).choices("etaoin shrdlu", k=4 * options.tokens)
    text = "".join(letters) if options.varied else "so, " * options.tokens
    script = Script(
        level=options.level,
        delay_s=options.delay,
        writes=options.writes,
        piece=options.piece,
        interval=options.interval,
        answer=text[: 4 * options.tokens - 8] + "Answer 4",
        answers=tuple(options.answers),
        reasoning="hm, " * options.tokens if options.think else "",
        think=options.think or "content",
        fault=options.fault,
        fault_every=options.fault_every,
        faults=tuple(filter(None, options.faults.split(","))),
        fault_share=options.fault_share,
        tokens_fault_share=options.tokens_fault_share,
    )

    async def serve() -> None:
        async with FakeUpstream(script, options.port, 0, options.seed, options.host) as upstream:
            print(f"listening on {upstream.url}", flush=True)
            await asyncio.Event().wait()

    try:
        import uvloop
    except ImportError:
        asyncio.run(serve())
    else:
        uvloop.run(serve())


if __name__ == "__main__":
    main()
