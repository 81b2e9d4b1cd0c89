"""Stored weights inside of models: products, gradients, files, adapters."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1QuantizationConfig
from modeling_deepseek_r1.moe.adapters import make_adapter
from modeling_deepseek_r1.quantization.formats import Format, encode, fit_grid
from modeling_deepseek_r1.quantization.modules import PackedMatrices, QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from modeling_deepseek_r1.quantization.run import quantize_model
from tests.models import random_ids, tiny_model

FORMATS = [Format(8), Format("fp8"), Format(4, 32)]


def filled(weight: torch.Tensor, format: Format, input_scale=None) -> PackedMatrices:
    matrices, grid = PackedMatrices(tuple(weight.shape), format, input_scale is not None), fit_grid(weight, format)
    matrices.fill(encode(weight, grid, format), grid, input_scale)
    return matrices


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_product_and_its_gradient_are_those_of_the_decoded_weight(format):
    matrices = filled(torch.randn(3, 20, 64), format, torch.rand(3, 64) + 0.5)
    rows, direction = torch.randn(7, 64, requires_grad=True), torch.randn(7, 20)
    output = matrices.product(rows, 1)
    expected = rows @ matrices.decoded()[1].T
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
    gradients = [torch.autograd.grad(value, rows, direction)[0] for value in (output, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format", [Format(8), Format(4, 32), Format(4, 64)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 32, 33])
def test_few_rows_in_bfloat16_give_the_same_by_another_kernel(format, rows):
    matrices = filled(torch.randn(2, 128, 192), format).to(torch.bfloat16)
    inputs = torch.randn(rows, 192, dtype=torch.bfloat16)
    assert matrices._suits_kernel(inputs) == (rows <= 32)
    output = matrices.product(inputs, 1).float()
    expected = inputs.float() @ matrices.decoded()[1].T
    assert float((output - expected).norm() / expected.norm()) < 0.01
    assert matrices._suits_kernel(inputs.requires_grad_()) is False


def test_a_cast_leaves_what_is_stored_alone():
    linear = QuantizedLinear(nn.Linear(32, 8), Format(4, 16), input_scale=True)
    embedding = QuantizedEmbedding(nn.Embedding(9, 32), Format(4, 16))
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16):
        linear.to(dtype), embedding.to(dtype)
        assert linear(torch.randn(2, 3, 32, dtype=dtype)).dtype == embedding(torch.tensor([[1]])).dtype == dtype
    assert all(
        torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype for name, tensor in linear.state_dict().items()
    )


def test_experts_are_those_of_the_decoded_weights():
    block = tiny_model("experts").model.layers[0].mlp
    plain, quantized = block.experts, QuantizedExperts(block.experts, Format(4, 8), input_scale=True)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            weight, module = getattr(plain, name), getattr(quantized, name)
            grid = fit_grid(weight, Format(4, 8))
            module.fill(encode(weight, grid, Format(4, 8)), grid, torch.rand(weight.shape[0], weight.shape[2]) + 0.5)
            weight.copy_(module.decoded())
    hidden, index, weights = torch.randn(11, 48, requires_grad=True), torch.randint(0, 5, (11, 2)), torch.rand(11, 2)
    weights[3] = 0
    outputs = [experts(hidden, index, weights) for experts in (quantized, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert not outputs[0][3].any()
    gradients = [torch.autograd.grad(output.square().sum(), hidden)[0] for output in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    assert quantized(hidden, index, torch.zeros(11, 2)).shape == (11, 48)
    with pytest.raises(ValueError, match="QuantizedExperts cannot be trained expert by expert"):
        make_adapter(quantized, [0], 2)


def quantized(pattern, bits=4, method="rtn", windows=None, group_size=8, **fields):
    model = tiny_model(pattern, **fields)
    config = DeepseekR1QuantizationConfig(bits, method, group_size if bits == 4 else None)
    return model, quantize_model(model, config, windows)


@pytest.mark.parametrize(
    ("pattern", "bits", "method", "tied"),
    [
        ("routed_mixed", 4, "rtn", True),
        ("global", 8, "rtn", False),
        ("experts", 4, "awq", False),
        ("experts", "fp8", "gptq", True),
        ("low_rank_experts", 4, "awq", True),
        ("shared_expert", 8, "gptq", False),
        ("expert_domains", 4, "gptq", True),
    ],
)
def test_a_saved_model_comes_back(pattern, bits, method, tied, tmp_path):
    model, (matrices, layers) = quantized(pattern, bits, method, random_ids(3, 40), tie_word_embeddings=tied)
    ids = random_ids(2, 30, seed=5)
    untouched = [m for name, m in model.named_modules() if name.endswith(("router", "norm", "global_tokens"))]
    assert untouched and not any(isinstance(part, (QuantizedLinear, PackedMatrices)) for m in untouched for part in m.modules())
    assert {type(m) for m in model.modules() if type(m) in (nn.Linear, nn.Embedding)} <= {nn.Linear}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, DeepseekR1ForCausalLM) and again.config.quantization_config.method == method
    assert torch.equal(model(ids).logits, again(ids).logits)
    texts = [m.generate(ids[:, :8], max_new_tokens=6, do_sample=False) for m in (model, again)]
    assert torch.equal(*texts)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert len(layers) == 3 and all(0 < layer.output_error < 1 for layer in layers)
    agreements = [layer.router_agreement for layer in layers if layer.router_agreement is not None]
    assert len(agreements) == len(model.model.routers) and all(0.5 < share <= 1 for share in agreements)
    assert all(m.on_text for m in matrices if "factors" not in m.name and (tied or "embed_tokens" not in m.name))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_calibration_moves_the_model_less_than_rounding():
    windows, held_out = random_ids(8, 64), random_ids(4, 64, seed=3)
    before = tiny_model("experts")(held_out).logits.detach()
    wrong = {}
    for method in ("rtn", "gptq"):
        model, _ = quantized("experts", method=method, windows=windows)
        wrong[method] = float((model(held_out).logits - before).detach().norm() / before.norm())
    assert wrong["gptq"] < 0.85 * wrong["rtn"]


def test_loading_can_round_too(tmp_path):
    tiny_model("experts", tie_word_embeddings=True).save_pretrained(tmp_path)
    expected, _ = quantized("experts", tie_word_embeddings=True)
    settings = DeepseekR1QuantizationConfig(4, group_size=8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    ids = random_ids(1, 20)
    assert torch.equal(model(ids).logits, expected(ids).logits)
    with pytest.raises(ValueError, match="method='gptq' reads a text first"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=DeepseekR1QuantizationConfig(8, "gptq"))


@pytest.mark.parametrize("bits", [4, "fp8"])
def test_adapters_train_on_frozen_stored_weights(bits):
    peft = pytest.importorskip("peft")
    model, _ = quantized("mixed", bits)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    ids = random_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 12 and all("lora_" in name and grad.any() for name, grad in trained.items())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = [float(model(ids, labels=ids).loss)]
    optimizer.step()
    assert float(model(ids, labels=ids).loss.detach()) < losses[0]
    stored = {name.replace("base_layer.", "").removeprefix("base_model.model."): t for name, t in model.state_dict().items()}
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())
    with pytest.raises(RuntimeError):
        model.merge_and_unload()
    trained = model(ids).logits
    model.get_base_model().dequantize()
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, trained, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["experts", "low_rank_experts"])
def test_plain_weights_can_be_made_again(pattern, tmp_path):
    model, _ = quantized(pattern, tie_word_embeddings=True, method="awq", windows=random_ids(2, 30))
    ids = random_ids(1, 20)
    expected = model(ids).logits
    model.dequantize()
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = DeepseekR1ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits) and not hasattr(again.config, "quantization_config")
