"""What a model is: configuration classes, the preset table and the layer-pattern notation. Imports no torch code of its own."""

from .configuration_deepseek_r1 import DeepseekR1TextConfig, ExpertRouting, SparseAttention
from .presets import LAYER_LETTERS, PRESETS, expand_layer_pattern, preset_fields

__all__ = [
    "LAYER_LETTERS",
    "PRESETS",
    "DeepseekR1TextConfig",
    "ExpertRouting",
    "SparseAttention",
    "expand_layer_pattern",
    "preset_fields",
]
