"""`layer_types="auto"`: what is tried, what is chosen, and that the result is the model that was measured."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1.conversion import Calibration, convert_checkpoint
from modeling_deepseek_r1.conversion.calibrate import SHORT_WINDOW_TOKENS
from modeling_deepseek_r1.conversion.recommend import COPIED_TOKENS, Candidate, LayerCost, candidate_patterns, choose
from modeling_deepseek_r1.conversion.target import clusters_for
from modeling_deepseek_r1.evaluation.perplexity import perplexity
from tests.models import tiny_model
from tests.test_conversation import word_tokenizer

AUTO = {"layer_types": "auto", "sliding_window": 8, "num_sink_tokens": 2, "num_clusters": 5}


@pytest.fixture(params=[False, True], ids=["", "tied"])
def source(request, tmp_path):
    tiny_model("full", max_position_embeddings=4096, tie_word_embeddings=request.param).save_pretrained(tmp_path / "source")
    word_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def words():
    return torch.randint(91, (SHORT_WINDOW_TOKENS + 700,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def calibration(tmp_path, words):
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return {"texts": (str(tmp_path / "text.txt"),), "tokens": SHORT_WINDOW_TOKENS, "tried_tokens": 700}


def candidate(layer_types, increase, cost):
    return Candidate(layer_types, 10.0 * (1 + increase), increase, 0.5, cost)


def test_the_cheapest_within_a_loss_and_the_best_within_a_cost():
    tried = [candidate("FF", 0.0, 1.0), candidate("RF", 0.01, 0.6), candidate("RR", 0.02, 0.3), candidate("SS", 0.2, 0.1)]
    assert choose(tried, 0.03, None).layer_types == "RR"
    assert choose(tried, 0.015, None).layer_types == "RF"
    assert choose(tried, None, 0.7).layer_types == "RF"
    assert choose(tried, 0.5, 0.15).layer_types == "SS"
    with pytest.raises(ValueError, match=r"SS, has \+20.0% perplexity at 10% of the cost"):
        choose(tried, None, 0.05)
    with pytest.raises(ValueError, match=r"FF, has \+0.0% perplexity"):
        choose(tried, -0.5, None)


def test_layers_that_would_move_most_stay_full():
    moved = [0.1, 0.9, 0.2, 0.8]
    costs = [LayerCost({"local_routed_attention": m, "sliding_attention": m + (i == 3)}, {}) for i, m in enumerate(moved)]
    patterns = ["".join(kind[6] for kind in kinds) for kinds in candidate_patterns(costs)]
    full, routed, sliding = "full_attention"[6], "local_routed_attention"[6], "sliding_attention"[6]
    assert patterns[0] == full * 4
    assert routed * 4 in patterns and sliding * 4 in patterns
    assert routed + full + routed + routed in patterns
    assert routed + full + routed + full in patterns
    assert len(set(patterns)) == len(patterns)


def test_clusters_follow_the_context():
    assert [clusters_for(n) for n in (100, 4096, 8192, 32768, 131072)] == [16, 32, 64, 256, 1024]


def test_what_is_written_is_what_was_measured(source, calibration, words, tmp_path):
    report = convert_checkpoint(source, tmp_path / "auto", calibration=Calibration(**calibration, max_cost=0.3), **AUTO)
    saved = json.loads((tmp_path / "auto" / "calibration.json").read_text())
    assert saved == report.calibration and saved["texts"] == ["text.txt"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "auto")
    letters = "".join({"full_attention": "F", "sliding_attention": "S"}.get(kind, "R") for kind in model.config.layer_types)
    chosen = next(row for row in saved["patterns"] if row["layer_types"] == letters)
    assert chosen["cost"] <= 0.3 < saved["patterns"][0]["cost"] == 1.0
    assert saved["patterns"][0]["layer_types"] == "FFF" and saved["patterns"][0]["increase"] == 0.0
    assert chosen["perplexity"] == min(row["perplexity"] for row in saved["patterns"] if row["cost"] <= 0.3)
    held_out = word_tokenizer()(" ".join(f"w{word}" for word in words[SHORT_WINDOW_TOKENS:]), add_special_tokens=False)[
        "input_ids"
    ]
    ids = torch.tensor(held_out[: 700 - COPIED_TOKENS])
    again = perplexity(model, ids, context_length=len(ids), num_windows=1).perplexity
    assert math.isclose(again, chosen["perplexity"], rel_tol=1e-4)
    assert letters in report.summary()


def test_refusals_come_before_the_work(source, calibration, tmp_path):
    with pytest.raises(ValueError, match="no pattern keeps the budget"):
        convert_checkpoint(source, tmp_path / "x", calibration=Calibration(**calibration, max_cost=0.001), **AUTO)
    short = calibration | {"tried_tokens": 3 * COPIED_TOKENS}
    with pytest.raises(ValueError, match="too few to try a sliding window of 8"):
        convert_checkpoint(source, tmp_path / "x", calibration=Calibration(**short), **AUTO)
    convert_checkpoint(source, tmp_path / "local", layer_types="SF", sliding_window=4)
    with pytest.raises(ValueError, match="starts from full attention in all layers"):
        convert_checkpoint(tmp_path / "local", tmp_path / "x", **AUTO)
    with pytest.raises(ValueError, match="context_length has no effect"):
        convert_checkpoint(source, tmp_path / "x", layer_types="SF", sliding_window=4, context_length=4096)
    assert not (tmp_path / "x").exists()
    report = convert_checkpoint(source, tmp_path / "x", dry_run=True, **AUTO)
    assert any("found while converting" in warning for warning in report.warnings)
    assert not (tmp_path / "x").exists()
