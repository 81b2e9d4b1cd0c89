"""Batches for training.

Classification needs nothing of its own: transformers' `DataCollatorWithPadding` does it. So does
`DataCollatorWithFlattening(return_seq_idx=True)` for batches without any padding.
"""

from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

from .encode import IGNORED, data_task, make_encoder
from .read import Record


class CausalCollator:
    """Pads documents of different lengths, on the tokenizer's side, with labels of -100.

    Features are tokenised (`input_ids`, and `labels` or TRL's `completion_mask` and `assistant_masks`), or records that are
    tokenised here: `messages`, `prompt` and `completion`, `text` (`encode.py`). For the latter a Trainer needs
    `remove_unused_columns=False`.

    Args:
        tokenizer: with a padding token.
        max_length: longer documents are cut at the end.
        pad_to_multiple_of: rounds the padded length up.
    """

    def __init__(self, tokenizer, max_length: int | None = None, pad_to_multiple_of: int | None = None):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
        self.encoders: dict[str, Any] = {}

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels`, each `[batch, longest]`."""
        return dict(self.pad([document for feature in features for document in self._documents(feature)]))

    def _documents(self, feature: dict[str, Any]) -> list[dict[str, list[int]]]:
        if "input_ids" in feature:
            documents = [_labelled(feature)]
        else:
            record = Record(feature, "a record of the batch")
            task = data_task(record)
            if task not in self.encoders:
                self.encoders[task] = make_encoder(task, self.tokenizer, max_length=self.max_length)
            documents = [_labelled(example) for example in self.encoders[task](record)]
        return [{name: values[: self.max_length] for name, values in document.items()} for document in documents]


def _labelled(feature: dict[str, Any]) -> dict[str, list[int]]:
    ids = torch.as_tensor(feature["input_ids"]).tolist()
    labels = torch.as_tensor(feature.get("labels", ids)).tolist()
    for name in ("completion_mask", "assistant_masks"):
        if name in feature:
            mask = torch.as_tensor(feature[name]).tolist()
            labels = [label if learned else IGNORED for label, learned in zip(labels, mask, strict=True)]
    return {"input_ids": ids, "labels": labels}


class PackedCollator:
    """Batches of packed rows (`pack.py`), padded on the right.

    Only a model that reads `seq_idx`, as this library's do, keeps the documents apart: others see them through the mask.

    Args:
        pad_token_id: fills up the rows; it is neither seen nor learned.
        length: of all rows; default: that of the longest one in the batch.
    """

    def __init__(self, pad_token_id: int, length: int | None = None):
        self.pad_token_id, self.length = pad_token_id, length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels`, `position_ids`, `seq_idx`, `attention_mask`, each `[batch, length]`.

        Raises:
            ValueError: a row that is longer than `length`.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        length = self.length or longest
        if longest > length:
            raise ValueError(f"a packed row has {longest} tokens, more than the {length} of a batch")
        filling = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0}
        batch = {name: torch.full((len(rows), length), value) for name, value in filling.items()}
        batch["attention_mask"] = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            for name in filling:
                batch[name][number, : len(row[name])] = torch.as_tensor(row[name])
            batch["attention_mask"][number, : len(row["input_ids"])] = 1
        batch["seq_idx"] = (batch["position_ids"] == 0).cumsum(1) - 1
        return batch
