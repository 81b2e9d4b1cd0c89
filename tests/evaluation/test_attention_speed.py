"""The layer benchmark: right before fast, and complete."""

import torch

from modeling_deepseek_r1.attention.pattern import AttentionPattern
from modeling_deepseek_r1.evaluation import FORMAT_VERSION, read_report, write_report
from modeling_deepseek_r1.evaluation.attention_speed import measure_attention


def test_every_variant_is_measured_and_compared(tmp_path):
    result = measure_attention(
        [64, 128],
        AttentionPattern(16, 2),
        dtypes=[torch.float32, torch.bfloat16],
        heads=2,
        head_dim=8,
        compared_lengths=[128],
        masked_lengths=[128],
        backward_lengths=[128],
        repeats=2,
    )
    assert [(cell["dtype"], cell["length"]) for cell in result["cells"]] == [
        ("float32", 64), ("float32", 128), ("bfloat16", 64), ("bfloat16", 128),
    ]  # fmt: skip
    short, long = result["cells"][:2]
    assert set(short["forward"]) == {"local"} and not short["forward_backward"] and short["largest_error"] is None
    assert set(long["forward"]) == set(long["forward_backward"]) == {"local", "full", "masked"}
    assert set(long["forward_speedups"]) == {"full", "masked"}
    assert len(long["forward"]["full"]["samples"]) == 2
    assert long["largest_error"] < 1e-5
    assert result["cells"][3]["largest_error"] < 0.05
    assert set(result["exponents"]) == {"float32", "bfloat16"}
    result["format_version"] = FORMAT_VERSION
    write_report(result, tmp_path / "result.json")
    assert read_report(tmp_path / "result.json") == result
