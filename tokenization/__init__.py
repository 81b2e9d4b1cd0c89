"""What goes in: prompts by the checkpoint's own tokenizer and chat template, and images, videos, sound and rows beside them."""

from .images import Video
from .processing_deepseek_r1 import PLACEHOLDER_TOKENS, DeepseekR1Processor
from .prompts import encode_messages, encode_prompt
from .rows import RowSchema
from .tokenization_deepseek_r1 import DeepseekR1Tokenizer

__all__ = [
    "PLACEHOLDER_TOKENS",
    "DeepseekR1Processor",
    "DeepseekR1Tokenizer",
    "RowSchema",
    "Video",
    "encode_messages",
    "encode_prompt",
]
