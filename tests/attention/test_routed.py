"""Routed attention against the reference: outputs, gradients, empty sets, decoding, and the identities that need no reference."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from modeling_deepseek_r1.attention.kmeans import assign_keys, choose_clusters, fit_centroids
from modeling_deepseek_r1.attention.pattern import AttentionLayout, AttentionPattern, remote_keys, visible_keys
from modeling_deepseek_r1.attention.ragged import ragged_attention
from modeling_deepseek_r1.attention.reference import attention_reference, key_layout
from modeling_deepseek_r1.attention.routed import Routing, plan_pairs, routed_attention

PATTERNS = [
    AttentionPattern(5, 0, 1, 3),
    AttentionPattern(5, 2, 2, 1000),
    AttentionPattern(64, 8, 3, 20),
    AttentionPattern(1, 3, 2, 7),
]
HEADS = [(4, 4), (6, 2), (7, 1)]
CASES = list(itertools.product(PATTERNS, [1, 63, 200], [0, 3, 150], HEADS, [3, 8]))


def problem(heads, groups, queries, keys, clusters, choices, batch=2, dtype=torch.float32):
    tensors = [
        torch.randn(batch, h, n, 16).to(dtype).requires_grad_() for h, n in ((heads, queries), (groups, keys), (groups, keys))
    ]
    centroids = F.normalize(torch.randn(groups, clusters, 16), dim=-1)
    log_gate = torch.randn(batch, heads, queries, requires_grad=True)
    routing = Routing(choose_clusters(tensors[0], centroids, choices), assign_keys(tensors[1], centroids), log_gate)
    return tensors, routing


def reference(tensors, routing, pattern, layout, places):
    visible, remote = (
        visible_keys(pattern, *places),
        remote_keys(pattern, routing.query_clusters, routing.key_clusters, *places),
    )
    assert not (visible[:, None] & remote & (places[0] >= 0)[:, None, :, None]).any()
    return attention_reference(*tensors, visible, 0.25, 0.0, remote, routing.log_gate[..., None])[0]


def assert_agree(actual, expected, tensors, tolerance=2e-5, real=None):
    grad = torch.randn_like(expected)
    if real is not None:
        actual, expected, grad = (x * real for x in (actual, expected, grad))
    wanted = torch.autograd.grad(expected, tensors, grad)
    found = torch.autograd.grad(actual, tensors, grad)
    for mine, theirs in zip((actual, *found), (expected, *wanted), strict=True):
        assert (mine - theirs).float().norm() <= tolerance * theirs.float().norm().clamp(min=0.1)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.full] if number % 5 else []) for number, case in enumerate(CASES)], ids=str
)
def test_routed_is_the_reference(case):
    pattern, queries, past, (heads, groups), clusters = case
    tensors, routing = problem(heads, groups, queries, queries + past, clusters, pattern.routed_clusters)
    layout = AttentionLayout(2, queries, past)
    places = key_layout(layout, pattern, queries + past, tensors[0].device)
    expected = reference(tensors, routing, pattern, layout, places)
    actual = routed_attention(*tensors, routing, pattern, 0.25)
    assert_agree(actual, expected, [*tensors, routing.log_gate])


def test_bfloat16_is_close_to_the_reference():
    tensors, routing = problem(6, 2, 200, 200, 8, 2, dtype=torch.bfloat16)
    pattern, layout = AttentionPattern(20, 3, 2, 30), AttentionLayout(2, 200)
    expected = reference(tensors, routing, pattern, layout, key_layout(layout, pattern, 200, tensors[0].device))
    assert_agree(routed_attention(*tensors, routing, pattern, 0.25), expected, [*tensors, routing.log_gate], 0.02)


def test_all_clusters_and_all_tokens_are_full_attention():
    tensors, routing = problem(6, 2, 90, 90, 4, 4)
    open_gate = routing._replace(log_gate=torch.zeros_like(routing.log_gate))
    expected = F.scaled_dot_product_attention(*tensors, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(routed_attention(*tensors, open_gate, AttentionPattern(7, 2, 4, 90), 0.25), expected)


def test_a_closed_gate_is_local_attention():
    tensors, routing = problem(6, 2, 90, 90, 4, 2)
    closed = routing._replace(log_gate=torch.full_like(routing.log_gate, -1e9))
    pattern = AttentionPattern(7, 2, 2, 50)
    positions = torch.arange(90).expand(2, -1)
    expected = attention_reference(*tensors, visible_keys(pattern, positions, positions), 0.25)[0]
    torch.testing.assert_close(routed_attention(*tensors, closed, pattern, 0.25), expected)


def test_what_a_query_sees_does_not_depend_on_later_tokens():
    tensors, routing = problem(4, 2, 120, 120, 5, 2)
    pattern = AttentionPattern(6, 1, 2, 9)
    whole = routed_attention(*tensors, routing, pattern, 0.25)
    part = Routing(routing.query_clusters[:, :, :70], routing.key_clusters[:, :, :70], routing.log_gate[:, :, :70])
    torch.testing.assert_close(routed_attention(*(x[:, :, :70] for x in tensors), part, pattern, 0.25), whole[:, :, :70])


def test_empty_remote_sets_contribute_exactly_nothing():
    tensors, routing = problem(4, 2, 60, 60, 5, 1)
    never = routing._replace(
        query_clusters=torch.full_like(routing.query_clusters, 4), key_clusters=torch.zeros_like(routing.key_clusters)
    )
    pattern = AttentionPattern(6, 1, 1, 9)
    assert plan_pairs(never, pattern) == []
    output = routed_attention(*tensors, never, pattern, 0.25)
    grads = torch.autograd.grad(output.sum(), [*tensors, never.log_gate])
    assert all(torch.isfinite(x).all() for x in (output, *grads))
    assert not grads[3].any()


@pytest.mark.parametrize("kind", ["left", "packed", "holes"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ragged_batches(kind, pattern):
    n, mask, seq_idx = 90, torch.ones(3, 90, dtype=torch.long), None
    if kind == "left":
        mask[0, :30], mask[2, :89] = 0, 0
    if kind == "holes":
        mask[0, 10:20], mask[1, ::3] = 0, 0
    if kind == "packed":
        seq_idx = torch.stack([torch.arange(n) // 45, torch.arange(n) // 7, torch.zeros(n, dtype=torch.long)])
    layout = AttentionLayout.build(3, n, attention_mask=mask, seq_idx=seq_idx)
    tensors, routing = problem(6, 2, n, n, 5, pattern.routed_clusters, batch=3)
    expected = reference(
        tensors, routing, pattern, layout, (layout.positions, layout.positions, layout.documents, layout.documents)
    )
    actual = ragged_attention(*tensors, pattern, 0.25, layout, layout.positions, layout.documents, routing)
    assert_agree(actual, expected, [*tensors, routing.log_gate], real=mask[:, None, :, None])


def test_k_means_finds_separate_directions():
    directions = F.normalize(torch.randn(2, 6, 16), dim=-1)
    which = torch.randint(6, (2, 600))
    keys = directions.gather(1, which[..., None].expand(-1, -1, 16)) * (0.5 + torch.rand(2, 600, 1)) + 0.01 * torch.randn(
        2, 600, 16
    )
    centroids = fit_centroids(keys, 6)
    torch.testing.assert_close(centroids.norm(dim=-1), torch.ones(2, 6))
    assert (centroids @ directions.transpose(1, 2)).amax(1).min() > 0.99
    found = assign_keys(keys[None], centroids)[0]
    for group, cluster in itertools.product(range(2), range(6)):
        assert which[group][found[group] == cluster].unique().numel() == 1
    with pytest.raises(ValueError, match="cannot make 601 clusters"):
        fit_centroids(keys, 601)


def test_ties_go_to_the_lower_cluster():
    centroids = torch.eye(4)[None]
    assert choose_clusters(torch.zeros(1, 1, 1, 4), centroids, 3).tolist() == [[[[0, 1, 2]]]]
    assert choose_clusters(torch.tensor([[[[0.0, 2.0, 0.0, 2.0]]]]), centroids, 3).tolist() == [[[[1, 3, 0]]]]
    assert assign_keys(torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]]), centroids).tolist() == [[[0]]]


@pytest.mark.parametrize("training", [False, True])
def test_memory_grows_with_the_length_and_not_with_its_square(training):
    """Up to 64K tokens: the largest tensor and the highest sum of all that live at once."""
    from torch.profiler import ProfilerActivity, profile

    pattern = AttentionPattern(64, 8, 2, 32)

    def run(n):
        tensors, routing = problem(2, 1, n, n, 32, 2, batch=1)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            with torch.set_grad_enabled(training):
                output = routed_attention(*tensors, routing, pattern, 0.25)
            if training:
                output.sum().backward()
        live = highest = 0
        for event in sorted(record.events(), key=lambda event: event.time_range.end):
            live += event.self_cpu_memory_usage
            highest = max(highest, live)
        return highest / output.nbytes

    short, long = run(8192), run(65536)
    # Besides the output: keys, pairs and their parts, of each a fixed number per token.
    assert long < 1.5 * short, (short, long)
    assert long < 40
