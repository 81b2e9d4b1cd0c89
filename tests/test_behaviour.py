"""What transformers' users expect of any model, on layers of every type."""

import pytest
import torch
from torch.export import Dim
from transformers import pipeline

from tests.data.tokenizers import make_tokenizer
from tests.models import random_ids, tiny_model
from tests.test_model import assert_same_grads, grads

TYPES = ["full", "sinks", "routed", "global"]


@pytest.mark.parametrize("name", TYPES)
def test_an_exported_graph_serves_other_lengths_and_paddings(name):
    model, ids = tiny_model(name), random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    with torch.no_grad():
        graph = torch.export.export(
            model, (), inputs, dynamic_shapes={"input_ids": free, "attention_mask": free, "use_cache": None}, strict=False
        ).module()
        for rows, length, missing in ((2, 20, 6), (3, 41, 0), (3, 33, 30)):
            ids = random_ids(rows, length, seed=length)
            mask = torch.ones_like(ids)
            mask[1, length - missing :] = 0
            actual = graph(input_ids=ids, attention_mask=mask, use_cache=False).logits
            expected = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_weights_on_request_are_sparse_and_those_of_the_reference(name, monkeypatch):
    from modeling_deepseek_r1.attention import reference

    monkeypatch.setattr(reference, "MAX_SCORES", 100)
    ids, mask = random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :9] = 0
    real = mask[:, None, :, None]
    with torch.no_grad():
        asked = {"attention_mask": mask, "output_attentions": True}
        expected = tiny_model(name, "eager")(ids, **asked).attentions
        outputs = tiny_model(name)(ids, **asked)
    assert len(outputs.attentions) == len(expected) == 3
    for mine, theirs in zip(outputs.attentions, expected, strict=True):
        assert mine.is_sparse and mine.values().all()
        torch.testing.assert_close(mine.to_dense(), theirs * real, rtol=1e-4, atol=1e-5)
    if name == "sinks":
        assert outputs.attentions[0]._nnz() < 0.5 * expected[0].numel()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["routed", "global"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    ids, model = random_ids(2, 30), tiny_model(name).train()
    model(ids, labels=ids).loss.backward()
    expected = grads(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert_same_grads(grads(model), expected)


@pytest.mark.parametrize("name", TYPES)
def test_generation_from_embeddings_and_with_resized_ones(name):
    model, ids = tiny_model(name, tie_word_embeddings=True), random_ids(2, 19)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)[:, 19:]
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options), expected)
    logits = model(ids).logits
    model.resize_token_embeddings(101)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model(ids).logits[..., :97], logits)


@pytest.mark.parametrize("name", TYPES)
def test_a_pipeline_of_several_texts_gives_what_each_gives_alone(name):
    model = tiny_model(name, vocab_size=259)
    pipe = pipeline("text-generation", model=model, tokenizer=make_tokenizer(None), max_new_tokens=6, do_sample=False)
    texts = ["To be, or not to be, that is the question", "No."]
    together = [answer[0]["generated_text"] for answer in pipe(texts, batch_size=2)]
    assert together == [pipe(text)[0]["generated_text"] for text in texts]
    assert all(answer.startswith(text) for answer, text in zip(together, texts, strict=True))
