"""Conversion to routed layers: centroids and gates fitted to a text, everything else as in the source."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1.conversion import convert_checkpoint, to_dense
from modeling_deepseek_r1.conversion.calibrate import SHORT_WINDOW_TOKENS, Calibration
from tests.models import tiny_model
from tests.test_conversation import word_tokenizer


@pytest.fixture
def source(tmp_path):
    tiny_model("full", max_position_embeddings=4096).save_pretrained(tmp_path / "source")
    word_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def text(tmp_path):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(91, (SHORT_WINDOW_TOKENS + 5,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return tmp_path / "text.txt"


ROUTED = {"layer_types": "FRR", "sliding_window": 8, "num_sink_tokens": 2, "num_clusters": 5}


def test_centroids_are_fitted_and_everything_else_is_kept(source, text, tmp_path):
    report = convert_checkpoint(source, tmp_path / "routed", calibration=text, **ROUTED)
    assert "routed" in report.pattern
    assert not report.exact
    before = AutoModelForCausalLM.from_pretrained(source)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "routed", output_loading_info=True)
    assert not any(info.values()), info
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    routers = {name: value for name, value in model.state_dict().items() if ".router." in name}
    assert len(routers) == 8
    for name, value in routers.items():
        if name.endswith("query_centroids"):
            assert value.shape == (6, 5, 8)
        elif name.endswith("centroids"):
            assert value.shape == (2, 5, 8)
            torch.testing.assert_close(value.norm(dim=-1), torch.ones(2, 5))
        else:
            assert value.isfinite().all() and value.any() == name.endswith("bias")
    ids = torch.randint(3, 97, (1, 9))
    # Nothing is remote yet.
    torch.testing.assert_close(model(ids[:, :8]).logits, before(ids[:, :8]).logits, rtol=1e-4, atol=1e-5)


def test_fitting_repeats_and_a_routed_source_keeps_its_centroids(source, text, tmp_path):
    for name in ("first", "second"):
        convert_checkpoint(source, tmp_path / name, calibration=[text], **ROUTED)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    report = convert_checkpoint(tmp_path / "first", tmp_path / "wider", sliding_window=16)
    assert report.calibration is None
    wider = AutoModelForCausalLM.from_pretrained(tmp_path / "wider")
    assert wider.config.sliding_window == 16
    assert all(torch.equal(first[name], value) for name, value in wider.state_dict().items())
    report = convert_checkpoint(tmp_path / "first", tmp_path / "finer", num_clusters=7, calibration=text)
    assert report.calibration["texts"] == ["text.txt"]


def test_the_way_back_leaves_the_routers_out(source, text, tmp_path):
    convert_checkpoint(source, tmp_path / "routed", calibration=text, **ROUTED)
    with pytest.raises(ValueError, match="2 of 3 are local_routed_attention"):
        to_dense(tmp_path / "routed", tmp_path / "dense")
    report = to_dense(tmp_path / "routed", tmp_path / "dense", allow_pattern_change=True)
    assert len(report.tensors_skipped) == 8
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (source, tmp_path / "dense"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_refusals(source, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("w1 w2")
    with pytest.raises(ValueError, match="has 2 tokens; at least"):
        convert_checkpoint(source, tmp_path / "x", calibration=short, **ROUTED)
    with pytest.raises(ValueError, match="cannot make 9999 clusters"):
        convert_checkpoint(source, tmp_path / "x", calibration=text, **{**ROUTED, "num_clusters": 9999})
    with pytest.raises(ValueError, match="num_clusters has no effect"):
        convert_checkpoint(source, tmp_path / "x", layer_types="SF", sliding_window=4, num_clusters=3)
    with pytest.raises(OSError, match="nowhere"):
        convert_checkpoint(source, tmp_path / "x", calibration=tmp_path / "nowhere", **ROUTED)
    assert not (tmp_path / "x").exists()
    dry = convert_checkpoint(source, tmp_path / "x", calibration=Calibration([str(text)], 4096), dry_run=True, **ROUTED)
    assert dry.parameters == sum(x.numel() for x in tiny_model("full").parameters()) + 2 * (2 * 5 * 8 + 6 * 5 * 8 + 6 * 48 + 6)
    assert not (tmp_path / "x").exists()
