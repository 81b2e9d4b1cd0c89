"""A static cache: the text of the dynamic one, and decoding steps that are one graph."""

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from tests.models import EXPERT_PATTERNS, PATTERNS, random_ids, tiny_model

DENSE = [name for name in PATTERNS if name not in EXPERT_PATTERNS]


def padded(batch, length, missing):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, :missing] = 0
    return mask


def steps(model, ids, mask, cache, cuts, forward=None):
    """Logits of all tokens, given in pieces; only the first goes past `forward`."""
    parts, done = [], 0
    for cut in cuts:
        run = forward if forward is not None and done else model
        with torch.no_grad():
            parts.append(run(ids[:, done : done + cut], attention_mask=mask[:, done : done + cut], past_key_values=cache).logits)
        done += cut
    return torch.cat(parts, 1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("missing", [0, 6])
@pytest.mark.parametrize("cuts", [[25] + [1] * 15, [3, 1, 1, 1, 13, 1, 20], [1] * 40], ids=str)
def test_steps_equal_one_forward(pattern, missing, cuts):
    ids, mask, cache = random_ids(2, 40), padded(2, 40, missing), None
    model = tiny_model(pattern)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=40)
    actual = steps(model, ids, mask, cache, cuts)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 40 and all(layer.is_closed for layer in cache.layers)


@pytest.mark.parametrize("pattern", DENSE)
@pytest.mark.parametrize("missing", [0, 6])
def test_a_step_is_one_graph(pattern, missing):
    ids, mask = random_ids(2, 40), padded(2, 40, missing)
    model = tiny_model(pattern)
    cache = StaticCache(config=model.config, max_cache_len=48)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
        actual = steps(model, ids, mask, cache, [20] + [1] * 20, compiled)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
