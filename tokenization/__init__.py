"""What goes in: prompts by the checkpoint's own tokenizer and chat template, and images, videos, sound and rows beside them."""

from .images import Video
from .processing_deepseek_r1 import PLACEHOLDER_TOKENS, DeepseekR1Processor
from .prompts import encode_messages, encode_prompt
from .rows import RowSchema

__all__ = [
    "PLACEHOLDER_TOKENS",
    "DeepseekR1Processor",
    "RowSchema",
    "Video",
    "encode_messages",
    "encode_prompt",
]
