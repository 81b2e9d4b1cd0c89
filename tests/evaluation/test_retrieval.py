import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_deepseek_r1.evaluation import read_text, retrieval, wilson_interval
from modeling_deepseek_r1.evaluation.retrieval import Haystack, build_item, is_exact_match, score_item

TEXT = "\n".join(f"Line {number} of a text about nothing in particular, {number % 7} words long." for number in range(400))
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"


class TokenCache:
    """What the fake models remember: all tokens, `[batch, seq]`."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.ids = self.ids.repeat_interleave(repeats, dim=0)


class FakeModel(nn.Module):
    """Its hidden states are its logits; `predict(ids)` gives those after the sequence `ids`."""

    device = torch.device("cpu")
    vocab_size = 256

    def __init__(self, predict):
        super().__init__()
        self.predict = predict
        self.base_model = self.run_base

    def get_output_embeddings(self):
        return nn.Identity()

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.run_base(input_ids).last_hidden_state)

    def run_base(self, input_ids, past_key_values=None, use_cache=False):
        past = past_key_values.ids if past_key_values is not None else input_ids[:, :0]
        ids = torch.cat([past, input_ids], dim=1)
        rows = []
        for row in ids.tolist():
            # A prefill only ever needs its last position here.
            wanted = range(past.shape[1] + 1, len(row) + 1) if input_ids.shape[1] < 50 else [len(row)]
            states = [self.predict(row[:end]) for end in wanted]
            rows.append(torch.cat([torch.zeros(input_ids.shape[1] - len(states), self.vocab_size), torch.stack(states)]))
        if past_key_values is not None:
            past_key_values.ids = ids
        return SimpleNamespace(last_hidden_state=torch.stack(rows), past_key_values=past_key_values or TokenCache(ids))


def copying(ids: list[int]) -> torch.Tensor:
    """Predicts what followed the longest earlier occurrence of the end of `ids`, as induction heads do."""
    text, best = bytes(ids), None
    for length in range(1, min(len(ids), 60)):
        place = text.find(text[-length:], 0, len(text) - 1)
        if place < 0:
            break
        best = ids[place + length]
    logits = torch.zeros(FakeModel.vocab_size)
    if best is not None:
        logits[best] = 20.0
    return logits


def uniform(ids: list[int]) -> torch.Tensor:
    return torch.zeros(FakeModel.vocab_size)


def last_seen(byte_tokenizer):
    """Knows how facts look and repeats the one nearest to the question, whoever it is about."""

    def predict(ids: list[int]) -> torch.Tensor:
        text, _, written = byte_tokenizer.decode(ids).rpartition(" is")
        value = " " + re.findall(r" is (\d+)\.\n", text)[-1] if text else ""
        logits = torch.zeros(FakeModel.vocab_size)
        if value.startswith(written) and written != value:
            logits[byte_tokenizer(value[len(written)])["input_ids"][0]] = 20.0
        return logits

    return predict


@pytest.fixture
def haystack(byte_tokenizer):
    return Haystack(byte_tokenizer, TEXT)


@pytest.mark.parametrize(("length", "depth"), [(700, 0.0), (901, 0.37), (1200, 1.0)])
def test_item_has_its_length_and_its_facts(byte_tokenizer, haystack, length, depth):
    item = build_item(byte_tokenizer, haystack, length=length, depth=depth, seed=3)
    text = byte_tokenizer.decode(item.input_ids[0])
    value = item.candidates[item.answer]
    assert item.input_ids.shape == (1, length)
    for planted in item.planted:
        assert text.count(f" is {planted}.\n") == 1
    for absent in set(item.candidates) - set(item.planted):
        assert absent not in text
    fact = next(line for line in text.splitlines() if f" {value}." in line)
    assert text.endswith(fact.removesuffix(f" {value}."))
    assert len(set(item.candidates)) == 10
    assert len(item.planted) == 5
    # Measured in the text alone, where the facts before it shift it by at most their own length.
    assert text.index(fact) / length == pytest.approx(depth, abs=0.28)


def test_facts_do_not_cut_lines(byte_tokenizer, haystack):
    item = build_item(byte_tokenizer, haystack, length=1500, depth=0.5, seed=1)
    lines = [line for line in byte_tokenizer.decode(item.input_ids[0]).splitlines() if line]
    assert all(line.startswith(("Line", "The secret")) for line in lines[1:])


def test_same_seed_same_item_other_seed_other_item(byte_tokenizer, haystack):
    first, again, other = (build_item(byte_tokenizer, haystack, length=800, depth=0.5, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first.input_ids, again.input_ids)
    assert (first.candidates, first.answer) == (again.candidates, again.answer)
    assert not torch.equal(first.input_ids, other.input_ids)


def test_chat_prompt_follows_the_template(byte_tokenizer, haystack):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    item = build_item(tokenizer, haystack, length=900, depth=0.5, seed=0, prompt="chat")
    text = tokenizer.decode(item.input_ids[0])
    assert item.input_ids.shape == (1, 900)
    assert text.startswith("<user>")
    assert "?</user><assistant>The secret number of the" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 1.2}, "depth=1.2"),
        ({"num_planted": 0}, "num_planted=0"),
        ({"num_planted": 11}, "num_candidates=10"),
        ({"num_planted": 1, "num_candidates": 1}, "num_candidates=1"),
        ({"length": 200}, "length=200 tokens is too short .* add "),
        ({"length": 10**6}, "the text has .* are needed"),
        ({"prompt": "poem"}, "prompt='poem' is unknown, choose one of completion, chat"),
        ({"prompt": "chat"}, "chat template"),
    ],
)
def test_bad_items_are_refused(byte_tokenizer, haystack, settings, message):
    with pytest.raises(ValueError, match=message):
        build_item(byte_tokenizer, haystack, **({"length": 800, "depth": 0.5, "seed": 0} | settings))


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_scores_equal_those_of_full_forwards(any_model, byte_tokenizer, haystack, batch_size):
    item = build_item(byte_tokenizer, haystack, length=450, depth=0.4, seed=2)
    scores, written = score_item(any_model, byte_tokenizer, item, candidate_batch_size=batch_size)
    expected = []
    for candidate in item.candidates:
        answer = torch.tensor([byte_tokenizer(" " + candidate)["input_ids"]])
        with torch.no_grad():
            log_probs = (
                any_model(torch.cat([item.input_ids, answer], dim=1)).logits[0, -answer.shape[1] - 1 : -1].log_softmax(-1)
            )
        expected.append(log_probs.gather(1, answer.T).sum().item())
    assert scores == pytest.approx(expected, abs=1e-3)
    greedy = any_model.generate(item.input_ids, max_new_tokens=7, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert written == byte_tokenizer.decode(greedy[0, -7:], skip_special_tokens=True)


def test_a_copying_model_finds_everything(byte_tokenizer):
    result = retrieval(FakeModel(copying), byte_tokenizer, TEXT, lengths=[600, 900], depths=[0.1, 0.9], seeds=range(3))
    assert (result.accuracy, result.exact_match, result.items) == (1.0, 1.0, 12)
    assert [cell["length"] for cell in result.by_length] == [600, 900]
    assert [(cell.length, cell.depth) for cell in result.cells] == [(600, 0.1), (600, 0.9), (900, 0.1), (900, 0.9)]


def test_a_uniform_model_is_near_chance(byte_tokenizer):
    result = retrieval(FakeModel(uniform), byte_tokenizer, TEXT, lengths=[500], depths=[0.5], seeds=range(100))
    assert result.chance == 0.1
    low, high = result.accuracy_interval
    assert low < result.chance < high
    assert result.exact_match == 0


def test_a_model_that_repeats_any_planted_value_does_not_pass(byte_tokenizer):
    fake = FakeModel(last_seen(byte_tokenizer))
    result = retrieval(fake, byte_tokenizer, TEXT, lengths=[600], depths=[0.2], seeds=range(20))
    planted_ranked_first = sum(
        best in build_item(byte_tokenizer, Haystack(byte_tokenizer, TEXT), length=600, depth=0.2, seed=seed).planted
        for cell in result.cells
        for seed, best in zip(cell.seeds, cell.best_candidates, strict=True)
    )
    assert planted_ranked_first == 20
    assert result.accuracy <= 0.3


def test_results_repeat_and_survive_json(llama, byte_tokenizer):
    first, again = (retrieval(llama, byte_tokenizer, TEXT, lengths=[450], depths=[0, 1], seeds=[5]).to_dict() for _ in range(2))
    assert first == again == json.loads(json.dumps(first))


def test_progress_is_told(byte_tokenizer):
    seen = []
    settings = {"lengths": [500], "depths": [0.5], "seeds": range(2)}
    retrieval(FakeModel(uniform), byte_tokenizer, TEXT, **settings, on_progress=lambda *state: seen.append(state))
    assert seen == [(1, 2), (2, 2)]


def test_an_empty_grid_is_refused(llama, byte_tokenizer):
    with pytest.raises(ValueError, match="must not be empty"):
        retrieval(llama, byte_tokenizer, TEXT, lengths=[500], depths=[])


@pytest.mark.parametrize(
    ("generated", "expected"), [(" 48213.", True), ("\n48213", True), (" 482137", False), (" about 48213", False), ("", False)]
)
def test_exact_match(generated, expected):
    assert is_exact_match(generated, "48213") is expected


def test_wilson_interval_against_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson_interval(15, 148) == pytest.approx([0.0624, 0.1605], abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)
    with pytest.raises(ValueError, match="trials=0"):
        wilson_interval(0, 0)


@pytest.mark.slow
def test_real_model_finds_facts(smollm2):
    model, tokenizer = smollm2
    result = retrieval(model, tokenizer, read_text(), lengths=[700], depths=[0.1, 0.5, 0.9], seeds=range(3))
    assert result.accuracy_interval[0] > result.chance_seen
