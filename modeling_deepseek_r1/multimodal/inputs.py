"""Names of what goes into a multimodal model, and what comes out of it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..moe.outputs import DeepseekR1CausalLMOutputWithPast
from .alignment import BridgeMemory

ENCODER_INPUTS = {
    "image": ("pixel_values",),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "input_features_mask"),
    "structured": ("row_numeric", "row_categorical", "row_missing"),
    "video_sound": ("video_sound_features", "video_sound_features_mask", "video_sound_spans"),
}
"""Modality -> names of its inputs; the first one decides whether there are any."""

ALIGNED = {"video_sound": "video"}
"""What has no placeholders of its own -> the modality whose placeholders it shares."""

JOINED_INPUTS = [name for names in ENCODER_INPUTS.values() for name in names]
JOINED_INPUTS += ["mm_token_type_ids", "mm_token_times", "mm_encoder_outputs", "bridge_memory"]
"""What `DeepseekR1Model.join` takes besides ids and their mask."""


@dataclass
class DeepseekR1MultimodalOutput(DeepseekR1CausalLMOutputWithPast):
    """Adds `consistency` `[batch]`, the cosine of each row's text and features (`multimodal/alignment.py`), and the contrastive
    `alignment_loss` before its coefficient; both need the bridge."""

    consistency: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None


def encoded_features(outputs: dict[str, BaseModelOutputWithPooling]) -> dict[str, torch.Tensor]:
    """`[N, hidden]` of each modality."""
    return {modality: output["pooler_output"].flatten(0, -2) for modality, output in outputs.items()}


def span_means(features: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """`[N, H]` means of `features` `[M, H]` from each first to before each second number of `spans` `[N, 2]`; zeros where these are
    equal."""
    sums = nn.functional.pad(features.float().cumsum(0), (0, 0, 1, 0))
    first, last = spans.unbind(1)
    return ((sums[last] - sums[first]) / (last - first).clamp(min=1)[:, None]).to(features)


class Joined(NamedTuple):
    """Arguments of the text model, and what was seen on the way."""

    arguments: dict[str, torch.Tensor | BridgeMemory | None]
    consistency: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None
