"""Requests' prompts as token ids, apart from the event loop."""

import asyncio
import copy
import inspect
import json
from typing import Any

from jinja2 import TemplateError

from .protocol import ApiError, ChatMessage, ChatRequest, TextRequest
from .texts import knows_tools


class Prompts:
    """Makes ids of conversations and texts, one at a time, in a thread.

    Args:
        tokenizer: the checkpoint's; a copy is used, because tokenizers change while they encode.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer: Any, vocab_size: int):
        self._tokenizer, self._vocab_size = copy.deepcopy(tokenizer), vocab_size
        self._lock = asyncio.Lock()
        self._reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters)

    async def of_chat(self, request: ChatRequest) -> list[int]:
        """ApiError 400 where the template has no place for what is said."""
        return await self._apart(self._chat, request)

    async def of_texts(self, request: TextRequest) -> list[list[int]]:
        """ApiError 400 where a prompt is empty or has ids that the model does not know."""
        return await self._apart(self._texts, request)

    async def _apart(self, function, request):
        async with self._lock:
            return await asyncio.to_thread(function, request)

    def _chat(self, request: ChatRequest) -> list[int]:
        if not self._tokenizer.chat_template:
            raise ApiError(400, "the checkpoint has no chat template; use /v1/completions", "no_chat_template")
        options = request.chat_template_kwargs or {}
        if reserved := sorted(self._reserved & options.keys()):
            raise ApiError(400, f"{reserved[0]} is not a variable of chat templates", param="chat_template_kwargs")
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or []] if request.tool_choice != "none" else []
        if tools and not knows_tools(self._tokenizer):
            raise ApiError(400, "the checkpoint's chat template has no place for tools", "tools_not_supported", "tools")
        messages = [message_of(message, number) for number, message in enumerate(request.messages)]
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, tools=tools or None, add_generation_prompt=True, return_dict=True, **options
            )
        except (TemplateError, TypeError) as error:
            raise ApiError(400, f"the chat template refuses these messages: {error}", "template_error", "messages") from error
        return list(encoded["input_ids"])

    def _texts(self, request: TextRequest) -> list[list[int]]:
        prompts = []
        for prompt in request.prompts:
            ids = list(self._tokenizer(prompt).input_ids) if isinstance(prompt, str) else prompt
            if not ids:
                raise ApiError(400, "the prompt is empty; give at least one word", param="prompt")
            if max(ids) >= self._vocab_size:
                raise ApiError(400, f"token {max(ids)} is beyond the vocabulary of {self._vocab_size}", param="prompt")
            prompts.append(ids)
        return prompts


def message_of(message: ChatMessage, number: int) -> dict[str, Any]:
    """As chat templates want it: text in one piece, arguments of calls as objects.

    Raises:
        ApiError: arguments that are no JSON.
    """
    values = message.model_dump(exclude_none=True)
    if message.role == "developer":
        values["role"] = "system"
    if isinstance(message.content, list):
        values["content"] = "".join(part.text for part in message.content)
    values.setdefault("content", "")
    for call in values.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except ValueError as error:
            place = f"messages.{number}.tool_calls"
            raise ApiError(400, f"{place}: arguments are no JSON: {error}", param=place) from error
    return values
