"""Likelihoods of tokens under any transformers causal language model, without ever holding `[seq, vocab]` for a long text.

The base model runs once and returns hidden states; the output embedding is applied to a few positions at a time. Models that
do more than one matrix product after the last hidden state (soft-capped or scaled logits) are found by `check_output_head`.
"""

import torch
from torch import nn

POSITIONS_PER_CHUNK = 256
_CHECKED_TOKENS = 8


def hidden_states(model, input_ids: torch.Tensor, past_key_values=None, use_cache: bool = False):
    """One forward of the base model.

    Args:
        input_ids: `[batch, seq]`, on the model's device; no padding.
        past_key_values: cache of the tokens before, extended in place by models that use transformers' caches.

    Returns:
        `(hidden [batch, seq, hidden_size], past_key_values or None)`.

    Raises:
        ValueError: the model has no separate base model that returns hidden states.
    """
    base = model.base_model
    if base is model:
        raise ValueError(f"{type(model).__name__} has no base model (model.base_model is the model itself)")
    output = base(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ValueError(f"{type(base).__name__}, the base model of {type(model).__name__}, returns no last_hidden_state")
    return hidden, getattr(output, "past_key_values", None)


def next_token_logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """Float32 logits `[..., vocab]` of the token after each of `hidden` `[..., hidden_size]`."""
    return model.get_output_embeddings()(hidden).float()


def token_nll(
    model, hidden: torch.Tensor, targets: torch.Tensor, positions_per_chunk: int = POSITIONS_PER_CHUNK
) -> torch.Tensor:
    """Negative log-likelihood of `targets[b, t]` given `hidden[b, t]`, in nats and float32.

    Args:
        hidden: `[batch, seq, hidden_size]`.
        targets: `[batch, seq]` token ids, already shifted by the caller: `targets[:, t]` follows position `t`.
        positions_per_chunk: positions of the flattened `batch * seq` whose logits exist at the same time.

    Returns:
        `[batch, seq]`.
    """
    if positions_per_chunk < 1:
        raise ValueError(f"positions_per_chunk={positions_per_chunk} must be 1 or more")
    flat_hidden, flat_targets = hidden.flatten(0, 1), targets.flatten()
    losses = torch.empty(flat_targets.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, flat_targets.numel(), positions_per_chunk):
        chunk = slice(start, start + positions_per_chunk)
        logits = next_token_logits(model, flat_hidden[chunk])
        losses[chunk] = nn.functional.cross_entropy(logits, flat_targets[chunk], reduction="none")
    return losses.view_as(targets)


@torch.no_grad()
def check_output_head(model, input_ids: torch.Tensor) -> None:
    """Compares output embedding times hidden state with the model's own logits on the first tokens of `input_ids` `[tokens]`.

    Raises:
        ValueError: they differ, so that likelihoods computed in chunks would be wrong for this model.
    """
    sample = input_ids[:_CHECKED_TOKENS].unsqueeze(0).to(model.device)
    expected = model(input_ids=sample, use_cache=False).logits.float()
    actual = next_token_logits(model, hidden_states(model, sample)[0])
    scale = expected.abs().max().clamp_min(1e-6)
    if actual.shape != expected.shape or (actual - expected).abs().max() > 1e-2 * scale:
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output embedding (for instance by scaling or soft-capping); "
            "evaluation in chunks does not support it"
        )


def model_context_limit(model) -> int | None:
    """Positions that the model was built for, in tokens; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
