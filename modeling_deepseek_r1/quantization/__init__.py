"""Weights in few bits: rounding, calibration, what is stored and how it is loaded again."""

from .quantizer import DeepseekR1QuantizationConfig, register

__all__ = ["DeepseekR1QuantizationConfig", "register"]
