"""Generation beyond a plain `model.generate()`."""

from .conversation import Conversation

__all__ = ["Conversation"]
