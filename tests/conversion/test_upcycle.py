"""Experts made of a dense checkpoint: the same function, the announced sizes, and everything that conversion does with it later."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1TextConfig
from modeling_deepseek_r1.conversion import Calibration, convert_checkpoint, export_checkpoint, source, to_dense
from modeling_deepseek_r1.conversion.calibrate import router_tensors
from modeling_deepseek_r1.conversion.plan import expected_tensors
from tests.models import EXPERT_PATTERNS, randomise, tiny_config, tiny_model

from .gguf_files import write_gguf
from .sources import MIXTURES, VARIANTS, assert_same_tensors, config_of, input_ids, model_of, save, stored_tensors
from .test_export import FRESH_PROCESS, run_fresh
from .test_write import MEASURE_PEAK

DENSE = [name for name in VARIANTS if name not in MIXTURES]
WITH_MLP_BIASES = [name for name in DENSE if getattr(config_of(name), "mlp_bias", False)]
WITHOUT_MLP_BIASES = [name for name in DENSE if name not in WITH_MLP_BIASES]


LOAD_EXPORT = (
    FRESH_PROCESS.partition("import torch\n")[0]
    + """
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

model, expected = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True), load_file(sys.argv[2])
with torch.no_grad():
    print((model(expected["ids"]).logits - expected["logits"]).abs().max().item() < 1e-5)
"""
)


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_same_function(converted, original, atol):
    with torch.no_grad():
        expected = original(input_ids()).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(converted(input_ids()).logits, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("pattern", [*EXPERT_PATTERNS, "mixed"])
def test_expected_tensors_are_those_of_the_model(pattern):
    config = tiny_config(pattern)
    shapes = {name: tuple(tensor.shape) for name, tensor in DeepseekR1ForCausalLM(config).state_dict().items()}
    assert expected_tensors(config) | router_tensors(config) == shapes


@pytest.mark.parametrize("variant", WITHOUT_MLP_BIASES)
def test_identical_experts_are_the_dense_model(variant, tmp_path):
    original = model_of(variant)
    active = 1 + WITHOUT_MLP_BIASES.index(variant) % 8
    report = convert_checkpoint(
        save(original, tmp_path / "source"), tmp_path / "experts", num_experts=8, num_experts_per_tok=active
    )
    assert report.exact
    assert report.experts.startswith("1 layer x 8 experts, +")
    converted = load(tmp_path / "experts")
    assert converted.config.mlp_layer_types == ["dense", "sparse", "dense"]
    assert (converted.config.num_experts, converted.config.num_experts_per_tok) == (8, active)
    assert_same_function(converted, original, 1e-4)


@pytest.mark.parametrize("variant", DENSE)
def test_low_rank_experts_are_the_dense_model(variant, tmp_path):
    original = model_of(variant)
    active = 1 + DENSE.index(variant) % 8
    report = convert_checkpoint(
        save(original, tmp_path / "source"),
        tmp_path / "experts",
        num_experts=8,
        num_experts_per_tok=active,
        expert_rank=3,
        expert_layers="EED",
    )
    assert report.exact
    assert report.experts.startswith("2 layers x 8 experts (rank 3), +")
    converted = load(tmp_path / "experts")
    assert converted.config.mlp_layer_types == ["sparse", "sparse", "dense"]
    assert_same_function(converted, original, 1e-5)


def test_every_number_of_active_experts(tmp_path):
    original = model_of("llama")
    save(original, tmp_path / "source")
    for active in range(1, 5):
        convert_checkpoint(
            tmp_path / "source",
            tmp_path / "experts",
            num_experts=4,
            num_experts_per_tok=active,
            expert_layers="E",
            overwrite=True,
        )
        assert_same_function(load(tmp_path / "experts"), original, 1e-4)


@pytest.mark.parametrize("variant", WITH_MLP_BIASES)
def test_copies_of_an_mlp_with_biases_are_refused(variant, tmp_path):
    save(model_of(variant), tmp_path / "source")
    with pytest.raises(ValueError, match="experts have no biases; low-rank experts"):
        convert_checkpoint(tmp_path / "source", tmp_path / "experts", num_experts=8)
    assert not (tmp_path / "experts").exists()


def test_what_is_written(tmp_path):
    original = model_of("qwen3")
    save(original, tmp_path / "source")
    arguments = {"num_experts": 4, "expert_layers": [2], "dtype": "bfloat16"}
    convert_checkpoint(tmp_path / "source", tmp_path / "copies", **arguments)
    convert_checkpoint(tmp_path / "source", tmp_path / "deltas", expert_rank=2, **arguments)
    dense = {name: tensor.bfloat16() for name, tensor in original.state_dict().items()}
    copies, deltas = stored_tensors(tmp_path / "copies"), stored_tensors(tmp_path / "deltas")
    prefix = "model.layers.2.mlp"
    gate_up = torch.cat((dense[f"{prefix}.gate_proj.weight"], dense[f"{prefix}.up_proj.weight"]))
    for expert in range(4):
        assert torch.equal(copies[f"{prefix}.experts.gate_up_proj"][expert], gate_up)
        assert torch.equal(copies[f"{prefix}.experts.down_proj"][expert], dense[f"{prefix}.down_proj.weight"])
    for stored in (copies, deltas):
        scores = stored[f"{prefix}.router.scores.weight"]
        assert scores.dtype is torch.float32 and scores.shape == (4, 48)
        assert 0.015 < scores.std() < 0.025
        assert torch.equal(scores, copies[f"{prefix}.router.scores.weight"])
        assert torch.equal(stored["model.layers.1.mlp.up_proj.weight"], dense["model.layers.1.mlp.up_proj.weight"])
    for name in ("copies", "deltas"):
        assert AutoConfig.from_pretrained(tmp_path / name).router_aux_loss_coef == 0.1
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert torch.equal(deltas[f"{prefix}.experts.{part}.weight"], dense[f"{prefix}.{part}.weight"])
    for part, size in (("gate_up_proj", 48), ("down_proj", 40)):
        first, second = (deltas[f"{prefix}.experts.{part}_{factor}"] for factor in "ab")
        assert first.dtype is torch.bfloat16 and not second.any()
        assert 0.8 < first.float().std() * size**0.5 < 1.2
        assert not torch.equal(first[0], first[1])


def test_the_seed_decides_what_is_random(tmp_path):
    save(model_of("llama"), tmp_path / "source")
    experts = {"num_experts": 4, "expert_rank": 2}
    for name, seed in (("first", 0), ("same", 0), ("other", 1)):
        convert_checkpoint(tmp_path / "source", tmp_path / name, calibration=Calibration(seed=seed), **experts)
    assert_same_tensors(tmp_path / "same", tmp_path / "first")
    first, other = stored_tensors(tmp_path / "first"), stored_tensors(tmp_path / "other")
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert differing == {name for name in first if name.endswith(("scores.weight", "_a"))}


def test_a_dry_run_announces_the_real_sizes(tmp_path, monkeypatch):
    save(model_of("llama"), tmp_path / "source")
    for arguments in ({"num_experts": 4}, {"expert_topology": {"text": 3, "code": 2}, "expert_rank": 2}):
        report = convert_checkpoint(tmp_path / "source", tmp_path / "experts", overwrite=True, **arguments)
        stored = stored_tensors(tmp_path / "experts")
        assert report.parameters == sum(tensor.numel() for tensor in stored.values())
        assert report.disk_bytes == sum(tensor.nbytes for tensor in stored.values())
        assert report.load_bytes == report.disk_bytes + max(tensor.nbytes for tensor in stored.values())
        growth = report.parameters / sum(tensor.numel() for tensor in stored_tensors(tmp_path / "source").values()) - 1
        assert report.experts.endswith(f"{growth:+.1%} parameters") and report.experts in report.summary()
        with monkeypatch.context() as patch:
            patch.setattr(source.FolderSource, "read", lambda self, name: pytest.fail("a dry run read a tensor"))
            dry = convert_checkpoint(tmp_path / "source", tmp_path / "experts", overwrite=True, dry_run=True, **arguments)
        assert dry.to_dict() == report.to_dict() | {"dry_run": True}


def test_shards_and_saving_again(tmp_path):
    original = model_of("mistral_window")
    save(original, tmp_path / "source", max_shard_size="20KB")
    convert_checkpoint(tmp_path / "source", tmp_path / "experts", num_experts=3, max_shard_size="30KB")
    assert len(list((tmp_path / "experts").glob("model-*.safetensors"))) > 3
    converted = load(tmp_path / "experts")
    assert_same_function(converted, original, 1e-4)
    converted.save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "experts")
    assert DeepseekR1TextConfig.from_pretrained(tmp_path / "again") == converted.config
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = input_ids(24)
    assert torch.equal(load(tmp_path / "again").generate(ids, **settings), original.generate(ids, **settings))


def test_from_gguf(tmp_path):
    original = model_of("llama")
    report = convert_checkpoint(
        write_gguf(tmp_path / "a.gguf", original), tmp_path / "experts", num_experts=4, expert_rank=2, expert_layers="E"
    )
    assert report.exact
    assert_same_function(load(tmp_path / "experts"), original, 1e-5)


def test_experts_and_a_pattern_together(tmp_path):
    save(model_of("llama"), tmp_path / "source")
    pattern = {"layer_types": "SF", "sliding_window": 7, "num_sink_tokens": 2}
    report = convert_checkpoint(tmp_path / "source", tmp_path / "both", num_experts=4, **pattern)
    assert not report.exact and "sliding_attention" in report.pattern
    convert_checkpoint(tmp_path / "source", tmp_path / "sparse", **pattern)
    assert_same_function(load(tmp_path / "both"), load(tmp_path / "sparse"), 1e-4)


def test_layers_of_different_width(tmp_path):
    fields = {"vocab_size": 101, "per_layer_config": {1: {"intermediate_size": 24}}}
    original = tiny_model("full", **fields)
    original.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "experts", num_experts=3, expert_layers="E")
    converted = load(tmp_path / "experts")
    assert [layer.mlp.experts.intermediate_dim for layer in converted.model.layers] == [64, 24, 64]
    assert_same_function(converted, original, 1e-4)


@pytest.mark.parametrize("pattern", EXPERT_PATTERNS)
def test_a_model_with_experts_converts_again(pattern, tmp_path):
    model = tiny_model(pattern)
    model.save_pretrained(tmp_path / "source")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "same")
    assert report.exact and "experts" in report.experts and "parameters" not in report.experts
    assert_same_tensors(tmp_path / "same", tmp_path / "source")
    assert load(tmp_path / "same").config == DeepseekR1TextConfig.from_pretrained(tmp_path / "source")
    report = convert_checkpoint(
        tmp_path / "source", tmp_path / "sparse", layer_types="S", sliding_window=9, dtype="bfloat16", max_shard_size="20KB"
    )
    stored, before = stored_tensors(tmp_path / "sparse"), stored_tensors(tmp_path / "source")
    for name, tensor in stored.items():
        assert torch.equal(tensor, before[name] if ".router." in name else before[name].bfloat16()), name
    assert report.load_bytes == sum(tensor.nbytes for tensor in stored.values()) + max(t.nbytes for t in stored.values())
    assert set(load(tmp_path / "sparse").config.layer_types) == {"sliding_attention"}
    with pytest.raises(ValueError, match=r"no family expresses .* llama: .*experts in [23] of 3 layers"):
        to_dense(tmp_path / "source", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_experts_and_training_that_moves_them_apart(tmp_path):
    """Copies become different, because their weights differ; so do deltas, which start at zero."""
    save(model_of("llama"), tmp_path / "source")
    for rank, name in ((None, "down_proj"), (2, "down_proj_b")):
        convert_checkpoint(tmp_path / "source", tmp_path / "experts", num_experts=3, expert_rank=rank, overwrite=True)
        model = load(tmp_path / "experts").train()
        model(input_ids(), labels=input_ids()).loss.backward()
        grad = getattr(model.model.layers[1].mlp.experts, name).grad
        assert (grad[0] - grad[1]).abs().max() > 1e-2 * grad.abs().max() > 0


@pytest.mark.slow
def test_an_export_loads_where_the_package_is_missing(tmp_path):
    original = model_of("llama")
    save(original, tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "experts", num_experts=4, expert_rank=2)
    export_checkpoint(tmp_path / "experts", tmp_path / "export")
    with torch.no_grad():
        save_file({"ids": input_ids(), "logits": original(input_ids()).logits}, tmp_path / "expected.safetensors")
    assert run_fresh(LOAD_EXPORT, tmp_path, tmp_path / "export", tmp_path / "expected.safetensors") == ["blocked", "True"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"expert_rank": 2}, "expert_rank has no effect without experts"),
        ({"domain_texts": {"a": "prose"}}, "domain_texts has no effect without experts"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5 must lie between 1 and num_experts=4"),
        ({"num_experts": 4, "expert_rank": 0}, "must be at least 1"),
        ({"num_experts": 4, "expert_rank": 27}, "expert_rank=27 is too large for layer 1: from 27 on"),
        ({"num_experts": 4, "expert_layers": "DX"}, "letters D = dense, E = sparse"),
        ({"num_experts": 4, "expert_layers": "D"}, "leaves all 3 layers dense"),
        ({"num_experts": 4, "expert_layers": []}, "leaves all 3 layers dense"),
        ({"num_experts": 4, "expert_layers": [1, 3]}, r"expert_layers has 3; layers are numbered 0 \.\.\. 2"),
        ({"num_experts": 4, "expert_topology": {"a": 1, "b": 2}}, "leave num_experts out or make them agree"),
        ({"expert_topology": {"a": 1, "b": "many"}}, "number of experts"),
        ({"num_experts": 4, "domain_texts": {"a": "prose"}}, "at least two"),
        ({"num_experts": 5, "domain_texts": {"a": "prose", "b": "code"}}, r"num_experts=5 cannot be shared equally .*'a': 2"),
        ({"expert_topology": {"a": 1, "b": 2}, "domain_texts": {"c": "code"}}, "has 'c', which no domain gate knows.*: a, b"),
        ({"expert_topology": {"a": 2}, "domain_texts": {"a": "code"}}, "its domains are: none"),
    ],
)
def test_refusals(arguments, words, tmp_path):
    save(model_of("llama"), tmp_path / "source")
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(tmp_path / "source", tmp_path / "experts", **arguments)
    assert not (tmp_path / "experts").exists()


def test_the_largest_rank_is_smaller_than_a_copy(tmp_path):
    save(model_of("llama"), tmp_path / "source")
    copies, deltas = (
        convert_checkpoint(tmp_path / "source", tmp_path / "x", num_experts=50, expert_rank=rank, dry_run=True).parameters
        for rank in (None, 26)
    )
    assert 0.9 < deltas / copies < 1.02


@pytest.mark.parametrize("arguments", [{"num_experts": 4}, {"expert_topology": [{"a": 2, "b": 2}], "expert_rank": 2}])
def test_experts_are_not_made_of_experts(arguments, tmp_path):
    randomise(tiny_model("experts")).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="the source has experts in 2 of 3 layers"):
        convert_checkpoint(tmp_path / "source", tmp_path / "experts", **arguments)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_peak_memory_is_about_the_largest_tensor_that_is_written(tmp_path):
    sizes = {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 2000, "num_attention_heads": 8}
    save(model_of("llama", num_hidden_layers=5, **sizes), tmp_path / "source")
    script = MEASURE_PEAK.replace("dtype=sys.argv[3]", "num_experts=8, expert_layers='E'")
    command = [sys.executable, "-c", script, tmp_path / "source", tmp_path / "experts"]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    written = [tensor.nbytes for tensor in stored_tensors(tmp_path / "experts").values()]
    # Pages of files and freed blocks that a system takes back late are counted by some systems.
    assert 0 < peak < 2 * max(written) + 80 * 10**6 < sum(written) / 2
