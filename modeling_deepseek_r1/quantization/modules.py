"""Modules whose weights are stored in few bits. They are buffers: nothing trains them, but gradients pass through to the inputs, and
to the scales while these are trained (`scales.train_scales`).

Weights are made again, in the dtype of the input, for every product, and for the backward pass once more. On a CPU in bfloat16 a
few rows (decoding) go through ATen's products of packed weights instead, which read each weight only once. In float32 those are a
hundred times slower than making the weights.
"""

import torch
from torch import nn

from ..attention.float32 import Float32Module
from ..moe.experts import DeepseekR1Experts, DeepseekR1LowRankExperts
from ..moe.kernels import sort_pairs
from .formats import Format, decode, read, stored

MAX_ROWS = 32
"""Up to so many rows ATen's products are faster than making the weights."""
_KERNEL_GROUPS = (32, 64, 128, 256)


class _Product(torch.autograd.Function):
    """`rows @ weight.T` for a stored weight."""

    @staticmethod
    def forward(ctx, rows, weight, scales, zeros):
        ctx.save_for_backward(rows if scales.requires_grad else None, weight, scales, zeros)
        return rows @ decode(weight, scales, zeros, rows.dtype).t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, weight, scales, zeros = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            return grad @ decode(weight, scales, zeros, grad.dtype), None, None, None
        # A weight is a scale times a number, so that the scale's gradient is that of its weights times their numbers.
        numbers = decode(weight, torch.ones_like(scales), zeros, grad.dtype).unflatten(-1, (scales.shape[-1], -1))
        scale_grad = ((grad.t() @ rows).view(numbers.shape) * numbers).sum(-1, dtype=scales.dtype)
        weight = numbers.mul_(scales.to(grad.dtype).unsqueeze(-1)).flatten(-2)
        return grad @ weight if ctx.needs_input_grad[0] else None, None, scale_grad, None


class PackedMatrices(Float32Module):
    """One matrix or several of one shape, stored.

    All buffers keep their dtype when a model is cast.

    Args:
        shape: `[out, in]`, or `[E, out, in]`.
        format: how.
        input_scale: whether inputs are multiplied with a scale per column first, `[in]` or `[E, in]` (activation-aware scaling).

    Attributes:
        weight, scales, zeros: as `Format.buffers` says; zeros is None with 8 bits.
        input_scale: float32, or None.
        scale_change: float32 parameter like `scales` while these are trained, else None.
    """

    def __init__(self, shape: tuple[int, ...], format: Format, input_scale: bool = False):
        nn.Module.__init__(self)
        self._store(shape, format, input_scale)

    def _store(self, shape: tuple[int, ...], format: Format, input_scale: bool) -> None:
        self.shape, self.format = tuple(shape), format
        self.register_buffer("zeros", None)
        for name, (size, dtype) in format.buffers(self.shape).items():
            self.register_buffer(name, torch.zeros(size, dtype=dtype))
        self.register_buffer("input_scale", torch.ones(*shape[:-2], shape[-1]) if input_scale else None)
        self.register_parameter("scale_change", None)
        self._kernel_weights: dict[int | None, tuple[torch.Tensor, ...]] = {}

    def fill(self, codes: torch.Tensor, grid, input_scale: torch.Tensor | None = None) -> None:
        """Stores a weight (`formats.stored`)."""
        for name, tensor in stored(codes, grid, self.format).items():
            setattr(self, name, tensor.contiguous())
        if input_scale is not None:
            self.input_scale = input_scale.float().contiguous()
        self._kernel_weights = {}

    @property
    def current_scales(self) -> torch.Tensor:
        """The stored scales, or what training has made of them."""
        return self.scales if self.scale_change is None else self.scales.float() * (1 + self.scale_change)

    def decoded(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the module multiplies with, the scale of the inputs included."""
        weight = decode(self.weight, self.current_scales, self.zeros, dtype)
        return weight if self.input_scale is None else weight * self.input_scale.to(dtype).unsqueeze(-2)

    def product(self, rows: torch.Tensor, number: int | None = None) -> torch.Tensor:
        """`rows @ weight.T`, `[T, out]` for `[T, in]`, with matrix `number` of several."""
        if torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        own = [self.weight, self.current_scales, self.zeros, self.input_scale]
        if number is not None:
            own = [None if tensor is None else tensor[number] for tensor in own]
        if own[3] is not None:
            rows = rows * own[3].to(rows.dtype)
        if self._suits_kernel(rows):
            return self._kernel_product(rows, number, *own[:3])
        return _Product.apply(rows, *own[:3])

    def _suits_kernel(self, rows: torch.Tensor) -> bool:
        if rows.device.type != "cpu" or rows.dtype != torch.bfloat16 or not 0 < rows.shape[0] <= MAX_ROWS:
            return False
        if self.scale_change is not None or self.format.bits == "fp8" or (torch.is_grad_enabled() and rows.requires_grad):
            return False
        # Other sizes are read beyond their end, or refused.
        return self.shape[-1] % 64 == self.shape[-2] % 64 == 0 and self.format.group_size in (None, *_KERNEL_GROUPS)

    def _kernel_product(self, rows, number, weight, scales, zeros) -> torch.Tensor:
        rows = rows.contiguous()
        if self.format.bits == 8:
            return torch._weight_int8pack_mm(rows, weight, scales.flatten().to(rows.dtype))
        if number not in self._kernel_weights:
            # The layout of this processor, beside the stored one, which is that of all.
            codes, grid = read(weight, scales, zeros)
            shift = (8 - grid.zeros.float()) * grid.scales.float()
            pairs = torch.stack((grid.scales.float(), shift), -1).transpose(0, 1).to(torch.bfloat16).contiguous()
            self._kernel_weights[number] = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1), pairs
        packed, pairs = self._kernel_weights[number]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, self.format.group_size, pairs)

    def _apply(self, fn, recurse: bool = True):
        self._kernel_weights = {}
        return super()._apply(fn, recurse)


class QuantizedLinear(PackedMatrices, nn.Linear):
    """A linear layer; to PEFT and others it is one, whose weight they cannot change."""

    def __init__(self, linear: nn.Linear, format: Format, input_scale: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._store((linear.out_features, linear.in_features), format, input_scale)
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.product(input.flatten(0, -2)).view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.format}"


class QuantizedEmbedding(PackedMatrices, nn.Embedding):
    """An embedding.

    Attributes:
        like: an empty parameter, whose dtype is that of the output and follows the model's. transformers takes a model's dtype
            from its first parameter, which would be that of a router otherwise.
    """

    def __init__(self, embedding: nn.Embedding, format: Format, input_scale: bool = False):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.like = nn.Parameter(torch.empty(0, dtype=embedding.weight.dtype), requires_grad=False)
        self._store((embedding.num_embeddings, embedding.embedding_dim), format, False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = [None if tensor is None else tensor[input] for tensor in (self.weight, self.current_scales, self.zeros)]
        return decode(*rows, self.like.dtype)

    def _apply(self, fn, recurse: bool = True):
        like = fn(self.like.data)
        super()._apply(fn, recurse)
        self.like.data = like
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"


class QuantizedHead(nn.Linear):
    """A head without anything of its own, which multiplies with the embedding that it is tied to."""

    def __init__(self, embedding: QuantizedEmbedding):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = embedding.embedding_dim, embedding.num_embeddings, None
        self._embedding = (embedding,)  # in a tuple: it is a part of the model once

    @property
    def weight(self) -> torch.Tensor:
        """What is stored, see `PackedMatrices`."""
        return self.embedding.weight

    @property
    def embedding(self) -> QuantizedEmbedding:
        """What it multiplies with."""
        return self._embedding[0]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.embedding.product(input.flatten(0, -2))
        return output.view(*input.shape[:-1], self.out_features)


class QuantizedExperts(nn.Module):
    """`DeepseekR1Experts` whose matrices are stored.

    Attributes:
        gate_up_proj: `PackedMatrices` `[E, 2I, H]`; down_proj: `[E, H, I]`.
    """

    def __init__(self, experts: DeepseekR1Experts, format: Format, input_scale: bool = False):
        super().__init__()
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        for name in ("gate_up_proj", "down_proj"):
            setattr(self, name, PackedMatrices(tuple(getattr(experts, name).shape), format, input_scale))

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """`[T, H]` for `hidden_states` `[T, H]`, `top_k_index` and `top_k_weights` `[T, K]`."""
        slots, sizes = sort_pairs(top_k_index, top_k_weights, self.num_experts)
        tokens, weights = slots // top_k_index.shape[1], top_k_weights.flatten()[slots, None]
        gate, up = self._products(self.gate_up_proj, hidden_states[tokens], sizes).chunk(2, -1)
        product = (self.act_fn(gate) * up * weights).to(hidden_states.dtype)
        output = self._products(self.down_proj, product, sizes).to(hidden_states.dtype)
        return torch.zeros_like(hidden_states).index_add(0, tokens, output)

    @staticmethod
    def _products(matrices: PackedMatrices, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        parts = [(number, part) for number, part in enumerate(rows.split(sizes)) if len(part)]
        if not parts:
            return rows.new_zeros(0, matrices.shape[-2])
        return torch.cat([matrices.product(part, number) for number, part in parts])


class QuantizedLowRankExperts(DeepseekR1LowRankExperts):
    """`DeepseekR1LowRankExperts` whose factors are stored, in `factors`; the MLP that they share has layers of its own.

    The second factors lie transposed: ranks are too few for groups, and each has a size of its own.
    """

    TRANSPOSED = ("gate_up_proj_b", "down_proj_b")
    FACTORS = ("gate_up_proj_a", "gate_up_proj_b", "down_proj_a", "down_proj_b")

    def __init__(self, experts: DeepseekR1LowRankExperts, format: Format, input_scale: bool = False):
        nn.Module.__init__(self)
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        self.gate_proj, self.up_proj, self.down_proj = experts.gate_proj, experts.up_proj, experts.down_proj
        shapes = {name: getattr(experts, name).shape for name in self.FACTORS}
        shapes |= {name: (shapes[name][0], shapes[name][2], shapes[name][1]) for name in self.TRANSPOSED}
        self.factors = nn.ModuleDict({name: PackedMatrices(tuple(shape), format) for name, shape in shapes.items()})

    def init_weights(self, std: float) -> None:
        """Nothing: all is read from a checkpoint."""

    def factor(self, name: str) -> torch.Tensor:
        """A factor as the low-rank experts have it, float32."""
        weight = self.factors[name].decoded()
        return weight.transpose(-1, -2).contiguous() if name in self.TRANSPOSED else weight

    gate_up_proj_a = property(lambda self: self.factor("gate_up_proj_a"))
    gate_up_proj_b = property(lambda self: self.factor("gate_up_proj_b"))
    down_proj_a = property(lambda self: self.factor("down_proj_a"))
    down_proj_b = property(lambda self: self.factor("down_proj_b"))

    @staticmethod
    def _delta(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return DeepseekR1LowRankExperts._delta(rows, a.to(rows.dtype), b.to(rows.dtype), sizes)


def plain_linear(module: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    """The layer with its weight made once and for all."""
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device=module.weight.device, dtype=dtype)
    linear.weight = nn.Parameter(module.decoded().to(dtype))
    linear.bias = module.bias
    return linear


def plain_embedding(module: QuantizedEmbedding, dtype: torch.dtype) -> nn.Embedding:
    """As `plain_linear`."""
    weight = module.decoded().to(dtype)
    embedding = nn.Embedding(*weight.shape, padding_idx=module.padding_idx, device="meta")
    embedding.weight = nn.Parameter(weight)
    return embedding


def plain_experts(module: QuantizedExperts | QuantizedLowRankExperts, empty: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As `plain_linear`; `empty` is the plain module on the meta device, to be filled."""
    if isinstance(module, QuantizedLowRankExperts):
        empty.gate_proj, empty.up_proj, empty.down_proj = module.gate_proj, module.up_proj, module.down_proj
        weights = {name: module.factor(name) for name in module.FACTORS}
    else:
        weights = {name: getattr(module, name).decoded() for name in ("gate_up_proj", "down_proj")}
    for name, weight in weights.items():
        setattr(empty, name, nn.Parameter(weight.to(dtype)))
    return empty
