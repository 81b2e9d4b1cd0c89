"""Requests' prompts as token ids and encoders' inputs, apart from the event loop."""

import asyncio
import copy
import inspect
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError

from .media import MediaLimits, MediaReader
from .protocol import ApiError, ChatMessage, ChatRequest, TextRequest
from .texts import knows_tools


class Prompt(NamedTuple):
    """Token ids, and what other modalities give to the model."""

    ids: list[int]
    inputs: dict[str, torch.Tensor]


class Prompts:
    """Makes prompts of conversations and texts, one at a time, in a thread.

    Args:
        tokenizer: the checkpoint's; a copy is used, because tokenizers change while they encode.
        vocab_size: of the model.
        processor: of a model with other modalities; None: messages are text alone.
        placeholders: modality -> token of such a model.
        limits: of images and sound.

    Raises:
        ImportError: the model sees images and Pillow is not installed.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        processor: Any = None,
        placeholders: Mapping[str, int] | None = None,
        limits: MediaLimits | None = None,
    ):
        self._tokenizer, self._vocab_size = copy.deepcopy(tokenizer), vocab_size
        self._processor, self._limits = copy.deepcopy(processor), limits or MediaLimits()
        self._placeholders = {token: modality for modality, token in (placeholders or {}).items()}
        parts = {"image": "image_processor", "audio": "feature_extractor"}
        has = [modality for modality, part in parts.items() if getattr(processor, part, None) is not None]
        self.modalities = [modality for modality in has if modality in (placeholders or {})]
        self._sampling_rate = self._processor.feature_extractor.sampling_rate if "audio" in self.modalities else 0
        self._lock = asyncio.Lock()
        self._reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {
            "processor_kwargs",
            "sampling_rate",
        }
        if "image" in self.modalities:
            try:
                import PIL  # noqa: F401
            except ImportError as error:
                raise ImportError("images need Pillow: pip install 'modeling-deepseek-r1[vision]'") from error

    async def of_chat(self, request: ChatRequest) -> Prompt:
        """ApiError 400 where the template or the model has no place for what is said, or something cannot be read."""
        return await self._apart(self._chat, request)

    async def of_texts(self, request: TextRequest) -> list[Prompt]:
        """ApiError 400 where a prompt is empty or has ids that the model does not know."""
        return await self._apart(self._texts, request)

    async def _apart(self, function, request):
        async with self._lock:
            return await asyncio.to_thread(function, request)

    def _chat(self, request: ChatRequest) -> Prompt:
        if not self._tokenizer.chat_template:
            raise ApiError(400, "the checkpoint has no chat template; use /v1/completions", "no_chat_template")
        options = request.chat_template_kwargs or {}
        if reserved := sorted(self._reserved & options.keys()):
            raise ApiError(400, f"{reserved[0]} is not a variable of chat templates", param="chat_template_kwargs")
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or []] if request.tool_choice != "none" else []
        if tools and not knows_tools(self._tokenizer):
            raise ApiError(400, "the checkpoint's chat template has no place for tools", "tools_not_supported", "tools")
        reader = MediaReader(self.modalities, self._sampling_rate, self._limits)
        messages = [message_of(message, number, reader) for number, message in enumerate(request.messages)]
        options = {**options, "tools": tools or None, "add_generation_prompt": True, "return_dict": True}
        try:
            if reader.items:
                return self._joined(messages, options)
            encoded = self._tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, TypeError) as error:
            raise ApiError(400, f"the chat template refuses these messages: {error}", "template_error", "messages") from error
        return Prompt(self._text_ids(encoded["input_ids"], "messages"), {})

    def _joined(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> Prompt:
        try:
            inputs = dict(self._processor.apply_chat_template(messages, tokenize=True, **options))
        except (
            ValueError
        ) as error:  # nothing in a clip; as many placeholders in the text as in the content are no places for it
            raise ApiError(400, str(error), "invalid_media", "messages") from error
        del inputs["attention_mask"]
        return Prompt(inputs.pop("input_ids")[0].tolist(), inputs)

    def _texts(self, request: TextRequest) -> list[Prompt]:
        prompts = []
        for prompt in request.prompts:
            ids = list(self._tokenizer(prompt).input_ids) if isinstance(prompt, str) else prompt
            if not ids:
                raise ApiError(400, "the prompt is empty; give at least one word", param="prompt")
            if max(ids) >= self._vocab_size:
                raise ApiError(400, f"token {max(ids)} is beyond the vocabulary of {self._vocab_size}", param="prompt")
            prompts.append(Prompt(self._text_ids(ids, "prompt"), {}))
        return prompts

    def _text_ids(self, ids: list[int], param: str) -> list[int]:
        if found := self._placeholders.keys() & set(ids):
            token = found.pop()
            text = f"token {token} stands for {self._placeholders[token]} input, and none was given with this text"
            raise ApiError(400, text, "invalid_media", param)
        return list(ids)


def message_of(message: ChatMessage, number: int, reader: MediaReader) -> dict[str, Any]:
    """As chat templates want it: text in one piece, arguments of calls as objects. With images or sound its content is a list
    of blocks, as the processor wants it.

    Raises:
        ApiError: arguments that are no JSON, or parts that cannot be read.
    """
    values = message.model_dump(exclude_none=True, exclude={"content"})
    if message.role == "developer":
        values["role"] = "system"
    values["content"] = message.content or ""
    if isinstance(message.content, list):
        blocks = [reader.block(part, f"messages.{number}.content.{place}") for place, part in enumerate(message.content)]
        other = any(block["type"] != "text" for block in blocks)
        if other and message.role != "user":
            place = f"messages.{number}.content"
            raise ApiError(400, f"{place}: images and sound belong to messages of the role user", "invalid_media", place)
        values["content"] = blocks if other else "".join(block["text"] for block in blocks)
    for call in values.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except ValueError as error:
            place = f"messages.{number}.tool_calls"
            raise ApiError(400, f"{place}: arguments are no JSON: {error}", param=place) from error
    return values
