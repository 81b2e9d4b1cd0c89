"""Which candidates go on, without any model: tokens and likelihoods are written by hand."""

import pytest

from modeling_deepseek_r1.generation import HierarchicalCandidates
from modeling_deepseek_r1.generation.selection import PromptSearch
from tests.test_conversation import word_tokenizer


def search(num_candidates, stages, scores=None, max_new_tokens=20, **options):
    """A search whose evaluator gives each text the number of its first word in `scores`."""
    if scores is not None:
        options |= {
            "evaluator": lambda prompt, texts: [scores[text.split()[0]] for text in texts],
            "tokenizer": word_tokenizer(),
        }
    return PromptSearch(HierarchicalCandidates(num_candidates, stages, **options), "w1", 1, max_new_tokens)


def grow(course, gains=None, ends=()):
    """A token for every running candidate: the i-th gets word i."""
    for number, candidate in enumerate(course.record.candidates):
        if candidate.ended is None:
            candidate.tokens.append(6 + number)
            candidate.log_likelihood += gains[number] if gains else -1.0
            if number in ends:
                candidate.finish("eos")
    course.advance()


def ends(course):
    return [candidate.ended for candidate in course.record.candidates]


def test_halving():
    course = search(4, [(2, 2), (3, 1)], {"w0": 1.0, "w1": 4.0, "w2": 2.0, "w3": 3.0})
    grow(course)
    assert ends(course) == [None] * 4
    grow(course)
    assert ends(course) == ["dropped", None, "dropped", None]
    grow(course)
    assert ends(course) == ["dropped", None, "dropped", "dropped"]
    assert [c.stage for c in course.record.candidates] == [0, None, 0, 1]
    assert [c.stage_scores for c in course.record.candidates] == [[1.0], [4.0, 4.0], [2.0], [3.0, 3.0]]
    grow(course, ends=[1])
    assert course.record.best is course.record.candidates[1]
    assert course.record.generated_tokens == 2 + 4 + 2 + 3


def test_a_finished_draft_takes_a_place_and_can_win_from_behind():
    course = search(3, [(2, 1)], {"w0": 3.0, "w1": 2.0, "w2": 1.0})
    grow(course, ends=[0])
    grow(course)
    assert ends(course) == ["eos", "dropped", "dropped"]
    assert course.record.best is course.record.candidates[0]
    scores = {"w0": 1.0, "w1": 2.0, "w2": 0.0}
    course = search(3, [(2, 1)], scores)
    grow(course, ends=[0])
    grow(course)
    assert ends(course) == ["eos", None, "dropped"]
    scores["w1"] = 0.5  # it gets worse
    grow(course, ends=[1])
    assert course.record.best is course.record.candidates[0]


def test_a_lead_decides():
    scores = {"w0": 1.0, "w1": 4.0, "w2": 2.0}
    course = search(3, [(1, 2)], scores, margin=2.0)
    grow(course)
    assert ends(course) == ["dropped", None, "dropped"]
    assert course.record.decided == "margin"
    course = search(3, [(1, 2)], scores, margin=2.1)
    grow(course)
    assert ends(course) == ["dropped", None, None]
    assert course.record.decided is None


def test_a_threshold_decides():
    course = search(3, [], {"w0": 1.0, "w1": 4.0, "w2": 5.0}, threshold=4.0)
    grow(course, ends=[0])
    assert ends(course) == ["eos", None, None]
    grow(course, ends=[1])
    assert ends(course) == ["eos", "eos", "decided"]
    assert course.record.decided == "threshold"
    assert course.record.best is course.record.candidates[1]
    assert course.record.candidates[2].score == 5.0  # unfinished texts do not win


def test_beaten_candidates_could_not_have_won():
    course = search(3, [], drop_beaten=True, max_new_tokens=10)
    grow(course, gains=[-1.0, -9.0, -11.0], ends=[0])
    assert ends(course) == ["eos", None, "beaten"]  # -11 over 10 tokens is worse than -1, -9 over 10 is not
    grow(course, gains=[0.0, -1.5, 0.0])
    assert ends(course) == ["eos", "beaten", "beaten"]
    assert course.record.best is course.record.candidates[0]


def test_scores_that_are_none_are_refused():
    for scores, message in (([1.0], "for 2 texts"), ([1.0, float("nan")], "one finite number")):
        course = PromptSearch(
            HierarchicalCandidates(2, [(1, 1)], lambda prompt, texts, s=scores: s, word_tokenizer()), "w1", 1, 9
        )
        with pytest.raises(ValueError, match=message):
            grow(course)
