"""Losses of one document that may be longer than the model was trained for."""

import torch

from .scoring import POSITIONS_PER_CHUNK, check_output_head, hidden_states, token_nll


@torch.no_grad()
def document_losses(
    model, input_ids: torch.Tensor, cache=None, *, positions_per_chunk: int = POSITIONS_PER_CHUNK
) -> torch.Tensor:
    """Negative log-likelihood of every token of one document but the first, in nats.

        document_losses(model, ids, SegmentedCache(model.config, segment_length=8192, overlap=4096)).mean().exp()

    Args:
        model: a transformers causal language model, in evaluation mode.
        input_ids: `[tokens]`, at least two.
        cache: an empty cache to read it with, e.g. a `generation.SegmentedCache` of this library's models; None: all at once.
        positions_per_chunk: positions whose logits exist at the same time.

    Returns:
        `[tokens - 1]` float32.

    Raises:
        ValueError: too few tokens or another shape, a cache that has read something, or a model that does not fit
            `check_output_head`.
    """
    if input_ids.dim() != 1 or len(input_ids) < 2:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; it must be [tokens] with at least 2 tokens")
    if cache is not None and cache.get_seq_length():
        raise ValueError(f"the cache holds {cache.get_seq_length()} tokens already; pass an empty one")
    check_output_head(model, input_ids)
    ids = input_ids.to(model.device)[None]
    hidden, _ = hidden_states(model, ids, cache, use_cache=cache is not None)
    return token_nll(model, hidden[:, :-1], ids[:, 1:], positions_per_chunk)[0].cpu()
