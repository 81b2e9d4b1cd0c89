"""Conversations that keep their cache between the turns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, TextStreamer

from ..tokenization.prompts import encode_messages


@dataclass
class Conversation:
    """A conversation whose keys and values stay cached from turn to turn, so that only what is new is computed.

    Attributes:
        model, tokenizer: a causal language model and its tokenizer, with a chat template.
        options: arguments for `generate()`.
        messages: the turns so far, `{"role": ..., "content": ...}`.
        make_cache: makes an empty cache, e.g. a `SegmentedCache` for conversations beyond the trained length.
    """

    model: Any
    tokenizer: Any
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    make_cache: Callable[[], Cache] | None = None
    _cache: Cache | None = None
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
        ids = encode_messages(self.tokenizer, messages).to(self.model.device)
        if not self._continues(ids):
            self._cache = self.make_cache() if self.make_cache else DynamicCache(config=self.model.config)
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
