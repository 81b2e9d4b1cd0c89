"""What sparse layers are made of: the fields of `sparse_attention`."""

from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub.dataclasses import strict

OWN_LAYER_TYPES = {"local_routed_attention": "num_clusters", "local_global_attention": "global_stride"}
"""Layer types that transformers does not know, each with the field of `SparseAttention` that makes it what it is."""


@strict
@dataclass
class SparseAttention:
    """What a sparse layer keeps besides its window.

    Attributes:
        num_sink_tokens: the first tokens of every document stay visible to all later ones (attention sinks,
            https://arxiv.org/abs/2309.17453); in tokens.
        num_clusters: centroids per key/value head of a routed layer.
        routed_clusters: clusters that each query of a routed layer looks into.
        routed_tokens: the most recent keys that it sees in each of them.
        global_stride: of a local_global layer: beyond the window the last token of every so many stays visible.
        num_memory_tokens: of a local_global layer: learned keys and values without position that every query sees.
    """

    num_sink_tokens: int = 0
    num_clusters: int = 64
    routed_clusters: int = 2
    routed_tokens: int = 256
    global_stride: int = 64
    num_memory_tokens: int = 0

    def validate_counts(self):
        for name in ("num_sink_tokens", "num_memory_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"sparse_attention[{name!r}]={getattr(self, name)} must be 0 or more tokens")
        for name in ("routed_tokens", "global_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"sparse_attention[{name!r}]={getattr(self, name)} must be at least 1")
        if not 1 <= self.routed_clusters <= self.num_clusters:
            raise ValueError(
                f"sparse_attention['routed_clusters']={self.routed_clusters} must lie between 1 and"
                f" num_clusters={self.num_clusters}"
            )


def complete_sparse_attention(value: dict[str, Any] | None, where: str) -> dict[str, Any] | None:
    """`sparse_attention` with all its fields.

    Raises:
        ValueError: not a dictionary, an unknown field; `where` begins the message.
    """
    if value is None:
        return None
    known = SparseAttention.__dataclass_fields__
    if not isinstance(value, dict) or set(value) - set(known):
        raise ValueError(f"{where}sparse_attention={value!r} must be a dictionary with keys among {sorted(known)}")
    return asdict(SparseAttention(**value))
