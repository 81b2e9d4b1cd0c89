"""Matrices in few bits: which numbers exist (`Grid`), which of them a weight becomes (`encode`), and the way back (`decode`).

Rows are outputs, columns inputs, any number of matrices in front. 8 bits and fp8 have one float32 scale per row; 4 bits a bfloat16
scale and a zero point in 0 ... 15 per group of neighbouring inputs, because a scale of its own costs a group little and halves
the error. Two values of 4 bits share a byte, the first in its lower half.
"""

from dataclasses import dataclass

import torch

BITS = {"8": 8, "4": 4, "fp8": "fp8"}
"""What a user writes -> `Format.bits`."""
GROUP_SIZES = (8, 16, 32, 64, 128, 256)
FLOAT8 = torch.float8_e4m3fn

_LARGEST = {8: 127.0, "fp8": torch.finfo(FLOAT8).max}
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of a group's range that the search for a better scale tries; values outside become the outermost one."""


@dataclass(frozen=True)
class Format:
    """How a matrix is stored.

    Args:
        bits: 8, 4 or "fp8" (e4m3).
        group_size: neighbouring inputs that share a scale, with 4 bits.

    Raises:
        ValueError: bits or a group size that do not exist, or do not go together.
    """

    bits: int | str
    group_size: int | None = None

    def __post_init__(self):
        if self.bits not in BITS.values():
            raise ValueError(f"bits={self.bits!r} must be one of {', '.join(map(repr, BITS.values()))}")
        if self.bits == 4 and self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size={self.group_size!r} must be one of {', '.join(map(str, GROUP_SIZES))} with 4 bits")
        if self.bits != 4 and self.group_size is not None:
            raise ValueError(f"group_size={self.group_size!r} belongs to 4 bits; {self.bits!r} has one scale per row")

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what is stored of a weight `[..., out, in]`, by name.

        Raises:
            ValueError: groups that do not divide the inputs.
        """
        *rows, inputs = shape
        if self.bits != 4:
            # Bytes: what is not a floating-point tensor nobody casts.
            dtype = torch.uint8 if self.bits == "fp8" else torch.int8
            return {"weight": (shape, dtype), "scales": ((*rows, 1), torch.float32)}
        if inputs % self.group_size:
            fitting = [str(size) for size in GROUP_SIZES if inputs % size == 0]
            raise ValueError(
                f"groups of {self.group_size} do not divide {inputs} inputs; group_size may be {' or '.join(fitting) or 'none'}"
            )
        groups = inputs // self.group_size
        return {
            "weight": ((*rows, inputs // 2), torch.uint8),
            "scales": ((*rows, groups), torch.bfloat16),
            "zeros": ((*rows, (groups + 1) // 2), torch.uint8),
        }


@dataclass(frozen=True)
class Grid:
    """The numbers that a stored weight can be, `scale * (code - zero)`.

    Attributes:
        scales: `[..., out, groups]`, as they are stored.
        zeros: the same shape, int32; None where it is 0.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def columns(self, indices: torch.Tensor, group_size: int | None) -> "Grid":
        """The grid of some columns, one group each."""
        groups = torch.zeros_like(indices) if group_size is None else indices // group_size
        return Grid(self.scales[..., groups], None if self.zeros is None else self.zeros[..., groups])


def fit_grid(weight: torch.Tensor, format: Format, importance: torch.Tensor | None = None) -> Grid:
    """Scales that just cover the weights; with `importance`, those of the least squared error among these and narrower ones.

    Args:
        weight: `[..., out, in]` float32.
        importance: `[in]` or `[..., 1, in]`, what a squared error of a column costs: the column's mean squared input.
    """
    groups = weight.unflatten(-1, (-1, format.group_size or weight.shape[-1]))
    grid = _grid(groups, format, 1.0)
    if importance is None:
        return grid
    cost = importance.broadcast_to(*weight.shape[:-2], 1, weight.shape[-1])
    cost, least = cost.unflatten(-1, groups.shape[-2:]), None
    for shrink in _SHRINKS:
        tried = _grid(groups, format, shrink)
        codes = _round(groups, tried.scales[..., None], _last(tried.zeros), format)
        error = (
            (_values(codes, tried.scales[..., None], _last(tried.zeros), torch.float32) - groups).square_().mul_(cost).sum(-1)
        )
        if least is None:
            least = error
            continue
        better = error < least
        least = torch.where(better, error, least)
        zeros = None if grid.zeros is None else torch.where(better, tried.zeros, grid.zeros)
        grid = Grid(torch.where(better, tried.scales, grid.scales), zeros)
    return grid


def _grid(groups: torch.Tensor, format: Format, shrink: float) -> Grid:
    if format.bits != 4:
        largest = groups.abs().amax(-1) * shrink
        return Grid((largest / _LARGEST[format.bits]).clamp_(min=torch.finfo(torch.float32).tiny))
    low, high = groups.amin(-1).clamp_(max=0) * shrink, groups.amax(-1).clamp_(min=0) * shrink
    # Codes are made for the scales that are stored, rounded as these are.
    scales = ((high - low) / 15).to(torch.bfloat16).clamp_(min=torch.finfo(torch.bfloat16).tiny)
    return Grid(scales, torch.round(-low / scales.float()).clamp_(0, 15).int())


def _last(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor[..., None]


def _round(weight, scales, zeros, format: Format) -> torch.Tensor:
    """Codes; scales and zeros broadcast to the weight."""
    scaled = weight / scales.float()
    if format.bits == "fp8":
        return scaled.clamp_(-_LARGEST["fp8"], _LARGEST["fp8"]).to(FLOAT8)
    if format.bits == 8:
        return scaled.round_().clamp_(-127, 127).to(torch.int8)
    return scaled.round_().add_(zeros).clamp_(0, 15).to(torch.uint8)


def _values(codes, scales, zeros, dtype: torch.dtype) -> torch.Tensor:
    values = codes.to(dtype)
    if zeros is not None:
        values = values.sub_(zeros.to(dtype))
    return values.mul_(scales.to(dtype))


def encode(weight: torch.Tensor, grid: Grid, format: Format) -> torch.Tensor:
    """Codes `[..., out, in]` of the nearest numbers: int8, uint8 (one a byte) or float8."""
    groups = weight.unflatten(-1, (grid.scales.shape[-1], -1))
    return _round(groups, grid.scales[..., None], _last(grid.zeros), format).flatten(-2)


def rounded(weight: torch.Tensor, grid: Grid, format: Format) -> torch.Tensor:
    """The nearest numbers themselves, `[..., out, in]` float32."""
    return values(encode(weight, grid, format), grid, torch.float32)


def values(codes: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """What codes stand for, `[..., out, in]`."""
    groups = codes.unflatten(-1, (grid.scales.shape[-1], -1))
    return _values(groups, grid.scales[..., None], _last(grid.zeros), dtype).flatten(-2)


def stored(codes: torch.Tensor, grid: Grid, format: Format) -> dict[str, torch.Tensor]:
    """The tensors of `Format.buffers`."""
    if format.bits != 4:
        return {"weight": codes.view(torch.uint8) if format.bits == "fp8" else codes, "scales": grid.scales}
    zeros = torch.nn.functional.pad(grid.zeros.to(torch.uint8), (0, grid.zeros.shape[-1] % 2))
    return {"weight": _pack(codes), "scales": grid.scales, "zeros": _pack(zeros)}


def read(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> tuple[torch.Tensor, Grid]:
    """Codes and grid of stored tensors."""
    if zeros is None:
        return weight.view(FLOAT8) if weight.dtype == torch.uint8 else weight, Grid(scales)
    return _unpack(weight), Grid(scales, _unpack(zeros)[..., : scales.shape[-1]])


def decode(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The weight `[..., out, in]` of stored tensors."""
    codes, grid = read(weight, scales, zeros)
    return values(codes, grid, dtype)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
