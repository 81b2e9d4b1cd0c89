"""Statistics of routed layers against counts made by hand."""

from dataclasses import asdict

import pytest
import torch

from modeling_deepseek_r1.evaluation.routing import _best, mean_statistics, routing_statistics
from tests.models import random_ids, tiny_model


def test_best_takes_the_largest_of_the_allowed_and_the_later_of_equals():
    scores = torch.tensor([[3.0, 1.0, 3.0, 9.0, 3.0]])
    allowed = torch.tensor([[True, True, True, False, True]])
    assert _best(scores, allowed, torch.tensor([[2]])).tolist() == [[False, False, True, False, True]]
    assert _best(scores, allowed, torch.tensor([[9]])).tolist() == allowed.tolist()
    assert not _best(scores, allowed, torch.tensor([[0]])).any()


def test_a_model_that_sees_every_key_finds_every_key():
    model = tiny_model("routed", sparse_attention={"num_clusters": 4, "routed_clusters": 4, "routed_tokens": 99})
    (first, *_) = rows = routing_statistics(model, random_ids(1, 60), queries=9, top=5)
    assert [row.layer for row in rows] == [0, 1, 2]
    assert first.recall == first.recall_recent == first.recall_blocks == 1.0
    assert first.mass == pytest.approx(1.0) and first.empty_queries == 0.0
    assert mean_statistics(rows)["recall"] == 1.0


def test_few_keys_find_few_and_counts_are_right():
    model = tiny_model("routed")
    (row, *_) = routing_statistics(model, random_ids(1, 90), queries=80, top=4)
    assert 0.0 < row.recall < 1.0
    # At most two clusters with three keys each.
    assert 0.0 < row.remote_keys <= 6.0
    assert 0.25 <= row.largest_cluster <= 1.0
    assert all(0.0 <= value <= 1.0 for name, value in asdict(row).items() if name not in ("layer", "remote_keys"))


def test_refusals():
    with pytest.raises(ValueError, match="no local_routed_attention layer"):
        routing_statistics(tiny_model("full"), random_ids(1, 20))
    with pytest.raises(ValueError, match="give more than 71"):
        routing_statistics(tiny_model("routed"), random_ids(1, 71))
