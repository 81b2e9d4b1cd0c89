"""One candidate is plain generation; of many, each has grown from its own cache, whatever left or joined the batch beside it."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessorList, TextStreamer

from modeling_deepseek_r1.generation import HierarchicalCandidates, generate_candidates
from tests.models import random_ids, tiny_model
from tests.test_conversation import word_tokenizer

SAMPLED = {"do_sample": True, "temperature": 0.9, "top_p": 0.95}
STAGES = [(4, 4), (9, 2)]
PATTERNS = ["full", "mixed", "routed", "global_mixed", "expert_domains"]


def left_padded(*lengths: int) -> dict[str, torch.Tensor]:
    ids, mask = (
        torch.zeros(len(lengths), max(lengths), dtype=torch.long),
        torch.zeros(len(lengths), max(lengths), dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = random_ids(1, length, seed=length)[0], 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, **options):
    torch.manual_seed(5)
    return model.generate(**inputs, **{"max_new_tokens": 16, **options})


def assert_likelihoods(model, prompt: list[int], candidates) -> None:
    """Each candidate's likelihood is that of one forward over all of its tokens, without a cache."""
    for candidate in candidates:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + candidate.tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(candidate.tokens)[:, None]).sum()
        assert candidate.log_likelihood == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_candidate_is_plain_generation(pattern):
    model, one = tiny_model(pattern), HierarchicalCandidates(1)
    eos = list(range(30, 45))  # some rows end early
    for inputs in ({"input_ids": random_ids(1, 12)}, left_padded(13, 6, 9)):
        for options in ({"do_sample": False}, {**SAMPLED, "repetition_penalty": 1.3, "min_new_tokens": 3}):
            expected = generate(model, inputs, eos_token_id=eos, **options)
            assert torch.equal(generate(model, inputs, eos_token_id=eos, custom_generate=one, **options), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_candidates_are_selected_by_likelihood_and_go_on_from_their_caches(pattern):
    model, inputs = tiny_model(pattern), left_padded(11, 7)
    output = generate(
        model,
        inputs,
        custom_generate=HierarchicalCandidates(6, STAGES),
        return_dict_in_generate=True,
        eos_token_id=list(range(30, 33)),
        **SAMPLED,
    )
    reference = tiny_model(pattern, "eager")
    for row, (length, record) in enumerate(zip((11, 7), output.prompts, strict=True)):
        prompt = inputs["input_ids"][row, -length:].tolist()
        assert record.prompt_tokens == length
        assert_likelihoods(reference, prompt, record.candidates)
        best = max((c for c in record.candidates if c.is_finished), key=lambda c: c.mean_log_likelihood)
        assert record.best is best
        assert output.sequences[row, 11 : 11 + len(best.tokens)].tolist() == best.tokens
        assert len({tuple(c.tokens[:4]) for c in record.candidates}) > 1
        for stage, (tokens, keep) in enumerate(STAGES):
            present = [c for c in record.candidates if len(c.stage_scores) > stage]
            dropped = [c for c in present if c.ended == "dropped" and c.stage == stage]
            kept = [c for c in present if c not in dropped]
            assert all(len(c.tokens) == tokens for c in dropped)
            assert sum(not (c.is_finished and len(c.tokens) <= tokens) for c in kept) <= keep
            if dropped:
                top = sorted((c.stage_scores[stage] for c in present), reverse=True)[:keep]
                assert max(c.stage_scores[stage] for c in dropped) <= top[-1]
    assert output.totals["generated_tokens"] == sum(len(c.tokens) for r in output.prompts for c in r.candidates)
    assert output.totals["row_steps"] < 12 * output.totals["steps"]


PROMPTS = ["w5 w6 w7", "w8", "w20 w21 w22 w23 w24 w25 w26 w27 w28 w29 w30", "w9 w10", "w50 w51 w52 w53 w54"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_are_filled_again_with_candidates_of_other_prompts(pattern):
    model, tokenizer, widths, rows = tiny_model(pattern), word_tokenizer(None), [], []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    cached = model.model.layers[-1].register_forward_hook(
        lambda module, args, kwargs, output: widths.append(kwargs["past_key_values"].layers[-1].keys.shape[2]), with_kwargs=True
    )
    torch.manual_seed(3)
    output = generate_candidates(
        model,
        tokenizer,
        iter(PROMPTS),
        HierarchicalCandidates(3, [(6, 1)]),
        rows=5,
        max_new_tokens=25,
        eos_token_id=[40],
        **SAMPLED,
    )
    cached.remove()
    assert [record.prompt for record in output.prompts] == PROMPTS
    for record in output.prompts:
        prompt = tokenizer(record.prompt).input_ids
        assert_likelihoods(tiny_model(pattern, "eager"), prompt, record.candidates)
        assert record.best.text == tokenizer.decode(record.best.tokens, skip_special_tokens=True)
        assert len([c for c in record.candidates if c.is_finished]) >= 1
    assert max(rows) <= 5
    assert 4 in rows  # one prompt was drafted while another was finished
    assert output.totals["steps"] < 90  # one after the other they would take 5 * 24
    assert max(widths) <= 11 + 25 + 1 + 3  # no longer than the longest row, nodes and new token included


@pytest.mark.parametrize("pattern, rows", [("mixed", 1), ("routed", 2), ("global", 4)])
def test_single_candidates_in_joined_rows_are_plain_generation(pattern, rows):
    model, tokenizer = tiny_model(pattern), word_tokenizer(None)
    options = {
        "max_new_tokens": 14,
        "do_sample": False,
        "repetition_penalty": 1.2,
        "min_new_tokens": 4,
        "eos_token_id": [33, 40, 60],
    }
    output = generate_candidates(model, tokenizer, PROMPTS, HierarchicalCandidates(1), rows=rows, **options)
    for prompt, record in zip(PROMPTS, output.prompts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert (
            record.best.tokens
            == model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        )


def test_an_evaluator_gets_prompt_and_texts_and_decides():
    model, tokenizer, asked = tiny_model("mixed"), word_tokenizer(None), []

    def count_of_a(prompt, texts):
        asked.append((prompt, list(texts)))
        return [sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) for text in texts]

    plan = HierarchicalCandidates(6, [(5, 2)], evaluator=count_of_a, tokenizer=tokenizer)
    inputs = {"input_ids": tokenizer("w5 w6", return_tensors="pt").input_ids}
    output = generate(model, inputs, custom_generate=plan, return_dict_in_generate=True, eos_token_id=-1, **SAMPLED)
    (record,) = output.prompts
    assert [prompt for prompt, _ in asked] == ["w5 w6"] * 2
    assert [len(texts) for _, texts in asked] == [6, 2]
    first = [c.stage_scores[0] for c in record.candidates]
    assert sorted(first)[-2:] == sorted(c.stage_scores[0] for c in record.candidates if c.ended == "length")
    assert record.best.score == max(c.score for c in record.candidates if c.ended == "length")
    generate(model, inputs, custom_generate=plan, prompt_texts=["asked"], eos_token_id=-1, **SAMPLED)
    assert asked[-1][0] == "asked"
    with pytest.raises(ValueError, match="2 prompt_texts are given for 1 prompts"):
        generate(model, inputs, custom_generate=plan, prompt_texts=["a", "b"], **SAMPLED)


def test_other_models_and_their_caches():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    inputs = left_padded(11, 7)
    expected = generate(model, inputs, **SAMPLED)
    assert torch.equal(generate(model, inputs, custom_generate=HierarchicalCandidates(1), **SAMPLED), expected)
    plan = HierarchicalCandidates(4, [(5, 2)])
    output = generate(model, inputs, custom_generate=plan, return_dict_in_generate=True, **SAMPLED)
    for row, length in enumerate((11, 7)):
        assert_likelihoods(model, inputs["input_ids"][row, -length:].tolist(), output.prompts[row].candidates)
    with pytest.raises(ValueError, match="DynamicLayer, in which rows of different prompts cannot be joined"):
        generate_candidates(model, word_tokenizer(None), ["w5"], plan, max_new_tokens=9, **SAMPLED)


def test_logits_processors_see_their_own_prompt():
    seen = []

    def watch(ids, scores):
        seen.append(ids.clone())
        return scores

    model, tokenizer = tiny_model("mixed"), word_tokenizer(None)
    plan = HierarchicalCandidates(2, [(3, 1)])
    generate_candidates(
        model, tokenizer, PROMPTS[:3], plan, rows=6, max_new_tokens=5, logits_processor=LogitsProcessorList([watch]), **SAMPLED
    )
    starts = {tuple(tokenizer(prompt).input_ids) for prompt in PROMPTS[:3]}
    assert all(any(tuple(ids[0, : len(start)].tolist()) == start for start in starts) for ids in seen)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_candidates": 0}, "num_candidates=0 must be at least 1"),
        ({"stages": [(4, 8)]}, "smaller number to keep"),
        ({"stages": [(4, 4), (4, 2)]}, "more tokens than the one before"),
        ({"stages": [(0, 4)]}, "more tokens"),
        ({"stages": [(4, 0)]}, "at least 1"),
        ({"evaluator": len}, "pass the model's tokenizer"),
        ({"evaluator": len, "tokenizer": word_tokenizer(), "drop_beaten": True}, "set a threshold instead"),
        ({"margin": -1.0}, "margin=-1.0 must be 0 or more"),
    ],
)
def test_plans_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalCandidates(**arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "greedy drafts would all be the same"),
        ({"num_beams": 2}, "not made by beam_search"),
        ({**SAMPLED, "num_return_sequences": 2}, "every candidate comes back"),
        ({**SAMPLED, "return_dict_in_generate": True, "output_scores": True}, "output_scores is not kept"),
        ({**SAMPLED, "use_cache": False}, "leave use_cache=True"),
        ({**SAMPLED, "max_new_tokens": 9}, "must lie before the last of max_new_tokens=9"),
    ],
)
def test_what_candidates_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(
            tiny_model(), {"input_ids": random_ids(1, 5)}, custom_generate=HierarchicalCandidates(4, STAGES[1:]), **options
        )


def test_a_filled_cache_embeddings_and_nonsense_are_refused():
    model, plan, tokenizer, cache = tiny_model(), HierarchicalCandidates(4, STAGES[1:]), word_tokenizer(None), DynamicCache()
    with torch.no_grad():
        model(random_ids(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 4 tokens already"):
        generate(model, {"input_ids": random_ids(1, 5)}, past_key_values=cache, custom_generate=plan, **SAMPLED)
    with pytest.raises(ValueError, match="not from inputs_embeds"):
        generate(model, {"inputs_embeds": torch.zeros(1, 5, 48)}, custom_generate=plan, **SAMPLED)
    with pytest.raises(ValueError, match="rows=3 are too few for num_candidates=4"):
        generate_candidates(model, tokenizer, ["w5"], plan, rows=3, **SAMPLED)
    with pytest.raises(ValueError, match="streamer means nothing"):
        generate_candidates(model, tokenizer, ["w5"], plan, streamer=TextStreamer(tokenizer), **SAMPLED)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate_candidates(model, tokenizer, [" "], plan, max_new_tokens=12, **SAMPLED)
    with pytest.raises(ValueError, match="pass a list of texts"):
        generate_candidates(model, tokenizer, "w5 w6", plan, max_new_tokens=12, **SAMPLED)
    assert generate_candidates(model, tokenizer, [], plan, **SAMPLED).prompts == []
