"""Configurations: round trips, pattern strings, presets, and refusals that say what would be right."""

import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_deepseek_r1.configuration import PRESETS, DeepseekR1TextConfig, expand_layer_pattern, preset_fields
from tests.models import PATTERNS, tiny_config

EXTREMES = {
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0}},
    "rotary_by_layer": {
        "per_layer_config": {1: {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}, "head_dim": 16}}
    },
    "everything_by_layer": {
        "per_layer_config": {
            0: {"sliding_window": 3, "sparse_attention": {"num_sink_tokens": 1}, "attention_bias": True, "qk_norm": "head"},
            2: {"attention_out_bias": True, "mlp_bias": True, "intermediate_size": 32, "num_key_value_heads": 6},
        }
    },
    "several_end_tokens": {"eos_token_id": [2, 3], "tie_word_embeddings": True, "qk_norm": "head", "hidden_act": "relu6"},
}


def configs():
    for name in PRESETS:
        yield name, DeepseekR1TextConfig.from_preset(name)
    for name in PATTERNS:
        yield name, tiny_config(name)
    for name, fields in EXTREMES.items():
        yield name, tiny_config("mixed", **fields)


@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in configs()])
def test_saving_and_loading_gives_an_equal_configuration(config, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded == config
    assert type(loaded) is DeepseekR1TextConfig
    for mine, theirs in zip(loaded.per_layer_config, config.per_layer_config, strict=True):
        assert mine == theirs


def test_equality_sees_every_difference():
    assert tiny_config() == tiny_config()
    assert tiny_config() != tiny_config(sliding_window=8)
    assert tiny_config() != tiny_config(per_layer_config={0: {"sliding_window": 8}})
    assert tiny_config() != 3


def test_a_pattern_string_repeats_over_the_layers():
    assert expand_layer_pattern("SSF", 7) == [*(["sliding_attention"] * 2 + ["full_attention"]) * 2, "sliding_attention"]
    assert DeepseekR1TextConfig(layer_types="F", num_hidden_layers=2).layer_types == ["full_attention"] * 2
    assert DeepseekR1TextConfig(sliding_window=9, num_hidden_layers=2).layer_types == ["sliding_attention"] * 2


def test_every_preset_makes_a_valid_model_and_can_be_overruled():
    for name in PRESETS:
        config = DeepseekR1TextConfig.from_preset(name, num_hidden_layers=5, sliding_window=17)
        assert (config.num_hidden_layers, config.sliding_window) == (5, 17)
    assert DeepseekR1TextConfig.from_preset("mobile").hidden_act == "relu6"
    with pytest.raises(ValueError, match="fits new models only"):
        preset_fields("mobile")
    with pytest.raises(ValueError, match="choose one of dense, balanced"):
        preset_fields("fast")


def test_a_preset_is_not_changed_by_the_models_made_from_it():
    before = json.dumps(PRESETS)
    DeepseekR1TextConfig.from_preset("balanced").sparse_attention["num_sink_tokens"] = 5
    assert json.dumps(PRESETS) == before


WRONG = {
    "letter": ({"layer_types": "SX"}, "'SX'.*letters F = full_attention"),
    "no letter": ({"layer_types": ""}, "one or more of the letters"),
    "unknown type": ({"layer_types": ["full_attention", "banana", "full_attention"]}, "'banana'.*must be one of"),
    "too few types": ({"layer_types": ["full_attention"]}, r"layer_types has 1 entries.*num_hidden_layers=3"),
    "window missing": ({"layer_types": "S", "sliding_window": None}, "layer 0 is sliding_attention but sliding_window=None"),
    "window zero": ({"per_layer_config": {2: {"sliding_window": 0}}}, "layer 2 is sliding_attention but sliding_window=0"),
    "heads": ({"num_key_value_heads": 4}, "num_key_value_heads=4 must divide num_attention_heads=6"),
    "no heads": ({"num_attention_heads": 0, "num_key_value_heads": None}, "num_attention_heads=0 must be at least 1"),
    "head size": ({"head_dim": 7}, "head_dim=7 must be positive, and even"),
    "sinks": ({"sparse_attention": {"num_sink_tokens": -1}}, "'num_sink_tokens'.*=-1 must be 0 or more"),
    "clusters": (
        {"sparse_attention": {"num_clusters": 4, "routed_clusters": 5}},
        "'routed_clusters'.*=5 must lie between 1 and",
    ),
    "routed tokens": ({"sparse_attention": {"routed_tokens": 0}}, "'routed_tokens'.*=0 must be at least 1"),
    "nothing routed": (
        {"layer_types": "R", "sparse_attention": None},
        "layer 0 is local_routed_attention but sparse_attention is None",
    ),
    "sparse name": ({"sparse_attention": {"sinks": 4}}, r"keys among \[.*'num_sink_tokens'"),
    "sparse name in a layer": ({"per_layer_config": {1: {"sparse_attention": {"sinks": 4}}}}, "layer 1: sparse_attention"),
    "sparse type": ({"sparse_attention": {"num_sink_tokens": "4"}}, "num_sink_tokens.*expected int"),
    "rotary list": ({"no_rope_layers": [1, 2, 1]}, "no_rope_layers contains 2"),
    "rotary type": ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "'spiral' must be one of"),
    "rotary by type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "by layer in per_layer_config",
    ),
    "norm": ({"qk_norm": "layer"}, "qk_norm"),
    "dropout": ({"attention_dropout": 1.5}, r"attention_dropout=1.5 must lie in \[0, 1\)"),
    "chunk": ({"chunk_size_feed_forward": -1}, "chunk_size_feed_forward=-1 must be 0"),
    "no layers": ({"num_hidden_layers": 0, "layer_types": None}, "num_hidden_layers=0 must be at least 1"),
    "vocabulary": ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
    "type": ({"hidden_size": "big"}, "hidden_size.*expected int"),
    "shared by all layers": ({"per_layer_config": {1: {"hidden_size": 32}}}, "layer 1 sets hidden_size"),
    "layer number": ({"per_layer_config": {3: {"sliding_window": 4}}}, r"range \[0, 3\)"),
}


@pytest.mark.parametrize("fields, message", WRONG.values(), ids=WRONG)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError)) as caught:
        tiny_config("mixed", **fields)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
