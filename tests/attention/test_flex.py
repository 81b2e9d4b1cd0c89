"""flex_attention against the reference, as a dense function; compiled once, in a slow test."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import DynamicCache

from modeling_deepseek_r1.attention import flex
from modeling_deepseek_r1.attention.pattern import AttentionPattern
from modeling_deepseek_r1.attention.reference import layer_reference
from tests.attention.test_bidirectional import places
from tests.attention.test_flash import PATTERNS, problem
from tests.models import random_ids, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
BOTH_SIDES = [AttentionPattern(9, 5, causal=False), AttentionPattern(9, 5, global_stride=4, causal=False)]
BOTH_SIDES += [AttentionPattern(9, 3, 2, 4, causal=False)]
MODELS = ["full", "sinks", "routed", "global"]


@pytest.fixture
def dense(monkeypatch):
    monkeypatch.setattr(flex, "compiled_flex", lambda device_type: flex_attention)


@pytest.mark.parametrize("pattern", [*PATTERNS, *BOTH_SIDES])
def test_a_pattern_is_the_reference(pattern, dense):
    states, routing = problem(pattern, 300, 300)
    with torch.no_grad():
        expected = layer_reference(*states, pattern, 0.3, places(300), routing)[0]
        actual = flex.flex_pattern_attention(*states, pattern, 0.3, (*places(300), None, None), routing)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_blocks_that_nobody_sees_are_left_out():
    pattern = AttentionPattern(100, 5)
    local = flex._local(pattern, (*places(1000, 1), None, None), None, None)
    mask = flex.block_mask(local, 1, 1, 1000, 1000, torch.device("cpu"))
    seen = mask.to_dense()[0, 0].bool()
    q, k = torch.arange(8)[:, None], torch.arange(8)
    assert torch.equal(seen, (k == q) | (k == q - 1) | (k == 0))
    assert not mask.full_kv_num_blocks.any()
    full = flex._local(AttentionPattern(), (*places(1000, 1), None, None), None, None)
    assert flex.block_mask(full, 1, 1, 1000, 1000, torch.device("cpu")).full_kv_num_blocks[0, 0].tolist() == list(range(8))


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_padding_packing_and_cache(name, both_sides, dense):
    fields = {"use_bidirectional_attention": both_sides}
    reference, model = tiny_model(name, "eager", **fields), tiny_model(name, "flex_attention", **fields)
    ids, mask = random_ids(2, 45), torch.ones(2, 45, dtype=torch.long)
    mask[0, :17] = mask[1, 40:] = 0
    real, seq_idx = mask.bool(), (torch.arange(45) // 20)[None].expand(2, -1)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask).logits[real]
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], expected, rtol=1e-4, atol=1e-5)
        expected = reference(ids, seq_idx=seq_idx).logits
        torch.testing.assert_close(model(ids, seq_idx=seq_idx).logits, expected, rtol=1e-4, atol=1e-5)
        expected, cache = reference(ids).logits, DynamicCache()
        if both_sides:
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
            return
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([20, 22, 3], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


def test_gradients_on_a_cpu_are_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(flex, "compiled_flex", lambda device_type: pytest.fail("it ran"))
    with pytest.raises(NotImplementedError, match="no gradients on a CPU; wrap the call in torch.no_grad"):
        tiny_model("sinks", "flex_attention")(random_ids(1, 20))


@pytest.mark.full
@pytest.mark.slow
def test_compiled_it_gives_the_same():
    for name, lengths in (("sinks", (150, 200)), ("global", (150,))):
        reference, model = tiny_model(name, "eager"), tiny_model(name, "flex_attention")
        for length in lengths:
            ids = random_ids(1, length)
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [*PATTERNS, *BOTH_SIDES])
def test_training_on_a_gpu(pattern):
    from tests.attention.test_flash import assert_agree

    states, routing = problem(pattern, 300, 300, device="cuda")
    where = [x.cuda() for x in places(300)]
    expected = layer_reference(*states, pattern, 0.3, where, routing)[0]
    actual = flex.flex_pattern_attention(*states, pattern, 0.3, (*where, None, None), routing)
    assert_agree(actual, expected, states, routing, tolerance=1e-2)
