"""The course of one request: its jobs in the engine, their events, and what the client gets of them, whole or as a stream."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from .engine import End, Engine, Failure, Job, QueueFullError, StoppedError, Token
from .prompts import Prompt
from .protocol import ApiError, ChatRequest, Sampling, head, usage
from .texts import GrowingText, Message, Part


@dataclass
class Choice:
    """One text of an answer.

    Attributes:
        index: among all texts of the answer; `number`: among those of its job.
        message: how it is taken apart.
        tokens: so far.
        logprobs: of the tokens not sent yet.
        finish_reason: None while it grows.
    """

    index: int
    number: int
    job: Job
    text: GrowingText
    message: Message
    tokens: int = 0
    logprobs: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class Answer:
    """Runs the jobs of a request.

    Args:
        engine: that runs them.
        request: as it came.
        prompts: of its texts.
        tokenizer: the checkpoint's.
        make_message: of a prompt's ids.
        keep_special: whether texts keep special tokens, because tool calls are made of such.
        ends: ids that end a text and do not belong to it.
        max_tokens: of an answer whose request does not say.
        timeout: in seconds, from now on.
        on_first_token: called with the seconds that it took.

    Raises:
        ApiError: 400 where it could never run.
    """

    def __init__(
        self,
        engine: Engine,
        request: Sampling,
        prompts: list[Prompt],
        tokenizer: Any,
        make_message: Callable[[list[int]], Message],
        *,
        keep_special: bool,
        ends: set[int],
        max_tokens: int,
        timeout: float,
        on_first_token: Callable[[float], None],
    ):
        self._engine, self._request, self.tokenizer, self._ends = engine, request, tokenizer, ends
        self._prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self._began, self._on_first_token = time.monotonic(), on_first_token
        self._deadline, self._timeout = self._began + timeout, timeout
        self._events: asyncio.Queue[tuple[int, Token | End | Failure]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        if len(prompts) > engine.queue:
            raise ApiError(400, f"{len(prompts)} prompts are more than the {engine.queue} that may wait", "too_large", "prompt")
        self.jobs = [self._job(number, prompt, max_tokens) for number, prompt in enumerate(prompts)]
        self.choices = [
            Choice(
                place * request.n + number,
                number,
                job,
                GrowingText(tokenizer, request.stops, keep_special),
                make_message(job.ids),
            )
            for place, job in enumerate(self.jobs)
            for number in range(request.n)
        ]

    def _job(self, number: int, prompt: Prompt, max_tokens: int) -> Job:
        ids = prompt.ids
        room = self._engine.context - len(ids)
        if room < 1:
            text = f"the prompt has {len(ids)} tokens and leaves no room for an answer in a context of {self._engine.context}"
            raise ApiError(400, text, "context_length_exceeded")
        wanted = self._request.wanted_tokens or min(max_tokens, room)
        if wanted > room:
            text = f"{len(ids)} tokens of the prompt and {wanted} of the answer exceed a context of {self._engine.context}"
            raise ApiError(400, text, "context_length_exceeded")
        chat = isinstance(self._request, ChatRequest)
        top = (self._request.top_logprobs if chat else self._request.logprobs) or 0

        def tell(event: Token | End | Failure) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        job = Job(ids, self._request.options(wanted), tell, self._request.n, top, self._request.seed, prompt.inputs)
        try:
            self._engine.check(job)
        except ValueError as error:
            raise ApiError(400, str(error), "too_large") from error
        return job

    def submit(self) -> None:
        """ApiError 429 where too many wait, 503 where the server stops."""
        try:
            self._engine.submit(self.jobs)
        except QueueFullError as error:
            raise ApiError(429, str(error), "queue_full") from error
        except StoppedError as error:
            raise ApiError(503, str(error), "stopping") from error

    def cancel(self) -> None:
        """Frees the rows; what was complete anyway is not changed by it."""
        for job in self.jobs:
            job.cancel()

    async def parts(self) -> AsyncIterator[tuple[Choice, Part]]:
        """What to add to which text; with the last part of a text its `finish_reason` is set.

        Raises:
            ApiError: 500 where the model failed, 503 where the server stops, 504 after the time is over.
        """
        missing = len(self.choices)
        while missing:
            try:
                number, event = await asyncio.wait_for(self._events.get(), self._deadline - time.monotonic())
            except TimeoutError as error:
                raise ApiError(504, f"not complete after {self._timeout:g} seconds", "timeout") from error
            if isinstance(event, Failure):
                stopped = isinstance(event.error, StoppedError)
                text = str(event.error) if stopped else "the model failed on this request; the server's log says why"
                raise ApiError(503 if stopped else 500, text, "stopping" if stopped else "internal_error")
            choice = self.choices[number * self._request.n + event.choice]
            if choice.finish_reason is not None:
                continue
            part = self._add(choice, event) if isinstance(event, Token) else self._end(choice, event.reason)
            missing -= choice.finish_reason is not None
            if part or choice.finish_reason is not None:
                yield choice, part

    def _add(self, choice: Choice, token: Token) -> Part:
        if self._on_first_token is not None:
            self._on_first_token(time.monotonic() - self._began)
            self._on_first_token = None
        choice.tokens += 1
        if token.id in self._ends:
            return Part()
        choice.logprobs.append(token)
        part = choice.message.add(choice.text.add(token.id))
        if choice.text.stopped:
            choice.job.cancel(choice.number)
            return joined(part, self._end(choice, "eos"))
        return part

    def _end(self, choice: Choice, reason: str) -> Part:
        part = joined(choice.message.add(choice.text.finish()), choice.message.finish())
        calls = choice.message.whole.calls
        choice.finish_reason = "length" if reason == "length" and not choice.text.stopped else "tool_calls" if calls else "stop"
        return part

    @property
    def usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, sum(choice.tokens for choice in self.choices))


def joined(first: Part, second: Part) -> Part:
    return Part(first.content + second.content, first.reasoning + second.reasoning, first.calls + second.calls)


class ChatShape:
    """How chat completions look; `TextShape`: text completions."""

    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(self, request: ChatRequest, tokenizer: Any):
        self.wanted, self.tokenizer = request.logprobs, tokenizer

    def first(self, choice: Choice) -> dict:
        return {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk(self, choice: Choice, part: Part) -> dict:
        names = {"content": part.content, "reasoning_content": part.reasoning, "tool_calls": part.calls}
        delta = {name: value for name, value in names.items() if value}
        logprobs, choice.logprobs = self.logprobs(choice.logprobs), []
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def whole(self, choice: Choice) -> dict:
        parts = choice.message.whole
        message: dict[str, Any] = {"role": "assistant", "content": parts.content}
        if parts.reasoning:
            message["reasoning_content"] = parts.reasoning
        if parts.calls:
            message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in parts.calls]
            message["content"] = parts.content or None
        logprobs = self.logprobs(choice.logprobs)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def logprobs(self, tokens: list[Token]) -> dict | None:
        return {"content": [self._entry(token) for token in tokens]} if self.wanted else None

    def _entry(self, token: Token) -> dict:
        top = [self._one(number, value) for number, value in token.top]
        return {**self._one(token.id, token.log_likelihood), "top_logprobs": top}

    def _one(self, token: int, value: float) -> dict:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": value, "bytes": list(text.encode())}


class TextShape:
    """How text completions look."""

    kinds = ("text_completion", "text_completion")

    def __init__(self, request: Any, tokenizer: Any):
        self.wanted, self.tokenizer = request.logprobs, tokenizer

    def first(self, choice: Choice) -> None:
        return None

    def chunk(self, choice: Choice, part: Part) -> dict:
        logprobs, choice.logprobs = self.logprobs(choice.logprobs), []
        return self._choice(choice, part.content, logprobs)

    def whole(self, choice: Choice) -> dict:
        return self._choice(choice, choice.message.whole.content, self.logprobs(choice.logprobs))

    def _choice(self, choice: Choice, text: str, logprobs: dict | None) -> dict:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def logprobs(self, tokens: list[Token]) -> dict | None:
        if self.wanted is None:
            return None
        decode = self.tokenizer.decode
        return {
            "tokens": [decode([token.id]) for token in tokens],
            "token_logprobs": [token.log_likelihood for token in tokens],
            "top_logprobs": [{decode([number]): value for number, value in token.top} for token in tokens],
        }


async def whole(answer: Answer, shape: ChatShape | TextShape, model: str) -> dict:
    """The complete answer."""
    async for _ in answer.parts():
        pass
    choices = [shape.whole(choice) for choice in answer.choices]
    return {**head(shape.kinds[0], model), "choices": choices, "usage": answer.usage}


async def stream(answer: Answer, shape: ChatShape | TextShape, model: str, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: chunks, the usage if wanted, and `[DONE]`; an error ends them early."""
    beginning = head(shape.kinds[1], model)

    def event(choices: list[dict], **more) -> str:
        return f"data: {json.dumps({**beginning, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    try:
        for choice in answer.choices:
            if (first := shape.first(choice)) is not None:
                yield event([first])
        async for choice, part in answer.parts():
            yield event([shape.chunk(choice, part)])
        if with_usage:
            yield event([], usage=answer.usage)
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    yield "data: [DONE]\n\n"
