"""Global attention: a query sees its window, the sink tokens, nodes far behind and learned memory tokens, the latter two gated.

Nodes are the keys at positions num_sink_tokens <= j <= i - window with (j + 1) mod `global_stride` = 0: the last token of every
block, which has seen its block (strided attention, https://arxiv.org/abs/1904.10509, with the window and global tokens of
Longformer, https://arxiv.org/abs/2004.05150). Memory tokens are keys and values of their own, per layer and key/value head,
without position and therefore not rotated (persistent vectors, https://arxiv.org/abs/1907.01470); every query sees them, in every
document. All is one softmax, in which nodes count with a gate g and the memory with g exp(b), b one number per head.

Where the pattern is not causal, nodes at j >= i + window are seen too.

How it is computed: nodes are a strided slice of the keys, of which a query sees the first c, c growing by one every
`global_stride` queries. A block of queries meets those that all of it sees in one product and the few others in a second one.
Window, nodes and memory are merged through their log-sum-exps (`blockwise.py`). Cost: n (W + S + M + n / stride) pairs.

Shapes: B batch, H query heads, G key/value heads, Q queries, K keys, N nodes, M memory tokens, D head size.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .blockwise import Block, Part, gate_gradient, local_plan, merge_gated, run_plan, run_plan_backward
from .flash import FlashKernel
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
    pattern: AttentionPattern,
    num_queries: int,
    seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
    kernel: FlashKernel | None = None,
) -> list[Block]:
    """Blocks of queries with the nodes that they see; keys are the nodes in the order of their positions.

    Args:
        num_queries: the queries are the positions `seq_len - num_queries ... seq_len - 1`.
        kernel: computes the products of a plan without masks; default: those of this library.
    """
    # Query q sees the first (q - origin) // stride + 1 nodes.
    origin = pattern.first_node + pattern.window - (seq_len - num_queries)
    return _growing_plan(origin, num_queries, seq_len, pattern.global_stride, dtype, device, kernel)


def _growing_plan(origin, num_queries, num_nodes, stride, dtype, device, kernel=None) -> list[Block]:
    """From the query `origin` on, one node more every `stride` queries, until there are `num_nodes`."""
    size = -(-NODE_BLOCK // stride) * stride
    start, blocks, masks = max(0, origin), [], {}
    if kernel is not None and start < num_queries:
        since, seen = start - origin, (num_queries - 1 - origin) // stride + 1
        part = Part(((0, seen),), causal=True, kernel=replace(kernel, stride=stride, lead=since % stride))
        return [Block(start, num_queries, (part,))]
    while start < num_queries and num_nodes:
        since = start - origin
        stop = min(num_queries, start + size - since % size)
        # Every query of a block sees one more than `common`, as long as there are more.
        common, most = min(since // stride, num_nodes - 1), min((stop - 1 - origin) // stride + 1, num_nodes)
        if most == common + 1:
            parts = (Part(((0, most),)),)
        else:
            kind = (since % stride, stop - start, most - common)
            if kind not in masks:
                seen = (since % stride + torch.arange(stop - start, device=device)) // stride
                hidden = torch.arange(most - common, device=device) > seen[:, None]
                masks[kind] = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
            tail = Part(((common, most),), masks[kind])
            parts = (Part(((0, common),)), tail) if common else (tail,)
        blocks.append(Block(start, stop, parts))
        start = stop
    return blocks


def _plan_ahead(pattern: AttentionPattern, length: int, num_nodes: int, dtype, device) -> list[Block]:
    """The nodes behind the windows of a document: the plan for those before them, seen from the document's end."""
    last = pattern.first_node + (num_nodes - 1) * pattern.global_stride
    origin = length - 1 - last + pattern.window
    plan = _growing_plan(origin, length, num_nodes, pattern.global_stride, dtype, device)

    def mirrored(part: Part) -> Part:
        ((low, high),) = part.ranges
        mask = None if part.mask is None else part.mask.flip(0, 1).contiguous()
        return Part(((num_nodes - high, num_nodes - low),), mask)

    return [Block(length - b.stop, length - b.start, tuple(map(mirrored, b.parts))) for b in reversed(plan)]


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
    kernel: FlashKernel | None = None,
) -> torch.Tensor:
    """Global attention of the last Q tokens of one document, or, where the pattern is not causal, of all of them.

    Args:
        query: `[B, H, Q, D]` after rotation.
        key, value: `[B, G, K, D]`, the first tokens of the document followed by its last ones; all of them without `nodes.held`.
        seq_len: tokens of the document so far.

    Returns:
        `[B, H, Q, D]`.
    """
    queries, keys = query.shape[2], key.shape[2]
    like = query.dtype, query.device
    if queries == 1 and keys <= pattern.num_sink_tokens + pattern.window:
        local = [Block(0, 1, (Part(((0, keys),), kernel=kernel),))]
    else:
        local = local_plan(pattern, queries, keys, seq_len, *like, kernel)
    held = nodes.held
    if held is None:
        end = keys if pattern.causal else max(0, keys - pattern.num_sink_tokens)
        held = [x[:, :, pattern.first_node : end : pattern.global_stride].contiguous() for x in (key, value)]
    plans, remotes = [local, node_plan(pattern, queries, seq_len, *like, kernel)], [*held, nodes.log_gate]
    if not pattern.causal:
        count, origin = held[0].shape[2], pattern.first_node + pattern.window
        plans[1] = _growing_plan(origin, queries, count, pattern.global_stride, *like)
        plans.append(_plan_ahead(pattern, queries, count, *like))
        remotes *= 2
    if nodes.memory is not None:
        plans.append([Block(0, queries, (Part(((0, nodes.memory.key.shape[1]),), kernel=kernel),))])
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
    length, log_gate = key.shape[2], nodes.log_gate[..., None]
    held = nodes.held
    key, value, places, is_node, is_memory = extended_keys(key, value, nodes, pattern, places)
    remote = visible_nodes(pattern, *places)
    if held is not None:
        remote = remote & is_node
    remote = (remote | is_memory) if is_memory is not None else remote
    if nodes.memory is not None:
        log_gate = log_gate + nodes.memory.bias[:, None, None] * is_memory
    return key, value, F.pad(visible, (key.shape[2] - length, 0)), remote[:, None], log_gate


def extended_keys(key: torch.Tensor, value: torch.Tensor, nodes: Nodes, pattern: AttentionPattern, places: tuple) -> tuple:
    """Memory tokens and nodes that are held apart put before the other keys.

    Args:
        key, value: `[B, G, K, D]`.
        places: as in `dense_inputs`.

    Returns:
        Keys, values, and places of all; which keys are nodes, bool `[K']` where these are held apart and the others do not count
        as nodes, else `[B, K']`; and which are memory tokens, bool `[K']`, or None.
    """
    queries, positions, *documents = (*places, None, None)[:4]
    is_memory = None
    if nodes.held is not None:
        numbers = torch.arange(nodes.held[0].shape[2], device=key.device)
        own = (pattern.first_node + pattern.global_stride * numbers).expand(len(key), -1)
        key, value = (torch.cat(pair, 2) for pair in zip(nodes.held, (key, value), strict=True))
        is_node = torch.arange(key.shape[2], device=key.device) < len(numbers)
        positions = torch.cat((own, positions), 1)
    else:
        is_node = pattern.are_nodes(positions)
    if nodes.memory is not None:
        count = nodes.memory.key.shape[1]
        key, value = (torch.cat(pair, 2) for pair in zip(_in_batch(nodes.memory, key), (key, value), strict=True))
        is_memory = torch.arange(key.shape[2], device=key.device) < count
        # No position: neither a near key nor a node.
        positions, is_node = F.pad(positions, (count, 0), value=-1), F.pad(is_node, (count, 0))
        documents = [documents[0], None if documents[1] is None else F.pad(documents[1], (count, 0))]
    return key, value, (queries, positions, *documents), is_node, is_memory


def _in_batch(memory: Memory, like: torch.Tensor) -> list[torch.Tensor]:
    return [x.to(like.dtype).expand(like.shape[0], -1, -1, -1) for x in (memory.key, memory.value)]
