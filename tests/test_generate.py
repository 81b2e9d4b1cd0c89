"""generate(): the same text with and without a cache, in every decoding mode, and clear refusals."""

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer
from transformers.generation import GenerationConfig

from tests.models import PATTERNS, random_ids, tiny_model

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam_sampling": {"num_beams": 2, "do_sample": True},
    "several": {"num_return_sequences": 2, "do_sample": True},
}


def generate(model, ids, seed=0, **kwargs):
    torch.manual_seed(seed)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **kwargs}
    return model.generate(ids, **options)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mode", MODES)
def test_cache_does_not_change_the_text(pattern, mode):
    model, ids = tiny_model(pattern), random_ids(2, 19)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    expected = generate(model, ids, attention_mask=mask, use_cache=False, **MODES[mode])
    assert torch.equal(generate(model, ids, attention_mask=mask, **MODES[mode]), expected)
    chunked = generate(model, ids, attention_mask=mask, prefill_chunk_size=5, **MODES[mode])
    assert torch.equal(chunked, expected)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("drafts", ["prompt_lookup", "assistant"])
def test_assisted_decoding_gives_the_greedy_text(pattern, drafts):
    model = tiny_model(pattern)
    ids = random_ids(1, 8).repeat(1, 4)
    expected = generate(model, ids, max_new_tokens=40)
    helper = {"prompt_lookup_num_tokens": 4} if drafts == "prompt_lookup" else {"assistant_model": tiny_model(pattern)}
    assert torch.equal(generate(model, ids, max_new_tokens=40, **helper), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_static_cache_gives_the_same_text(pattern):
    model, ids = tiny_model(pattern), random_ids(2, 19)
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)
    cache = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(generate(model, ids, past_key_values=cache), expected)
    full = [layer for layer in cache.layers if layer.pattern.window is None]
    assert all(layer.keys.shape[2] == 64 + 1 for layer in full)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_conversation_goes_on_from_its_cache(pattern):
    model, ids, cache = tiny_model(pattern), random_ids(2, 12), DynamicCache()
    first = generate(model, ids, past_key_values=cache, max_new_tokens=6)
    longer = torch.cat((first, random_ids(2, 5, seed=9)), 1)
    assert torch.equal(generate(model, longer, past_key_values=cache), generate(model, longer))


def test_left_padding_gives_the_text_of_the_single_rows():
    model = tiny_model("mixed")
    rows = [random_ids(1, length, seed=length) for length in (21, 9)]
    ids, mask = torch.zeros(2, 21, dtype=torch.long), torch.zeros(2, 21, dtype=torch.long)
    for row, single in enumerate(rows):
        ids[row, -single.shape[1] :], mask[row, -single.shape[1] :] = single[0], 1
    together = generate(model, ids, attention_mask=mask)[:, 21:]
    for row, single in enumerate(rows):
        assert torch.equal(together[row], generate(model, single)[0, single.shape[1] :])


def test_generation_starts_from_embeddings():
    model, ids = tiny_model("mixed"), random_ids(2, 12)
    expected = generate(model, ids)[:, 12:]
    actual = generate(model, None, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(actual, expected)


class _Digits:
    """As much of a tokenizer as the streamer needs."""

    @staticmethod
    def decode(tokens, **kwargs):
        return " ".join(str(int(token)) for token in tokens) + " "


def test_streaming_gives_the_tokens_one_by_one():
    model, ids = tiny_model("mixed"), random_ids(1, 12)
    streamer = TextIteratorStreamer(_Digits(), skip_prompt=True)
    expected = generate(model, ids, streamer=streamer)[0, 12:].tolist()
    pieces = list(streamer)
    assert len(pieces) > 5
    assert [int(number) for number in "".join(pieces).split()] == expected


@pytest.mark.parametrize("pattern", ["full", "sliding"])
def test_continuous_batching_gives_the_same_text(pattern):
    from transformers.generation import ContinuousBatchingConfig

    model = tiny_model(pattern)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (11, 5, 17)]
    expected = [generate(model, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    results = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64),
        progress_bar=False,
    )
    by_prompt = {tuple(result.prompt_ids): list(result.generated_tokens) for result in results.values()}
    assert [by_prompt[tuple(prompt)] for prompt in prompts] == expected


def test_continuous_batching_refuses_what_pages_cannot_hold():
    with pytest.raises(ValueError, match="sink tokens"):
        tiny_model("sinks").generate_batch([[3, 4, 5]])
    with pytest.raises(ValueError, match="different windows"):
        tiny_model("sliding", per_layer_config={1: {"sliding_window": 3}}).generate_batch([[3, 4, 5]])


def test_refusals_say_what_is_wrong():
    model = tiny_model("mixed")
    with pytest.raises(ValueError, match="no token"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="token id 97 is outside"):
        model(torch.tensor([[5, 97]]))
    with pytest.raises(ValueError, match="token id -1 is outside"):
        model(torch.tensor([[5, -1]]))
    with pytest.raises(ValueError, match=r"must be \[1, 4\]"):
        model(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="2-D mask"):
        model(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="seq_idx has shape"):
        model(torch.ones(1, 4, dtype=torch.long), seq_idx=torch.ones(1, 3))
    with pytest.raises(ValueError, match="exactly one of"):
        model()


def test_a_cache_of_another_model_is_refused():
    model, other = tiny_model("mixed"), DynamicCache()
    other.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    with pytest.raises(ValueError, match="already filled"):
        model(random_ids(1, 4), past_key_values=other)
    used = DynamicCache()
    model(random_ids(1, 4), past_key_values=used)
    with pytest.raises(ValueError, match="the cache holds 1 rows, but 2 rows are given"):
        model(random_ids(2, 4), past_key_values=used)


def test_taking_back_dropped_keys_is_refused():
    model, cache = tiny_model("mixed"), DynamicCache()
    with torch.no_grad():
        model(random_ids(1, 100), past_key_values=cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-3)
