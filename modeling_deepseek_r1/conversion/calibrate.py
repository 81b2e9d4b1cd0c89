"""One pass over a text, with the model that is being converted: the keys of every layer, clustered for routed attention.

The model runs with the source's own attention. Its keys before rotation are clustered by their directions, query centroids are
fitted to what its queries attend to (`query_centroids.py`), and gates to what its layers add then (`remote_gates.py`).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers.initialization import no_init_weights

from ..attention.kmeans import fit_centroids
from ..attention.layer import layer_pattern
from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..configuration.sparse import OWN_LAYER_TYPES
from ..modeling_deepseek_r1 import DeepseekR1ForCausalLM
from .query_centroids import fit_query_centroids, remote_shares
from .recorded import record, sampled_positions
from .remote_gates import fit_gate_bias, remote_errors

WINDOW_TOKENS = 8192
"""Tokens of a calibration window, long enough for queries to have more remote keys than they may see."""
SHORT_WINDOW_TOKENS = 2048
"""The least that is read, of a shorter text or by a model that knows no longer ones."""


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
        routed = [i for i, kind in enumerate(config.layer_types) if kind == "local_routed_attention"]
        clusters = max((config.sparse_attention_of(i).num_clusters for i in routed), default=0)
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
        prefix = router_prefix(layer_idx)
        shapes[f"{prefix}.weight"] = (layer.num_attention_heads, layer.hidden_size)
        shapes[f"{prefix}.bias"] = (layer.num_attention_heads,)
        shapes[f"{prefix}.centroids"] = (layer.num_key_value_heads, sparse.num_clusters, layer.head_dim)
        shapes[f"{prefix}.query_centroids"] = (layer.num_attention_heads, sparse.num_clusters, layer.head_dim)
    return shapes


def router_prefix(layer_idx: int) -> str:
    return f"model.layers.{layer_idx}.self_attn.router"


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


def text_windows(
    tokenizer, calibration: Calibration, tokens: int, longest: int = WINDOW_TOKENS
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Windows `[windows, n]` for the centroids, equally many from each text, and what follows in each text, `[tokens_held_out]`.

    Args:
        tokens: to read in all.
        longest: context that the model knows.

    Raises:
        ValueError: a text that is too short for one window.
    """
    from ..evaluation.text import encode_text, read_text

    share = max(WINDOW_TOKENS, tokens // len(calibration.texts))
    # Roughly four characters a token; encoding a whole book for its first pages would be a waste.
    limit = (share + calibration.tried_tokens) * 12
    texts = {name: encode_text(tokenizer, read_text([name])[:limit]) for name in calibration.texts}
    length, most = WINDOW_TOKENS, min(longest, tokens // len(texts), *map(len, texts.values()))
    while length > max(most, SHORT_WINDOW_TOKENS):
        length //= 2
    windows, held_out = [], []
    for name, ids in texts.items():
        count = min(max(1, tokens // length // len(texts)), len(ids) // length)
        if not count:
            raise ValueError(f"calibration text {name!r} has {len(ids)} tokens; at least {length} are needed")
        windows.append(ids[: count * length].view(count, length))
        held_out.append(ids[count * length :][: calibration.tried_tokens])
    return torch.cat(windows), held_out


def fit_routers(
    model: DeepseekR1ForCausalLM, config: DeepseekR1TextConfig, windows: torch.Tensor, seed: int
) -> dict[str, torch.Tensor]:
    """The tensors of `router_tensors(config)`: fitted centroids, query centroids and biases of the gates; their weights are zero.

    Args:
        model: as `load_plain` makes it.
        config: that of the routed model.
        windows: `[windows, n]` token ids to read.

    Raises:
        ValueError: a text too short for the number of clusters.
    """
    routed = [layer_idx for layer_idx, kind in enumerate(config.layer_types) if kind == "local_routed_attention"]
    patterns = {layer_idx: layer_pattern(config, layer_idx) for layer_idx in routed}
    count, length = windows.shape
    positions = {layer_idx: sampled_positions(patterns[layer_idx], length, count, seed) for layer_idx in routed}
    recorded = record(model, positions, tqdm(windows, unit="window", desc="calibrating", disable=None))
    tensors = {name: torch.zeros(shape) for name, shape in router_tensors(config).items() if name.endswith("weight")}
    for layer_idx in tqdm(routed, unit="layer", desc="clustering", disable=None):
        own, clusters = recorded.pop(layer_idx), config.sparse_attention_of(layer_idx).num_clusters
        centroids = fit_centroids(torch.cat(own.keys, 1).float(), clusters, seed=seed)
        layer = patterns[layer_idx], bool(config.no_rope_layers[layer_idx])
        query_centroids = fit_query_centroids(*remote_shares(own, centroids, *layer), centroids, seed)
        projection = model.model.layers[layer_idx].self_attn.o_proj.weight
        errors = remote_errors(own, centroids, query_centroids, *layer, projection)
        fitted = {"centroids": centroids, "query_centroids": query_centroids, "bias": fit_gate_bias(errors)}
        tensors |= {f"{router_prefix(layer_idx)}.{name}": tensor for name, tensor in fitted.items()}
    return tensors
