"""Tiny random multimodal models, and a batch in which one row has images and a clip, one a video and a table row, one only text."""

import torch
from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig, WhisperConfig

from modeling_deepseek_r1 import DeepseekR1Config, DeepseekR1ForConditionalGeneration

from ..models import random_ids, randomise, tiny_config

PLACEHOLDERS = {"image": 90, "video": 91, "audio": 92, "structured": 93}
SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {
    "dinov2": Dinov2Config(**SIZES, image_size=28, patch_size=7),
    "siglip_vision_model": SiglipVisionConfig(**SIZES, image_size=28, patch_size=7),
    "clip_vision_model": CLIPVisionConfig(**SIZES, image_size=28, patch_size=7),
}
AUDIO = WhisperConfig(
    d_model=16,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_layers=1,
    decoder_attention_heads=2,
    num_mel_bins=8,
    max_source_positions=30,
)


def multimodal_config(pattern="mixed", vision="dinov2", text=None, **fields) -> DeepseekR1Config:
    values = dict(
        vision_config=VISION[vision].to_dict(),
        audio_config=AUDIO.to_dict(),
        structured_config={"num_numeric": 1, "categories": [3, 2]},
        fusion={"hidden_size": 12},
        bridge={"layers": [0, 2], "conflict_hidden_size": 10, "alignment_loss_coef": 0.3},
        vision_downsampling=2,
        **{f"{modality}_token_id": token for modality, token in PLACEHOLDERS.items()},
    )
    return DeepseekR1Config(text_config=tiny_config(pattern, **(text or {})), **{**values, **fields})


def multimodal_model(pattern="mixed", implementation="sdpa", **fields) -> DeepseekR1ForConditionalGeneration:
    torch.manual_seed(0)
    config = multimodal_config(pattern, **fields)
    return randomise(DeepseekR1ForConditionalGeneration._from_config(config, attn_implementation=implementation)).eval()


def mixed_batch(length: int = 40) -> dict[str, torch.Tensor]:
    """Row 0: two images (4 features each) around a clip of 3; row 1, padded on the left: a video of two frames and a row of three
    fields; row 2: text."""
    generator = torch.Generator().manual_seed(1)
    ids = random_ids(3, length, vocab_size=90)
    times = torch.full(ids.shape, -1.0)
    ids[0, 2:6] = ids[0, 20:24] = PLACEHOLDERS["image"]
    ids[0, 8:11], times[0, 8:11] = PLACEHOLDERS["audio"], torch.tensor([0.1, 0.2, 0.3])
    ids[1, 6:10], times[1, 6:10] = PLACEHOLDERS["video"], 0.5
    ids[1, 12:16], times[1, 12:16] = PLACEHOLDERS["video"], 1.5
    ids[1, 17:20] = PLACEHOLDERS["structured"]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_times": times,
        "pixel_values": torch.randn(2, 3, 28, 28, generator=generator),
        "pixel_values_videos": torch.randn(2, 3, 28, 28, generator=generator),
        "input_features": torch.randn(1, 8, 19, generator=generator),
        "input_features_mask": torch.ones(1, 19, dtype=torch.long),
        "row_numeric": torch.randn(1, 1, generator=generator),
        "row_categorical": torch.tensor([[2, 1]]),
        "row_missing": torch.tensor([[0, 0, 1]]),
    }
