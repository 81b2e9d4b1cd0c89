"""One pass over a text, with the model that is being converted: the keys of every layer, clustered for routed attention, and where
its queries find what they attend to.

The model runs with the source's own attention. Clusters are made of the directions of its keys before rotation; the maps of the
queries are fitted to the weights that a sample of them gives to the remote keys of each cluster. Gates start at zero, which lets
remote keys count like near ones.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers.initialization import no_init_weights

from ..attention.kmeans import assign_keys, fit_centroids
from ..attention.query_map import cluster_mass, fit_query_map
from ..attention.rotary import rotate
from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..configuration.sparse import OWN_LAYER_TYPES
from ..modeling_deepseek_r1 import DeepseekR1ForCausalLM

WINDOW_TOKENS = 2048
"""Tokens of a calibration window, at least."""
WINDOWS_OF_ATTENTION = 4
"""A calibration window is at least so many attention windows long, so that most of its keys are remote to its last queries."""
SAMPLED_QUERIES = 2048
"""Positions whose queries are looked at, in all windows together."""


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
        clusters = max((config.sparse_attention_of(i).num_clusters for i in _routed_layers(config)), default=0)
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
    """Name of a router's `centroids` or `query_map`."""
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
    widest = max((config.per_layer_config[i].sliding_window or 0) for i in _routed_layers(config))
    return max(WINDOW_TOKENS, min(WINDOWS_OF_ATTENTION * widest, config.max_position_embeddings))


def _routed_layers(config: DeepseekR1TextConfig) -> list[int]:
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


@dataclass
class LayerStates:
    """What one layer makes of the calibration windows, before rotation and in bfloat16.

    Attributes:
        keys: `[G, n, D]` per window.
        queries: `[H, S, D]` per window, at sampled positions.
        positions: `[S]` per window.
        rotation: cosines and sines `[1, n, D]`, or None in a layer without rotation.
    """

    keys: list[torch.Tensor]
    queries: list[torch.Tensor]
    positions: list[torch.Tensor]
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None


def collect_states(
    model: DeepseekR1ForCausalLM, config: DeepseekR1TextConfig, windows: torch.Tensor, seed: int
) -> dict[int, LayerStates]:
    """Keys and sampled queries of the routed layers of `config`, while the model reads the windows `[windows, n]`."""
    generator = torch.Generator().manual_seed(seed)
    collected = {layer_idx: LayerStates([], [], []) for layer_idx in _routed_layers(config)}
    length, sampled = windows.shape[1], -(-SAMPLED_QUERIES // len(windows))

    def keep(attention, args):
        hidden_states, rotation = args[:2]
        layer, states = config.per_layer_config[attention.layer_idx], collected[attention.layer_idx]
        first = layer.sliding_window + config.sparse_attention_of(attention.layer_idx).num_sink_tokens
        positions = first + torch.randperm(max(0, length - first), generator=generator)[:sampled]
        query, key, _ = attention.unrotated(hidden_states)
        states.keys.append(key[0].to(torch.bfloat16))
        states.queries.append(query[0, :, positions].to(torch.bfloat16))
        states.positions.append(positions)
        states.rotation = rotation if attention.uses_rotary else None

    hooks = [model.model.layers[layer_idx].self_attn.register_forward_pre_hook(keep) for layer_idx in collected]
    try:
        with torch.no_grad():
            for window in tqdm(windows, unit="window", desc="calibrating", disable=None):
                model.model(window.unsqueeze(0), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return collected


def fit_routers(
    model: DeepseekR1ForCausalLM, config: DeepseekR1TextConfig, windows: torch.Tensor, seed: int
) -> dict[str, torch.Tensor]:
    """The tensors of `router_tensors(config)`: fitted centroids and query maps, and gates at zero.

    Args:
        model: as `load_plain` makes it.
        config: that of the routed model.
        windows: `[windows, n]` token ids to read.

    Raises:
        ValueError: a text too short for the number of clusters.
    """
    states = collect_states(model, config, windows, seed)
    tensors = {name: torch.zeros(shape) for name, shape in router_tensors(config).items()}
    for layer_idx in tqdm(list(states), unit="layer", desc="clustering", disable=None):
        clusters = config.sparse_attention_of(layer_idx).num_clusters
        own = states.pop(layer_idx)
        centroids = fit_centroids(torch.cat(own.keys, 1).float(), clusters, seed=seed)
        tensors[fitted_name(layer_idx, "centroids")] = centroids
        mass = _remote_mass(own, config, layer_idx, centroids, model.model.layers[layer_idx].self_attn.scaling)
        tensors[fitted_name(layer_idx, "query_map")] = fit_query_map(torch.cat(own.queries, 1).float(), mass, centroids, seed)
    return tensors


def _remote_mass(
    states: LayerStates, config: DeepseekR1TextConfig, layer_idx: int, centroids: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`cluster_mass` of the sampled queries of all windows, `[H, S of all windows, C]`."""
    sparse, window = config.sparse_attention_of(layer_idx), config.per_layer_config[layer_idx].sliding_window
    masses = []
    for key, query, positions in zip(states.keys, states.queries, states.positions, strict=True):
        clusters = assign_keys(key[None], centroids)[0]
        key, query = key.float(), query.float()
        if states.rotation is not None:
            cos, sin = (x.float() for x in states.rotation)
            key, query = rotate(key[None], cos, sin)[0], rotate(query[None], cos[:, positions], sin[:, positions])[0]
        limits = centroids.shape[1], window, sparse.num_sink_tokens
        masses.append(cluster_mass(query, key, clusters, positions, *limits, scaling))
    return torch.cat(masses, 1)
