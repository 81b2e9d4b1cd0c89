"""Configurations: round trips, pattern strings, presets, and refusals that say what would be right."""

import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

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
    "experts_by_layer": {
        "num_experts": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "per_layer_config": {
            1: {"num_experts": 6, "num_experts_per_tok": 3, "routing": {"min_experts_per_tok": 1}},
            2: {"moe_intermediate_size": 16, "routing": {"expert_topology": [{"x": 1}, {"x": 1, "y": 3}], "expert_rank": 2}},
        },
    },
    "several_end_tokens": {"eos_token_id": [2, 3], "tie_word_embeddings": True, "qk_norm": "head", "hidden_act": "relu6"},
    "shared_expert": {
        "num_experts": 4,
        "shared_expert_intermediate_size": 8,
        "qk_norm": "projection",
        "clip_qkv": 8,
        "routing": {"bias_balancing": True},
    },
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


def test_the_number_of_experts_comes_from_the_topology():
    config = DeepseekR1TextConfig(num_hidden_layers=5, routing={}, mlp_layer_types=["dense"] + ["sparse"] * 4)
    assert (config.num_experts, config.moe_intermediate_size) == (8, config.intermediate_size)
    assert not config.is_heterogeneous and not config.is_sparse(0) and config.is_sparse(1)
    assert [list(config.expert_domains(layer)) for layer in range(1, 5)] == [
        ["code", "image", "text"], ["text_semantic", "text_syntactic"], ["multimodal_fusion"], ["output_refinement"],
    ]  # fmt: skip
    two = DeepseekR1TextConfig(num_hidden_layers=5, routing={"expert_topology": [{"a": 2}, {"b": 3}]})
    assert [layer.num_experts for layer in two.per_layer_config] == [2, 2, 2, 3, 3]
    plain = DeepseekR1TextConfig(num_hidden_layers=2, num_experts=6, per_layer_config={1: {"num_experts": 4}})
    assert [plain.expert_domains(layer) for layer in range(2)] == [{"all": 6}, {"all": 4}]
    assert plain.routing is None


def test_no_experts_means_no_mixture():
    for experts in (None, 0):
        config = tiny_config("full", num_experts=experts)
        assert config.mlp_layer_types is None and not any(config.is_sparse(layer) for layer in range(3))
        # TRL would look for the router's logits otherwise.
        assert config.router_aux_loss_coef == 0.0


def test_experts_keep_their_numbers_when_a_file_is_read(tmp_path):
    """Keys of a configuration file are sorted."""
    config = tiny_config("full", routing={"expert_topology": [{"text": 3, "code": 2}]})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert list(loaded.expert_domains(0).items()) == list(config.expert_domains(0).items()) == [("code", 2), ("text", 3)]


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
    "stride": ({"sparse_attention": {"global_stride": 0}}, "'global_stride'.*=0 must be at least 1"),
    "memory": ({"sparse_attention": {"num_memory_tokens": -1}}, "'num_memory_tokens'.*=-1 must be 0 or more"),
    "no nodes": (
        {"layer_types": "G", "sparse_attention": None},
        "layer 0 is local_global_attention but sparse_attention is None; give its global_stride",
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
    "experts per token": ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5 must lie between 1 and num_exp"),
    "sparse without experts": ({"mlp_layer_types": ["sparse"] * 3}, "layer 0: num_experts_per_tok=2 .* num_experts=0"),
    "mlp type": ({"num_experts": 4, "mlp_layer_types": ["sparse", "moe", "dense"]}, "mlp_layer_types contains 'moe'"),
    "mlp types": ({"num_experts": 4, "mlp_layer_types": ["sparse"]}, "mlp_layer_types has 1 entries.*num_hidden_layers=3"),
    "expert biases": ({"num_experts": 4, "mlp_bias": True}, "layer 0: mlp_bias=True, but experts have no biases"),
    "expert width": ({"num_experts": 4, "moe_intermediate_size": 0}, "moe_intermediate_size=0 must be at least 1"),
    "shared expert": ({"num_experts": 4, "shared_expert_intermediate_size": 0}, "layer 0: shared_expert_intermediate_size=0"),
    "shared alone": ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8 has no effect without experts"),
    "clipping": ({"per_layer_config": {1: {"clip_qkv": 0}}}, "layer 1: clip_qkv=0 must be positive"),
    "norm kind": ({"qk_norm": "layer"}, "qk_norm.*projection"),
    "aux coefficient": ({"num_experts": 4, "router_aux_loss_coef": -1}, "router_aux_loss_coef=-1 must be 0 or more"),
    "routing name": ({"routing": {"experts": 4}}, r"routing=.*keys among \[.*'expert_topology'"),
    "routing name in a layer": ({"num_experts": 4, "per_layer_config": {1: {"routing": {"x": 4}}}}, "layer 1: routing"),
    "routing scoring": ({"routing": {"router_scoring": "hash"}}, "router_scoring.*hash"),
    "no stage": ({"routing": {"expert_topology": []}}, r"'expert_topology'\]=\[\] must have at least one stage"),
    "empty stage": ({"routing": {"expert_topology": [{}]}}, "has the stage {}; each stage must map"),
    "no experts in a domain": ({"routing": {"expert_topology": [{"a": 0}]}}, "each stage must map at least one domain"),
    "topology and experts": (
        {"num_experts": 8, "routing": {"expert_topology": [{"a": 4}]}},
        r"num_experts=8 but the stages of routing\['expert_topology'\] have \[4\] experts",
    ),
    "topology and experts of a layer": (
        {"routing": {"expert_topology": [{"a": 4}]}, "per_layer_config": {1: {"num_experts": 5}}},
        "layer 1: num_experts=5 but its stage",
    ),
    "domain weight": (
        {"routing": {"expert_topology": [{"a": 4}], "domain_weights": {"b": 1.0}}},
        r"'domain_weights'\] has 'b': 1.0; the keys must be domains",
    ),
    "minimum": ({"num_experts": 4, "routing": {"min_experts_per_tok": 3}}, r"=3 must be at most num_experts_per_tok=2"),
    "minimum zero": ({"num_experts": 4, "routing": {"min_experts_per_tok": 0}}, "'min_experts_per_tok'.*=0 must be at least 1"),
    "threshold": ({"num_experts": 4, "routing": {"expert_activation_threshold": 2}}, r"must lie in \[0, 1\]"),
    "target": ({"num_experts": 4, "routing": {"target_experts_per_tok": 2}}, "'target_experts_per_tok'.*which must differ"),
    "rank": ({"num_experts": 4, "routing": {"expert_rank": 0}}, "'expert_rank'.*=0 must be at least 1"),
    "rank without norm": (
        {"num_experts": 4, "norm_topk_prob": False, "routing": {"expert_rank": 2}},
        "'expert_rank'.*=2 needs norm_topk_prob=True",
    ),
    "cost": ({"num_experts": 4, "routing": {"expert_cost_ratio": -0.1}}, "'expert_cost_ratio'.*must be 0 or more"),
    "layer number": ({"per_layer_config": {3: {"sliding_window": 4}}}, r"range \[0, 3\)"),
}


@pytest.mark.parametrize("fields, message", WRONG.values(), ids=WRONG)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError)) as caught:
        tiny_config("mixed", **fields)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("pattern,letters", [("routed_mixed", "SRF"), ("global_mixed", "GSR"), ("global", "GGG")])
def test_files_of_own_layer_types_are_read_by_the_base_class_too(pattern, letters, tmp_path):
    """As a resuming Trainer and AutoTokenizer do; it knows no layer types but transformers' own."""
    config = tiny_config(pattern)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["layer_pattern"] == letters and "layer_types" not in stored
    assert PreTrainedConfig.from_json_file(tmp_path / "config.json").hidden_size == config.hidden_size
    read = DeepseekR1TextConfig.from_pretrained(tmp_path)
    assert read == config and read.layer_types == config.layer_types and not hasattr(read, "layer_pattern")
    tiny_config("mixed").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == tiny_config("mixed").layer_types
