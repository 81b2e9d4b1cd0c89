"""The data of a recipe, ready for a Trainer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from ..data import (
    Augmented,
    CausalCollator,
    Documents,
    DocumentStream,
    MultimodalCollator,
    PackedCollator,
    PackedDocuments,
    PackedStream,
    Records,
    data_task,
    jitter_rows,
    make_encoder,
    open_data,
)
from ..data.encode import find_labels
from .recipe import Recipe


@dataclass
class TrainingData:
    """What a Trainer needs of the data.

    Attributes:
        task: one of `data.encode.TASKS`, or "multimodal" for conversations with other inputs than text.
        train, evaluation: datasets; no evaluation if none was asked for.
        collate: makes batches of their rows.
        label_names: of a classification.
        documents, tokens: counts of what is trained on; None for a stream.
        notes: a line for everything that was left out or cut.
    """

    task: str
    train: Any
    evaluation: Any
    collate: Callable
    label_names: list[str] = field(default_factory=list)
    documents: int | None = None
    tokens: int | None = None
    notes: list[str] = field(default_factory=list)


def prepare_data(recipe: Recipe, tokenizer, label_names: list[str] | None = None) -> TrainingData:
    """Reads, tokenises, splits and packs.

    Args:
        recipe: its settings about data.
        tokenizer: the checkpoint's, with a padding token; of a multimodal one the processor.
        label_names: classes that the checkpoint knows already; default: those of the recipe, or of the data.

    Raises:
        ValueError, OSError: data that is missing, damaged, empty or too short; see `data.open_data` and the encoders.
    """
    if hasattr(tokenizer, "tokenizer"):
        return _multimodal(recipe, tokenizer)
    if recipe.number_jitter:
        raise ValueError("number_jitter is for table rows, which only conversations for multimodal models have")
    records = _open(recipe, recipe.data)
    task = _task(recipe, records)
    evaluation = _open(recipe, recipe.eval_data) if recipe.eval_data else None
    notes = [*records.notes, *(evaluation.notes if evaluation is not None else ())]
    if task == "classification":
        return _classification(recipe, tokenizer, records, evaluation, label_names, notes)
    encode = make_encoder(task, tokenizer, max_length=recipe.length)
    aside = _documents(evaluation, encode, "evaluation") if evaluation is not None else None
    if recipe.streaming:
        train = DocumentStream(records, encode, shuffle_buffer=recipe.shuffle_buffer, seed=recipe.seed, repeat=True)
        rows = train if recipe.packing == "none" else PackedStream(train, recipe.length, recipe.packing)
        counts: dict[str, int] = {}
    else:
        train = _documents(records, encode, "training")
        if recipe.eval_share:
            train, aside = train.split(recipe.eval_share, recipe.seed)
        rows = _rows(recipe, train, "training")
        counts = {"documents": len(train), "tokens": train.num_tokens}
        long = sum(length > recipe.length for length in train.lengths)
        if long and recipe.packing == "none":
            notes.append(f"{long} documents will be cut to {recipe.length} tokens; packing keeps what is behind them")
    collate = CausalCollator(tokenizer, recipe.length)
    if recipe.packing != "none":
        collate = PackedCollator(tokenizer.pad_token_id, recipe.length)
    evaluated = _rows(recipe, aside, "evaluation") if aside is not None else None
    return TrainingData(task, rows, evaluated, collate, notes=[*notes, *encode.notes], **counts)


def _open(recipe: Recipe, sources: list[str]) -> Records:
    return open_data(
        sources, split=recipe.split, subset=recipe.subset, streaming=recipe.streaming, text_column=recipe.text_column
    )


def _task(recipe: Recipe, records: Records) -> str:
    found = data_task(records.first())
    if recipe.task == "auto":
        return found
    if recipe.task not in (found, "text"):
        raise ValueError(f"{records.first().where} is data for the task {found!r}, not {recipe.task!r}")
    return recipe.task


def _documents(records: Records, encode: Callable, what: str) -> Documents:
    progress = tqdm(records, desc=f"tokenising {what} data", unit=" records", leave=False)
    documents = Documents(example for record in progress for example in encode(record))
    if not len(documents):
        raise ValueError(f"{', '.join(records.names)}: no {what} data is left: {'; '.join(encode.notes) or 'it is empty'}")
    return documents


def _rows(recipe: Recipe, documents: Documents, what: str) -> Any:
    rows = documents if recipe.packing == "none" else PackedDocuments(documents, recipe.length, recipe.packing)
    # The first token of a document has nothing before it that it could be predicted from.
    if not any(label != -100 for number in range(len(rows)) for label in rows[number]["labels"][1:]):
        raise ValueError(f"the {what} texts are too short: none has a second token that could be learned")
    return rows


def _multimodal(recipe: Recipe, processor) -> TrainingData:
    """Conversations with other inputs than text, which are read batch by batch while training."""
    records = _open(recipe, recipe.data)
    task = _task(recipe, records)
    if task != "chat":
        raise ValueError(
            f"a multimodal model is trained on conversations; {records.first().where} is data for the task {task!r}"
        )
    if recipe.streaming or recipe.packing != "none":
        raise ValueError("conversations with images, sound or rows are neither streamed nor packed: set packing to none")
    train = list(records)
    aside, notes = None, list(records.notes)
    if recipe.eval_data:
        evaluation = _open(recipe, recipe.eval_data)
        aside, notes = list(evaluation), [*notes, *evaluation.notes]
    elif recipe.eval_share:
        numbers = Documents({"input_ids": [number]} for number in range(len(train)))
        train, aside = ([train[one["input_ids"][0]] for one in part] for part in numbers.split(recipe.eval_share, recipe.seed))
    if recipe.number_jitter:
        train = Augmented(train, partial(jitter_rows, share=recipe.number_jitter), recipe.seed)
    return TrainingData(
        "multimodal", train, aside, MultimodalCollator(processor, recipe.length), documents=len(train), notes=notes
    )


def _classification(recipe: Recipe, tokenizer, records: Records, evaluation, known: list[str] | None, notes) -> TrainingData:
    if recipe.streaming:
        raise ValueError("a classification cannot be streamed: its classes and texts are read before")
    names = known or recipe.labels or find_labels(records)
    encode = make_encoder("classification", tokenizer, max_length=recipe.length, label_names=names)
    examples = [example for record in tqdm(records, desc="tokenising", leave=False) for example in encode(record)]
    aside = [example for record in evaluation for example in encode(record)] if evaluation is not None else None
    if recipe.eval_share:
        numbers = Documents({"input_ids": [number]} for number in range(len(examples)))
        parts = numbers.split(recipe.eval_share, recipe.seed)
        examples, aside = ([examples[one["input_ids"][0]] for one in part] for part in parts)
    tokens = sum(len(example["input_ids"]) for example in examples)
    collate = DataCollatorWithPadding(tokenizer)
    return TrainingData("classification", examples, aside, collate, names, len(examples), tokens, [*notes, *encode.notes])
