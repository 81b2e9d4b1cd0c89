"""The cache oracle: whatever the way in which tokens reach the model, the logits are those of one forward without a cache."""

import copy

import pytest
import torch
from transformers import DynamicCache

from tests.models import PATTERNS, random_ids, tiny_model

pytestmark = pytest.mark.parametrize("pattern", PATTERNS)
IMPLEMENTATIONS = ["eager", "sdpa"]
LENGTH = 40


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def run(model, ids, cache=None, mask=None, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, attention_mask=mask, use_cache=cache is not None, **kwargs).logits


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cuts", [[1] * LENGTH, [25] + [1] * 15, [3, 17, 1, 1, 18], [40]], ids=str)
def test_steps_and_chunks_equal_one_forward(pattern, implementation, cuts):
    ids = random_ids(2, LENGTH)
    expected = run(tiny_model(pattern, "eager"), ids)
    model, cache = tiny_model(pattern, implementation), DynamicCache()
    parts = [run(model, part, cache) for part in ids.split(cuts, 1)]
    assert_equal(torch.cat(parts, 1), expected)
    assert cache.get_seq_length() == LENGTH


def test_a_long_prompt_without_cuts_is_chunked_inside(pattern):
    ids = random_ids(2, LENGTH)
    expected = run(tiny_model(pattern, "eager"), ids)
    model = tiny_model(pattern, chunk_size_feed_forward=9)
    assert_equal(run(model, ids), expected)
    cache = DynamicCache()
    assert_equal(run(model, ids[:, :-5], cache), expected[:, :-5])
    assert_equal(run(model, ids[:, -5:], cache), expected[:, -5:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("cuts", [[30] + [1] * 10, [13, 27], [18, 18, 1, 3]], ids=str)
@pytest.mark.parametrize("explicit_positions", [True, False])
def test_padding_changes_nothing(pattern, implementation, side, cuts, explicit_positions):
    model = tiny_model(pattern, implementation)
    rows, mask = [random_ids(1, length, seed=length) for length in (40, 33, 5)], torch.zeros(3, 40, dtype=torch.long)
    for row, ids in enumerate(rows):
        missing = 40 - ids.shape[1]
        kept = {"left": range(missing, 40), "right": range(40 - missing), "holes": [*range(2), *range(missing + 2, 40)]}[side]
        mask[row, list(kept)] = 1
    ids = torch.zeros(3, 40, dtype=torch.long)
    ids[mask.bool()] = torch.cat([row[0] for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, parts, done = DynamicCache(), [], 0
    for cut in cuts:
        extra = {"position_ids": positions[:, done : done + cut]} if explicit_positions else {}
        parts.append(run(model, ids[:, done : done + cut], cache, mask[:, : done + cut], **extra))
        done += cut
    whole = run(model, ids, None, mask)
    for row, single in enumerate(rows):
        expected = run(tiny_model(pattern, "eager"), single)[0]
        assert_equal(torch.cat(parts, 1)[row][mask[row].bool()], expected)
        assert_equal(whole[row][mask[row].bool()], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("given", ["position_ids", "seq_idx"])
@pytest.mark.parametrize("cuts", [[40], [40 - 6] + [1] * 6, [21, 19], [9, 12, 19]], ids=str)
def test_packed_documents_do_not_see_each_other(pattern, implementation, given, cuts):
    lengths = [12, 1, 8, 19]
    documents = [random_ids(1, length, seed=length) for length in lengths]
    expected = torch.cat([run(tiny_model(pattern, "eager"), document) for document in documents], 1)
    ids = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    model, cache, parts, done = tiny_model(pattern, implementation), DynamicCache(), [], 0
    for cut in cuts:
        span = slice(done, done + cut)
        extra = {"position_ids": positions[:, span]}
        if given == "seq_idx":
            extra["seq_idx"] = seq_idx[:, span]
        parts.append(run(model, ids[:, span], cache, **extra))
        done += cut
    assert_equal(torch.cat(parts, 1), expected)
    assert_equal(run(model, ids, position_ids=positions), expected)


def test_rows_of_different_packing_in_one_batch(pattern):
    model, reference = tiny_model(pattern), tiny_model(pattern, "eager")
    lengths = [[10, 30], [25, 15], [40]]
    seq_idx = torch.stack([torch.repeat_interleave(torch.arange(len(x)), torch.tensor(x)) for x in lengths])
    ids = random_ids(3, 40)
    positions = torch.stack([torch.cat([torch.arange(n) for n in x]) for x in lengths])
    actual = run(model, ids, position_ids=positions, seq_idx=seq_idx)
    for row, parts in enumerate(lengths):
        expected = torch.cat([run(reference, part[None]) for part in ids[row].split(parts)], 1)
        assert_equal(actual[row], expected[0])


def test_beams_are_reordered_repeated_and_selected(pattern):
    model = tiny_model(pattern)
    ids, cache = random_ids(2, 25), DynamicCache()
    run(model, ids, cache)
    cache.batch_repeat_interleave(2)
    following = random_ids(4, 6, seed=1)
    run(model, following, cache)
    order = torch.tensor([2, 2, 0, 3])
    cache.reorder_cache(order)
    history = torch.cat((ids.repeat_interleave(2, 0), following), 1)[order]
    last = random_ids(4, 3, seed=2)
    expected = run(tiny_model(pattern, "eager"), torch.cat((history, last), 1))[:, -3:]
    assert_equal(run(model, last, copy.deepcopy(cache)), expected)
    cache.batch_select_indices(torch.tensor([1, 3]))
    assert_equal(run(model, last[[1, 3]], cache), expected[[1, 3]])


@pytest.mark.parametrize("padded", [False, True])
def test_drafts_are_taken_back(pattern, padded):
    model, reference = tiny_model(pattern), tiny_model(pattern, "eager")
    ids = random_ids(2, 30)
    mask = torch.ones(2, 60, dtype=torch.long)
    if padded:
        mask[1, :4] = 0
    cache = DynamicCache()
    run(model, ids, cache, mask[:, :30])
    cache.activate_past_recording()
    cache.crop(0)
    history = ids
    for step in range(4):
        draft = random_ids(2, 5, seed=step + 10)
        run(model, draft, cache, mask[:, : history.shape[1] + 5])
        cache.crop(-3)
        history = torch.cat((history, draft[:, :2]), 1)
        assert cache.get_seq_length() == history.shape[1]
    last = random_ids(2, 2, seed=3)
    full = torch.cat((history, last), 1)
    expected = run(reference, full, mask=mask[:, : full.shape[1]])[:, -2:]
    assert_equal(run(model, last, cache, mask[:, : full.shape[1]]), expected)


def test_a_copied_prefix_serves_several_continuations(pattern):
    model, reference = tiny_model(pattern), tiny_model(pattern, "eager")
    prefix, cache = random_ids(1, 21), DynamicCache()
    run(model, prefix, cache)
    for seed in range(3):
        following = random_ids(1, 4, seed=seed)
        expected = run(reference, torch.cat((prefix, following), 1))[:, -4:]
        assert_equal(run(model, following, copy.deepcopy(cache)), expected)


def test_gradients_flow_through_a_cache(pattern):
    ids = random_ids(2, 24)
    model, reference = tiny_model(pattern), tiny_model(pattern, "eager")
    reference(ids).logits[:, -1].square().sum().backward()
    cache = DynamicCache()
    for part in ids.split([9, 14, 1], 1):
        logits = model(part, past_key_values=cache, use_cache=True).logits
    logits[:, -1].square().sum().backward()
    for (name, actual), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            actual.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_local_layers_hold_a_bounded_number_of_keys(pattern):
    model, cache = tiny_model(pattern), DynamicCache()
    with torch.no_grad():
        run(model, random_ids(1, 200), cache)
        sizes = [layer.keys.shape[2] for layer in cache.layers]
        for step in range(90):
            run(model, random_ids(1, 1, seed=step), cache)
    for layer, size in zip(cache.layers, sizes, strict=True):
        if not layer.pattern.drops_keys:
            assert layer.keys.shape[2] == 290
        else:
            capacity = layer.pattern.local.capacity
            assert size == capacity
            assert layer.keys.shape[2] <= capacity + 1
            assert layer._stores[0].buffer.shape[2] < 4 * (capacity + 64)
        if layer.pattern.global_stride:
            assert layer.nodes[0].shape[2] == int(layer.pattern.are_nodes(torch.arange(290)).sum())


def test_reset_makes_the_cache_new(pattern):
    model, cache, ids = tiny_model(pattern), DynamicCache(), random_ids(1, 30)
    expected = run(model, ids, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_equal(run(model, ids, cache), expected)
