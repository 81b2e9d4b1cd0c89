"""What clients send and get, in the form of OpenAI's API: https://platform.openai.com/docs/api-reference/chat

Unknown fields and values that cannot be honoured are refused, never ignored; fields that change nothing here are accepted.
Beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `chat_template_kwargs`, and `reasoning_content` in messages.
"""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class ApiError(Exception):
    """An answer that says what is wrong.

    Attributes:
        status: of HTTP.
        body: OpenAI's error object.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=256)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Sampling(Strict):
    """What chat and text completions have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # These change nothing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # These are not there.
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def options(self, max_new_tokens: int) -> dict[str, Any]:
        """Arguments for `generate()`; what is not given is left to the checkpoint."""
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "num_beams": 1,
            "num_return_sequences": 1,
            "use_cache": True,
        }
        if self.min_tokens:
            options["min_new_tokens"] = min(self.min_tokens, max_new_tokens)
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        # So small a temperature is greedy, and would overflow as a divisor.
        if self.temperature is not None and self.temperature < 0.01:
            return {**options, "do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        given = {name: value for name, value in sampling.items() if value is not None}
        return {**options, **given, **({"do_sample": True} if given else {})}


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Sound(Strict):
    data: str
    format: Literal["wav"]


class SoundPart(Strict):
    type: Literal["input_audio"]
    input_audio: Sound


ContentPart = Annotated[TextPart | ImagePart | SoundPart, Field(discriminator="type")]


class FunctionCall(Strict):
    name: str
    arguments: str


class Call(Strict):
    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None


class Function(Strict):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class TextFormat(Strict):
    type: Literal["text"]


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: TextFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(Sampling):
    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if alone else self.prompt


def parse(kind: type[Sampling], body: bytes) -> Sampling:
    """ApiError 400 where the body is not a request; it names the field that is wrong, the first of those furthest inside."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Of a union all branches complain, and the one that was meant gets furthest; the branches' names follow the field's.
        first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
        place = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        code = "invalid_json" if first["type"] == "json_invalid" else first["type"]
        where = f"{place}: " if place else ""
        raise ApiError(400, f"{where}{first['msg']}", code=code, param=place or None) from error


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def head(kind: str, model: str) -> dict[str, Any]:
    """The fields that every answer, and every chunk of a stream, begins with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
