"""Existing checkpoints into this library's, and back."""

from .calibrate import Calibration
from .compose import compose_checkpoint
from .convert import convert_checkpoint
from .export import export_checkpoint
from .report import ConversionReport
from .to_dense import to_dense

__all__ = ["Calibration", "ConversionReport", "compose_checkpoint", "convert_checkpoint", "export_checkpoint", "to_dense"]
