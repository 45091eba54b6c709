"""Bodies of `/v1/chat/completions` -> what the method works on. Every string, list and number is bounded here.

What OpenAI knows and cannot change the answer is accepted; what would change it and cannot be honoured is a 400.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from harness.types import Agreement, AnswerRules, Carry, Message, Params, Problem, Sampling, Selection, ToolCall
from mrsa_server.api.effort import Wishes
from mrsa_server.api.errors import BadRequest
from mrsa_server.api.schemas import MAX_TOOLS_BYTES, check_schema
from mrsa_server.api.tools import Tool, call_schema
from mrsa_server.api.zyphra import translate
from mrsa_server.settings import Effort, Settings

_MAX_TEXT = 8 * 2**20
_MAX_INT = 2**53 - 1
_MAX_METADATA = 16 * (64 + 512)  # OpenAI's: 16 names of 64 characters, texts of 512
ALIAS_SUFFIX = "-mrsa"
COMPLETION = "chatcmpl-"  # begins the id of every completion; its run has what follows it in its own

Text = Annotated[str, StringConstraints(max_length=_MAX_TEXT)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Short = Annotated[str, StringConstraints(max_length=1024)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Tokens = Annotated[int, Field(ge=1, le=_MAX_INT)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
EffortName = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Wire(BaseModel):
    """What every part of a body is: nothing is converted, nothing unknown is let pass."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


WireT = TypeVar("WireT", bound=Wire)


def _no(value: object) -> object:
    if value is not False and value is not None:  # a literal takes 0 too, which is equal
        raise PydanticCustomError("invalid_value", "must be False")
    return value


No = Annotated[Literal[False], BeforeValidator(_no)]


class TextPart(Wire):
    """Text of a message."""

    type: Literal["text"]
    text: Text


class RefusalPart(Wire):
    """What an assistant refused with, in an earlier turn."""

    type: Literal["refusal"]
    refusal: Text


class ImageUrl(Wire):
    """Where an image is: only inside the message can be accepted, nothing is ever fetched."""

    url: Text
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Wire):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _known_part(value: object) -> object:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in ("text", "refusal", "image_url"):
        raise PydanticCustomError(
            "unsupported_content", "a part of type {kind} cannot be read: text only", {"kind": repr(kind[:64])}
        )
    return value


Part = Annotated[TextPart | RefusalPart | ImagePart, Field(discriminator="type"), BeforeValidator(_known_part)]


def _one_or_many(value: object) -> str:
    return "many" if isinstance(value, list) else "one"


Content = Annotated[
    Annotated[Text, Tag("one")] | Annotated[list[Part], Tag("many"), Field(min_length=1, max_length=1024)],
    Discriminator(_one_or_many),
]
Stop = Annotated[
    Annotated[Short, Tag("one")] | Annotated[list[Short], Tag("many"), Field(max_length=16)],
    Discriminator(_one_or_many),
]


class CalledFunction(Wire):
    """The function of an earlier call."""

    name: Name
    arguments: Text


class CallIn(Wire):
    """A call that an earlier assistant turn made."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = None  # some clients send back what they read from a stream


class MessageIn(Wire):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[CallIn], Field(max_length=256)] | None = None
    tool_call_id: Name | None = None
    # What a client sends back of an earlier answer, and no prompt needs.
    refusal: Text | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    annotations: Annotated[list[Any], Field(max_length=256)] | None = None
    audio: None = None
    function_call: None = None


class FunctionIn(Wire):
    """The definition of a tool."""

    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=16_384)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolIn(Wire):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionIn


class NamedFunction(Wire):
    """The function that has to be called."""

    name: FunctionName


class NamedTool(Wire):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Wire):
    """Free text."""

    type: Literal["text"]


class JsonFormat(Wire):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaIn(Wire):
    """A JSON schema with a name."""

    name: Short
    description: Annotated[str, StringConstraints(max_length=16_384)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Wire):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaIn


class StreamOptions(Wire):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: No | None = None


class Reasoning(Wire):
    """The effort as `/v1/responses` and some proxies write it."""

    effort: EffortName | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class AgreementIn(Wire):
    """When equal answers end a run, as `harness.types.Agreement`."""

    share: Annotated[float, Field(gt=0, le=1)] = Agreement().share
    min_votes: Annotated[int, Field(ge=2, le=_MAX_INT)] = Agreement().min_votes


def _agreement(value: object) -> object:
    """True asks for the usual agreement, false for none."""
    if isinstance(value, bool):
        return {} if value else None
    if value is not None and not isinstance(value, dict):
        raise PydanticCustomError("agreement", "must be true, false or an object with share and min_votes")
    return value


class MrsaIn(Wire):
    """The request extension `mrsa`: overrides of the preset. Names and units are those of `Params`."""

    effort: EffortName | None = None
    population: Tokens | None = None
    rounds: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = None
    set_size: Tokens | None = None
    rollout_tokens: Tokens | None = None
    tail_tokens: Tokens | None = None
    final_tokens: Tokens | None = None
    final_candidates: Tokens | None = None
    carry: Literal["reasoning", "answer", "hybrid"] | None = None
    selection: Literal["vote", "first"] | None = None
    budget_tokens: Tokens | None = None
    deadline_s: Annotated[float, Field(gt=0, le=_MAX_INT)] | None = None
    final_temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop_when_agreed: Annotated[
        AgreementIn | None, BeforeValidator(_agreement, json_schema_input_type=AgreementIn | bool | None)
    ] = None
    skip_agreed_sets: bool | None = None
    quorum: Tokens | None = None
    start_small: Annotated[int, Field(ge=2, le=_MAX_INT)] | None = None
    stream: Literal["final", "rounds", "rollouts"] | None = None


MrsaSwitch = Annotated[
    Annotated[bool, Tag("switch")] | Annotated[MrsaIn, Tag("object")],
    Discriminator(lambda value: "switch" if isinstance(value, bool) else "object"),
]


def _metadata(value: dict[str, Any]) -> dict[str, Any]:
    """A page of runs shows the metadata of a hundred."""
    if sum(len(name) + len(text) for name, text in value.items() if isinstance(text, str)) > _MAX_METADATA:
        raise PydanticCustomError(
            "metadata", "its texts must be at most {most} characters together", {"most": _MAX_METADATA}
        )
    return value


class ChatBody(Wire):
    """A body of `POST /v1/chat/completions`, after `translate`."""

    model: Name
    messages: Annotated[list[MessageIn], Field(min_length=1, max_length=4096)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=_MAX_INT)] | None = None
    max_completion_tokens: Tokens | None = None
    max_tokens: Tokens | None = None
    stop: Stop | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Seed | None = None
    tools: Annotated[list[ToolIn], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = None
    reasoning_effort: EffortName | None = None
    reasoning: Reasoning | None = None
    mrsa: MrsaSwitch | None = None
    # Known, and without influence on the answer.
    user: Short | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=64), AfterValidator(_metadata)] | None = None
    store: bool | None = None
    service_tier: Short | None = None
    prompt_cache_key: Short | None = None
    prompt_cache_retention: Short | None = None
    safety_identifier: Short | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    # Known, and refused unless they ask for nothing.
    logprobs: No | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None  # `Literal[0]` takes false
    logit_bias: Annotated[dict[Short, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=16)] | None = None
    audio: None = None
    functions: None = None
    function_call: None = None
    prediction: None = None
    web_search_options: None = None


class Chat(NamedTuple):
    """A request as the rest of the server reads it.

    Attributes:
        model: The name that the client gave.
        problem: The conversation and the rules of its answer.
        sampling: How tokens are drawn.
        seed: The run's.
        body: What else was asked for.
        tools: Tools that the model may call; empty with `tool_choice` none.
        forced: Whether the answer must be a call.
        warnings: What was not taken literally.
        names: The client's name for each field that it wrote under another one, by the path that a body of chat has.
    """

    model: str
    problem: Problem
    sampling: Sampling
    seed: int
    body: ChatBody
    tools: tuple[Tool, ...]
    forced: bool
    warnings: tuple[str, ...]
    names: Mapping[str, str]


def parse_chat(raw: bytes, settings: Settings) -> Chat:
    """Read a body.

    Raises:
        BadRequest: Naming the field and what is wrong with it.
        InvalidParams: If a value is outside of what the method can do.
    """
    data, names, warnings = translate(read_object(raw))
    return to_chat(read(ChatBody, data, names), settings, warnings, names)


def read(form: type[WireT], data: dict[str, Any], names: Mapping[str, str] | None = None) -> WireT:
    """An object as the body of a route.

    Args:
        form: That route's.
        data: The object.
        names: The client's name for each field that it knows under another one.

    Raises:
        BadRequest: Naming the field and what is wrong with it.
    """
    try:
        return form.model_validate(data)
    except ValidationError as error:
        raise of_validation(error, data, names or {}) from None


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that a body has to be.

    Raises:
        BadRequest: It is none.
    """
    try:
        data: object = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    return data


def of_validation(error: ValidationError, data: dict[str, Any], names: Mapping[str, str]) -> BadRequest:
    """The first error under the path that the client wrote; pydantic's own tags of unions are left out of it."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = errors[0]
    path: list[str] = []
    here: object = data
    for number, step in enumerate(first["loc"]):
        last = number == len(first["loc"]) - 1
        if isinstance(here, dict) and isinstance(step, str) and step in here:
            here = here[step]
        elif isinstance(here, list) and isinstance(step, int) and step < len(here):
            here = here[step]
        elif not (last and first["type"] == "missing"):
            continue
        path.append(str(step))
    param = ".".join(path)
    param = names.get(param, param)
    code, message = first["type"], first["msg"]
    if code == "extra_forbidden":
        code, message = "unknown_parameter", "is not a parameter of this server"
    elif code == "missing":
        code, message = "missing_required_parameter", "is required"
    elif code == "none_required":
        code, message = "unsupported_parameter", "is not supported by this server"
    elif code != "unsupported_content":
        code = "invalid_value"
    more = len({one["loc"][:2] for one in errors}) - 1
    tail = f" (and {more} more)" if more else ""
    return BadRequest(f"{param or 'body'}: {message}{tail}", param or None, code)


def to_chat(body: ChatBody, settings: Settings, warnings: list[str], names: Mapping[str, str]) -> Chat:
    """A body as the rest of the server reads it.

    Raises:
        BadRequest: Naming the field and what is wrong with it.
        InvalidParams: If a value is outside of what the method can do.
    """
    messages = tuple(
        _to_message(message, f"messages.{index}", settings.inline_images, warnings)
        for index, message in enumerate(body.messages)
    )
    tools, forced = _to_tools(body)
    schema = _to_schema(body, tools, forced)
    stop = body.stop if isinstance(body.stop, list) else [body.stop] if body.stop else []
    if not all(stop):
        raise BadRequest("stop: must not hold an empty string", "stop")
    shown = orjson.dumps([tool.definition() for tool in tools]).decode() if tools else None
    limit = body.max_completion_tokens or body.max_tokens
    seed = body.seed
    if isinstance(body.mrsa, MrsaIn) and body.mrsa.seed is not None:
        seed = body.mrsa.seed
    return Chat(
        model=body.model,
        problem=Problem(messages, AnswerRules(limit, tuple(stop), schema, shown)),
        sampling=_to_sampling(body, settings.usual_temperature, seeded=seed is not None),
        seed=secrets.randbits(63) if seed is None else seed % 2**63,
        body=body,
        tools=tools,
        forced=forced,
        warnings=tuple(warnings),
        names=names,
    )


def _to_sampling(body: ChatBody, usual_temperature: float, seeded: bool) -> Sampling:
    default = Sampling()
    return Sampling(
        temperature=usual_temperature if body.temperature is None else body.temperature,
        top_p=default.top_p if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=default.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty,
        seeded=seeded,
    )


_DATA_URL = re.compile(r"data:(image/[a-zA-Z0-9.+-]{1,64});base64,", re.ASCII)


def _to_message(
    message: MessageIn, param: str, inline_images: Literal["note", "refuse"], warnings: list[str]
) -> Message:
    calls = message.tool_calls or ()
    if calls and message.role != "assistant":
        raise BadRequest(f"{param}.tool_calls: only an assistant turn makes calls", f"{param}.tool_calls")
    if message.role == "tool" and message.tool_call_id is None:
        raise BadRequest(f"{param}.tool_call_id: is required in a tool turn", f"{param}.tool_call_id")
    if message.content is None and not (message.role == "assistant" and (calls or message.refusal)):
        raise BadRequest(f"{param}.content: is required", f"{param}.content", "missing_required_parameter")
    if isinstance(message.content, list):
        parts = [
            _part_text(part, f"{param}.content.{index}", inline_images, warnings)
            for index, part in enumerate(message.content)
        ]
        text = "\n".join(parts)
    else:
        text = message.content if message.content is not None else message.refusal or ""
    return Message(
        # Chat templates of open models know no developer; to OpenAI it is the newer name of the system.
        role="system" if message.role == "developer" else message.role,
        content=(text,),
        name=message.name,
        tool_calls=tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in calls),
        tool_call_id=message.tool_call_id,
    )


def _part_text(
    part: TextPart | RefusalPart | ImagePart, param: str, inline_images: Literal["note", "refuse"], warnings: list[str]
) -> str:
    if isinstance(part, TextPart):
        return part.text
    if isinstance(part, RefusalPart):
        return part.refusal
    match = _DATA_URL.match(part.image_url.url)
    if match is None:
        raise BadRequest(
            f"{param}: images are not read, and no URL is ever fetched", f"{param}.image_url", "unsupported_content"
        )
    if inline_images == "refuse":
        raise BadRequest(f"{param}: images are not read: text only", f"{param}.image_url", "unsupported_content")
    encoded = part.image_url.url[match.end() :].rstrip("=")
    note = f"[{match[1]}, {len(encoded) * 3 // 4} bytes: not shown, this model reads text only]"
    warnings.append(f"{param}: the image was replaced by the note {note}")
    return note


def _to_tools(body: ChatBody) -> tuple[tuple[Tool, ...], bool]:
    """The tools that the answer may use, and whether it must use one."""
    tools: list[Tool] = []
    sizes = 0
    for index, tool in enumerate(body.tools or ()):
        function = tool.function
        param = f"tools.{index}.function"
        if any(function.name == other.name for other in tools):
            raise BadRequest(f"{param}.name: {function.name!r} is there twice", f"{param}.name")
        parameters = function.parameters or {"type": "object", "properties": {}}
        sizes += len(check_schema(parameters, f"{param}.parameters"))
        if sizes > MAX_TOOLS_BYTES:
            raise BadRequest(f"tools: all schemas together must be at most {MAX_TOOLS_BYTES} bytes", "tools")
        tools.append(Tool(function.name, function.description, parameters))
    choice = body.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice: there are no tools to choose from", "tool_choice")
        return (), False
    if isinstance(choice, NamedTool):
        chosen = [tool for tool in tools if tool.name == choice.function.name]
        if not chosen:
            raise BadRequest(f"tool_choice: there is no tool {choice.function.name!r}", "tool_choice.function.name")
        return tuple(chosen), True
    return (() if choice == "none" else tuple(tools)), choice == "required"


def _to_schema(body: ChatBody, tools: tuple[Tool, ...], forced: bool) -> str | None:
    """The schema that binds the answer: that of a forced call, or the one that the client gave."""
    if forced:
        several = body.tool_choice == "required" and body.parallel_tool_calls is not False
        return call_schema(tools, several)
    if body.response_format is None or isinstance(body.response_format, TextFormat):
        return None
    if tools:
        raise BadRequest(
            "response_format: JSON cannot be combined with tools that the model may or may not call; "
            "set tool_choice to none or required",
            "response_format",
            "unsupported_parameter",
        )
    if isinstance(body.response_format, JsonFormat):
        return '{"type":"object"}'
    return check_schema(body.response_format.json_schema.schema_, "response_format.json_schema.schema")


# Under the plain name these ask for the method; the others (a seed, a deadline, what to stream) mean any generation.
_SHAPE = frozenset(
    {
        "population",
        "rounds",
        "set_size",
        "rollout_tokens",
        "tail_tokens",
        "final_candidates",
        "carry",
        "selection",
        "stop_when_agreed",
        "skip_agreed_sets",
        "quorum",
        "start_small",
    }
)


def to_wishes(chat: Chat, method: bool, default_effort: Effort) -> Wishes:
    """What the client asks of the method.

    Args:
        chat: The request.
        method: Whether the model's name asks for the method.
        default_effort: Where the method is asked for and no effort named.
    """
    body = chat.body
    named = body.reasoning_effort or (body.reasoning.effort if body.reasoning else None)
    mrsa = body.mrsa if isinstance(body.mrsa, MrsaIn) else MrsaIn()
    if body.mrsa is False:
        effort = Effort.NONE
    elif mrsa.effort is not None:
        effort = Effort(mrsa.effort)
    elif named is not None:
        effort = Effort(named)
    else:
        shaped = body.mrsa is True or bool(mrsa.model_fields_set & _SHAPE)
        effort = default_effort if method or shaped else Effort.NONE
    wishes = Wishes(
        effort=effort,
        choices=body.n or 1,
        population=mrsa.population,
        rounds=mrsa.rounds,
        set_size=mrsa.set_size,
        rollout_tokens=mrsa.rollout_tokens,
        tail_tokens=mrsa.tail_tokens,
        final_tokens=mrsa.final_tokens,
        final_candidates=mrsa.final_candidates,
        carry=Carry(mrsa.carry) if mrsa.carry else Carry.REASONING,
        selection=Selection(mrsa.selection) if mrsa.selection else Selection.VOTE,
        budget_tokens=mrsa.budget_tokens,
        deadline_s=mrsa.deadline_s,
        final_temperature=mrsa.final_temperature,
        stop_when_agreed=Agreement(**dict(mrsa.stop_when_agreed)) if mrsa.stop_when_agreed else None,
        skip_agreed_sets=bool(mrsa.skip_agreed_sets),
        quorum=mrsa.quorum,
        start_small=mrsa.start_small,
        ignored=chat.warnings,
    )
    limit = chat.problem.answer.max_tokens
    if wishes.plain and limit is not None and wishes.final_tokens is None:
        field = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        return replace(wishes, final_tokens=limit, final_field=field)
    return wishes


def to_problem(chat: Chat, wishes: Wishes) -> Problem:
    """The conversation; for a plain generation `max_completion_tokens` bounds the whole of it, not its answer."""
    if not wishes.plain:
        return chat.problem
    return replace(chat.problem, answer=replace(chat.problem.answer, max_tokens=None))


def echo(params: Params, effort: Effort) -> dict[str, object]:
    """The effective parameters, as a client could send them back."""
    return {
        "effort": effort.value,
        "population": params.population,
        "rounds": params.rounds,
        "set_size": params.set_size,
        "rollout_tokens": params.rollout_tokens,
        "tail_tokens": params.tail_tokens,
        "final_tokens": params.final_tokens,
        "final_candidates": params.final_candidates,
        "carry": params.carry.value,
        "selection": params.selection.value,
        "budget_tokens": params.budget_tokens,
        "deadline_s": params.deadline_s,
        "final_temperature": params.final_temperature,
        "seed": params.seed,
        "stop_when_agreed": asdict(params.stop_when_agreed) if params.stop_when_agreed else None,
        "skip_agreed_sets": params.skip_agreed_sets,
        "quorum": params.quorum,
        "start_small": params.start_small,
    }
