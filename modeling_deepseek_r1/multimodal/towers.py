"""Encoders of images and sound, from transformers' own classes, and what the text model reads of them.

Shapes: I images, P patches, A clips, F mel frames (10 ms each), S positions of the audio encoder (20 ms each), D encoder width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

LEADING_TOKENS = {"dinov2": 1, "clip_vision_model": 1, "siglip_vision_model": 0}
"""Tokens before the patches in the encoder's last hidden state."""


class VisionTower(nn.Module):
    """A vision transformer without what it has besides patches.

    Args:
        config: of type dinov2, siglip_vision_model or clip_vision_model.
    """

    def __init__(self, config):
        super().__init__()
        self.leading = LEADING_TOKENS[config.model_type]
        self.patch_size = config.patch_size
        self.encoder = AutoModel.from_config(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of `[I, 3, height, width]` as a grid `[I, D, rows, columns]`."""
        rows, columns = (size // self.patch_size for size in pixel_values.shape[-2:])
        pixel_values = pixel_values.to(next(self.encoder.parameters()).dtype)
        patches = self.encoder(pixel_values=pixel_values).last_hidden_state[:, self.leading :]
        return patches.transpose(1, 2).unflatten(-1, (rows, columns))


class AudioTower(nn.Module):
    """Whisper's encoder (https://arxiv.org/abs/2212.04356) over clips of any length up to its own.

    The original wants 30 s and takes what is missing for silence. Here the table of positions is cut to the longest clip, and
    padding behind shorter ones is hidden, so that a clip costs what its length costs and gives the same alone and in a batch.

    Args:
        config: a Whisper configuration.
    """

    def __init__(self, config):
        super().__init__()
        self.encoder = WhisperEncoder(config)
        self.max_frames = 2 * config.max_source_positions

    def forward(self, input_features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Features `[A, S, D]`, S = ceil(F / 2), of log-mel spectra `[A, mel bins, F]` of which `lengths` `[A]` frames are real.

        Raises:
            ValueError: more frames than the encoder has positions for.
        """
        if input_features.shape[-1] > self.max_frames:
            raise ValueError(
                f"input_features have {input_features.shape[-1]} frames; the audio encoder reads at most {self.max_frames}"
            )
        encoder = self.encoder
        frames = torch.arange(input_features.shape[-1], device=input_features.device) < lengths[:, None]
        hidden = F.gelu(encoder.conv1(input_features.to(encoder.conv1.weight.dtype) * frames[:, None]))
        # Beyond its end a clip must look like the zeros that the convolution puts around a whole one.
        hidden = F.gelu(encoder.conv2(hidden * frames[:, None])).transpose(1, 2)
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
        real = frames[:, ::2]
        mask = torch.zeros(real.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(
            ~real, torch.finfo(hidden.dtype).min
        )
        mask = None if bool(real.all()) else mask[:, None, None, :].expand(-1, -1, hidden.shape[1], -1)
        for layer in encoder.layers:
            output = layer(hidden, mask)
            hidden = output[0] if isinstance(output, tuple) else output
        return encoder.layer_norm(hidden)
