"""Bodies of requests: read up to a size, and checked field by field, so that nothing else reaches the model."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from .errors import RequestError

MAX_INPUTS = 2048
"""Inputs of one embedding request, as OpenAI has it."""

UNIONS = {
    "input": f"a text, token ids, or a list of up to {MAX_INPUTS} of either; lists are not empty",
    "prompt": "a text",
    "stop": "a text, or a list of up to 4, none of them empty or longer than 256 characters",
}
"""Fields of which several types are taken; pydantic speaks of each of them in turn."""


class Body(BaseModel):
    """A request; fields that it does not name are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(BaseModel):
    """A part of a message. Parts of other types would be dropped by the language model's handler."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class Function(BaseModel):
    """What an earlier answer asked to be called."""

    model_config = ConfigDict(strict=True)
    name: str
    arguments: str | dict[str, Any] = "{}"

    @field_validator("arguments")
    @classmethod
    def _is_json(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        if isinstance(value, str):
            parse_json(value)
        return value


class ToolCall(BaseModel):
    """A call of a tool in an earlier answer."""

    model_config = ConfigDict(strict=True)
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(BaseModel):
    """One message; what clients send back with an earlier answer, such as ``refusal``, is left out."""

    model_config = ConfigDict(strict=True)
    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


Messages = Annotated[list[Message], Field(min_length=1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Sampling(Body):
    """What chat and completion have in common.

    Fields that the handlers do not know, but that OpenAI does, may only say what is done anyway.
    """

    model: str | None = None
    stream: bool | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=False)] | None = None
    frequency_penalty: Annotated[float, Field(gt=-1, le=2, strict=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0, strict=False)] | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None

    def for_handler(self, name: str) -> dict[str, Any]:
        """What transformers' handler is given: only what was asked for, and only what it knows."""
        unused = {"model", "n", "presence_penalty", "stream_options", "user"} | self._unused()
        body = self.model_dump(exclude_none=True, exclude=unused)
        return {**{key: value for key, value in body.items() if value not in ([], {})}, "model": name}

    def _unused(self) -> set[str]:
        return set()


class ChatBody(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, strict=False)]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto"] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: Literal[False] | None = None
    response_format: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None

    @field_validator("response_format")
    @classmethod
    def _is_text(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type") != "text":
            raise ValueError("only {'type': 'text'} can be had")
        return value

    def for_handler(self, name: str) -> dict[str, Any]:
        """As of :class:`Sampling`; some handlers do not know the newer name of ``max_tokens``."""
        body = super().for_handler(name)
        newer = {} if self.max_completion_tokens is None else {"max_tokens": self.max_completion_tokens}
        return {**body, **newer}

    def _unused(self) -> set[str]:
        return {
            "max_completion_tokens",
            *("tool_choice", "parallel_tool_calls", "logprobs", "response_format"),
            *("metadata", "store", "service_tier"),
        }


class CompletionBody(Sampling):
    """``POST /v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    suffix: str | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None

    def for_handler(self, name: str) -> dict[str, Any]:
        """As of :class:`Sampling`, with one prompt."""
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return {**super().for_handler(name), "prompt": prompt}

    def _unused(self) -> set[str]:
        return {"best_of", "echo", "logprobs"}


Row = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class EmbeddingBody(Body):
    """``POST /v1/embeddings``; ``prompt_name``, ``input_type`` and ``messages`` are not OpenAI's."""

    model: str | None = None
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
        | Row
        | Annotated[list[Row], Field(min_length=1, max_length=MAX_INPUTS)]
        | None
    ) = None
    messages: Messages | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    prompt_name: str | None = None
    input_type: Literal["query", "document"] | None = None
    user: str | None = None

    def refuse_ids(self) -> None:
        """Refuse token ids, which clients that know nothing of the model take from OpenAI's own tokenizer.

        Raises:
            RequestError: 400, if there are any.
        """
        if isinstance(self.input, list) and not isinstance(self.input[0], str):
            raise RequestError(
                400,
                "input is token ids, and another tokenizer's would give wrong vectors. Send texts (LangChain's "
                "OpenAIEmbeddings: check_embedding_ctx_length=False), or start the server with --allow-token-ids if "
                "clients use the model's own tokenizer.",
                param="input",
            )

    def rows(self) -> list[str] | list[list[int]]:
        """The inputs as a list: of texts, or of rows of token ids."""
        given: Any = self.input
        is_single = isinstance(given, str) or isinstance(given[0], int)
        return [given] if is_single else given


Checked = TypeVar("Checked", bound=Body)


def parse_json(text: str | bytes) -> Any:
    """JSON, without what Python takes beside it.

    Raises:
        ValueError: If it is none, is nested too deeply, or holds half of a surrogate pair, which is no text.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeError as error:
        raise ValueError("it is no valid Unicode") from error
    return value


def check_body(raw: bytes, kind: type[Checked]) -> Checked:
    """A body as its fields.

    Raises:
        RequestError: 400, with the first field that is wrong.
    """
    try:
        value = parse_json(raw)
    except ValueError as error:
        message = "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RequestError(400, f"The body cannot be read: {message}.") from error
    if not isinstance(value, dict):
        raise RequestError(400, "The body must be a JSON object.")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _first_of(error, kind) from error


def _first_of(error: ValidationError, kind: type[Body]) -> RequestError:
    """What the first error says of which field, without what was sent."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields)
        return RequestError(400, f"There is no field {field:.80}; there are {known}.", param=f"{field:.80}")
    if field in UNIONS:
        return RequestError(400, f"{field} must be {UNIONS[field]}.", param=field)
    place = ".".join(str(part) for part in first["loc"])
    return RequestError(400, f"{place}: {first['msg']}.", param=field)
