"""What a model is: configuration classes, the preset table and the layer-pattern notation. Imports no torch code of its own."""

from .configuration_deepseek_r1 import DeepseekR1TextConfig, ExpertRouting, SparseAttention
from .configuration_multimodal import MODALITIES, Bridge, DeepseekR1Config, Fusion, Structured
from .presets import LAYER_LETTERS, PRESETS, expand_layer_pattern, preset_fields

__all__ = [
    "LAYER_LETTERS",
    "MODALITIES",
    "PRESETS",
    "Bridge",
    "DeepseekR1Config",
    "DeepseekR1TextConfig",
    "ExpertRouting",
    "Fusion",
    "SparseAttention",
    "Structured",
    "expand_layer_pattern",
    "preset_fields",
]
