"""Weights in few bits: rounding, calibration, what is stored and how it is loaded again.

`import modeling_deepseek_r1` imports what `from_pretrained` needs; `run.py` has `quantize_model` and `quantize_checkpoint`.
"""

from .quantizer import DeepseekR1QuantizationConfig, register

__all__ = ["DeepseekR1QuantizationConfig", "register"]
