"""Every family and variant, at the level of files: no class of this library's model takes part."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from modeling_deepseek_r1.configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from modeling_deepseek_r1.conversion import convert_checkpoint, to_dense
from modeling_deepseek_r1.conversion.families import FAMILIES
from modeling_deepseek_r1.conversion.to_dense import choose_family

from .sources import MIXTURES, VARIANTS, assert_same_tensors, config_of, edit_config, input_ids, model_of, save

STRUCTURE = {
    "llama": {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False, "qk_norm": None, "head_dim": 8},
    "llama_tied": {"tie_word_embeddings": True, "head_dim": 8, "num_key_value_heads": 1},
    "llama_biases": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "llama_head_dim": {"head_dim": 12, "hidden_act": "gelu"},
    "llama_old_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    "qwen2": {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "qk_norm": None, "sliding_window": None},
    "qwen2_window": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 5},
    "qwen3": {"qk_norm": "head", "head_dim": 16, "attention_bias": False, "attention_out_bias": False},
    "qwen3_window": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attention_bias": True,
        "attention_out_bias": True,
        "sliding_window": 4,
    },
    "mistral": {"layer_types": ["full_attention"] * 3, "head_dim": 10, "attention_bias": False},
    "mistral_window": {"layer_types": ["sliding_attention"] * 3, "sliding_window": 7},
    "smollm3": {"no_rope_layers": [1, 0, 1], "layer_types": ["full_attention"] * 3},
    "smollm3_window": {
        "no_rope_layers": [1, 0, 1],
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    "mixtral": {
        "num_experts": 4,
        "norm_topk_prob": True,
        "moe_intermediate_size": 40,
        "mlp_layer_types": ["sparse"] * 3,
        "router_aux_loss_coef": 0.02,
        "shared_expert_intermediate_size": None,
        "routing": None,
    },
    "mixtral_window": {"layer_types": ["sliding_attention"] * 3, "sliding_window": 6, "head_dim": 10},
    "qwen2_moe": {
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 20,
        "attention_bias": True,
        "attention_out_bias": False,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
    },
    "qwen2_moe_window": {
        "mlp_layer_types": ["dense", "sparse", "dense", "dense"],
        "norm_topk_prob": True,
        "attention_bias": False,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "full_attention"],
    },
    "qwen3_moe": {"qk_norm": "head", "mlp_layer_types": ["dense", "sparse", "sparse"], "head_dim": 16, "num_experts": 5},
    "qwen3_moe_window": {"layer_types": ["sliding_attention"] * 3, "attention_out_bias": True, "num_experts_per_tok": 1},
    "olmoe": {"qk_norm": "projection", "clip_qkv": 0.6, "moe_intermediate_size": 40, "norm_topk_prob": False},
    "olmoe_biases": {"clip_qkv": None, "attention_bias": True, "attention_out_bias": True, "output_router_logits": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversion_keeps_every_tensor_and_the_way_back_the_function(variant, tmp_path):
    model = model_of(variant)
    source = save(model, tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "converted")
    assert report.exact and report.tensors_cast == 0 and report.tensors_skipped == []
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    if variant not in MIXTURES:
        assert_same_tensors(tmp_path / "converted", source)

    back = to_dense(tmp_path / "converted", tmp_path / "dense")
    assert back.exact and back.target_family == model.config.model_type
    assert_same_tensors(tmp_path / "dense", source)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert type(dense) is type(model)
    with torch.no_grad():
        assert torch.equal(dense(input_ids()).logits, model(input_ids()).logits)


@pytest.mark.parametrize("variant", STRUCTURE)
def test_configuration_says_what_the_family_does(variant, tmp_path):
    convert_checkpoint(save(model_of(variant), tmp_path / "source"), tmp_path / "converted")
    stored = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert stored["architectures"] == ["DeepseekR1ForCausalLM"] and stored["model_type"] == "deepseek_r1_text"
    assert stored["dtype"] == "float32"
    config = DeepseekR1TextConfig.from_pretrained(tmp_path / "converted")
    for name, value in STRUCTURE[variant].items():
        assert getattr(config, name) == value, name
    for name in ("vocab_size", "rms_norm_eps", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config, name) == getattr(config_of(variant), name), name


def test_every_family_has_variants():
    assert {config_class.model_type for config_class, _ in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_way_back_gives_the_configuration_that_was_there(variant, tmp_path):
    convert_checkpoint(save(model_of(variant), tmp_path / "source"), tmp_path / "converted")
    to_dense(tmp_path / "converted", tmp_path / "dense")
    source, dense = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("source", "dense"))
    # What only shortens the spelling of layer_types and no_rope_layers, or is another spelling of rope_type.
    ignored = {"max_window_layers", "no_rope_layer_interval", "no_rope_layers", "rope_parameters", "_name_or_path"}
    ignored |= {"decoder_sparse_step", "mlp_only_layers"}
    assert {k: v for k, v in dense.items() if k not in ignored} == {k: v for k, v in source.items() if k not in ignored}
    assert (source["rope_parameters"] or {}).items() >= dense["rope_parameters"].items()


def test_negative_padding_id_means_none(tmp_path):
    source = save(model_of("llama"), tmp_path / "source")
    edit_config(source, pad_token_id=-1)
    convert_checkpoint(source, tmp_path / "converted")
    assert DeepseekR1TextConfig.from_pretrained(tmp_path / "converted").pad_token_id is None


def test_stray_window_of_a_llama_checkpoint_is_ignored_as_its_code_does(tmp_path):
    source = save(model_of("llama"), tmp_path / "source")
    edit_config(source, sliding_window=4)
    report = convert_checkpoint(source, tmp_path / "converted")
    assert report.pattern == "3 x full_attention"


def test_partial_rotary_factor_is_ignored_as_the_default_rotary_code_does(tmp_path):
    source = save(model_of("llama"), tmp_path / "source")
    edit_config(source, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    convert_checkpoint(source, tmp_path / "converted")
    rope = DeepseekR1TextConfig.from_pretrained(tmp_path / "converted").rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("deepseek_v3", "671B model with latent attention; convert a DeepSeek-R1-Distill-Qwen or DeepSeek-R1-Distill-Llama"),
        ("deepseek_v2", "latent attention"),
        ("t5", "'t5' .* is not supported; supported: llama, mistral, qwen2, qwen3, smollm3, mixtral, .*, deepseek_r1_text"),
        ("llava", "is not supported; supported: llama"),
        (None, "model_type None .* is not supported; supported: llama"),
    ],
)
def test_unsupported_model_types_are_refused(model_type, words, tmp_path):
    source = save(model_of("llama"), tmp_path / "source")
    edit_config(source, model_type=model_type)
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(source, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "fields", [{"num_attention_heads": "six"}, {"num_key_value_heads": 4}, {"per_layer_config": {"0": {"head_dim": 4}}}]
)
def test_invalid_configuration_is_refused_by_name(fields, tmp_path):
    source = save(model_of("llama"), tmp_path / "source")
    edit_config(source, **fields)
    with pytest.raises(ValueError, match=next(iter(fields))):
        convert_checkpoint(source, tmp_path / "converted")


SLIDING = {"layer_types": "S", "sliding_window": 5}


@pytest.mark.parametrize(
    ("fields", "words", "pattern_alone"),
    [
        (SLIDING | {"sparse_attention": {"num_sink_tokens": 4}}, r"sparse_attention \(num_sink_tokens=4\)", True),
        (SLIDING | {"per_layer_config": {0: {"sliding_window": 3}}}, r"per_layer_config \(sliding_window differ", True),
        (SLIDING | {"qk_norm": "head", "mlp_bias": True}, r"llama: layer_types \(3 of 3 layers have a sliding window\)", False),
        ({"attention_bias": True, "attention_out_bias": False, "mlp_bias": True}, r"qwen2: mlp_bias \(True\)", False),
        (
            {"attention_bias": False, "attention_out_bias": True},
            r"attention_bias \(False\) and attention_out_bias \(True\)",
            False,
        ),
        ({"qk_norm": "head", "no_rope_layers": [1, 0, 1]}, r"qwen3: no_rope_layers \(\[1\]\)", False),
    ],
)
def test_to_dense_names_what_no_family_expresses(fields, words, pattern_alone):
    with pytest.raises(ValueError, match=words) as caught:
        choose_family(DeepseekR1TextConfig(num_hidden_layers=3, **fields), allow_pattern_change=False)
    assert ("allow_pattern_change=True" in str(caught.value)) == pattern_alone


def test_to_dense_drops_the_pattern_only_when_allowed(tmp_path):
    source = save(model_of("llama"), tmp_path / "source")
    sparse = convert_checkpoint(source, tmp_path / "sparse", preset="low_latency")
    assert not sparse.exact
    with pytest.raises(ValueError, match="allow_pattern_change=True"):
        to_dense(tmp_path / "sparse", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    report = to_dense(tmp_path / "sparse", tmp_path / "dense", allow_pattern_change=True)
    assert not report.exact and any("not the same function" in line for line in report.warnings)
    assert_same_tensors(tmp_path / "dense", source)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "dense"), LlamaConfig)


def test_to_dense_takes_another_family_where_the_first_cannot(tmp_path):
    source = save(model_of("llama"), tmp_path / "source")
    convert_checkpoint(source, tmp_path / "windowed", layer_types="S", sliding_window=5)
    report = to_dense(tmp_path / "windowed", tmp_path / "dense")
    assert report.exact and report.target_family == "mistral"
    assert AutoConfig.from_pretrained(tmp_path / "dense").sliding_window == 5


def test_to_dense_refuses_other_checkpoints(tmp_path):
    source = save(model_of("llama"), tmp_path / "source")
    with pytest.raises(ValueError, match="'llama'; to_dense takes 'deepseek_r1_text'"):
        to_dense(source, tmp_path / "dense")
