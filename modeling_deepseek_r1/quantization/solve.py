"""The numbers of one matrix, given how its inputs correlate: rounding, error compensation, activation-aware scaling.

What a matrix does wrong on the calibration text, `||X (W - W')^T||^2`, is `tr(D G D^T)` with `D = W - W'` and the Gram matrix
`G = X^T X` of its inputs; so G is all that has to be kept of a text.

By the time a matrix is rounded its inputs are no longer what they were, as the layers before have been rounded. What its outputs
ought to be, `Y`, is what they were: so its weights are first moved to `W + S (G + damping)^-1` with the shortfall
`S = (Y - X W^T)^T X`, which are the best that it could have, and rounded then (https://arxiv.org/abs/2504.02692).
"""

from dataclasses import dataclass

import torch

from .formats import Format, Grid, encode, fit_grid, rounded, values

DAMPING = 0.01
"""Share of the mean diagonal that is added to G's, so that it can be inverted where few tokens were seen."""
TIED_DAMPING = 1.0
"""The same for a head that is the embedding as well, in which every column counts for itself besides."""
MOVE_DAMPING = 0.3
"""The same for moving weights, so that they stay where they are in directions that the text hardly has."""
_COLUMNS = 128
_EXPONENTS = tuple(step / 10 for step in range(11))


@dataclass
class Solution:
    """A quantized matrix.

    Attributes:
        codes, grid: what is stored. input_scale: `[in]`, or None.
        error: norm of what rounding makes of the outputs (without inputs: the weights), relative to their own.
    """

    codes: torch.Tensor
    grid: Grid
    input_scale: torch.Tensor | None
    error: float


def solve(
    weight: torch.Tensor,
    gram: torch.Tensor | None,
    format: Format,
    method: str,
    damping: float = DAMPING,
    shortfall: torch.Tensor | None = None,
) -> Solution:
    """Quantizes a matrix `[out, in]`, float32.

    Args:
        gram: `X^T X`, `[in, in]`, of the inputs of a text; None or zero: no input was seen, and weights are rounded to nearest.
        method: "rtn", "gptq" (https://arxiv.org/abs/2210.17323), "awq" (https://arxiv.org/abs/2306.00978), or "fitted": rounding,
            to scales that suit the inputs.
        damping: of the Gram matrix, for "gptq".
        shortfall: `[out, in]`, see above; for "gptq", which alone moves weights. None: the inputs are what they were.
    """
    if gram is not None and not gram.diagonal().any():
        gram = None
    if gram is None or method in ("rtn", "fitted"):
        importance = torch.ones_like(weight[0]) if gram is None else gram.diagonal()
        grid = fit_grid(weight, format, None if method == "rtn" else importance)
        codes = encode(weight, grid, format)
        scale = torch.ones(weight.shape[1], device=weight.device) if method == "awq" else None
    elif method == "gptq":
        if shortfall is not None:
            weight = weight + torch.cholesky_solve(shortfall.T, _factor(gram, max(damping, MOVE_DAMPING))[0]).T
        codes, grid = compensated(weight, gram, format, damping)
        scale = None
    else:
        codes, grid, scale = activation_aware(weight, gram, format)
    result = values(codes, grid, torch.float32)
    return Solution(codes, grid, scale, relative_error(weight, result if scale is None else result * scale, gram))


def squared_error(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """`tr(D G D^T)`."""
    return float(((difference @ gram) * difference).sum(dtype=torch.float64).clamp(min=0))


def relative_error(weight: torch.Tensor, result: torch.Tensor, gram: torch.Tensor | None) -> float:
    """As `Solution.error`."""
    if gram is None:
        return float((result - weight).norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny))
    own = squared_error(weight, gram)
    return (squared_error(result - weight, gram) / own) ** 0.5 if own else 0.0


def compensated(weight: torch.Tensor, gram: torch.Tensor, format: Format, damping: float) -> tuple[torch.Tensor, Grid]:
    """Column after column is rounded, and its error taken out of the outputs by the columns that are still to come.

    The largest inputs come first. Grids are fitted before, so that groups stay neighbours whatever the order.
    """
    importance = gram.diagonal()
    grid = fit_grid(weight, format, importance)
    order = importance.argsort(descending=True)
    inverse = _factor(gram[order][:, order], damping)[1]
    columns = grid.columns(order, format.group_size)
    rest, codes = weight[:, order].clone(), None
    for start in range(0, len(order), _COLUMNS):
        stop = min(start + _COLUMNS, len(order))
        block, errors = rest[:, start:stop].clone(), torch.empty_like(rest[:, start:stop])
        for offset in range(stop - start):
            place = start + offset
            one = Grid(
                columns.scales[:, place : place + 1], None if columns.zeros is None else columns.zeros[:, place : place + 1]
            )
            column = encode(block[:, offset : offset + 1], one, format)
            codes = column.new_empty(weight.shape) if codes is None else codes
            codes[:, place] = column[:, 0]
            error = (block[:, offset] - values(column, one, torch.float32)[:, 0]) / inverse[place, place]
            block[:, offset:].addr_(error, inverse[place, place:stop], alpha=-1)
            errors[:, offset] = error
        rest[:, stop:].addmm_(errors, inverse[start:stop, stop:], alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return codes[:, back], grid


def _factor(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cholesky factors, in float32, of the damped Gram matrix (lower) and of its inverse (upper); what float32 cannot factorise gets
    more damping."""
    mean = gram.diagonal().mean()
    for _ in range(6):
        damped = gram.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return factor, upper
        damping *= 10
    raise ValueError("the inputs of a layer cannot be used for calibration: their products are not finite, or all but zero")


def activation_aware(weight: torch.Tensor, gram: torch.Tensor, format: Format) -> tuple[torch.Tensor, Grid, torch.Tensor]:
    """Columns of large inputs are made larger before rounding, and these inputs smaller; how much, by trying.

    Returns:
        Codes and grid of `weight / scale`, and `scale` `[in]`.
    """
    size = gram.diagonal().sqrt().clamp(min=1e-4 * float(gram.diagonal().max()) ** 0.5)
    best = None
    for exponent in _EXPONENTS:
        larger = size**exponent
        larger = larger / (larger.max() * larger.min()).sqrt()
        scaled = weight * larger
        grid = fit_grid(scaled, format, gram.diagonal() / larger.square())
        error = squared_error(rounded(scaled, grid, format) / larger - weight, gram)
        if best is None or error < best[0]:
            best = error, scaled, grid, 1 / larger
    _, scaled, grid, scale = best
    return encode(scaled, grid, format), grid, scale
