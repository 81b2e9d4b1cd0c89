"""Conversations with images, videos, sound and table rows as training batches."""

from collections.abc import Mapping
from typing import Any

import torch

from ..tokenization.processing_deepseek_r1 import BLOCKS, PLACEHOLDER_TOKENS
from .encode import IGNORED, ChatEncoder
from .read import Record

COLUMNS = {"image": "images", "video": "videos", "audio": "audio", "structured": "rows"}
"""Modality -> column from which blocks that have nothing but their type take their input, in order."""


class MultimodalCollator:
    """Makes batches of conversations; only what the assistant says is learned, never a prompt or a placeholder.

    A record has `messages` (or `prompt` and `completion`, lists of messages) as `DeepseekR1Processor.apply_chat_template` takes
    them. A block such as `{"type": "image"}` takes the next input of the record's column `images`, `videos`, `audio` or `rows`. A
    Trainer needs `remove_unused_columns=False`.

    Args:
        processor: a [`DeepseekR1Processor`] with a chat template.
        max_length: longer conversations are cut at the end, but not within or before placeholders.
    """

    def __init__(self, processor, max_length: int | None = None):
        self.processor, self.max_length = processor, max_length
        self.encoder = ChatEncoder(processor.tokenizer)
        tokens = {modality: processor.tokenizer.convert_tokens_to_ids(text) for modality, text in PLACEHOLDER_TOKENS.items()}
        self.modality_of = {token: modality for modality, token in tokens.items()}

    def __call__(self, features: list[Mapping[str, Any] | Record]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels`, `mm_token_type_ids`, and the encoders' inputs that the batch has.

        Raises:
            ValueError: a record without conversation or answer, inputs that cannot be read or do not match their blocks, or more
                tokens than `max_length` up to a placeholder.
        """
        examples, given = [], {modality: [] for modality in PLACEHOLDER_TOKENS}
        for number, fields in enumerate(features):
            known = isinstance(fields, Record)
            record, inputs = self._plain(fields if known else Record(dict(fields), f"record {number} of the batch"))
            for example in self.encoder(record):
                counts = {modality: example["input_ids"].count(token) for token, modality in self.modality_of.items()}
                for modality, count in counts.items():
                    given[modality] += inputs[modality][:count]
                examples.append((record.where, example))
        data, times = self.processor.encode_inputs({modality: items for modality, items in given.items() if items})
        sizes = {modality: iter([len(item) for item in items]) for modality, items in times.items()}
        rows = [self._expanded(where, example, sizes) for where, example in examples]
        kinds = self.processor.token_kinds([ids for ids, _ in rows], times)
        fills = {"mm_token_type_ids": 0, "mm_token_times": -1.0}
        batch = {name: self._padded(values, fills[name]) for name, values in kinds.items()}
        batch["input_ids"] = self._padded([ids for ids, _ in rows], self.processor.tokenizer.pad_token_id)
        batch["labels"] = self._padded([labels for _, labels in rows], IGNORED)
        batch["attention_mask"] = self._padded([[1] * len(ids) for ids, _ in rows], 0)
        return batch | data

    def _plain(self, record: Record) -> tuple[Record, dict[str, list]]:
        """The record with placeholders for blocks, and the inputs behind them."""
        fields, inputs = dict(record.fields), {modality: [] for modality in PLACEHOLDER_TOKENS}
        waiting = {modality: list(fields.get(column) or []) for modality, column in COLUMNS.items()}
        for column in ("messages", "prompt", "completion"):
            if isinstance(fields.get(column), list):
                messages = [self._filled(record, message, waiting) for message in fields[column]]
                fields[column] = [self.processor.plain_message(message, inputs) for message in messages]
        left = [f"{len(items)} of column {COLUMNS[modality]!r}" for modality, items in waiting.items() if items]
        if left:
            raise ValueError(f"{record.where}: there are more inputs than blocks for them: {', '.join(left)} are left")
        return record._replace(fields=fields), inputs

    @staticmethod
    def _filled(record: Record, message: Mapping[str, Any], waiting: dict[str, list]) -> dict[str, Any]:
        """The message with the inputs of blocks that have nothing but their type."""
        if not isinstance(message.get("content"), list):
            return dict(message)
        blocks = []
        for block in message["content"]:
            block = {name: value for name, value in block.items() if value is not None}
            modality = BLOCKS.get(block.get("type"))
            if modality is not None and set(block) == {"type"}:
                if not waiting[modality]:
                    raise ValueError(
                        f"{record.where}: a block of type {block['type']!r} has no input, and the column {COLUMNS[modality]!r} has none"
                        " left for it"
                    )
                block[block["type"]] = waiting[modality].pop(0)
            blocks.append(block)
        return {**message, "content": blocks}

    def _expanded(self, where: str, example: Mapping[str, list[int]], sizes: dict) -> tuple[list[int], list[int]]:
        """Ids and labels with every placeholder as often as its input has features."""
        ids, labels, last = [], [], 0
        for token, label in zip(example["input_ids"], example.get("labels", example["input_ids"]), strict=True):
            repeats = next(sizes[self.modality_of[token]]) if token in self.modality_of else 1
            ids += [token] * repeats
            labels += [IGNORED if token in self.modality_of else label] * repeats
            last = len(ids) if token in self.modality_of else last
        if self.max_length is not None and last > self.max_length:
            raise ValueError(f"{where} has placeholders up to token {last}, but rows have at most {self.max_length} tokens")
        return ids[: self.max_length], labels[: self.max_length]

    def _padded(self, rows: list[list], value: float) -> torch.Tensor:
        length, left = max(map(len, rows)), self.processor.tokenizer.padding_side == "left"
        filling = [[value] * (length - len(row)) for row in rows]
        return torch.tensor([fill + row if left else row + fill for row, fill in zip(rows, filling, strict=True)])
