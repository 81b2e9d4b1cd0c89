"""Hybrid-attention language models for transformers, made from the checkpoints that people already have.

Importing this package registers its models with transformers' Auto classes.
"""

from .configuration import DeepseekR1Config, DeepseekR1TextConfig
from .modeling_deepseek_r1 import (
    DeepseekR1ForCausalLM,
    DeepseekR1ForQuestionAnswering,
    DeepseekR1ForSequenceClassification,
    DeepseekR1ForTokenClassification,
    DeepseekR1TextModel,
)
from .modeling_multimodal import DeepseekR1ForConditionalGeneration, DeepseekR1Model
from .quantization import DeepseekR1QuantizationConfig
from .quantization import register as register_quantization
from .registration import register
from .tokenization.processing_deepseek_r1 import DeepseekR1Processor
from .tokenization.tokenization_deepseek_r1 import DeepseekR1Tokenizer

__version__ = "0.1.0"

register()
register_quantization()

__all__ = [
    "DeepseekR1Config",
    "DeepseekR1ForCausalLM",
    "DeepseekR1ForConditionalGeneration",
    "DeepseekR1ForQuestionAnswering",
    "DeepseekR1ForSequenceClassification",
    "DeepseekR1ForTokenClassification",
    "DeepseekR1Model",
    "DeepseekR1Processor",
    "DeepseekR1QuantizationConfig",
    "DeepseekR1TextConfig",
    "DeepseekR1TextModel",
    "DeepseekR1Tokenizer",
]
