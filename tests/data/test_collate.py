"""Padding, masks and formats of the collators."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from modeling_deepseek_r1.data import CausalCollator
from tests.models import PATTERNS, random_ids, tiny_model

from .tokenizers import make_tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_seen_nor_learned(side):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    features = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": torch.tensor([8, 9])}]
    batch = CausalCollator(tokenizer, pad_to_multiple_of=4)(features)
    mask = batch["attention_mask"]
    assert (mask.flip(1) if side == "left" else mask).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    expected = [[-100, 6, 7, -100], [8, 9, -100, -100]] if side == "right" else [[-100, -100, 6, 7], [-100, -100, 8, 9]]
    assert batch["labels"].tolist() == expected
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


def test_masks_of_trl_and_cutting():
    features = [
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]},
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 0, 1, 1]},
    ]
    batch = CausalCollator(make_tokenizer(), max_length=3)(features)
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, -100, 7]]


def test_raw_records_are_tokenised():
    tokenizer = make_tokenizer()
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    batch = CausalCollator(tokenizer)([{"messages": talk}, {"text": "x"}, {"prompt": "y", "completion": "z"}])
    learned = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["bc<|im_end|>", "x<|im_end|>", "z<|im_end|>"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_batches_without_padding_are_separate_documents(pattern):
    """transformers' own flattening collator, by sequence numbers and by positions alone."""
    model = tiny_model(pattern)
    documents = [random_ids(1, length, seed=length)[0].tolist() for length in (9, 1, 20)]
    expected = sum(
        model(torch.tensor([ids]), labels=torch.tensor([[-100, *ids[1:]]]), num_items_in_batch=1).loss for ids in documents
    )
    for numbered in (True, False):
        collate = DataCollatorWithFlattening(return_seq_idx=numbered)
        loss = model(**collate([{"input_ids": ids} for ids in documents]), num_items_in_batch=1).loss
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
