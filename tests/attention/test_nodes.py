"""Global attention against the reference: outputs, gradients, decoding, and the identities that need no reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from modeling_deepseek_r1.attention.nodes import Memory, Nodes, dense_inputs, global_attention, node_plan
from modeling_deepseek_r1.attention.pattern import AttentionLayout, AttentionPattern, visible_keys, visible_nodes
from modeling_deepseek_r1.attention.ragged import document_attention, ragged_attention
from modeling_deepseek_r1.attention.reference import attention_reference, key_layout


def pattern_of(window, sinks, stride):
    return AttentionPattern(window, sinks, global_stride=stride)


PATTERNS = [pattern_of(5, 0, 3), pattern_of(5, 7, 4), pattern_of(64, 8, 64), pattern_of(1, 3, 1), pattern_of(20, 2, 97)]
HEADS = [(4, 4), (6, 2), (7, 1)]
CASES = list(itertools.product(PATTERNS, [1, 63, 200], [0, 3, 150], HEADS, [0, 5]))
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def problem(heads, groups, queries, keys, memory, batch=2, dtype=torch.float32):
    shapes = [(heads, queries), (groups, keys), (groups, keys)]
    tensors = [torch.randn(batch, *shape, 16).to(dtype).requires_grad_() for shape in shapes]
    nodes = Nodes(torch.randn(batch, heads, queries, requires_grad=True))
    if memory:
        own = [torch.randn(groups, memory, 16, requires_grad=True) for _ in range(2)]
        nodes = nodes._replace(memory=Memory(*own, torch.randn(heads, requires_grad=True)))
    return tensors, nodes


def reference(tensors, nodes, pattern, places):
    visible = visible_keys(pattern, *places)
    assert not (visible & visible_nodes(pattern, *places) & (places[0] >= 0)[..., None]).any()
    key, value, visible, remote, log_gate = dense_inputs(*tensors[1:], visible, nodes, pattern, places)
    return attention_reference(tensors[0], key, value, visible, 0.25, 0.0, remote, log_gate)[0]


def regular(pattern, queries, keys, past=None):
    layout = AttentionLayout(2, queries, keys - queries if past is None else past)
    return key_layout(layout, pattern, keys, torch.device("cpu"))


def assert_agree(actual, expected, tensors, nodes, real=None):
    tensors, tolerance = [*tensors, nodes.log_gate, *(nodes.memory or ())], TOLERANCE[expected.dtype]
    grad = torch.randn_like(expected)
    if real is not None:
        actual, expected, grad = (x * real for x in (actual, expected, grad))
    wanted = torch.autograd.grad(expected, tensors, grad)
    found = torch.autograd.grad(actual, tensors, grad)
    for mine, theirs in zip((actual, *found), (expected, *wanted), strict=True):
        assert (mine - theirs).float().norm() <= tolerance * theirs.float().norm().clamp(min=0.1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nodes_are_the_formula(pattern):
    n, window, sinks, stride = 70, pattern.window, pattern.num_sink_tokens, pattern.global_stride
    positions = torch.arange(n)[None]
    visible = visible_nodes(pattern, positions, positions)[0]
    expected = [[sinks <= j <= i - window and (j + 1) % stride == 0 for j in range(n)] for i in range(n)]
    assert visible.tolist() == expected
    # The plan's nodes, in the order of their positions from the first one on, are the same.
    planned = torch.zeros(n, n, dtype=torch.bool)
    for block in node_plan(pattern, n, n, torch.float32, positions.device):
        for part in block.parts:
            (low, high) = part.ranges[0]
            seen = torch.ones(block.stop - block.start, high - low) if part.mask is None else part.mask == 0
            columns = pattern.first_node + stride * torch.arange(low, high)
            planned[block.start : block.stop, columns] = seen.bool()
    assert planned.tolist() == expected
    later = torch.arange(n, n + 300)[None]
    ever_seen = (visible_keys(pattern, later, positions) | visible_nodes(pattern, later, positions)).any(1)
    assert torch.equal(pattern.kept(positions, torch.tensor([[n]])), ever_seen)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.full] if number % 7 else []) for number, case in enumerate(CASES)], ids=str
)
def test_blockwise_is_the_reference(case):
    pattern, queries, past, (heads, groups), memory = case
    tensors, nodes = problem(heads, groups, queries, queries + past, memory)
    expected = reference(tensors, nodes, pattern, regular(pattern, queries, queries + past))
    assert_agree(document_attention(*tensors, pattern, 0.25, queries + past, nodes), expected, tensors, nodes)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16_is_close_to_the_reference(pattern):
    tensors, nodes = problem(6, 2, 200, 200, 5, dtype=torch.bfloat16)
    expected = reference(tensors, nodes, pattern, regular(pattern, 200, 200))
    assert_agree(global_attention(*tensors, nodes, pattern, 0.25, 200), expected, tensors, nodes)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("queries", [1, 5, 150])
def test_keys_that_the_cache_has_dropped_are_not_missed(pattern, queries):
    past = 300
    tensors, nodes = problem(6, 2, queries, past + queries, 5)
    expected = reference(tensors, nodes, pattern, regular(pattern, queries, past + queries))
    local = torch.cat((torch.arange(pattern.num_sink_tokens), torch.arange(past - pattern.window + 1, past + queries)))
    held = tuple(x[:, :, pattern.first_node :: pattern.global_stride] for x in tensors[1:])
    kept, nodes = [tensors[0], *(x[:, :, local] for x in tensors[1:])], nodes._replace(held=held)
    torch.testing.assert_close(document_attention(*kept, pattern, 0.25, past + queries, nodes), expected)
    torch.testing.assert_close(reference(kept, nodes, pattern, regular(pattern, queries, len(local), past)), expected)


@pytest.mark.parametrize("kind", ["left", "right", "holes", "packed"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_batches(kind, pattern, dtype):
    n, mask, seq_idx = 90, torch.ones(3, 90, dtype=torch.long), None
    if kind == "left":
        mask[0, :30], mask[2, :89] = 0, 0
    if kind == "right":
        mask[0, 60:], mask[2, 1:] = 0, 0
    if kind == "holes":
        mask[0, 10:20], mask[1, ::3] = 0, 0
    if kind == "packed":
        seq_idx = torch.stack([torch.arange(n) // 45, torch.arange(n) // 7, torch.zeros(n, dtype=torch.long)])
    layout = AttentionLayout.build(3, n, attention_mask=mask, seq_idx=seq_idx)
    tensors, nodes = problem(6, 2, n, n, 5, batch=3, dtype=dtype)
    expected = reference(tensors, nodes, pattern, (layout.positions, layout.positions, layout.documents, layout.documents))
    actual = ragged_attention(*tensors, pattern, 0.25, layout, layout.positions, layout.documents, nodes)
    assert torch.isfinite(actual).all()
    assert_agree(actual, expected, tensors, nodes, real=mask[:, None, :, None])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("pattern,seen", [(pattern_of(90, 2, 4), "F"), (pattern_of(7, 2, 1), "F"), (pattern_of(7, 2, 91), "S")])
def test_a_long_window_or_every_token_a_node_is_full_attention_and_no_node_is_sliding(pattern, seen, grad):
    tensors, nodes = problem(6, 2, 90, 90, 0)
    nodes = nodes._replace(log_gate=torch.zeros_like(nodes.log_gate))
    expected = document_attention(*tensors, AttentionPattern() if seen == "F" else pattern.local, 0.25, 90)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(document_attention(*tensors, pattern, 0.25, 90, nodes), expected)


def test_gates_close_nodes_and_memory_or_the_memory_alone():
    pattern = pattern_of(7, 2, 3)
    tensors, nodes = problem(6, 2, 90, 90, 4)
    closed = nodes._replace(log_gate=torch.full_like(nodes.log_gate, -1e9))
    torch.testing.assert_close(
        global_attention(*tensors, closed, pattern, 0.25, 90), document_attention(*tensors, pattern.local, 0.25, 90)
    )
    silent = nodes._replace(memory=nodes.memory._replace(bias=torch.full((6,), -1e9)))
    without = nodes._replace(memory=None)
    torch.testing.assert_close(
        global_attention(*tensors, silent, pattern, 0.25, 90), global_attention(*tensors, without, pattern, 0.25, 90)
    )


def test_every_query_sees_the_memory_even_the_first():
    tensors, nodes = problem(2, 2, 1, 1, 3, batch=1)
    output = global_attention(*tensors, nodes, pattern_of(7, 2, 3), 0.25, 1)
    query, key, value = (x.detach()[0, :, 0] for x in tensors)
    memory = nodes.memory
    logits = torch.cat(
        (
            (query * key).sum(-1, keepdim=True) * 0.25,
            torch.einsum("hd,hmd->hm", query, memory.key) * 0.25 + nodes.log_gate[0] + memory.bias[:, None],
        ),
        1,
    )
    values = torch.cat((value[:, None], memory.value), 1)
    torch.testing.assert_close(output[0, :, 0], torch.einsum("hm,hmd->hd", logits.softmax(-1), values))


def test_what_a_query_sees_does_not_depend_on_later_tokens():
    tensors, nodes = problem(4, 2, 120, 120, 4)
    pattern = pattern_of(6, 1, 3)
    whole = global_attention(*tensors, nodes, pattern, 0.25, 120)
    part = nodes._replace(log_gate=nodes.log_gate[:, :, :70])
    shorter = global_attention(*(x[:, :, :70] for x in tensors), part, pattern, 0.25, 70)
    torch.testing.assert_close(shorter, whole[:, :, :70])


def test_gradients_pass_the_numerical_check():
    pattern = pattern_of(3, 1, 2)
    states = [torch.randn(1, heads, 11, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]
    shapes = (1, 2, 11), (1, 3, 4), (1, 3, 4), (2,)
    others = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def attention(query, key, value, log_gate, *memory):
        return global_attention(query, key, value, Nodes(log_gate, Memory(*memory)), pattern, 0.5, 11)

    assert torch.autograd.gradcheck(attention, (*states, *others))


def test_without_remote_keys_the_gate_has_a_zero_gradient():
    """Not none at all, on which training on several devices would stop."""
    tensors, nodes = problem(4, 2, 9, 9, 0)
    document_attention(*tensors, pattern_of(7, 2, 3), 0.25, 9, nodes).sum().backward()
    assert nodes.log_gate.grad is not None and not nodes.log_gate.grad.any()
    assert F.mse_loss(tensors[0].grad, torch.zeros_like(tensors[0])) > 0


@pytest.mark.parametrize("training", [False, True])
def test_memory_grows_with_the_length_and_not_with_its_square(training):
    """Up to 32K tokens: the highest sum of all tensors that live at once."""
    from torch.profiler import ProfilerActivity, profile

    def run(n):
        pattern = pattern_of(64, 8, 64)
        tensors, nodes = problem(2, 1, n, n, 16, batch=1)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            with torch.set_grad_enabled(training):
                output = document_attention(*tensors, pattern, 0.25, n, nodes)
            if training:
                output.sum().backward()
        # What each allocation and release adds, in their order; what operators are charged with comes later than it happens.
        changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]
        return max(itertools.accumulate(changes)) / output.nbytes

    short, long = run(4096), run(32768)
    assert long < 1.2 * short, (short, long)
    assert long < 12
