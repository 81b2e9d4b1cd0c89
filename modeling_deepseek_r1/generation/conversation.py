"""Prompts by the checkpoint's chat template, and conversations that keep their cache between the turns."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, TextStreamer


def encode_prompt(tokenizer, prompt: str, *, system: str | None = None, raw: bool = False) -> torch.Tensor:
    """Token ids `[1, n]` of a prompt.

    Args:
        tokenizer: the checkpoint's.
        prompt: what the user says, or with `raw` the beginning of a text.
        system: instructions that come before it.
        raw: continue the text as it is instead of answering it by the chat template. Without a template this is so anyway.

    Raises:
        ValueError: an empty prompt, or a system message where there is no template to put it in.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; give at least one word")
    if raw or not tokenizer.chat_template:
        if system:
            raise ValueError("a system message needs a chat template, and this prompt is continued as plain text")
        return tokenizer(prompt, return_tensors="pt").input_ids
    messages = [{"role": "system", "content": system}] if system else []
    return _by_template(tokenizer, [*messages, {"role": "user", "content": prompt}])


def _by_template(tokenizer, messages: list[dict[str, str]]) -> torch.Tensor:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids


@dataclass
class Conversation:
    """A conversation whose keys and values stay cached from turn to turn, so that only what is new is computed.

    Attributes:
        model, tokenizer: a causal language model and its tokenizer, with a chat template.
        options: arguments for `generate()`.
        messages: the turns so far, `{"role": ..., "content": ...}`.
    """

    model: Any
    tokenizer: Any
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    _cache: DynamicCache | None = None
    _cached_ids: torch.Tensor | None = None

    def __post_init__(self):
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the checkpoint's tokenizer has no chat template; continue plain texts with `deepseek-r1 generate`"
            )

    def say(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Adds a turn of the user and returns the model's answer, which `streamer` receives as it comes.

        Raises:
            ValueError: an empty turn.
        """
        if not text.strip():
            raise ValueError("the message is empty; say something")
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = _by_template(self.tokenizer, messages).to(self.model.device)
        if not self._continues(ids):
            self._cache = DynamicCache(config=self.model.config)
        cache, self._cache = self._cache, None  # an interrupted turn leaves no half-filled cache behind
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=streamer, **self.options
        )
        answer = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self._cache, self._cached_ids = cache, output[:, : cache.get_seq_length()]
        return answer

    def forget(self) -> None:
        """Starts anew, keeping a system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._cache = self._cached_ids = None

    def _continues(self, ids: torch.Tensor) -> bool:
        """Templates may rewrite earlier turns (leave out reasoning, for instance); the cache then no longer fits."""
        if self._cache is None or self._cached_ids is None or self._cached_ids.shape[1] >= ids.shape[1]:
            return False
        return torch.equal(ids[:, : self._cached_ids.shape[1]], self._cached_ids)
