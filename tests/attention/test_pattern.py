"""The definition of the patterns and the layout, against a literal reading of the formulas."""

import pytest
import torch

from modeling_deepseek_r1.attention.pattern import AttentionLayout, AttentionPattern, visible_keys


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_visible_keys_is_the_formula(window, sinks):
    n = 12
    positions = torch.arange(n)[None]
    visible = visible_keys(AttentionPattern(window, sinks), positions, positions)[0]
    for i in range(n):
        for j in range(n):
            in_window = j <= i and (window is None or i - window < j)
            is_sink = window is not None and j < min(sinks, i + 1)
            assert bool(visible[i, j]) == (in_window or is_sink), (i, j)


def test_a_window_as_long_as_the_text_is_full_attention():
    positions = torch.arange(9)[None]
    full = visible_keys(AttentionPattern(), positions, positions)
    assert torch.equal(visible_keys(AttentionPattern(9, 2), positions, positions), full)
    assert not torch.equal(visible_keys(AttentionPattern(8, 0), positions, positions), full)


def test_documents_and_padding_are_kept_apart():
    positions = torch.tensor([[-1, 0, 1, 0, 1]])
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    visible = visible_keys(AttentionPattern(), positions, positions, documents, documents)[0]
    expected = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]])
    assert torch.equal(visible.long(), expected)


def test_kept_is_what_any_later_token_can_see():
    pattern, n = AttentionPattern(4, 2), 11
    keys = torch.arange(n)[None]
    later = torch.arange(n, n + 30)[None]
    ever_seen = visible_keys(pattern, later, keys).any(1)
    assert torch.equal(pattern.kept(keys, torch.tensor([[n]])), ever_seen)
    assert int(ever_seen.sum()) == pattern.capacity


def test_without_padding_or_packing_the_layout_holds_no_tensor():
    assert AttentionLayout.build(2, 5, past=3).is_regular
    assert AttentionLayout.build(2, 5, attention_mask=torch.ones(2, 5)).is_regular
    assert AttentionLayout.build(2, 5, past=3, position_ids=torch.arange(3, 8)[None]).is_regular
    assert AttentionLayout.build(1, 3, attention_mask=torch.tensor([[1, 1, 0]]), cached=False).is_regular
    assert not AttentionLayout.build(1, 3, attention_mask=torch.tensor([[1, 1, 0]])).is_regular
    assert not AttentionLayout.build(1, 3, attention_mask=torch.tensor([[0, 1, 1]]), cached=False).is_regular


def test_positions_count_the_real_tokens_of_the_document():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0]])
    layout = AttentionLayout.build(2, 5, attention_mask=mask)
    assert layout.positions.tolist() == [[-1, -1, 0, 1, 2], [0, -1, 1, 2, -1]]
    assert layout.next_positions.tolist() == [[3], [3]]
    packed = AttentionLayout.build(1, 6, seq_idx=torch.tensor([[7, 7, 7, 2, 2, 9]]))
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert packed.documents.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert packed.next_positions.tolist() == [[1]]


def test_a_slice_is_the_layout_of_the_later_tokens():
    packed = AttentionLayout.build(
        1, 6, past=4, seq_idx=torch.tensor([[7, 7, 2, 2, 2, 9]]), position_ids=torch.arange(4, 10)[None]
    )
    assert packed.positions.tolist() == [[4, 5, 0, 1, 2, 0]]
    middle = packed.slice(1, 4)
    assert (middle.past, middle.positions.tolist(), middle.documents.tolist()) == (5, [[5, 0, 1]], [[0, 1, 1]])
    assert (middle.past_positions.tolist(), middle.past_documents.tolist(), middle.next_positions.tolist()) == (
        [[5]],
        [[0]],
        [[2]],
    )
    last = packed.slice(3, 6)
    assert (last.past_positions.tolist(), last.past_documents.tolist()) == ([[1]], [[1]])


def test_row_groups_collect_rows_of_equal_structure():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1]])
    groups = AttentionLayout.build(3, 3, attention_mask=mask).row_groups
    assert [(group.rows, group.runs) for group in groups] == [([0, 2], ((None, 1), (0, 2))), ([1], ((0, 3),))]
