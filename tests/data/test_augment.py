import random

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from modeling_deepseek_r1.data.augment import (
    Augmented,
    WordReplacement,
    adversarial_loss,
    jitter_numbers,
    jitter_rows,
    series_windows,
)
from modeling_deepseek_r1.data.read import Record

from ..models import random_ids, tiny_model
from .tokenizers import make_tokenizer


def test_numbers_vary_a_little_and_always_the_same_under_a_seed():
    rows = [{"age": 40.0, "job": "cook", "ill": True, "size": None}] * 50
    data = Augmented(rows, jitter_numbers, seed=3)
    ages = [row["age"] for row in data]
    assert all(38 <= age <= 42 for age in ages) and max(ages) > 41 and min(ages) < 39
    assert all({**row, "age": 40.0} == rows[0] for row in data)
    assert ages == [row["age"] for row in Augmented(rows, jitter_numbers, seed=3)]
    assert ages != [row["age"] for row in Augmented(rows, jitter_numbers, seed=4)]
    data.set_epoch(1)
    assert ages != [row["age"] for row in data]


def test_rows_of_a_conversation_vary_wherever_they_are():
    row = {"age": 40.0, "job": "cook"}
    content = [{"type": "row"}, {"type": "row", "row": row}, {"type": "text", "text": "40?"}]
    record = Record(
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "40"}], "rows": [row]}, "x"
    )
    changed = jitter_rows(record, random.Random(0), 0.1)
    (own,), (user, answer) = changed.fields["rows"], changed.fields["messages"]
    inline = user["content"][1]["row"]
    assert 36 <= own["age"] <= 44 and 36 <= inline["age"] <= 44 and len({own["age"], inline["age"], 40.0}) == 3
    assert own["job"] == inline["job"] == "cook" and changed.where == "x" and record.fields["rows"] == [row]
    assert user["content"][0] == content[0] and user["content"][2] == content[2] and answer == record.fields["messages"][1]


def test_words_are_replaced_by_likely_ones():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)).eval()
    wanted = tokenizer("x", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        model.cls.predictions.bias[wanted] = 100.0
    replace = WordReplacement(model, tokenizer, share=0.3)
    text = "some words in a row"
    changed = replace(text, random.Random(0))
    assert len(changed) == len(text) and 2 <= changed.count("x") <= 12
    assert all(new in (old, "x") for new, old in zip(changed, text, strict=True))
    assert changed == replace(text, random.Random(0)) != replace(text, random.Random(1))
    assert replace("", random.Random(0)) == ""
    with pytest.raises(ValueError, match="has no mask token"):
        WordReplacement(model, make_tokenizer())


def test_windows_over_a_series():
    assert list(series_windows([0, 1, 2, 3, 4, 5], 3, 2)) == [[0, 1, 2], [2, 3, 4]]
    assert list(series_windows([0, 1], 3, 1)) == []
    with pytest.raises(ValueError, match="step=0 must be at least 1"):
        series_windows([0], 1, 0)


def test_noise_against_the_model_hurts_more_than_other_noise():
    model, ids = tiny_model(), random_ids(2, 20)
    inputs = {"input_ids": ids, "labels": ids}
    plain = model(**inputs).loss
    adversarial = adversarial_loss(model, lambda: model(**inputs).loss, 0.1)
    embeddings = model.get_input_embeddings()(ids)
    noise = torch.randn_like(embeddings)
    noise *= (0.1 * embeddings.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1))[:, None, None]
    other = model(inputs_embeds=embeddings + noise, labels=ids).loss
    assert adversarial > plain + 0.01 and adversarial - plain > 2 * abs(other - plain)
    adversarial.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert torch.equal(model(**inputs).loss, plain)
