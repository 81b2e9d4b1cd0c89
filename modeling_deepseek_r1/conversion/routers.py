"""Fits routed layers in one pass over a text.

Clusters are made of the directions of the model's keys before rotation. The maps by which queries choose clusters, and the gates,
follow from what a sample of the queries attends to (`attention/fitting.py`).
"""

from typing import NamedTuple

import torch
from tqdm import tqdm

from ..attention.fitting import cluster_mass, fit_query_map, gate_bias, gate_errors
from ..attention.kmeans import assign_keys, choose_clusters, fit_centroids
from ..attention.layer import layer_pattern
from ..attention.pattern import AttentionPattern, remote_keys, visible_keys
from ..attention.rotary import rotate
from ..configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from ..modeling_deepseek_r1 import DeepseekR1ForCausalLM
from .calibrate import fitted_name, routed_layers, router_tensors

SAMPLED_QUERIES = 1024
"""Positions whose queries are looked at, in all windows together."""
GATE_SHARE = 4
"""One of so many sampled queries is enough to fit gates, which have one number per head."""


class WindowStates(NamedTuple):
    """What one layer makes of one calibration window, before rotation and in bfloat16.

    Attributes:
        query: `[H, S, D]`, at sampled positions.
        key, value: `[G, n, D]`.
        positions: `[S]`.
        rotation: cosines and sines `[1, n, D]`, or None in a layer without rotation.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor] | None

    def sample(self, share: int) -> "WindowStates":
        """With one of `share` queries."""
        return self._replace(query=self.query[:, ::share], positions=self.positions[::share])

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as attention multiplies them, float32."""
        query, key = self.query.float(), self.key.float()
        if self.rotation is None:
            return query, key
        cos, sin = (angles.float() for angles in self.rotation)
        return rotate(query[None], cos[:, self.positions], sin[:, self.positions])[0], rotate(key[None], cos, sin)[0]


def collect_states(
    model: DeepseekR1ForCausalLM, config: DeepseekR1TextConfig, windows: torch.Tensor, seed: int
) -> dict[int, list[WindowStates]]:
    """Layer -> states of the routed layers of `config`, while the model reads the windows `[windows, n]`."""
    generator = torch.Generator().manual_seed(seed)
    collected: dict[int, list[WindowStates]] = {layer_idx: [] for layer_idx in routed_layers(config)}
    length, sampled = windows.shape[1], -(-SAMPLED_QUERIES // len(windows))

    def keep(attention, args):
        pattern = layer_pattern(config, attention.layer_idx)
        first = pattern.window + pattern.num_sink_tokens
        positions = first + torch.randperm(max(0, length - first), generator=generator)[:sampled]
        query, key, value = (states[0].to(torch.bfloat16) for states in attention.unrotated(args[0]))
        rotation = args[1] if attention.uses_rotary else None
        collected[attention.layer_idx].append(WindowStates(query[:, positions], key, value, positions, rotation))

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
    """The tensors of `router_tensors(config)`. The gates' weights are zero: a fitted gate does not depend on the token.

    Args:
        model: as `load_plain` makes it.
        config: that of the routed model.
        windows: `[windows, n]` token ids to read.

    Raises:
        ValueError: a text too short for the number of clusters.
    """
    collected = collect_states(model, config, windows, seed)
    tensors = {name: torch.zeros(shape) for name, shape in router_tensors(config).items()}
    for layer_idx in tqdm(list(collected), unit="layer", desc="clustering", disable=None):
        pattern, clusters = layer_pattern(config, layer_idx), config.sparse_attention_of(layer_idx).num_clusters
        scaling = model.model.layers[layer_idx].self_attn.scaling
        for name, tensor in _fit(collected.pop(layer_idx), pattern, clusters, scaling, seed).items():
            tensors[fitted_name(layer_idx, name)] = tensor
    return tensors


def _fit(
    windows: list[WindowStates], pattern: AttentionPattern, num_clusters: int, scaling: float, seed: int
) -> dict[str, torch.Tensor]:
    """Centroids, query map and gate bias of one layer."""
    centroids = fit_centroids(torch.cat([window.key for window in windows], 1).float(), num_clusters, seed=seed)
    clusters = [assign_keys(window.key[None], centroids) for window in windows]
    limits = num_clusters, pattern.window, pattern.num_sink_tokens, scaling
    masses = [
        cluster_mass(*window.rotated(), own[0], window.positions, *limits)
        for window, own in zip(windows, clusters, strict=True)
    ]
    queries = torch.cat([window.query for window in windows], 1).float()
    query_map = fit_query_map(queries, torch.cat(masses, 1), centroids, seed)
    errors = torch.zeros(())
    for window, own in zip((window.sample(GATE_SHARE) for window in windows), clusters, strict=True):
        chosen = choose_clusters(window.query[None], centroids, pattern.routed_clusters, query_map)
        places = window.positions[None], torch.arange(window.key.shape[1])[None]
        local, remote = visible_keys(pattern, *places)[0], remote_keys(pattern, chosen, own, *places)[0]
        errors = errors + gate_errors(*window.rotated(), window.value, local, remote, window.positions, scaling)
    return {"centroids": centroids, "query_map": query_map, "bias": gate_bias(errors)}
