"""What goes in: prompts by the checkpoint's own tokenizer and chat template."""

from .prompts import encode_messages, encode_prompt

__all__ = ["encode_messages", "encode_prompt"]
