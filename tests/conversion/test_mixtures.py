"""Checkpoints with experts of other families: their layouts, what is refused, hybrid attention and training, the way back."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_deepseek_r1.configuration.configuration_deepseek_r1 import DeepseekR1TextConfig
from modeling_deepseek_r1.conversion import convert_checkpoint, to_dense
from modeling_deepseek_r1.conversion.calibrate import SHORT_WINDOW_TOKENS
from modeling_deepseek_r1.conversion.to_dense import choose_family
from tests.test_conversation import word_tokenizer

from .sources import assert_same_tensors, edit_config, input_ids, model_of, save, stored_tensors
from .test_write import MEASURE_PEAK

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("variant", FAMILIES)
def test_packed_experts_convert_like_single_ones(variant, tmp_path):
    model = model_of(variant)
    save(model, tmp_path / "single", max_shard_size="20KB")
    save(model, tmp_path / "packed", save_original_format=False)
    assert not any(".experts.0." in name for name in stored_tensors(tmp_path / "packed"))
    for name in ("single", "packed"):
        convert_checkpoint(tmp_path / name, tmp_path / f"{name}_converted", max_shard_size="30KB")
    assert_same_tensors(tmp_path / "packed_converted", tmp_path / "single_converted")
    to_dense(tmp_path / "packed_converted", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "single")


def test_bfloat16_comes_back_as_it_was(tmp_path):
    source = save(model_of("mixtral").bfloat16(), tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "converted")
    assert report.exact and report.dtype == "bfloat16" and report.tensors_cast == 3
    stored, before = stored_tensors(tmp_path / "converted"), stored_tensors(source)
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float32} == {
        f"model.layers.{layer}.mlp.router.scores.weight" for layer in range(3)
    }
    assert to_dense(tmp_path / "converted", tmp_path / "back").exact
    for name, tensor in stored_tensors(tmp_path / "back").items():
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name
    assert torch.equal(load(tmp_path / "back")(input_ids()).logits, load(source)(input_ids()).logits)


def break_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


W1, W2 = (f"model.layers.1.block_sparse_moe.experts.2.{name}.weight" for name in ("w1", "w2"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(W1), rf"experts of .* do not fit together: missing: {W1}"),
        (lambda tensors: tensors.update({W2: torch.zeros(48, 8)}), rf"{W2} is \[48, 8\], torch.float32, unlike .*experts.0.w2"),
        (lambda tensors: tensors.update({W2: tensors[W2].half()}), rf"{W2} is \[48, 40\], torch.float16, unlike"),
        (
            lambda tensors: [tensors.pop(n) for n in list(tensors) if ".experts.3." in n],
            r"has shape \[3, 80, 48\] instead of \[4, 80",
        ),
        (lambda tensors: tensors.pop(W1.replace("experts.2.w1", "gate")), "missing: model.layers.1.mlp.router.scores.weight"),
        (
            lambda tensors: tensors.update({f"{W1}_scale": torch.ones(1)}),
            "not part of the model: model.layers.1.mlp.experts.2.w1",
        ),
    ],
)
def test_experts_that_are_not_whole_are_named(change, words, tmp_path):
    source = save(model_of("mixtral"), tmp_path / "source")
    break_weights(source, change)
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("variant", "fields", "words"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 of a mixtral checkpoint is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 of a qwen3_moe checkpoint must be at least 1"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 must lie between 1 and num_experts=4"),
        ("olmoe", {"clip_qkv": -1.0}, "clip_qkv=-1.0 must be positive"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0 must be at least 1"),
    ],
)
def test_variants_that_are_not_supported_are_named(variant, fields, words, tmp_path):
    source = save(model_of(variant), tmp_path / "source")
    edit_config(source, **fields)
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(source, tmp_path / "converted")


@pytest.mark.parametrize("variant", ["qwen2_moe", "olmoe"])
def test_hybrid_attention_is_calibrated_generates_and_trains(variant, tmp_path):
    """Routed keys are those that attention sees: after norm and clipping. Without anything remote the function is the source's."""
    save(model_of(variant, max_position_embeddings=4096), tmp_path / "source")
    word_tokenizer().save_pretrained(tmp_path / "source")
    words = torch.randint(91, (SHORT_WINDOW_TOKENS + 5,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    report = convert_checkpoint(
        tmp_path / "source",
        tmp_path / "hybrid",
        layer_types="RSF",
        sliding_window=8,
        num_sink_tokens=2,
        num_clusters=4,
        calibration=tmp_path / "text.txt",
    )
    shared = " (and a shared one)" if variant == "qwen2_moe" else ""
    assert not report.exact and report.experts == f"3 layers x {4 if shared else 6} experts{shared}"
    source, hybrid = load(tmp_path / "source"), load(tmp_path / "hybrid")
    ids = input_ids(8)
    torch.testing.assert_close(hybrid(ids).logits, source(ids).logits, atol=1e-5, rtol=0)
    text = hybrid.generate(input_ids(20), max_new_tokens=8, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(hybrid(text[:, :-1]).logits[:, 19:].argmax(-1), text[:, 20:])

    assert hybrid.config.router_aux_loss_coef == source.config.router_aux_loss_coef > 0
    routers = [router.scores.weight.detach().clone() for router in hybrid.model.routers]
    rows = [{"input_ids": row, "labels": row} for row in input_ids(30)]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=2, learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = Trainer(hybrid, arguments, train_dataset=rows)
    trainer.train()
    assert all(not torch.equal(router.scores.weight, old) for router, old in zip(hybrid.model.routers, routers, strict=True))
    outputs = hybrid.train()(rows[0]["input_ids"][None], labels=rows[0]["labels"][None])
    plain = hybrid.eval()(rows[0]["input_ids"][None], labels=rows[0]["labels"][None])
    torch.testing.assert_close(outputs.loss, plain.loss + hybrid.config.router_aux_loss_coef * outputs.aux_loss)


@pytest.mark.parametrize(("variant", "layers", "family"), [("llama", "E", "mixtral"), ("qwen3", "DE", "qwen3_moe")])
def test_experts_made_of_a_dense_model_leave_as_a_family_that_has_them(variant, layers, family, tmp_path):
    source = save(model_of(variant), tmp_path / "source")
    convert_checkpoint(source, tmp_path / "experts", num_experts=3, expert_layers=layers)
    report = to_dense(tmp_path / "experts", tmp_path / "back")
    assert report.target_family == family and report.exact
    experts, back = load(tmp_path / "experts"), load(tmp_path / "back")
    torch.testing.assert_close(back(input_ids()).logits, experts(input_ids()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"routing": {"bias_balancing": True}}, r"mixtral: routing \(bias_balancing=True\)"),
        ({"routing": {"router_scoring": "attention"}}, r"mixtral: routing \(router_scoring=attention\)"),
        ({"routing": {"expert_rank": 2}}, r"mixtral: routing \(expert_rank=2\)"),
        ({"routing": {"min_experts_per_tok": 1}}, r"mixtral: routing \(min_experts_per_tok=1\)"),
        ({"num_experts": None, "routing": {"expert_topology": [{"a": 2, "b": 2}]}}, r"expert_topology=domains a, b"),
        ({"norm_topk_prob": False}, r"mixtral: norm_topk_prob \(False\).*qwen2_moe: shared_expert_intermediate_size \(None\)"),
        ({"mlp_layer_types": ["sparse", "dense"]}, r"mixtral: mlp_layer_types \(experts in 1 of 2 layers\)"),
        ({"shared_expert_intermediate_size": 8, "qk_norm": "head"}, r"qwen3_moe: shared_expert_intermediate_size \(8\)"),
        ({"clip_qkv": 3.0}, r"mixtral: clip_qkv \(3.0\).*olmoe: qk_norm \(None\)"),
        ({"qk_norm": "projection", "head_dim": 64}, r"olmoe: head_dim \(64, not"),
    ],
)
def test_what_no_family_with_experts_expresses_is_named(fields, words):
    config = DeepseekR1TextConfig(num_hidden_layers=2, **{"num_experts": 4, **fields})
    with pytest.raises(ValueError, match=words):
        choose_family(config, allow_pattern_change=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_peak_memory_is_about_the_largest_tensor_that_is_written(tmp_path):
    sizes = {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 2000, "num_attention_heads": 8}
    save(model_of("mixtral", num_hidden_layers=6, num_local_experts=8, **sizes), tmp_path / "source")
    packs = MEASURE_PEAK.replace(", dtype=sys.argv[3]", "")
    for script, before, name in (
        (packs, "source", "packed"),
        (packs.replace("convert_checkpoint", "to_dense"), "packed", "back"),
    ):
        command = [sys.executable, "-c", script, tmp_path / before, tmp_path / name]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        written = [tensor.nbytes for tensor in stored_tensors(tmp_path / name).values()]
        # Pages of files and freed blocks that a system takes back late are counted by some systems.
        assert 0 < peak < 2 * max(written) + 80 * 10**6 < sum(written) / 2, name
