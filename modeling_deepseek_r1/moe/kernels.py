"""Products of tokens with their experts, in which only the active (token, expert) pairs cost anything.

A slot with weight 0 is inactive and takes part in nothing. The active pairs are sorted by expert, so that the tokens of one
expert are neighbours and are multiplied with its weights in one product, without copying weights. The backward pass is written
out, because autograd over `weight[expert]` would make a gradient as large as all experts for each of them.

Shapes: T tokens, K slots, S active pairs, E experts, H hidden size, I width of an expert.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

BLOCK_ROWS = 256
"""Neighbouring experts with up to about so many rows share the steps between their products."""


def experts_reference(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`sum_k weight_k down_k(act(gate_k(x)) * up_k(x))`, token by token; the definition of `experts_forward`."""
    outputs = []
    for token, index, weights in zip(hidden_states, top_k_index.tolist(), top_k_weights, strict=True):
        output = torch.zeros_like(token)
        for expert, weight in zip(index, weights, strict=True):
            gate, up = (gate_up_proj[expert] @ token).chunk(2)
            output = output + weight * (down_proj[expert] @ (act_fn(gate) * up))
        outputs.append(output)
    return torch.stack(outputs)


def sort_pairs(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, list[int]]:
    """The active pairs in the order of their experts.

    Args:
        top_k_index, top_k_weights: `[T, K]`.

    Returns:
        `[S]` numbers of the slots, as (token, slot) in row-major order, and the number of pairs of each expert.
    """
    slots = top_k_weights.detach().flatten().nonzero().flatten()
    experts, order = top_k_index.flatten()[slots].sort(stable=True)
    return slots[order], torch.bincount(experts, minlength=num_experts).tolist()


def _spans(sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, row behind the last) of every expert that has rows."""
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield expert, start, start + size
            start += size


def _blocks(sizes: list[int]) -> Iterator[tuple[list[int], int, int]]:
    """(experts, first row, row behind the last) of neighbouring experts that have rows."""
    experts, first = [], 0
    for expert, start, stop in _spans(sizes):
        if experts and stop - first > BLOCK_ROWS:
            yield experts, first, start
            experts, first = [], start
        experts.append(expert)
    if experts:
        yield experts, first, sum(sizes)


def _clear_unused(grad: torch.Tensor, sizes: list[int]) -> None:
    for expert, size in enumerate(sizes):
        if not size:
            grad[expert].zero_()


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, sizes):
        output = rows.new_empty(rows.shape[0], weight.shape[1])
        for expert, start, stop in _spans(sizes):
            torch.mm(rows[start:stop], weight[expert].t(), out=output[start:stop])
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (rows, weight), sizes = ctx.saved_tensors, ctx.sizes
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for expert, start, stop in _spans(sizes):
            if grad_rows is not None:
                torch.mm(grad[start:stop], weight[expert], out=grad_rows[start:stop])
            if grad_weight is not None:
                torch.mm(grad[start:stop].t(), rows[start:stop], out=grad_weight[expert])
        if grad_weight is not None:
            _clear_unused(grad_weight, sizes)
        return grad_rows, grad_weight, None


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """One linear map per group of rows.

    Args:
        rows: `[S, in]`, the rows of the first expert first.
        weight: `[E, out, in]`.
        sizes: rows of each expert; they add up to S.

    Returns:
        `[S, out]`.
    """
    return _GroupedLinear.apply(rows, weight, sizes)


def grouped_linear_reference(rows: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """What `grouped_linear` computes."""
    groups = zip(rows.split(sizes), weight, strict=True)
    return torch.cat([F.linear(group, matrix) for group, matrix in groups])


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, a, b, experts, sizes):
        output, inner = rows.new_empty(rows.shape[0], weight.shape[1]), rows.new_empty(rows.shape[0], a.shape[1])
        for number, start, stop in _spans(sizes):
            torch.mm(rows[start:stop], a[number].t(), out=inner[start:stop])
            torch.mm(rows[start:stop], weight[experts[number]].t(), out=output[start:stop])
            output[start:stop].addmm_(inner[start:stop], b[number].t())
        ctx.save_for_backward(rows, weight, a, b, inner)
        ctx.experts, ctx.sizes = experts, sizes
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, weight, a, b, inner = ctx.saved_tensors
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_a, grad_b, grad_inner = torch.empty_like(a), torch.empty_like(b), torch.empty_like(inner)
        for number, start, stop in _spans(ctx.sizes):
            part, into = grad[start:stop], grad_inner[start:stop]
            torch.mm(part, b[number], out=into)
            torch.mm(part.t(), inner[start:stop], out=grad_b[number])
            torch.mm(into.t(), rows[start:stop], out=grad_a[number])
            if grad_rows is not None:
                torch.mm(part, weight[ctx.experts[number]], out=grad_rows[start:stop])
                grad_rows[start:stop].addmm_(into, a[number])
        for own in (grad_a, grad_b):
            _clear_unused(own, ctx.sizes)
        return grad_rows, None, grad_a, grad_b, None, None


def adapted_linear(
    rows: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, experts: list[int], sizes: list[int]
) -> torch.Tensor:
    """One frozen linear map with a low-rank delta, `weight_e + b_c a_c`, per group of rows.

    Args:
        rows: `[S, in]`, the rows of the first of C adapted experts first.
        weight: `[E, out, in]`; gets no gradient.
        a: `[C, r, in]`. b: `[C, out, r]`.
        experts: number of each adapted expert, 0 ... E - 1.
        sizes: rows of each; they add up to S.

    Returns:
        `[S, out]`.
    """
    return _AdaptedLinear.apply(rows, weight, a, b, experts, sizes)


def adapted_linear_reference(
    rows: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, experts: list[int], sizes: list[int]
) -> torch.Tensor:
    """What `adapted_linear` computes, with every matrix made in full."""
    return grouped_linear_reference(rows, weight.detach()[experts] + b @ a, sizes)


def experts_forward(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Gated MLPs of the active pairs, weighted and added up for each token.

    Args:
        hidden_states: `[T, H]`.
        gate_up_proj: `[E, 2I, H]`, the gate's rows first. down_proj: `[E, H, I]`. Without gradients, anything of such a `shape`
            that gives the matrix of an expert by its number.
        top_k_index, top_k_weights: `[T, K]`; a slot with weight 0 costs nothing.
        act_fn: activation of the gate, element by element.

    Returns:
        `[T, H]`.
    """
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden_states, gate_up_proj, down_proj, top_k_weights))
    if not tracked and hidden_states.shape[0] == 1:
        return _one_token(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, act_fn)
    slots, sizes = sort_pairs(top_k_index, top_k_weights, gate_up_proj.shape[0])
    tokens, weights = slots // top_k_index.shape[1], top_k_weights.flatten()[slots]
    if tracked:
        return _Experts.apply(hidden_states, gate_up_proj, down_proj, weights, tokens, sizes, act_fn)
    return _run_experts(hidden_states, gate_up_proj, down_proj, weights, tokens, sizes, act_fn)


def _one_token(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, act_fn) -> torch.Tensor:
    """Nothing to sort, nothing to gather: a product of a matrix with a vector for each active expert."""
    output, token = None, hidden_states[0]
    for expert, weight in zip(top_k_index[0].tolist(), top_k_weights[0].tolist(), strict=True):
        if weight:
            gate, up = torch.mv(gate_up_proj[expert], token).chunk(2)
            product, matrix = (act_fn(gate) * up).mul_(weight), down_proj[expert]
            output = torch.mv(matrix, product) if output is None else output.addmv_(matrix, product)
    return output[None] if output is not None else torch.zeros_like(hidden_states)


def _run_experts(hidden_states, gate_up_proj, down_proj, weights, tokens, sizes, act_fn, projected=None) -> torch.Tensor:
    """The forward pass; `projected`, `[S, 2I]`, takes what the backward pass needs."""
    blocks = list(_blocks(sizes))
    gate_up, down = _transposed(gate_up_proj), _transposed(down_proj)
    output = torch.zeros_like(hidden_states)
    # One block's rows stay in the processor's cache, and memory that has been touched once is not asked for again.
    longest = max((stop - start for _, start, stop in blocks), default=0)
    buffer, scratch = hidden_states.new_empty(longest, output.shape[1]), hidden_states.new_empty(longest, gate_up_proj.shape[1])
    for experts, start, stop in blocks:
        rows = torch.index_select(hidden_states, 0, tokens[start:stop], out=buffer[: stop - start])
        target = scratch[: stop - start] if projected is None else projected[start:stop]
        counts = [sizes[expert] for expert in experts]
        parts = rows.split(counts)
        for expert, part, into in zip(experts, parts, target.split(counts), strict=True):
            torch.mm(part, gate_up[expert], out=into)
        gate, up = target.chunk(2, -1)
        product = (act_fn(gate) * up).mul_(weights[start:stop, None])
        for expert, part, into in zip(experts, product.split(counts), parts, strict=True):
            torch.mm(part, down[expert], out=into)
        output.index_add_(0, tokens[start:stop], rows)
    return output


class _Transposed:
    def __init__(self, matrices):
        self.matrices = matrices

    def __getitem__(self, expert: int) -> torch.Tensor:
        return self.matrices[expert].t()


def _transposed(packed):
    """The matrix of an expert, transposed, by its number; all of them at once where they are there."""
    return packed.transpose(1, 2).unbind() if isinstance(packed, torch.Tensor) else _Transposed(packed)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, gate_up_proj, down_proj, weights, tokens, sizes, act_fn):
        projected = hidden_states.new_empty(len(tokens), gate_up_proj.shape[1])
        output = _run_experts(hidden_states, gate_up_proj, down_proj, weights, tokens, sizes, act_fn, projected)
        ctx.save_for_backward(hidden_states, gate_up_proj, down_proj, weights, tokens, projected)
        ctx.sizes, ctx.act_fn = sizes, act_fn
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden_states, gate_up_proj, down_proj, weights, tokens, projected = ctx.saved_tensors
        blocks, grad_hidden = list(_blocks(ctx.sizes)), torch.zeros_like(hidden_states)
        longest = max((stop - start for _, start, stop in blocks), default=0)
        buffers = [hidden_states.new_empty(longest, hidden_states.shape[1]) for _ in range(2)]
        grad_gate_up = torch.empty_like(gate_up_proj) if ctx.needs_input_grad[1] else None
        grad_down = torch.empty_like(down_proj) if ctx.needs_input_grad[2] else None
        grad_weights = torch.empty_like(weights)
        for experts, start, stop in blocks:
            counts, weight = [ctx.sizes[expert] for expert in experts], weights[start:stop, None]
            chosen = tokens[start:stop]
            rows = torch.index_select(hidden_states, 0, chosen, out=buffers[0][: stop - start])
            grads = torch.index_select(grad, 0, chosen, out=buffers[1][: stop - start])
            split = rows.split(counts), grads.split(counts)
            leaf = projected[start:stop].detach().requires_grad_()
            with torch.enable_grad():
                gate, up = leaf.chunk(2, -1)
                tracked = ctx.act_fn(gate) * up
            product, grad_product = tracked.detach(), torch.empty_like(tracked)
            for expert, part, target in zip(experts, split[1], grad_product.split(counts), strict=True):
                torch.mm(part, down_proj[expert], out=target)
            grad_weights[start:stop] = (grad_product * product).sum(-1, dtype=weights.dtype)
            (grad_projected,) = torch.autograd.grad(tracked, leaf, grad_product.mul_(weight))
            product.mul_(weight)
            parts = zip(experts, *split, product.split(counts), grad_projected.split(counts), strict=True)
            for expert, part, grad_part, inner, grad_inner in parts:
                if grad_down is not None:
                    torch.mm(grad_part.t(), inner, out=grad_down[expert])
                if grad_gate_up is not None:
                    torch.mm(grad_inner.t(), part, out=grad_gate_up[expert])
                torch.mm(grad_inner, gate_up_proj[expert], out=grad_part)
            grad_hidden.index_add_(0, chosen, grads)
        for own in (grad_gate_up, grad_down):
            if own is not None:
                _clear_unused(own, ctx.sizes)
        return grad_hidden, grad_gate_up, grad_down, grad_weights, None, None, None
