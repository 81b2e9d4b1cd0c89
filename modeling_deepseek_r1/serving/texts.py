"""From tokens to what a client reads: text as it grows, cut at stop strings, reasoning and tool calls told apart.

Reasoning and tool calls are found by transformers' response parser, after the tokenizer's own `response_template`, or after one
made here for chat templates that know `<think>`, `<tool_call>` or DeepSeek's tool tokens.
"""

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream

THINK = {"open": "<think>", "close": "</think>", "content": "text"}
# Arguments are parsed here and not by the parser, which would give up the whole message over one that is no JSON.
HERMES_CALLS = {"open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True, "content": "text"}
DEEPSEEK_CALLS = {
    "open_pattern": r"\s*<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n",
    "close": "\n```<｜tool▁call▁end｜>",
    "repeats": True,
    "content": "text",
    "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
}


DEEPSEEK_FRAME = {"open": ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"], "close_pattern": r"\s*", "content": "text"}


def response_template(tokenizer: Any) -> dict | None:
    """How answers of this checkpoint are taken apart; None: they are nothing but text."""
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        return own
    chat = tokenizer.chat_template or ""
    chat = chat if isinstance(chat, str) else " ".join(chat.values())
    fields: dict[str, Any] = {}
    if "<think>" in chat or "</think>" in chat:
        fields["reasoning_content"] = THINK
    if "<tool_call>" in chat:
        fields["tool_calls"] = HERMES_CALLS
    elif "<｜tool▁call▁begin｜>" in chat:
        fields |= {"tool_calls": DEEPSEEK_CALLS, "frame": DEEPSEEK_FRAME}
    if not fields:
        return None
    return {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": r"\A",
        "fields": {**fields, "content": {"content": "text"}},
    }


def knows_tools(tokenizer: Any) -> bool:
    """Whether the chat template puts tools into the prompt."""
    chat = tokenizer.chat_template or ""
    return "tools" in (chat if isinstance(chat, str) else " ".join(chat.values()))


class GrowingText:
    """The text of a choice.

    Args:
        tokenizer: the checkpoint's, a fast one.
        stop: the text ends before the first of these.
        keep_special: whether special tokens (other than the end) are part of the text.

    Attributes:
        stopped: a stop string has come.
    """

    def __init__(self, tokenizer: Any, stop: list[str], keep_special: bool = False):
        self._backend, self._stop = tokenizer.backend_tokenizer, stop
        self._tokenizer, self._keep_special, self._ids = tokenizer, keep_special, []
        self._stream = DecodeStream(skip_special_tokens=not keep_special)
        self._text, self._sent, self.stopped = "", 0, False

    def add(self, token: int) -> str:
        """What can be sent now that this token has come; the beginning of a stop string is held back."""
        if self.stopped:
            return ""
        self._ids.append(token)
        self._text += self._stream.step(self._backend, token) or ""
        return self._send(self._held())

    def finish(self) -> str:
        """The rest."""
        if self.stopped:
            return ""
        # Bytes that are no character stay in the stream; the tokenizer shows them as it does everywhere.
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=not self._keep_special)
        if whole.startswith(self._text):
            self._text = whole
        self._held()
        return self._send(0)

    def _held(self) -> int:
        """Looks for stop strings in what has not been sent; returns how many characters at the end may belong to one."""
        first = min((at for word in self._stop if (at := self._text.find(word, self._sent)) >= 0), default=None)
        if first is not None:
            self._text, self.stopped = self._text[:first], True
            return 0
        return max((n for word in self._stop for n in range(1, len(word)) if self._text.endswith(word[:n])), default=0)

    def _send(self, held: int) -> str:
        start, self._sent = self._sent, max(self._sent, len(self._text) - held)
        return self._text[start : self._sent]


@dataclass
class Part:
    """Something to add to a message."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class Message:
    """An assistant's message, taken apart while its text grows.

    Args:
        tokenizer: the checkpoint's.
        template: see `response_template`; None: all is content.
        prompt: the text that the model continues; it may have opened the reasoning already.
        calls: whether tool calls are looked for.

    Attributes:
        whole: all parts so far.
    """

    def __init__(self, tokenizer: Any, template: dict | None, prompt: str, calls: bool):
        self.whole, self._parser = Part(), None
        if template is None:
            return
        if not calls:
            template = {**template, "fields": {k: v for k, v in template["fields"].items() if k != "tool_calls"}}
        own = getattr(tokenizer, "response_template", None) is not None
        self._parser = tokenizer.get_response_parser(template, prefix=prompt if own else opened_reasoning(prompt))

    def add(self, text: str) -> Part:
        """What of the new text goes where."""
        return self._part(text, lambda: self._parser.feed(text)) if text else Part()

    def finish(self) -> Part:
        return self._part("", lambda: self._parser.finalize()[1])

    def _part(self, text: str, parse) -> Part:
        part = Part()
        if self._parser is None:
            part.content = text
        else:
            try:
                for event in parse():
                    self._sort(event, part)
            except ValueError:  # the tokenizer's own template does not fit what the model wrote
                part.content, self._parser = text, None
        self.whole.content += part.content
        self.whole.reasoning += part.reasoning
        self.whole.calls += part.calls
        return part

    def _sort(self, event: dict, part: Part) -> None:
        name, kind = event["field"], event["type"]
        if kind == "region_close" and name == "tool_calls":
            try:
                part.calls.append(tool_call(event["value"], len(self.whole.calls) + len(part.calls)))
            except ValueError:  # no JSON, no name: the client gets it as it is
                part.content += event["value"] if isinstance(event["value"], str) else json.dumps(event["value"])
        elif kind == "region_chunk" and name == "content":
            part.content += event["text"]
        elif kind == "region_chunk" and name in ("reasoning_content", "reasoning", "thinking"):
            part.reasoning += event["text"]


def opened_reasoning(prompt: str) -> str:
    """`<think>` and what follows where the prompt ends in unfinished reasoning."""
    start = prompt.rfind("<think>")
    return prompt[start:] if start >= 0 and "</think>" not in prompt[start:] and len(prompt) - start < 200 else ""


def tool_call(value: Any, index: int) -> dict:
    """A parsed call in OpenAI's form, with arguments as JSON. ValueError where it is none."""
    value = json.loads(value) if isinstance(value, str) else value
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call without a name")
    arguments = function.get("arguments", {})
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    function = {"name": function["name"].strip(), "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
