"""What a calibration reads, and the model that reads it: the one that is being converted, with the source's own attention."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers.initialization import no_init_weights

from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..configuration.sparse import OWN_LAYER_TYPES
from ..modeling_deepseek_r1 import DeepseekR1ForCausalLM

WINDOW_TOKENS = 2048
"""Tokens of a calibration window, at least."""
WINDOWS_OF_ATTENTION = 4
"""A calibration window is at least so many attention windows long, so that most of its keys are remote to its last queries."""


@dataclass(frozen=True)
class Calibration:
    """What a calibration reads.

    Attributes:
        texts: names of built-in texts (`"prose"`, `"code"`) or paths of UTF-8 files; the beginning of each is used equally.
        tokens: tokens to read in all; default: 16,384, or 256 for every centroid where that is more.
        seed: of the clustering, and of what is random in new experts.
        max_increase: where a pattern is to be found (`layer_types="auto"`), how much the perplexity may rise: 0.03 = 3 %.
        max_cost: instead, or besides, the share of full attention's query-key products that it may cost; of the patterns within
            it the best one is taken.
        tried_tokens: length of the held-out windows, one per text, on which patterns are tried; shorter where a text ends.
    """

    texts: Sequence[str] = ("prose", "code")
    tokens: int | None = None
    seed: int = 0
    max_increase: float | None = None
    max_cost: float | None = None
    tried_tokens: int = 4096

    def tokens_for(self, config: DeepseekR1TextConfig) -> int:
        """Tokens to read for the centroids of a model."""
        if self.tokens is not None:
            return self.tokens
        clusters = max((config.sparse_attention_of(i).num_clusters for i in routed_layers(config)), default=0)
        return max(16384, 256 * clusters)


def as_calibration(value) -> Calibration:
    """A [`Calibration`] from what `convert_checkpoint` accepts."""
    if value is None or isinstance(value, Calibration):
        return value or Calibration()
    return Calibration([value] if isinstance(value, str | os.PathLike) else list(value))


def router_tensors(config: DeepseekR1TextConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the float32 tensors that routed layers add to a model."""
    shapes = {}
    for layer_idx, kind in enumerate(config.layer_types):
        if kind != "local_routed_attention":
            continue
        layer, sparse = config.per_layer_config[layer_idx], config.sparse_attention_of(layer_idx)
        prefix = f"model.layers.{layer_idx}.self_attn.router"
        shapes[f"{prefix}.weight"] = (layer.num_attention_heads, layer.hidden_size)
        shapes[f"{prefix}.bias"] = (layer.num_attention_heads,)
        shapes[f"{prefix}.centroids"] = (layer.num_key_value_heads, sparse.num_clusters, layer.head_dim)
        shapes[f"{prefix}.query_map"] = (layer.num_attention_heads, layer.head_dim, layer.head_dim)
    return shapes


def fitted_name(layer_idx: int, name: str) -> str:
    """Name of a router's tensor in a checkpoint."""
    return f"model.layers.{layer_idx}.self_attn.router.{name}"


def load_plain(
    config: DeepseekR1TextConfig, names: Sequence[str], read: Callable[[str], torch.Tensor]
) -> DeepseekR1ForCausalLM:
    """The model with full attention in place of routed and local_global layers, its weights read one by one."""
    fields = config.to_dict()
    fields["layer_types"] = ["full_attention" if kind in OWN_LAYER_TYPES else kind for kind in config.layer_types]
    with no_init_weights():
        model = DeepseekR1ForCausalLM(DeepseekR1TextConfig.from_dict(fields)).to(config.dtype)
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name in names:
            targets[name].copy_(read(name))
    model.tie_weights()
    # Built without initialisation, the rotary frequencies still have to be computed.
    for module in model.model.rotary_embs:
        model._init_weights(module)
    return model.eval().requires_grad_(False)


def window_tokens(config: DeepseekR1TextConfig) -> int:
    """Length of the calibration windows for a model."""
    widest = max((config.per_layer_config[i].sliding_window or 0) for i in routed_layers(config))
    return max(WINDOW_TOKENS, min(WINDOWS_OF_ATTENTION * widest, config.max_position_embeddings))


def routed_layers(config: DeepseekR1TextConfig) -> list[int]:
    """Numbers of the routed layers."""
    return [layer_idx for layer_idx, kind in enumerate(config.layer_types) if kind == "local_routed_attention"]


def text_windows(
    tokenizer, calibration: Calibration, tokens: int, length: int = WINDOW_TOKENS
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Windows `[windows, length]`, equally many from each text, and what follows in each text, `[tokens_held_out]`.

    Raises:
        ValueError: a text that is too short for one window.
    """
    from ..evaluation.text import encode_text, read_text

    per_text = max(1, tokens // length // len(calibration.texts))
    windows, held_out = [], []
    for name in calibration.texts:
        text = read_text([name])
        # Roughly four characters a token; encoding a whole book for its first pages would be a waste.
        ids = encode_text(tokenizer, text[: (per_text * length + calibration.tried_tokens) * 12])
        count = min(per_text, len(ids) // length)
        if not count:
            raise ValueError(f"calibration text {name!r} has {len(ids)} tokens; at least {length} are needed")
        windows.append(ids[: count * length].view(count, length))
        held_out.append(ids[count * length :][: calibration.tried_tokens])
    return torch.cat(windows), held_out
