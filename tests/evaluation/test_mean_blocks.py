"""The baseline of blocks chosen by mean key: against a written-out loop, and inside a transformers model."""

import copy

import pytest
import torch
from conftest import make_llama

from modeling_deepseek_r1.attention.pattern import AttentionPattern
from modeling_deepseek_r1.attention.routed import routed_attention
from modeling_deepseek_r1.evaluation.mean_blocks import block_routing, use_mean_blocks


def by_loop(query, key, value, window, sinks, blocks, block):
    """One query after the other, as the definition reads."""
    output = torch.empty_like(query)
    heads, groups, length = query.shape[1], key.shape[1], key.shape[2]
    for head in range(heads):
        keys, values = key[0, head // (heads // groups)], value[0, head // (heads // groups)]
        for i in range(length):
            far = [start for start in range(0, length, block) if start <= i - window]
            scores = {start: float(query[0, head, i] @ keys[start : start + block].mean(0)) for start in far}
            chosen = sorted(far, key=lambda start: -scores[start])[:blocks]
            seen = [
                j
                for j in range(i + 1)
                if j > i - window or j < sinks or any(start <= j < start + block for start in chosen) and j <= i - window
            ]
            weights = (keys[seen] @ query[0, head, i] * 0.5).softmax(-1)
            output[0, head, i] = weights @ values[seen]
    return output


@pytest.mark.parametrize("length", [1, 9, 64, 83])
def test_blocks_are_the_ones_whose_mean_fits_best(length):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 4, generator=generator) for heads in (4, 2, 2))
    pattern = AttentionPattern(8, 3, 2, 8)
    actual = routed_attention(query, key, value, block_routing(query, key, pattern, 8), pattern, 0.5)
    torch.testing.assert_close(actual, by_loop(query, key, value, 8, 3, 2, 8), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_in_a_transformers_model_with_and_without_cache():
    dense = make_llama().eval()
    ids = torch.randint(3, dense.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(0))
    every_block, sparse = copy.deepcopy(dense), copy.deepcopy(dense)
    use_mean_blocks(every_block, window=8, num_sink_tokens=2, blocks=8, block_tokens=8)
    torch.testing.assert_close(every_block(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    use_mean_blocks(sparse, window=8, num_sink_tokens=2, blocks=1, block_tokens=8)
    at_once = sparse(ids).logits
    assert (at_once - dense(ids).logits).abs().max() > 1e-3
    first = sparse(ids[:, :50], use_cache=True)
    steps = sparse(ids[:, 50:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat((first.logits, steps), 1), at_once, rtol=1e-4, atol=1e-4)


def test_padding_is_refused():
    model = make_llama()
    use_mean_blocks(model, window=8, num_sink_tokens=2, blocks=1)
    attention = model.config._attn_implementation
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    state = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="has no padding"):
        ALL_ATTENTION_FUNCTIONS[attention](None, state, state, state, torch.ones(1), scaling=1.0)
