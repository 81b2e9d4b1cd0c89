"""Global attention: a query sees its window, the sink tokens, nodes far behind and learned memory tokens, the latter two gated.

Nodes are the keys at positions num_sink_tokens <= j <= i - window with (j + 1) mod `global_stride` = 0: the last token of every
block, which has seen its block (strided attention, https://arxiv.org/abs/1904.10509, with the window and global tokens of
Longformer, https://arxiv.org/abs/2004.05150). Memory tokens are keys and values of their own, per layer and key/value head,
without position and therefore not rotated (persistent vectors, https://arxiv.org/abs/1907.01470); every query sees them, in every
document. All is one softmax, in which nodes count with a gate g and the memory with g exp(b), b one number per head.

How it is computed: nodes are a strided slice of the keys, of which a query sees the first c, c growing by one every
`global_stride` queries. A block of queries meets those that all of it sees in one product and the few others in a second one.
Window, nodes and memory are merged through their log-sum-exps (`blockwise.py`). Cost: n (W + S + M + n / stride) pairs.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, N nodes, M memory tokens, D head size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .blockwise import Block, Part, gate_gradient, local_plan, merge_gated, run_plan, run_plan_backward
from .pattern import AttentionPattern, visible_nodes

NODE_BLOCK = 64
"""Queries per block of the plan of nodes, rounded up to whole strides."""


class Memory(NamedTuple):
    """Memory tokens of a layer: key and value `[G, M, D]`, and the logit `[H]` that each head adds to theirs."""

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor


class Nodes(NamedTuple):
    """What a global layer knows besides queries, keys and values.

    Attributes:
        log_gate: `[B, H, Q]` float32.
        memory: None where the layer has none.
        held: keys and values `[B, G, N, D]` of all nodes so far, where a cache keeps them apart; None: they are among the keys.
    """

    log_gate: torch.Tensor
    memory: Memory | None = None
    held: tuple[torch.Tensor, torch.Tensor] | None = None

    def cached(self, layer) -> "Nodes":
        """With what the layer of a cache holds."""
        return self._replace(held=layer.nodes)

    def rows(self, index: torch.Tensor) -> "Nodes":
        """Of some rows of the batch."""
        return self._replace(log_gate=self.log_gate.index_select(0, index))

    def split(self, lengths: list[int]) -> list["Nodes"]:
        """Of consecutive runs of queries."""
        return [self._replace(log_gate=gate) for gate in self.log_gate.split(lengths, 2)]

    @staticmethod
    def join(pieces: list["Nodes"]) -> "Nodes":
        return pieces[0]._replace(log_gate=torch.cat([piece.log_gate for piece in pieces], 2))


def node_plan(
    pattern: AttentionPattern, num_queries: int, seq_len: int, dtype: torch.dtype, device: torch.device
) -> list[Block]:
    """Blocks of queries with the nodes that they see; keys are the nodes in the order of their positions.

    Args:
        num_queries: the queries are the positions `seq_len - num_queries ... seq_len - 1`.
    """
    stride = pattern.global_stride
    size = -(-NODE_BLOCK // stride) * stride
    # Query q sees the first (q - origin) // stride + 1 nodes; every query of a block sees one more than `common`.
    origin = pattern.first_node + pattern.window - (seq_len - num_queries)
    start, blocks, masks = max(0, origin), [], {}
    while start < num_queries:
        since = start - origin
        stop = min(num_queries, start + size - since % size)
        common, most = since // stride, (stop - 1 - origin) // stride + 1
        if most == common + 1:
            parts = (Part(((0, most),)),)
        else:
            kind = (since % stride, stop - start)
            if kind not in masks:
                seen = (since % stride + torch.arange(stop - start, device=device)) // stride
                hidden = torch.arange(most - common, device=device) > seen[:, None]
                masks[kind] = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
            tail = Part(((common, most),), masks[kind])
            parts = (Part(((0, common),)), tail) if common else (tail,)
        blocks.append(Block(start, stop, parts))
        start = stop
    return blocks


class _GlobalAttention(torch.autograd.Function):
    """A local part and gated ones: `remotes` are key, value and logarithm of the gate `[B, H, Q]` of each."""

    @staticmethod
    def forward(ctx, plans, scale, query, key, value, *remotes):
        results = [
            (*run_plan(query, *remotes[3 * i : 3 * i + 2], plan, scale), remotes[3 * i + 2]) for i, plan in enumerate(plans[1:])
        ]
        output, total, shares = merge_gated(run_plan(query, key, value, plans[0], scale), results)
        ctx.save_for_backward(query, key, value, *remotes, output, total, *shares, *(result[0] for result in results))
        ctx.plans, ctx.scale = plans, scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        count = len(ctx.plans) - 1
        query, key, value, *saved = ctx.saved_tensors
        remotes, (output, total), saved = saved[: 3 * count], saved[3 * count : 3 * count + 2], saved[3 * count + 2 :]
        shares, outputs = saved[:count], saved[count:]
        grad_query, *grads = run_plan_backward(grad, query, key, value, output, total, ctx.plans[0], ctx.scale)
        for i, plan in enumerate(ctx.plans[1:]):
            states, log_gate = remotes[3 * i : 3 * i + 2], remotes[3 * i + 2]
            own = run_plan_backward(grad, query, *states, output, total - log_gate, plan, ctx.scale)
            grad_query += own[0]
            grads += [*own[1:], gate_gradient(grad, output, outputs[i], shares[i])]
        tensors = (query, key, value, *remotes)
        return None, None, *(x.to(y.dtype) for x, y in zip((grad_query, *grads), tensors, strict=True))


def global_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    nodes: Nodes,
    pattern: AttentionPattern,
    scale: float,
    seq_len: int,
) -> torch.Tensor:
    """Global attention of the last Q tokens of one document.

    Args:
        query: `[B, H, Q, D]` after rotation.
        key, value: `[B, G, K, D]`, the first tokens of the document followed by its last ones; all of them without `nodes.held`.
        seq_len: tokens of the document so far.

    Returns:
        `[B, H, Q, D]`.
    """
    queries, keys = query.shape[2], key.shape[2]
    if queries == 1 and keys <= pattern.num_sink_tokens + pattern.window:
        local = [Block(0, 1, (Part(((0, keys),)),))]
    else:
        local = local_plan(pattern, queries, keys, seq_len, query.dtype, query.device)
    held = nodes.held
    if held is None:
        held = [x[:, :, pattern.first_node :: pattern.global_stride].contiguous() for x in (key, value)]
    plans, remotes = [local, node_plan(pattern, queries, seq_len, query.dtype, query.device)], [*held, nodes.log_gate]
    if nodes.memory is not None:
        plans.append([Block(0, queries, (Part(((0, nodes.memory.key.shape[1]),)),))])
        remotes += _in_batch(nodes.memory, query)
        remotes.append(nodes.log_gate + nodes.memory.bias[:, None])
    return _GlobalAttention.apply(plans, scale, query, key, value, *remotes)


def dense_inputs(
    key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, nodes: Nodes, pattern: AttentionPattern, places: tuple
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for implementations with a mask: memory tokens and nodes that are held apart become keys before the others.

    Args:
        key, value: `[B, G, K, D]`.
        visible: `[B, Q, K]` bool, the local keys.
        places: positions of queries and keys, and their documents or None, as in `visible_nodes`.

    Returns:
        Keys, values, `visible`, the remote ones `[B, 1, Q, K']`, and what is added to their logits `[B, H, Q, 1 or K']`.
    """
    batch, _, length, _ = key.shape
    log_gate = nodes.log_gate[..., None]
    if nodes.held is None:
        remote = visible_nodes(pattern, *places)
    else:
        numbers = torch.arange(nodes.held[0].shape[2], device=key.device)
        positions = (pattern.first_node + pattern.global_stride * numbers).expand(batch, -1)
        remote = F.pad(visible_nodes(pattern, places[0], positions), (0, length))
        key, value = (torch.cat(pair, 2) for pair in zip(nodes.held, (key, value), strict=True))
    if nodes.memory is not None:
        count, others = nodes.memory.key.shape[1], key.shape[2]
        key, value = (torch.cat(pair, 2) for pair in zip(_in_batch(nodes.memory, key), (key, value), strict=True))
        remote = F.pad(remote, (count, 0), value=True)
        log_gate = log_gate + F.pad(nodes.memory.bias[:, None, None].expand(-1, -1, count), (0, others))
    return key, value, F.pad(visible, (key.shape[2] - length, 0)), remote[:, None], log_gate


def _in_batch(memory: Memory, like: torch.Tensor) -> list[torch.Tensor]:
    return [x.to(like.dtype).expand(like.shape[0], -1, -1, -1) for x in (memory.key, memory.value)]
