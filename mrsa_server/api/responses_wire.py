"""Bodies of `POST /v1/responses`, after Open Responses (2026-04-24) and OpenAI -> the same requests that chat makes.

A body becomes one of chat's, so that both routes have one set of rules; `names` leads an error back to the field that
the client wrote. Every string, list and number is bounded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, cast

import orjson
from pydantic import AliasChoices, BeforeValidator, Discriminator, Field, StringConstraints, Tag
from pydantic_core import PydanticCustomError

from mrsa_server.api.errors import BadRequest, renamed
from mrsa_server.api.schemas import check_schema
from mrsa_server.api.wire import (
    CalledFunction,
    CallIn,
    Chat,
    ChatBody,
    EffortName,
    FunctionIn,
    FunctionName,
    ImagePart,
    ImageUrl,
    JsonFormat,
    MessageIn,
    MrsaIn,
    MrsaSwitch,
    Name,
    NamedFunction,
    NamedTool,
    Part,
    Reasoning,
    RefusalPart,
    SchemaFormat,
    SchemaIn,
    Short,
    Text,
    TextFormat,
    TextPart,
    Tokens,
    ToolIn,
    Wire,
    read,
    read_object,
    to_chat,
)
from mrsa_server.settings import Settings

# How much of the rounds a reasoning item shows: their figures, the last stage's thinking too, the tails too. Where
# nothing is asked for it is the figures, and a stream has no text events for them.
Summary = Literal["concise", "auto", "detailed"]
OWN_EVENTS = "mrsa.events"
RESPONSE = "resp_"  # begins the id of every response; its run has what follows it in its own

_MOST_DEEP = 254  # what orjson writes; it reads 1,024
_Ignored = Annotated[dict[str, Any], Field(max_length=16)]
_Status = Literal["in_progress", "completed", "incomplete"]
_Key = Annotated[str, StringConstraints(max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]
_Description = Annotated[str, StringConstraints(max_length=16_384)]


class InputText(Wire):
    """Text that the model is to read."""

    type: Literal["input_text"]
    text: Text
    prompt_cache_breakpoint: _Ignored | None = None


class OutputText(Wire):
    """Text of an earlier answer."""

    type: Literal["output_text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=256)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None
    parsed: Any = None  # what `responses.parse` makes of it, and sends back


class Refusal(Wire):
    """What an earlier answer refused with."""

    type: Literal["refusal"]
    refusal: Text


class InputImage(Wire):
    """An image: only inside the message can be accepted, nothing is ever fetched."""

    type: Literal["input_image"]
    image_url: Text | None = None
    file_id: Name | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None
    prompt_cache_breakpoint: _Ignored | None = None


def _known_part(value: object) -> object:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in ("input_text", "output_text", "refusal", "input_image"):
        raise PydanticCustomError(
            "unsupported_content", "a part of type {kind} cannot be read: text only", {"kind": repr(kind[:64])}
        )
    return value


_PartIn = Annotated[
    InputText | OutputText | Refusal | InputImage, Field(discriminator="type"), BeforeValidator(_known_part)
]


def _one_or_many(value: object) -> str:
    return "many" if isinstance(value, list) else "one"


_Content = Annotated[
    Annotated[Text, Tag("one")] | Annotated[list[_PartIn], Tag("many"), Field(min_length=1, max_length=1024)],
    Discriminator(_one_or_many),
]


class MessageItem(Wire):
    """A turn of the conversation; `type` may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content
    id: Name | None = None
    status: _Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Wire):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Text
    id: Name | None = None
    status: _Status | None = None
    namespace: None = None
    caller: _Ignored | None = None
    # What the official Python client adds, and its `model_dump` sends back.
    parsed_arguments: Any = None
    in_background: Annotated[bool | None, Field(validation_alias=AliasChoices("async", "async_"))] = None


class CallOutputItem(Wire):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: Name
    output: _Content
    id: Name | None = None
    status: _Status | None = None
    name: Name | None = None
    namespace: None = None
    caller: _Ignored | None = None


class ReasoningText(Wire):
    """Reasoning of an earlier answer."""

    type: Literal["summary_text", "reasoning_text", "output_text", "text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=256)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


_Reasonings = Annotated[list[ReasoningText], Field(max_length=1024)]


class ReasoningItem(Wire):
    """Reasoning of an earlier answer: accepted and left out, as each answer's thinking begins anew."""

    type: Literal["reasoning"]
    summary: _Reasonings | None = None
    content: _Reasonings | None = None
    encrypted_content: Text | None = None
    id: Name | None = None
    status: _Status | None = None


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _item_type(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if kind in _ITEMS else "message"


def _known_item(value: object) -> object:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "item_reference":
        raise PydanticCustomError("unsupported_content", "item_reference: no item is stored, send the item itself")
    if isinstance(kind, str) and kind not in _ITEMS:
        raise PydanticCustomError(
            "unsupported_content", "an item of type {kind} cannot be read by this server", {"kind": repr(kind[:64])}
        )
    return value


_Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_type),
    BeforeValidator(_known_item),
]
_Input = Annotated[
    Annotated[Text, Tag("one")] | Annotated[list[_Item], Tag("many"), Field(min_length=1, max_length=4096)],
    Discriminator(_one_or_many),
]


class FunctionToolIn(Wire):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    name: FunctionName
    description: _Description | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Wire):
    """The function that has to be called, or one that may be."""

    type: Literal["function"]
    name: FunctionName


class AllowedTools(Wire):
    """Which of the tools may be called."""

    type: Literal["allowed_tools"]
    tools: Annotated[list[ChosenFunction], Field(min_length=1, max_length=128)]
    mode: Literal["none", "auto", "required"] = "auto"


def _choice_kind(value: object) -> str:
    if isinstance(value, dict):
        return "allowed" if value.get("type") == "allowed_tools" else "function"
    return "word"


_ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[ChosenFunction, Tag("function")]
    | Annotated[AllowedTools, Tag("allowed")],
    Discriminator(_choice_kind),
]


class SchemaFormatIn(Wire):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    name: Short
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: _Description | None = None
    strict: bool | None = None


class TextIn(Wire):
    """What the answer's text is to be like."""

    format: Annotated[TextFormat | JsonFormat | SchemaFormatIn, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningIn(Wire):
    """How much work the answer gets, and how much of it is shown."""

    effort: EffortName | None = None
    mode: Literal["standard", "pro"] | None = None
    summary: Summary | None = None
    generate_summary: Summary | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None


class StreamOptionsIn(Wire):
    """What a stream holds besides the response."""

    include_obfuscation: bool | None = None


class ResponsesBody(Wire):
    """A body of `POST /v1/responses`."""

    model: Name
    input: _Input
    instructions: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptionsIn | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    tools: Annotated[list[FunctionToolIn], Field(max_length=128)] | None = None
    tool_choice: _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextIn | None = None
    reasoning: ReasoningIn | None = None
    include: Annotated[list[Short], Field(max_length=16)] | None = None
    mrsa: MrsaSwitch | None = None
    store: bool | None = None
    # Known, and without influence on the answer.
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    max_tool_calls: Tokens | None = None  # of tools that the server runs, and it runs none
    user: Short | None = None
    safety_identifier: Short | None = None
    prompt_cache_key: Short | None = None
    prompt_cache_retention: Short | None = None
    prompt_cache_options: _Ignored | None = None
    service_tier: Short | None = None
    background: bool | None = None
    previous_response_id: Name | None = None  # its conversation is in `input` by now, see `continued`
    # Known, and refused unless they ask for nothing.
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None  # `Literal[0]` takes false
    conversation: None = None
    prompt: None = None
    context_management: None = None
    moderation: None = None


@dataclass(frozen=True, slots=True)
class ResponseForm:
    """What a response repeats of its request, and how it is shown.

    Attributes:
        echo: Fields of the response, as the request set them.
        summary: How much the reasoning item shows; None where nothing was asked for.
        own_events: Whether the stream holds events of ours too.
        own_deltas: Whether all that rollouts write is among these.
        background: Whether its run goes on without a reader.
        stored: Whether it can be retrieved later.
        metadata: The client's.
    """

    echo: Mapping[str, object]
    summary: Summary | None
    own_events: bool
    own_deltas: bool
    background: bool = False
    stored: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


class Asking(NamedTuple):
    """A request, and the form of its response."""

    chat: Chat
    form: ResponseForm


def check_body(raw: bytes) -> ResponsesBody:
    """A body by its shape alone.

    Raises:
        BadRequest: Naming the field and what is wrong with it.
    """
    return read(ResponsesBody, read_object(raw))


def previous_of(raw: bytes) -> str | None:
    """The response that a body goes on with."""
    found = read_object(raw).get("previous_response_id")
    return found if isinstance(found, str) else None


def continued(raw: bytes, earlier: bytes, output: object) -> bytes:
    """A body whose input begins with an earlier conversation: what that was asked with, and what it answered.

    Args:
        raw: A valid body.
        earlier: That of the earlier response, its own earlier turns included.
        output: Of the earlier response; its reasoning is left out, as that of each answer begins anew.
    """
    data = read_object(raw)
    answered = [_spoken(item) for item in cast("list[dict[str, Any]]", output) if item["type"] != "reasoning"]
    data["input"] = [*_turns(read_object(earlier)["input"]), *answered, *_turns(data["input"])]
    return orjson.dumps(data)


def input_items(raw: bytes, name: str) -> list[dict[str, Any]]:
    """The items of a stored body's input, each with an id that lasts."""
    found: list[dict[str, Any]] = []
    ids: set[str] = set()
    for number, item in enumerate(_turns(read_object(raw)["input"])):
        item = {"type": "message", **item}
        if item["type"] == "message":
            item.setdefault("status", "completed")
            if isinstance(item["content"], str):
                kind = "output_text" if item["role"] == "assistant" else "input_text"
                item["content"] = [{"type": kind, "text": item["content"]}]
        id = item.get("id")
        if id is None or id in ids:  # pages go on from one
            id = f"item_{name}_{number}"
        ids.add(id)
        found.append({**item, "id": id})
    return found


def _turns(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _spoken(item: dict[str, Any]) -> dict[str, Any]:
    """An item of an answer as one of a question."""
    if item["type"] == "function_call":
        return {name: item[name] for name in ("type", "call_id", "name", "arguments")}
    text = [{"type": "output_text", "text": part["text"]} for part in item["content"]]
    return {"type": "message", "role": "assistant", "content": text}


def parse_response(raw: bytes, settings: Settings) -> Asking:
    """Read a body.

    Raises:
        BadRequest: Naming the field and what is wrong with it.
        InvalidParams: If a value is outside of what the method can do.
    """
    body = check_body(raw)
    _check(body, settings)
    try:  # its items are told again, and go into what goes on with it
        if raw.count(b"[") + raw.count(b"{") > _MOST_DEEP:
            orjson.dumps(read_object(raw))
    except TypeError:
        raise BadRequest(f"The body must not be nested more than {_MOST_DEEP} deep.", code="invalid_json") from None
    names: dict[str, str] = {
        "messages": "input",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text.format",
        "response_format.json_schema": "text.format",
        "tool_choice.function": "tool_choice",
    }
    messages = _messages(body, names)
    tools = _tools(body, names)
    warnings: list[str] = []
    try:
        chat = to_chat(_to_chat_body(body, messages, tools, settings), settings, warnings, names)
    except BadRequest as error:
        raise renamed(error, names) from None
    return Asking(
        chat._replace(warnings=tuple(_renamed(text, names) for text in warnings)), _form(body, chat, settings)
    )


def _check(body: ResponsesBody, settings: Settings) -> None:
    """Refuse what would need what is not there, and what no response could repeat."""
    for param, asked in (("background", body.background), ("previous_response_id", body.previous_response_id)):
        if asked and settings.store_url is None:
            raise _unsupported(
                param, "this server stores no responses: start it with --state-dir DIR or MRSA_DATABASE_URL"
            )
    if body.background and body.store is False:
        raise BadRequest("background: needs store to be true, since the response is to be retrieved", "background")
    if "message.output_text.logprobs" in (body.include or ()):
        raise _unsupported("include", "an answer has no logprobs: it is one of many")
    # What binds nothing is echoed all the same: a tool that is not allowed, a format beside a tool that must be called.
    for index, tool in enumerate(body.tools or ()):
        check_schema(tool.parameters or {}, f"tools.{index}.parameters")
    if body.text and isinstance(body.text.format, SchemaFormatIn):
        check_schema(body.text.format.schema_, "text.format.schema")


def _unsupported(param: str, reason: str) -> BadRequest:
    return BadRequest(f"{param}: {reason}", param, "unsupported_parameter")


def _messages(body: ResponsesBody, names: dict[str, str]) -> list[MessageIn]:
    """The turns of the conversation; calls that follow one another, or an answer's text, are one turn."""
    messages: list[MessageIn] = []
    if body.instructions is not None:
        names["messages.0"] = "instructions"
        messages.append(MessageIn(role="system", content=body.instructions))
    if isinstance(body.input, str):
        names[f"messages.{len(messages)}"] = "input"
        return [*messages, MessageIn(role="user", content=body.input)]
    callable_turn = False  # whether calls may join the last turn
    for index, item in enumerate(body.input):
        match item:
            case ReasoningItem():
                continue
            case CallItem():
                call = CallIn(
                    id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments or "{}")
                )
                if callable_turn:
                    last = messages[-1]
                    messages[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), call]})
                    continue
                message, where = MessageIn(role="assistant", tool_calls=[call]), f"input.{index}"
            case CallOutputItem():
                message = MessageIn(role="tool", content=_content(item.output), tool_call_id=item.call_id)
                where = f"input.{index}"
                names[f"messages.{len(messages)}.content"] = f"{where}.output"
            case MessageItem():
                message, where = MessageIn(role=item.role, content=_content(item.content)), f"input.{index}"
        names[f"messages.{len(messages)}"] = where
        messages.append(message)
        callable_turn = message.role == "assistant"
    if len(messages) == (body.instructions is not None):
        raise BadRequest("input: must hold at least one message", "input")
    return messages


def _content(content: str | list[_PartIn]) -> str | list[Part]:
    if isinstance(content, str):
        return content
    parts: list[Part] = []
    for part in content:
        match part:
            case InputText() | OutputText():
                parts.append(TextPart(type="text", text=part.text))
            case Refusal():
                parts.append(RefusalPart(type="refusal", refusal=part.refusal))
            case InputImage():
                # One that is named by a file's id is refused as any that is not inside the message.
                parts.append(ImagePart(type="image_url", image_url=ImageUrl(url=part.image_url or "")))
    return parts


def _tools(body: ResponsesBody, names: dict[str, str]) -> list[ToolIn] | None:
    """The tools, those alone that are allowed where the request says which."""
    if body.tools is None:
        return None
    choice = body.tool_choice
    allowed = {tool.name for tool in choice.tools} if isinstance(choice, AllowedTools) else None
    if allowed is not None and (unknown := sorted(allowed - {tool.name for tool in body.tools})):
        raise BadRequest(f"tool_choice.tools: there is no tool {unknown[0]!r}", "tool_choice.tools")
    tools: list[ToolIn] = []
    for index, tool in enumerate(body.tools):
        if allowed is None or tool.name in allowed:
            names[f"tools.{len(tools)}.function"] = f"tools.{index}"
            function = FunctionIn(
                name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
            )
            tools.append(ToolIn(type="function", function=function))
    return tools


def _to_chat_body(
    body: ResponsesBody, messages: list[MessageIn], tools: list[ToolIn] | None, settings: Settings
) -> ChatBody:
    choice = body.tool_choice
    effort = body.reasoning.effort if body.reasoning else None
    return ChatBody(
        model=body.model,
        messages=messages,
        stream=body.stream,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        tools=tools,
        tool_choice=NamedTool(type="function", function=NamedFunction(name=choice.name))
        if isinstance(choice, ChosenFunction)
        else choice.mode
        if isinstance(choice, AllowedTools)
        else choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body),
        reasoning=Reasoning(effort=effort),
        mrsa=_mrsa(body, settings),
    )


def _format(body: ResponsesBody) -> TextFormat | JsonFormat | SchemaFormat | None:
    form = body.text.format if body.text else None
    if not isinstance(form, SchemaFormatIn):
        return form
    schema = SchemaIn.model_validate(
        {"name": form.name, "description": form.description, "schema": form.schema_, "strict": form.strict}
    )
    return SchemaFormat(type="json_schema", json_schema=schema)


def _mrsa(body: ResponsesBody, settings: Settings) -> bool | MrsaIn | None:
    """`mrsa`, with the method asked for where the mode is `pro` and nothing else says with how much work."""
    reasoning, mrsa = body.reasoning, body.mrsa
    if reasoning is None or reasoning.mode != "pro" or reasoning.effort is not None or isinstance(mrsa, bool):
        return mrsa
    if mrsa is None:
        return True
    return mrsa if mrsa.effort else mrsa.model_copy(update={"effort": settings.usual_effort.value})


def _form(body: ResponsesBody, chat: Chat, settings: Settings) -> ResponseForm:
    reasoning = body.reasoning or ReasoningIn()
    streamed = body.mrsa.stream if isinstance(body.mrsa, MrsaIn) else None
    summary = reasoning.summary or reasoning.generate_summary
    if summary is None and streamed is not None:
        summary = "auto" if streamed == "final" else "detailed"
    text = body.text or TextIn()
    stored = body.store is not False and settings.store_url is not None
    echo: dict[str, object] = {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": chat.sampling.presence_penalty,
        "frequency_penalty": chat.sampling.frequency_penalty,
        "temperature": chat.sampling.temperature,
        "top_p": chat.sampling.top_p,
        "top_logprobs": 0,
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": tool.strict,
            }
            for tool in body.tools or ()
        ],
        "tool_choice": "auto" if body.tool_choice is None else _plain(body.tool_choice),
        "text": {
            "format": {"type": "text"} if text.format is None else _format_echo(text.format),
            **({"verbosity": text.verbosity} if text.verbosity else {}),
        },
        "reasoning": {
            "effort": reasoning.effort,
            "summary": reasoning.summary or reasoning.generate_summary,
            **({"mode": reasoning.mode} if reasoning.mode else {}),
        },
        "truncation": body.truncation or "disabled",
        "metadata": body.metadata or {},
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "service_tier": "default",
        "store": stored,
        "background": bool(body.background),
        "previous_response_id": body.previous_response_id,
    }
    own_deltas = streamed == "rollouts"
    return ResponseForm(
        echo,
        summary,
        own_deltas or OWN_EVENTS in (body.include or ()),
        own_deltas,
        bool(body.background),
        stored,
        body.metadata or {},
    )


def _plain(choice: str | ChosenFunction | AllowedTools) -> object:
    return choice if isinstance(choice, str) else choice.model_dump()


def _format_echo(form: TextFormat | JsonFormat | SchemaFormatIn) -> dict[str, object]:
    if not isinstance(form, SchemaFormatIn):
        return {"type": form.type}
    return {
        "type": form.type,
        "name": form.name,
        "description": form.description,
        "schema": form.schema_,
        "strict": bool(form.strict),
    }


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """A warning under the name that the client wrote."""
    param, colon, rest = text.partition(":")
    return renamed(BadRequest(param, param), names).message + colon + rest
