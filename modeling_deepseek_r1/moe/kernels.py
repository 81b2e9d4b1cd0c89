"""Products of tokens with their experts, in which only the active (token, expert) pairs cost anything.

A slot with weight 0 is inactive and takes part in nothing. The active pairs are sorted by expert, so that the tokens of one
expert are neighbours and are multiplied with its weights in one product, without copying weights. The backward pass is written
out, because autograd over `weight[expert]` would make a gradient as large as all experts for each of them.

Shapes: T tokens, K slots, S active pairs, E experts, H hidden size, I width of an expert.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F


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
        gate_up_proj: `[E, 2I, H]`, the gate's rows first. down_proj: `[E, H, I]`.
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
    """Nothing to sort, nothing to gather."""
    output = None
    for expert, weight in zip(top_k_index[0].tolist(), top_k_weights[0].tolist(), strict=True):
        if weight:
            gate, up = F.linear(hidden_states, gate_up_proj[expert]).chunk(2, -1)
            product = (act_fn(gate) * up).mul_(weight)
            matrix = down_proj[expert].t()
            output = torch.mm(product, matrix) if output is None else output.addmm_(product, matrix)
    return output if output is not None else torch.zeros_like(hidden_states)


def _run_experts(hidden_states, gate_up_proj, down_proj, weights, tokens, sizes, act_fn, projected=None) -> torch.Tensor:
    """The forward pass; `projected`, `[S, 2I]`, takes what the backward pass needs."""
    rows = hidden_states[tokens]
    scratch = hidden_states.new_empty(max(sizes), gate_up_proj.shape[1]) if projected is None else None
    for expert, start, stop in _spans(sizes):
        target = scratch[: stop - start] if projected is None else projected[start:stop]
        gate, up = torch.mm(rows[start:stop], gate_up_proj[expert].t(), out=target).chunk(2, -1)
        product = (act_fn(gate) * up).mul_(weights[start:stop, None])
        # The rows have been read: their place takes the result.
        torch.mm(product, down_proj[expert].t(), out=rows[start:stop])
    return torch.zeros_like(hidden_states).index_add_(0, tokens, rows)


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
        rows, grads = hidden_states[tokens], grad[tokens]
        grad_gate_up = torch.empty_like(gate_up_proj) if ctx.needs_input_grad[1] else None
        grad_down = torch.empty_like(down_proj) if ctx.needs_input_grad[2] else None
        grad_weights = torch.empty_like(weights)
        for expert, start, stop in _spans(ctx.sizes):
            part, weight = grads[start:stop], weights[start:stop, None]
            leaf = projected[start:stop].detach().requires_grad_()
            with torch.enable_grad():
                gate, up = leaf.chunk(2, -1)
                tracked = ctx.act_fn(gate) * up
            product, grad_product = tracked.detach(), torch.mm(part, down_proj[expert])
            grad_weights[start:stop] = (grad_product * product).sum(-1, dtype=weights.dtype)
            if grad_down is not None:
                torch.mm(part.t(), product.mul_(weight), out=grad_down[expert])
            (grad_projected,) = torch.autograd.grad(tracked, leaf, grad_product.mul_(weight))
            if grad_gate_up is not None:
                torch.mm(grad_projected.t(), rows[start:stop], out=grad_gate_up[expert])
            torch.mm(grad_projected, gate_up_proj[expert], out=part)
        for own in (grad_gate_up, grad_down):
            if own is not None:
                _clear_unused(own, ctx.sizes)
        grad_hidden = torch.zeros_like(hidden_states).index_add_(0, tokens, grads)
        return grad_hidden, grad_gate_up, grad_down, grad_weights, None, None, None
