import pytest
import torch

from modeling_deepseek_r1.attention.pattern import AttentionPattern
from modeling_deepseek_r1.evaluation.attention_speed import Heads, measure_attention


def test_cells_hold_what_was_asked_for():
    pattern = AttentionPattern(16, 2, 2, 32, global_stride=4)
    result = measure_attention(
        [64, 128],
        pattern,
        num_clusters=4,
        num_memory_tokens=3,
        heads=Heads(4, 2, 8),
        compared_lengths=[128],
        masked_lengths=[128],
        backward_lengths=[64],
        repeats=2,
    )
    first, second = result["cells"]
    assert set(first["forward"]) == set(first["forward_backward"]) == {"local", "global", "routed"}
    assert (
        set(second["forward"]) == {"local", "global", "routed", "full", "blocks", "masked"} and not second["forward_backward"]
    )
    assert second["largest_error"] < 1e-5 and first["largest_error"] is None
    assert len(second["forward"]["full"]["samples"]) == 2
    assert set(result["exponents"]["float32"]) == set(first["memory_over_output"]) == {"local", "global", "routed"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_clusters_only_the_window_is_measured(dtype):
    result = measure_attention(
        [32], AttentionPattern(8), heads=Heads(2, 2, 8), compared_lengths=[32], dtypes=[dtype], repeats=1
    )
    (cell,) = result["cells"]
    assert set(cell["forward"]) == {"local", "full"}
    assert result["exponents"] == {str(dtype).removeprefix("torch."): {}}
