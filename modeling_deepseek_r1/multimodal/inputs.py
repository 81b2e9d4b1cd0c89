"""Names of what goes into a multimodal model, and what comes out of it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..moe.outputs import DeepseekR1CausalLMOutputWithPast
from .alignment import BridgeMemory

ENCODER_INPUTS = {
    "image": ("pixel_values",),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "input_features_mask"),
    "structured": ("row_numeric", "row_categorical", "row_missing"),
}
"""Modality -> names of its inputs; the first one decides whether there are any."""

JOINED_INPUTS = [name for names in ENCODER_INPUTS.values() for name in names]
JOINED_INPUTS += ["mm_token_type_ids", "mm_token_times", "mm_encoder_outputs", "bridge_memory"]
"""What `DeepseekR1Model.join` takes besides ids and their mask."""


@dataclass
class DeepseekR1MultimodalOutput(DeepseekR1CausalLMOutputWithPast):
    """Adds `consistency` `[batch]`, the cosine of each row's text and features (`multimodal/alignment.py`), and the contrastive
    `alignment_loss` before its coefficient; both need the bridge."""

    consistency: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None


class Joined(NamedTuple):
    """Arguments of the text model, and what was seen on the way."""

    arguments: dict[str, torch.Tensor | BridgeMemory | None]
    consistency: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
