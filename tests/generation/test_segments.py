"""Documents in overlapping segments, beside forwards that see exactly what a segment sees."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from modeling_deepseek_r1.evaluation import document_losses
from modeling_deepseek_r1.generation import SegmentedCache
from tests.models import random_ids, tiny_config, tiny_model

SEGMENT, OVERLAP, KEPT = 24, 12, 4
PIECEWISE = {"rope_parameters": {"rope_type": "piecewise_linear", "segments": [[0, 100.0], [9, 1000.0]]}}
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}}
ROTATIONS = {"plain": {}, "piecewise": PIECEWISE, "yarn": YARN}
PATTERNS = ["full", "sinks", "routed", "global"]


def one_layer(pattern, **fields):
    """Keys of its only layer depend on their own token alone, so that a forward over what a segment holds gives the same."""
    return tiny_model(pattern, num_hidden_layers=1, **fields)


def segments(model, **options):
    return SegmentedCache(model.config, SEGMENT, OVERLAP, **{"kept_tokens": KEPT, **options})


def read(model, ids, cache=None, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=cache is not None, **kwargs).logits


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_segment_sees_what_it_holds(pattern, rotation, reset):
    model, ids = one_layer(pattern, **ROTATIONS[rotation]), random_ids(2, 61)
    cache = segments(model, reset_positions=reset)
    actual, held = read(model, ids, cache), list(range(SEGMENT))
    assert_equal(actual[:, held], read(model, ids[:, held]))
    while held[-1] + 1 < 61:
        # The first four tokens and the last twelve; the step is a multiple of the distance of nodes.
        held = held[:KEPT] + held[-SEGMENT + KEPT + cache.step :]
        new = list(range(held[-1] + 1, min(61, held[-1] + 1 + cache.step)))
        held += new
        # A mask tells that positions with gaps are not those of packed documents.
        places = {} if reset else {"position_ids": torch.tensor([held]), "attention_mask": torch.ones(2, len(held))}
        assert_equal(actual[:, new], read(model, ids[:, held], **places)[:, -len(new) :])
    assert cache.get_seq_length() == 61
    assert max(layer.keys.shape[2] for layer in cache.layers) <= SEGMENT


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["mixed", "routed_mixed", "global_mixed", "per_layer", "experts"])
@pytest.mark.parametrize("reset", [True, False])
def test_pieces_steps_and_padding_change_nothing(pattern, reset):
    model, rows = tiny_model(pattern, **PIECEWISE), [random_ids(1, length, seed=length) for length in (70, 41, 9)]
    options = {"kept_tokens": 5, "reset_positions": reset}
    expected = [read(model, row, segments(model, **options)) for row in rows]
    cache = segments(model, **options)
    parts = [read(model, part, cache) for part in rows[0].split([30, 1, 1, 30, 8], 1)]
    assert_equal(torch.cat(parts, 1), expected[0])
    ids, mask = torch.zeros(3, 70, dtype=torch.long), torch.zeros(3, 70, dtype=torch.long)
    for row, single in enumerate(rows):
        ids[row, -single.shape[1] :], mask[row, -single.shape[1] :] = single[0], 1
    cache, parts, done = segments(model, **options), [], 0
    for cut in (37, 1, 30, 1, 1):
        parts.append(read(model, ids[:, done : done + cut], cache, attention_mask=mask[:, : done + cut]))
        done += cut
    for row, single in enumerate(expected):
        assert_equal(torch.cat(parts, 1)[row][mask[row].bool()], single[0])


def test_a_document_of_one_segment_is_read_as_ever():
    model, ids = tiny_model("global_mixed"), random_ids(2, 24)
    assert torch.equal(read(model, ids, segments(model, kept_tokens=5)), read(model, ids, DynamicCache()))


def test_plain_rotation_depends_on_distances_alone():
    model, ids = tiny_model("full"), random_ids(1, 80)
    both = [read(model, ids, segments(model, kept_tokens=0, reset_positions=reset)) for reset in (True, False)]
    assert_equal(*both)
    assert not torch.allclose(both[0][:, SEGMENT:], read(model, ids)[:, SEGMENT:], atol=1e-3)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("reset", [True, False])
def test_generation_goes_on_over_segments(mode, reset):
    model, ids = tiny_model("mixed", **PIECEWISE), random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **mode}

    def generate(ids, mask):
        cache = segments(model, reset_positions=reset)
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)

    together = generate(ids, mask)
    if "do_sample" not in mode:
        assert torch.equal(together[1:, 17:], generate(ids[1:, 17:], mask[1:, 17:]))
    if not mode:
        logits = read(model, together[:1, :-1], segments(model, reset_positions=reset))
        assert torch.equal(logits[:, 39:].argmax(-1), together[:1, 40:])
    assert together.shape == (len(together), 80)


def test_a_cache_goes_on_with_a_longer_text_and_starts_anew():
    model, ids = tiny_model("mixed"), random_ids(1, 50)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache = segments(model)
    first = model.generate(ids, past_key_values=cache, **options)
    longer = torch.cat((first, random_ids(1, 9, seed=5)), 1)
    expected = model.generate(longer, past_key_values=segments(model), **options)
    assert torch.equal(model.generate(longer, past_key_values=cache, **options), expected)
    cache.reset()
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), first)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"overlap": 4}, "largest window"),
        ({"kept_tokens": 2}, "3 sink tokens"),
        ({"overlap": 20}, "no room for new tokens"),
    ],
)
def test_impossible_lengths_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        SegmentedCache(tiny_config("mixed"), **{"segment_length": SEGMENT, "overlap": OVERLAP, "kept_tokens": KEPT, **lengths})


def test_what_segments_cannot_do_is_refused():
    dynamic = tiny_config("full", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="change beyond 256 tokens"):
        SegmentedCache(dynamic, 300)
    SegmentedCache(dynamic, 300, reset_positions=False)
    with pytest.raises(ValueError, match="convert the checkpoint"):
        SegmentedCache(LlamaConfig(), 300)
    model, ids = tiny_model("mixed"), random_ids(1, 40)
    with pytest.raises(ValueError, match="packed rows"):
        read(model, ids, segments(model), position_ids=torch.arange(40)[None] % 20)
    with pytest.raises(ValueError, match="output_hidden_states: not over several segments"):
        read(model, ids, segments(model), output_hidden_states=True)
    with pytest.raises(ValueError, match="without assistant_model"):
        model.generate(ids, past_key_values=segments(model), prompt_lookup_num_tokens=3, max_new_tokens=5)
    cache = segments(model)
    read(model, ids, cache)
    with pytest.raises(RuntimeError, match="further segment"):
        cache.crop(-1)


def test_losses_of_a_document():
    model, ids = tiny_model("mixed"), random_ids(1, 60)[0]
    for cache, beside in ((None, None), (segments(model), segments(model))):
        logits = read(model, ids[None], beside)[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        assert_equal(document_losses(model, ids, cache, positions_per_chunk=7), expected)
    with pytest.raises(ValueError, match="the cache holds 60 tokens already"):
        document_losses(model, ids, cache)
    with pytest.raises(ValueError, match=r"must be \[tokens\]"):
        document_losses(model, ids[None])
