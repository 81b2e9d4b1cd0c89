"""Generation beyond a plain `model.generate()`."""

from .conversation import Conversation, encode_prompt

__all__ = ["Conversation", "encode_prompt"]
