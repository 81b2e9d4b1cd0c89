import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_deepseek_r1.evaluation import perplexity, read_text
from modeling_deepseek_r1.evaluation.scoring import check_output_head, hidden_states, token_nll
from modeling_deepseek_r1.evaluation.text import encode_text


def random_ids(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(260, (count,), generator=torch.Generator().manual_seed(seed))


def brute_force(model, ids: torch.Tensor, length: int, windows: int, score_from: int) -> torch.Tensor:
    """`[windows, scored]`, each token's loss from the logits of a plain forward."""
    losses = []
    for window in ids[: length * windows].view(windows, length):
        with torch.no_grad():
            log_probs = model(window.unsqueeze(0)).logits[0].double().log_softmax(-1)
        losses.append([-log_probs[t - 1, window[t]].item() for t in range(score_from + 1, length)])
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("score_from", [0, 5, 61])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_equals_brute_force(any_model, batch_size, score_from):
    ids = random_ids(400)
    result = perplexity(any_model, ids, context_length=63, num_windows=3, batch_size=batch_size, score_from=score_from)
    expected = brute_force(any_model, ids, 63, 3, score_from)
    assert result.tokens == expected.numel() == 3 * (62 - score_from)
    assert result.mean_nll == pytest.approx(expected.mean().item(), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected.mean().item()), rel=1e-5)
    assert result.window_nll == pytest.approx(expected.mean(dim=1).tolist(), abs=1e-5)


@pytest.mark.parametrize("positions", [1, 7, 62, 1000])
def test_chunk_size_does_not_matter(llama, positions):
    ids = random_ids(200)
    whole = perplexity(llama, ids, context_length=63, num_windows=3)
    chunked = perplexity(llama, ids, context_length=63, num_windows=3, batch_size=2, positions_per_chunk=positions)
    assert chunked.mean_nll == pytest.approx(whole.mean_nll, abs=1e-6)


@pytest.mark.parametrize("score_from", [0, 200])
def test_position_buckets_hold_their_positions(llama, score_from):
    ids = random_ids(600)
    result = perplexity(llama, ids, context_length=300, num_windows=2, score_from=score_from)
    losses = brute_force(llama, ids, 300, 2, score_from)
    first = score_from + 1
    edges = [(1, 128), (128, 256), (256, 300)] if score_from == 0 else [(201, 256), (256, 300)]
    assert [(bucket.start, bucket.end) for bucket in result.by_position] == edges
    for bucket in result.by_position:
        part = losses[:, bucket.start - first : bucket.end - first]
        assert bucket.tokens == part.numel()
        assert bucket.mean_nll == pytest.approx(part.mean().item(), abs=1e-5)
    assert sum(bucket.tokens for bucket in result.by_position) == result.tokens


def test_logits_of_a_whole_window_never_exist(llama):
    ids, seen = random_ids(600), []
    llama.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    perplexity(llama, ids, context_length=300, num_windows=2, positions_per_chunk=64)
    assert max(seen) == 64


def test_bos_leads_each_window(llama):
    ids = random_ids(100)
    result = perplexity(llama, ids, context_length=21, num_windows=2, bos_token_id=3)
    with_bos = torch.cat([torch.tensor([3]), ids[:20], torch.tensor([3]), ids[20:40]])
    assert result.mean_nll == pytest.approx(brute_force(llama, with_bos, 21, 2, 0).mean().item(), abs=1e-5)


def test_another_architecture():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    ids = random_ids(60)
    result = perplexity(model, ids, context_length=30, num_windows=2)
    assert result.mean_nll == pytest.approx(brute_force(model, ids, 30, 2, 0).mean().item(), abs=1e-5)


def test_token_nll_ignores_the_dtype_of_logits(llama):
    ids = random_ids(20).unsqueeze(0)
    with torch.no_grad():
        hidden, _ = hidden_states(llama.bfloat16(), ids)
        losses = token_nll(llama, hidden[:, :-1], ids[:, 1:])
    assert losses.dtype == torch.float32
    assert losses.shape == (1, 19)


def test_progress_is_told(llama):
    seen = []
    perplexity(
        llama, random_ids(100), context_length=20, num_windows=5, batch_size=2, on_progress=lambda *state: seen.append(state)
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_model_that_scales_its_logits_is_refused(llama):
    class Scaled(type(llama)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 3
            return output

    scaled = Scaled(llama.config).eval()
    with pytest.raises(ValueError, match="Scaled changes its logits"):
        check_output_head(scaled, random_ids(20))


def test_a_model_without_base_is_refused(llama):
    with pytest.raises(ValueError, match="LlamaModel has no base model"):
        hidden_states(llama.model, random_ids(4).unsqueeze(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_from": 19}, "score_from=19"),
        ({"score_from": -1}, "score_from=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"positions_per_chunk": 0}, "positions_per_chunk=0"),
        ({"num_windows": 6}, "need 120 tokens of text, but there are 100"),
    ],
)
def test_bad_arguments_are_refused(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        perplexity(llama, random_ids(100), **({"context_length": 20, "num_windows": 2} | settings))


def test_a_broken_model_has_infinite_perplexity(llama):
    with torch.no_grad():
        llama.lm_head.weight.mul_(1e5)
    assert perplexity(llama, random_ids(20), context_length=10, num_windows=2).perplexity == math.inf


@pytest.mark.slow
def test_real_model_on_real_text(smollm2):
    """Labels shifted by one position give hundreds, a model that sees the answer about 1."""
    model, tokenizer = smollm2
    ids = encode_text(tokenizer, read_text())
    result = perplexity(model, ids, context_length=768, num_windows=2)
    assert 8 < result.perplexity < 25
    early, *_, late = result.by_position
    assert late.mean_nll < early.mean_nll
