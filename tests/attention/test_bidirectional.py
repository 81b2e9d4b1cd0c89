"""Attention to both sides: the definition, every implementation against the reference, and what a model makes of it."""

import pytest
import torch
from transformers import DynamicCache

from modeling_deepseek_r1 import DeepseekR1ForSequenceClassification, DeepseekR1TextModel
from modeling_deepseek_r1.attention.pattern import AttentionPattern, remote_keys, visible_keys, visible_nodes
from modeling_deepseek_r1.attention.ragged import document_attention
from modeling_deepseek_r1.attention.reference import layer_reference
from tests.attention.test_flash import assert_agree, problem
from tests.models import random_ids, randomise, tiny_config, tiny_model

PATTERNS = [
    AttentionPattern(causal=False),
    AttentionPattern(9, causal=False),
    AttentionPattern(9, 5, causal=False),
    AttentionPattern(40, 30, causal=False),
    AttentionPattern(9, 5, global_stride=4, causal=False),
    AttentionPattern(5, 2, global_stride=8, causal=False),
    AttentionPattern(9, 3, 2, 4, causal=False),
]
MODELS = ["full", "sinks", "routed", "global"]


def places(length, batch=2):
    return (torch.arange(length).expand(batch, -1),) * 2


@pytest.mark.parametrize("n", [4, 30])
def test_both_sides_are_the_formula(n):
    window, sinks, stride, limit = 5, 2, 3, 2
    one = places(n, 1)
    visible = visible_keys(AttentionPattern(window, sinks, causal=False), *one)[0]
    expected = [[abs(i - j) < window or j < sinks or j >= n - sinks for j in range(n)] for i in range(n)]
    assert visible.tolist() == expected
    nodes = visible_nodes(AttentionPattern(window, sinks, global_stride=stride, causal=False), *one)[0]
    assert nodes.tolist() == [[not expected[i][j] and (j + 1) % stride == 0 for j in range(n)] for i in range(n)]
    keys = torch.randint(3, (n,))
    remote = remote_keys(
        AttentionPattern(window, sinks, 1, limit, causal=False), torch.zeros(1, 1, n, 1), keys[None, None], *one
    )
    for i, row in enumerate(remote[0, 0].tolist()):
        members = [j for j in range(n) if keys[j] == 0 and not expected[i][j]]
        before, behind = [j for j in members if j < i], [j for j in members if j > i]
        assert [j for j in range(n) if row[j]] == before[-limit:] + behind[:limit]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, 2, 8, 11, 70, 300])
def test_blockwise_is_the_reference(pattern, length):
    states, routing = problem(pattern, length, length)
    expected = layer_reference(*states, pattern, 0.3, places(length), routing)[0]
    assert_agree(document_attention(*states, pattern, 0.3, length, routing), expected, states, routing)


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_packing_change_nothing(name):
    fields = {"use_bidirectional_attention": True}
    eager, model = tiny_model(name, "eager", **fields), tiny_model(name, **fields)
    rows = [random_ids(1, length, seed=length) for length in (34, 21)]
    single = [eager(row).logits[0] for row in rows]
    assert (single[0] - tiny_model(name, "eager")(rows[0]).logits[0]).abs().max() > 0.01
    ids, mask = torch.zeros(2, 40, dtype=torch.long), torch.zeros(2, 40, dtype=torch.long)
    ids[0, :34], ids[1, 19:] = rows[0][0], rows[1][0]
    mask[0, :34] = mask[1, 19:] = 1
    seq_idx = (torch.arange(55) >= 34).long()[None]
    for one in (eager, model):
        padded = one(ids, attention_mask=mask).logits
        for row in range(2):
            torch.testing.assert_close(padded[row][mask[row].bool()], single[row], rtol=1e-4, atol=1e-5)
        packed = one(torch.cat(rows, 1), seq_idx=seq_idx).logits[0]
        torch.testing.assert_close(packed, torch.cat(single), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one(rows[0]).logits[0], single[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_with_padding_are_the_reference(name):
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    ids[1, 29:] = mask[1, 29:] = 0
    results = []
    for implementation in ("eager", "sdpa"):
        config = tiny_config(name, use_bidirectional_attention=True, num_labels=3)
        torch.manual_seed(0)
        model = DeepseekR1ForSequenceClassification._from_config(config, attn_implementation=implementation)
        logits = randomise(model)(ids, attention_mask=mask).logits
        logits.square().sum().backward()
        results.append((logits, {key: x.grad for key, x in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_a_long_window_is_full_attention():
    ids, fields = random_ids(2, 40), {"use_bidirectional_attention": True}
    expected = tiny_model("full", **fields)(ids).logits
    torch.testing.assert_close(tiny_model("sliding", sliding_window=40, **fields)(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_cache_and_generation_are_refused(tmp_path):
    model, ids = tiny_model(use_bidirectional_attention=True), random_ids(1, 6)
    assert model(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values cannot go with use_bidirectional_attention"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"generate\(\) cannot go with"):
        model.generate(ids, max_new_tokens=2)
    model.save_pretrained(tmp_path)
    loaded = DeepseekR1TextModel.from_pretrained(tmp_path)
    assert not any(pattern.causal for pattern in loaded.patterns)


def test_what_cannot_be_said_of_both_sides_is_refused():
    from modeling_deepseek_r1.conversion.to_dense import choose_family
    from modeling_deepseek_r1.inspection import inspect_text

    model = tiny_model("full", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="use_bidirectional_attention"):
        inspect_text(model, None, "text")
    with pytest.raises(ValueError, match="use_bidirectional_attention"):
        choose_family(model.config, True)
    with pytest.raises(ValueError, match="which all layers have in common"):
        tiny_config(per_layer_config={1: {"use_bidirectional_attention": True}})
