"""The usual alternative to routed attention, as a baseline: window, sink tokens, and the blocks of keys whose mean fits best.

A query sees, besides the local set, the `blocks` blocks of consecutive keys with the largest dot product between the query and
the mean key, both rotated (MoBA, https://arxiv.org/abs/2502.13189; Quest and InfLLM choose by similar summaries). Computed by the
kernels of routed attention, a block being a cluster, so that the two are compared on equal terms.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from ..attention.pattern import AttentionPattern
from ..attention.routed import Routing, routed_attention

BLOCK_TOKENS = 64
_QUERIES_AT_ONCE = 1024


def mean_block_scores(query: torch.Tensor, key: torch.Tensor, block_tokens: int = BLOCK_TOKENS) -> torch.Tensor:
    """Dot products `[B, H, Q, N]` of queries `[B, H, Q, D]` with the mean keys of N blocks of keys `[B, G, K, D]`."""
    batch, groups, length, size = key.shape
    blocks = -(-length // block_tokens)
    sums = key.new_zeros(batch, groups, blocks * block_tokens, size, dtype=torch.float32)
    sums[:, :, :length] = key
    counts = (length - torch.arange(blocks, device=key.device) * block_tokens).clamp(max=block_tokens)
    means = sums.unflatten(2, (blocks, block_tokens)).sum(3) / counts[:, None]
    return (query.float().unflatten(1, (groups, -1)) @ means.transpose(2, 3)[:, :, None]).flatten(1, 2)


def block_routing(
    query: torch.Tensor, key: torch.Tensor, pattern: AttentionPattern, block_tokens: int = BLOCK_TOKENS
) -> Routing:
    """Blocks as clusters, for the last Q of K tokens; `pattern.routed_clusters` is the number of blocks that a query sees."""
    length, queries = key.shape[2], query.shape[2]
    positions = torch.arange(length, device=key.device)
    blocks = -(-length // block_tokens)
    # A block whose keys are all in the window (or later) has nothing to offer; the number `blocks` stands for none.
    first_keys = torch.arange(blocks, device=key.device) * block_tokens
    chosen = []
    for start in range(0, queries, _QUERIES_AT_ONCE):
        part = slice(start, min(queries, start + _QUERIES_AT_ONCE))
        scores = mean_block_scores(query[:, :, part], key, block_tokens)
        near = first_keys > positions[length - queries :][part, None] - pattern.window
        scores = scores.masked_fill(near, float("-inf"))
        best = scores.topk(min(pattern.routed_clusters, blocks), -1)
        chosen.append(best.indices.masked_fill(best.values.isinf(), blocks))
    key_clusters = (positions // block_tokens).expand(*key.shape[:3])
    return Routing(torch.cat(chosen, 2), key_clusters.contiguous(), query.new_zeros(query.shape[:3], dtype=torch.float32))


def use_mean_blocks(model, *, window: int, num_sink_tokens: int, blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
    """Lets every layer of a transformers model with full attention attend by mean blocks, through its attention interface.

    Args:
        model: such as `LlamaForCausalLM`; one unpadded sequence, or equally long ones, per forward.
        window, num_sink_tokens: the local set.
        blocks: blocks per query and head, each of `block_tokens` keys.

    Raises:
        ValueError: the implementation is called with an attention mask.
    """
    pattern = AttentionPattern(window, num_sink_tokens, blocks, block_tokens)

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        if attention_mask is not None:
            raise ValueError("mean-block attention has no padding; give sequences of one length without a mask")
        routing = block_routing(query, key, pattern, block_tokens)
        return routed_attention(query, key, value, routing, pattern, scaling).transpose(1, 2), None

    name = f"mean_blocks_{window}_{num_sink_tokens}_{blocks}_{block_tokens}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    model.set_attn_implementation(name)
