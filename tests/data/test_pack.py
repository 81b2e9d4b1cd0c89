"""Packing loses nothing, keeps documents apart, and goes on where it was interrupted."""

import copy
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader

from modeling_deepseek_r1.data import (
    Documents,
    DocumentStream,
    PackedCollator,
    PackedDocuments,
    PackedStream,
    Record,
    pack_pieces,
)
from modeling_deepseek_r1.data.pack import STRATEGIES
from tests.models import PATTERNS, random_ids, tiny_model

LENGTHS = [1, 3, 63, 7, 64, 65, 2, 131, 5, 9, 64, 1, 30, 33]


def make_documents(lengths=LENGTHS, own_labels=False):
    examples = []
    for number, length in enumerate(lengths):
        ids = random_ids(1, length, seed=number)[0].tolist()
        labels = [token if place % 3 else -100 for place, token in enumerate(ids)]
        examples.append({"input_ids": ids, **({"labels": labels} if own_labels else {})})
    return Documents(examples)


def pieces_of(row):
    starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    return [row["input_ids"][start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("row_length", [2, 7, 64, 65, 500])
def test_every_token_is_in_exactly_one_row(strategy, row_length):
    rows = pack_pieces(LENGTHS, row_length, strategy)
    seen = sorted((number, token) for row in rows for number, start, stop in row for token in range(start, stop))
    assert seen == [(number, token) for number, length in enumerate(LENGTHS) for token in range(length)]
    sizes = [sum(stop - start for _, start, stop in row) for row in rows]
    assert max(sizes) <= row_length
    if strategy == "concatenate":
        assert sizes[:-1] == [row_length] * (len(rows) - 1)


def test_best_fit_fills_rows_and_cuts_long_documents_only():
    rows = pack_pieces([6, 5, 4, 3, 2, 10, 0], 10)
    assert rows == [[(5, 0, 10)], [(0, 0, 6), (2, 0, 4)], [(1, 0, 5), (3, 0, 3), (4, 0, 2)]]
    assert pack_pieces([25], 10) == [[(0, 0, 10)], [(0, 10, 20)], [(0, 20, 25)]]


def test_labels_of_a_row():
    documents = Documents([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    (row,) = PackedDocuments(documents, 6)
    assert row == {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "position_ids": [0, 1, 2, 0, 1]}
    batch = PackedCollator(0, length=6)([row])
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100]]
    with pytest.raises(ValueError, match="a packed row has 5 tokens, more than the 4"):
        PackedCollator(0, length=4)([row])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_rows_are_separate_documents(pattern, strategy):
    """The same loss and gradients as document by document, with labels of their own."""
    model = tiny_model(pattern)
    packed = PackedDocuments(make_documents(own_labels=True), 40, strategy)
    rows = [packed[number] for number in range(len(packed))]
    model(**PackedCollator(0)(rows), num_items_in_batch=1).loss.backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row in rows:
        start = 0
        for ids in pieces_of(row):
            labels = torch.tensor([row["labels"][start : start + len(ids)]])
            start += len(ids)
            model(torch.tensor([ids]), labels=labels, num_items_in_batch=1).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            together[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def make_stream(**options):
    records = [Record({"text": number}, f"record {number}") for number in range(12)]

    def encode(record):
        number = record.fields["text"]
        # One record in five gives two examples, one none.
        return [{"input_ids": [number + 3] * (1 + number * 5 % 13)}] * {0: 2, 1: 0}.get(number % 5, 1)

    return DocumentStream(records, encode, **options)


def test_a_stream_in_order_and_shuffled():
    plain = [row["input_ids"][0] for row in make_stream()]
    assert plain == [3, 3, 5, 6, 7, 8, 8, 10, 11, 12, 13, 13]
    shuffled = list(islice(make_stream(shuffle_buffer=4, seed=1, repeat=True), 2 * len(plain)))
    first, second = ([row["input_ids"][0] for row in part] for part in (shuffled[: len(plain)], shuffled[len(plain) :]))
    assert sorted(first) == sorted(second) == plain
    assert first != plain and first != second
    with pytest.raises(ValueError, match="no document that could be learned"):
        next(iter(DocumentStream([Record({}, "")], lambda record: [], repeat=True)))


def test_workers_share_a_stream():
    rows = list(DataLoader(make_stream(), batch_size=None, num_workers=2))
    assert sorted(int(row["input_ids"][0]) for row in rows) == [row["input_ids"][0] for row in make_stream()]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("buffer", [1, 3, 100])
def test_a_packed_stream_has_every_token(strategy, buffer):
    rows = list(PackedStream(make_stream(), 8, strategy, buffer))
    assert sorted(token for row in rows for token in row["input_ids"]) == sorted(
        token for document in make_stream() for token in document["input_ids"]
    )
    assert all(len(row["input_ids"]) <= 8 for row in rows)
    if strategy == "concatenate":
        assert {len(row["input_ids"]) for row in rows[:-1]} == {8}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"shuffle_buffer": 3, "repeat": True}])
def test_an_interrupted_stream_goes_on_exactly(strategy, options):
    def make():
        return PackedStream(make_stream(**options), 8, strategy, buffer=3)

    expected = list(islice(make(), 25))
    for taken in range(len(expected)):
        first = make()
        begun = list(islice(first, taken))
        state = copy.deepcopy(first.state_dict())
        second = make()
        second.load_state_dict(state)
        assert begun + list(islice(second, len(expected) - taken)) == expected
    again = make()
    assert list(islice(again, 5)) + list(islice(again, 25)) == expected[:5] + expected


def test_documents_in_memory():
    documents = make_documents(own_labels=True)
    assert documents.lengths == LENGTHS and documents.num_tokens == sum(LENGTHS)
    kept, aside = documents.split(0.2, seed=3)
    assert (len(kept), len(aside)) == (11, 3)
    assert sorted(map(str, [*kept, *aside])) == sorted(map(str, documents))
    assert [list(part) for part in documents.split(0.2, seed=3)] == [list(kept), list(aside)]
    assert Documents([{"input_ids": [4, 5]}])[0] == {"input_ids": [4, 5], "labels": [4, 5]}
    with pytest.raises(IndexError):
        documents[len(LENGTHS)]
    with pytest.raises(ValueError, match="all documents need input_ids and labels, of one length"):
        Documents([{"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(ValueError, match="cannot be set aside"):
        make_documents([3]).split(0.5, seed=0)


def test_refusals():
    with pytest.raises(ValueError, match="packing 'first_fit' is unknown, choose one of best_fit, concatenate"):
        pack_pieces([3], 4, "first_fit")
    with pytest.raises(ValueError, match="rows of 1 tokens have nothing to predict"):
        pack_pieces([3], 1)
    with pytest.raises(ValueError, match="buffer=0"):
        PackedStream(make_stream(), 4, buffer=0)
