"""The benchmark of the experts: right before fast, and complete."""

import pytest
import torch

from modeling_deepseek_r1.evaluation import FORMAT_VERSION, block_speed, read_report, write_report
from modeling_deepseek_r1.evaluation.expert_speed import measure_experts


def test_every_variant_is_measured_and_compared(tmp_path):
    result = measure_experts(
        [1, 40],
        dtypes=[torch.float32, torch.bfloat16],
        hidden_size=32,
        moe_intermediate_size=16,
        num_experts=6,
        backward_tokens=[40],
        repeats=2,
    )
    assert [(cell["dtype"], cell["tokens"]) for cell in result["cells"]] == [
        ("float32", 1), ("float32", 40), ("bfloat16", 1), ("bfloat16", 40),
    ]  # fmt: skip
    one, many = result["cells"][:2]
    variants = {"ours", "dense", "eager", "grouped_mm", "batched_mm"}
    assert set(one["forward"]) == set(many["forward"]) == set(many["forward_backward"]) == variants
    assert not one["forward_backward"] and set(many["forward_speedups"]) == variants - {"ours"}
    assert len(many["forward"]["ours"]["samples"]) == 2
    for cell in result["cells"]:
        tolerance = 1e-5 if cell["dtype"] == "float32" else 0.05
        assert set(cell["largest_error"]) == variants - {"ours", "dense"}
        assert max(cell["largest_error"].values()) < tolerance
    result["format_version"] = FORMAT_VERSION
    write_report(result, tmp_path / "result.json")
    assert read_report(tmp_path / "result.json") == result


def test_copies_that_would_not_fit_are_left_out():
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "repeats": 1}
    (cell,) = measure_experts([8], max_copied_bytes=1000, **sizes)["cells"]
    assert set(cell["forward"]) == {"ours", "dense", "eager", "grouped_mm"}
    with pytest.raises(ValueError, match="'fastest' is not known; choose among eager"):
        measure_experts([8], implementations=["fastest"], **sizes)


BLOCK = {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 4, "repeats": 1}


def test_whole_blocks_are_measured_beside_those_of_three_families():
    one, many = block_speed.measure_blocks([1, 24], backward_tokens=[24], implementations=["eager", "grouped_mm"], **BLOCK)
    families = {f"{family}, {name}" for family in ("Mixtral", "Qwen3-MoE", "DeepSeek-V3") for name in ("eager", "grouped_mm")}
    assert set(one["forward_speedups"]) == set(many["forward_backward_speedups"]) == families
    assert set(many["forward_backward"]) == families | {"ours", "ours, shared expert"} and not one["forward_backward"]
    shared, plain = (many["forward"][name]["median"] for name in ("ours, shared expert", "ours"))
    ratios = many["forward_speedups"]
    assert ratios["DeepSeek-V3, eager"]["median"] == many["forward"]["DeepSeek-V3, eager"]["median"] / shared
    assert ratios["Mixtral, eager"]["median"] == many["forward"]["Mixtral, eager"]["median"] / plain


def test_a_block_that_gives_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(block_speed, "MixtralSparseMoeBlock", block_speed.Qwen3MoeSparseMoeBlock)
    monkeypatch.setattr(block_speed, "MixtralConfig", lambda num_local_experts, intermediate_size, **sizes: (
        block_speed.Qwen3MoeConfig(num_experts=num_local_experts, norm_topk_prob=False, **sizes)
    ))  # fmt: skip
    with pytest.raises(RuntimeError, match="Mixtral, eager gives something else than our block"):
        block_speed.measure_blocks([8], implementations=["eager"], **BLOCK)
