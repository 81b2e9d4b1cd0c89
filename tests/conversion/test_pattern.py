"""Asking for a sparse pattern, and what the report says about it."""

import json

import pytest

from modeling_deepseek_r1.configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from modeling_deepseek_r1.conversion import convert_checkpoint

from .sources import assert_same_tensors, model_of, save


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(model_of("llama", num_hidden_layers=4), tmp_path_factory.mktemp("pattern") / "source")


def test_preset_and_arguments_that_win_over_it(source, tmp_path):
    report = convert_checkpoint(source, tmp_path / "a", preset="low_latency", sliding_window=8, num_sink_tokens=2)
    assert report.pattern == "4 x sliding_attention (8 tokens + 2 sink tokens)"
    assert not report.exact
    config = DeepseekR1TextConfig.from_pretrained(tmp_path / "a")
    assert (config.sliding_window, config.sparse_attention["num_sink_tokens"]) == (8, 2)
    assert_same_tensors(tmp_path / "a", source)
    report = convert_checkpoint(source, tmp_path / "b", preset="low_latency", layer_types="SSSF", dry_run=True)
    assert report.pattern == "3 x sliding_attention (128 tokens + 32 sink tokens), 1 x full_attention"


def test_layer_types_as_a_list(source, tmp_path):
    kinds = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
    report = convert_checkpoint(source, tmp_path / "a", layer_types=kinds, sliding_window=6)
    assert report.pattern == "1 x sliding_attention (6 tokens), 3 x full_attention"
    assert json.loads((tmp_path / "a" / "config.json").read_text())["layer_types"] == kinds


def test_cache_sizes_are_those_of_the_layers(source, tmp_path):
    report = convert_checkpoint(source, tmp_path / "a", layer_types="SF", sliding_window=8, num_sink_tokens=2, dry_run=True)
    token = 2 * 2 * 8 * 4  # keys and values, 2 heads, 8 numbers each, float32
    assert (report.cache_before.growth_bytes, report.cache_before.fixed_bytes) == (4 * 1000 * token, 0)
    assert (report.cache_after.growth_bytes, report.cache_after.fixed_bytes) == (2 * 1000 * token, 2 * (8 - 1 + 2) * token)
    assert report.disk_bytes == 4 * report.parameters
    assert report.load_bytes == 4 * (report.parameters + 101 * 48)


def test_the_pattern_of_a_converted_checkpoint_changes_without_the_source(source, tmp_path):
    convert_checkpoint(source, tmp_path / "sparse", preset="low_latency")
    kept = convert_checkpoint(tmp_path / "sparse", tmp_path / "copy")
    assert kept.exact and kept.source_family == "deepseek_r1_text"
    report = convert_checkpoint(tmp_path / "sparse", tmp_path / "dense", preset="dense")
    assert report.pattern == "4 x full_attention" and not report.exact
    assert_same_tensors(tmp_path / "dense", source)
    assert DeepseekR1TextConfig.from_pretrained(tmp_path / "dense").source_model_type == "llama"


def test_asking_for_the_pattern_that_is_there_is_exact(source, tmp_path):
    assert convert_checkpoint(source, tmp_path / "a", preset="dense", dry_run=True).exact


def test_overrides_of_single_layers_give_way_to_what_is_asked_for(source, tmp_path):
    convert_checkpoint(source, tmp_path / "a", layer_types="SF", sliding_window=512, num_sink_tokens=32)
    file = tmp_path / "a" / "config.json"
    overrides = {"0": {"sliding_window": 16, "attention_dropout": 0.1}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"per_layer_config": overrides}))
    kept = convert_checkpoint(tmp_path / "a", tmp_path / "b", dry_run=True)
    assert kept.pattern.startswith("1 x sliding_attention (16 tokens + 32 sink tokens), 2 x full_attention") and kept.exact
    convert_checkpoint(tmp_path / "a", tmp_path / "c", sliding_window=64)
    stored = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (stored["sliding_window"], stored["per_layer_config"]) == (64, {"0": {"attention_dropout": 0.1}})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "fast"}, "preset='fast' is not known; choose one of dense"),
        ({"preset": "mobile"}, "fits new models only"),
        ({"layer_types": "SX"}, "layer_types='SX'"),
        ({"layer_types": "SF"}, "sliding_window=None; give the number of tokens"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"sliding_window": 8}, "sliding_window has no effect: every layer is full_attention"),
        ({"num_sink_tokens": 8}, "num_sink_tokens has no effect"),
        ({"preset": "balanced", "num_sink_tokens": -1}, "num_sink_tokens"),
        ({"preset": "balanced", "sliding_window": 0}, "sliding_window=0"),
        ({"max_shard_size": 0}, "max_shard_size=0"),
        ({"max_shard_size": "big"}, "big|size"),
    ],
)
def test_impossible_arguments_are_refused(arguments, words, source, tmp_path):
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(source, tmp_path / "a", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_report_reads_and_serialises(source, tmp_path):
    report = convert_checkpoint(source, tmp_path / "a", preset="balanced", dry_run=True)
    lines = report.summary().splitlines()
    starts = {len(line) - len(line[16:].lstrip()) for line in lines}
    assert len(starts) == 1 and lines[2].split() == ["same", "function", "no"]
    assert json.loads(json.dumps(report.to_dict()))["cache_after"]["growth_bytes"] == report.cache_after.growth_bytes
