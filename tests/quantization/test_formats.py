"""Numbers in few bits: how near they are, what is stored, and which of them a text prefers."""

import pytest
import torch

from modeling_deepseek_r1.quantization.formats import Format, decode, encode, fit_grid, rounded, stored
from modeling_deepseek_r1.quantization.solve import MOVE_DAMPING, relative_error, solve

FORMATS = [Format(8), Format("fp8"), Format(4, 8), Format(4, 32)]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_is_stored_is_the_nearest_number(format):
    weight = torch.randn(3, 10, 96)
    weight[0, 0, :8] = 0
    weight[1, 1] = 3.0  # one sign only: zero stays a number of the grid
    grid = fit_grid(weight, format)
    tensors = stored(encode(weight, grid, format), grid, format)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == format.buffers((3, 10, 96))
    result = decode(tensors["weight"], tensors["scales"], tensors.get("zeros"), torch.float32)
    assert torch.equal(result, rounded(weight, grid, format))
    assert not result[0, 0, :8].any()
    error, largest = (result - weight).abs(), weight.abs().amax(-1, keepdim=True)
    if format.bits == "fp8":
        assert bool((error <= 2**-4 * weight.abs() + 2**-9 * largest).all())
    else:
        steps = grid.scales.float().repeat_interleave(96 // grid.scales.shape[-1], -1)
        assert bool((error <= steps * (0.501 if format.bits == 8 else 0.6)).all())


def test_four_bits_take_half_a_byte():
    sizes = {str(f): sum(torch.Size(s).numel() * d.itemsize for s, d in f.buffers((64, 1024)).values()) for f in FORMATS}
    assert sizes[str(Format(4, 32))] * 8 / (64 * 1024) == 4.625
    assert sizes[str(Format(8))] == 64 * 1024 + 64 * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, r"bits=3 must be one of 8, 4, 'fp8'"),
        ({"bits": 4}, "group_size=None must be one of 8, 16, 32"),
        ({"bits": 4, "group_size": 48}, "group_size=48 must be one of"),
        ({"bits": 8, "group_size": 32}, "group_size=32 belongs to 4 bits"),
    ],
)
def test_a_format_that_does_not_exist(fields, message):
    with pytest.raises(ValueError, match=message):
        Format(**fields)


def correlated(rows: int, width: int) -> torch.Tensor:
    """Inputs that a third of the directions explain, of which a few are large."""
    factors = torch.randn(width // 3, width) * torch.logspace(0, 1.5, width)[torch.randperm(width)]
    return torch.randn(rows, width // 3) @ factors + 0.1 * torch.randn(rows, width)


@pytest.mark.parametrize("format", [Format(4, 16), Format(8), Format("fp8")], ids=str)
def test_calibrated_weights_do_better_on_correlated_inputs(format):
    weight, inputs = torch.randn(40, 192), correlated(600, 192)
    gram = inputs.T @ inputs
    found = {method: solve(weight, gram, format, method) for method in ("rtn", "fitted", "gptq", "awq")}
    for solution in found.values():
        result = decode(*stored_tensors(solution, format))
        scale = 1.0 if solution.input_scale is None else solution.input_scale
        wrong = inputs @ (result * scale - weight).T
        assert solution.error == pytest.approx(float(wrong.norm() / (inputs @ weight.T).norm()), rel=1e-3)
    assert found["gptq"].error < 0.6 * found["rtn"].error
    assert found["awq"].error <= found["fitted"].error <= found["rtn"].error
    if format.bits == 4:
        assert found["awq"].error < 0.9 * found["rtn"].error


def stored_tensors(solution, format):
    tensors = stored(solution.codes, solution.grid, format)
    return tensors["weight"], tensors["scales"], tensors.get("zeros"), torch.float32


def test_without_inputs_weights_are_rounded_to_nearest():
    weight = torch.randn(8, 32)
    plain = rounded(weight, fit_grid(weight, Format(8)), Format(8))
    for method in ("gptq", "awq"):
        for gram in (None, torch.zeros(32, 32)):
            solution = solve(weight, gram, Format(4, 8), method)
            assert (solution.input_scale is not None) == (method == "awq")
            assert solution.error < 0.12
    assert relative_error(weight, plain, None) == pytest.approx(float((plain - weight).norm() / weight.norm()))


def test_fewer_tokens_than_inputs_can_be_compensated():
    weight, inputs = torch.randn(16, 64), torch.randn(5, 64)
    inputs[:, 7] = 0
    gram = inputs.T @ inputs
    assert solve(weight, gram, Format(4, 8), "gptq").error < solve(weight, gram, Format(4, 8), "rtn").error
    with pytest.raises(ValueError, match="inputs of a layer cannot be used for calibration"):
        solve(weight, torch.full((64, 64), float("nan")), Format(4, 8), "gptq")


@pytest.mark.parametrize("format", [Format(4, 16), Format(8)], ids=str)
def test_drifted_inputs_are_made_up_for(format):
    """A matrix whose inputs are no longer what they were gives nearly what it gave."""
    weight, before = torch.randn(40, 96), correlated(900, 96)
    inputs = before @ (torch.eye(96) + 0.1 * torch.randn(96, 96)) + 10 * torch.randn(900, 96)
    wanted, gram = before @ weight.T, inputs.T @ inputs
    shortfall = (wanted - inputs @ weight.T).T @ inputs
    wrong = {}
    for name, given in (("weights as they are", None), ("moved", shortfall)):
        result = decode(*stored_tensors(solve(weight, gram, format, "gptq", shortfall=given), format))
        wrong[name] = float((inputs @ result.T - wanted).norm() / wanted.norm())
    damped = gram + MOVE_DAMPING * gram.diagonal().mean() * torch.eye(96)
    best = weight + torch.linalg.solve(damped, shortfall.T).T
    least = float((inputs @ best.T - wanted).norm() / wanted.norm())
    assert wrong["moved"] < 0.6 * wrong["weights as they are"]
    assert wrong["moved"] < (1.3 if format.bits == 8 else 3) * least
