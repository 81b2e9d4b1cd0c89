"""The models as transformers users know them: saving, loading, gradients, outputs on request, heads, embeddings."""

import re

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1ForSequenceClassification, DeepseekR1TextModel
from tests.models import EXPERT_PATTERNS, PATTERNS, random_ids, randomise, tiny_config, tiny_model

HEADS = [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification]
HEADS.append(AutoModelForQuestionAnswering)


def grads(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_grads(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_equals_the_reference(pattern):
    ids = random_ids(3, 50)
    mask = torch.ones_like(ids)
    mask[0, :20], mask[1, 44:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 20] = -100  # would be predicted from padding
    results = {}
    for implementation in ("eager", "sdpa"):
        model = tiny_model(pattern, implementation).train()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        results[implementation] = loss.item(), grads(model)
    assert results["sdpa"][0] == pytest.approx(results["eager"][0], rel=1e-5)
    assert_same_grads(results["sdpa"][1], results["eager"][1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    ids = random_ids(2, 30)
    model = tiny_model("per_layer").train()
    model(ids, labels=ids).loss.backward()
    expected = grads(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert_same_grads(grads(model), expected)


def test_padding_of_the_loss_is_ignored():
    model, ids = tiny_model(), random_ids(1, 20)
    alone = model(ids, labels=ids).loss
    padded = torch.cat((ids, torch.zeros(1, 6, dtype=torch.long)), 1)
    mask = torch.cat((torch.ones(1, 20), torch.zeros(1, 6)), 1).long()
    together = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(together, alone)


def test_dropout_is_that_of_the_reference_and_only_in_training():
    model, ids = tiny_model(attention_dropout=0.3), random_ids(2, 30)
    torch.testing.assert_close(model(ids).logits, tiny_model()(ids).logits)
    model.train()
    torch.manual_seed(1)
    first = model(ids).logits
    assert not torch.allclose(first, model(ids).logits)
    torch.manual_seed(1)
    torch.testing.assert_close(model(ids).logits, first)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16_and_float16_stay_close_to_float32(pattern):
    ids = random_ids(2, 60)
    expected = tiny_model(pattern)(ids).logits
    # Rounding moves a few keys and queries to another cluster, and the random centroids of this model are near to each other;
    # likewise a few tokens to other experts.
    rough = 3 if pattern in ("routed", *EXPERT_PATTERNS) else 1
    for dtype, tolerance in ((torch.bfloat16, 0.08 * rough), (torch.float16, 0.02 * rough)):
        model = tiny_model(pattern).to(dtype)
        logits = model(ids).logits
        assert logits.dtype == dtype
        assert (logits.float() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_gives_the_same_model(pattern, tied, tmp_path):
    model, ids = tiny_model(pattern, tie_word_embeddings=tied), random_ids(2, 30)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is DeepseekR1ForCausalLM
    assert not any(info.values()), info
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    # Where a tensor lies in memory decides how products of experts are rounded.
    tolerance = 1e-6 if pattern in EXPERT_PATTERNS else 0.0
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=tolerance, atol=tolerance)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if re.search(r"\.(router|global_tokens)\.", name) else torch.bfloat16), name
    assert half.model.rotary_embs[0].inv_freq.dtype == torch.float32


@pytest.mark.parametrize("auto_class", HEADS)
def test_every_head_loads_runs_and_trains(auto_class, tmp_path):
    tiny_model("mixed").save_pretrained(tmp_path)
    model = auto_class.from_pretrained(tmp_path)
    ids = random_ids(2, 12)
    outputs = model(ids)
    assert all(torch.isfinite(x).all() for x in outputs.to_tuple() if isinstance(x, torch.Tensor))
    sum(x.float().square().mean() for x in outputs.to_tuple() if isinstance(x, torch.Tensor)).backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_classification_reads_the_last_real_token():
    torch.manual_seed(0)
    model = randomise(DeepseekR1ForSequenceClassification(tiny_config("mixed", num_labels=3))).eval()
    ids = random_ids(1, 14)
    expected = model(ids).logits
    for left, right in ((5, 0), (0, 5)):
        zeros = torch.zeros(1, left, dtype=torch.long), torch.zeros(1, right, dtype=torch.long)
        mask = torch.cat((zeros[0], torch.ones_like(ids), zeros[1]), 1)
        actual = model(torch.cat((zeros[0], ids, zeros[1]), 1), attention_mask=mask).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_hidden_states_and_attentions_on_request():
    ids, eager = random_ids(2, 20), tiny_model("mixed", "eager")
    outputs = eager(ids, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4
    assert [tuple(x.shape) for x in outputs.attentions] == [(2, 6, 20, 20)] * 3
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 6, 20))
    assert outputs.attentions[0][0, 0, 15, 4] == 0  # behind the window of 7, after the 3 sink tokens
    assert outputs.attentions[1][0, 0, 15, 4] > 0
    blockwise = tiny_model("mixed", chunk_size_feed_forward=5)
    with torch.no_grad():
        states = blockwise(ids, output_hidden_states=True).hidden_states
    for mine, theirs in zip(states, outputs.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_window_as_long_as_the_text_is_the_full_model():
    ids = random_ids(2, 40)
    full = tiny_model("full")
    local = tiny_model("sliding", sliding_window=40)
    torch.testing.assert_close(local(ids).logits, full(ids).logits, rtol=1e-5, atol=1e-6)


def test_logits_to_keep_and_tuples():
    model, ids = tiny_model(), random_ids(2, 20)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 9])).logits, logits[:, [2, 9]])
    torch.testing.assert_close(model(ids, return_dict=False)[0], logits)


def test_resized_embeddings_keep_the_old_tokens():
    model, ids = tiny_model(tie_word_embeddings=True), random_ids(1, 20)
    expected = model(ids).logits
    model.resize_token_embeddings(101)
    torch.testing.assert_close(model(ids).logits[..., :97], expected)
    assert model(torch.tensor([[100]])).logits.shape == (1, 1, 101)


def test_positions_may_be_given():
    model, ids = tiny_model(), random_ids(2, 20)
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, position_ids=torch.arange(20)[None]).logits, expected)
    # Rotation is relative: a common offset changes nothing.
    torch.testing.assert_close(model(ids, position_ids=torch.arange(50, 70)[None]).logits, expected, rtol=1e-3, atol=1e-4)


def test_nothing_is_left_uninitialised_by_loading(tmp_path):
    model = tiny_model("per_layer", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    model.save_pretrained(tmp_path)
    loaded = DeepseekR1TextModel.from_pretrained(tmp_path)
    for (name, mine), theirs in zip(loaded.named_buffers(), model.model.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
