"""Divergence of two models: against a definition written out, where it is known, and as an alarm."""

import copy
import math

import pytest
import torch
from conftest import make_byte_tokenizer, make_hybrid, make_llama

from modeling_deepseek_r1.cli import main
from modeling_deepseek_r1.evaluation import encode_text, kl_drift, read_report, read_text

IDS = encode_text(make_byte_tokenizer(), read_text())
SMALL = {"context_length": 50, "num_windows": 3}


def test_it_is_the_divergence_of_the_distributions():
    reference, candidate = make_llama(0), make_hybrid(1)
    result = kl_drift(reference, candidate, IDS, **SMALL, positions_per_chunk=17)
    windows = IDS[:150].reshape(3, 50)
    with torch.no_grad():
        p, q = (model(windows).logits.double().softmax(-1) for model in (reference, candidate))
    expected = (p * (p / q).log()).sum(-1)
    assert result.mean_kl == pytest.approx(expected.mean().item(), rel=1e-4)
    assert result.window_kl == pytest.approx(expected.mean(1).tolist(), rel=1e-4)
    assert result.standard_error == pytest.approx(expected.mean(1).std().item() / 3**0.5, rel=1e-3)
    assert result.same_token == (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert result.tokens == 150 == sum(part.tokens for part in result.histogram)
    assert result.histogram[-2].tokens == ((expected >= 1) & (expected < 10)).sum()
    first = result.worst[0]
    assert expected[first.window, first.position] == pytest.approx(expected.max().item()) == pytest.approx(first.kl, rel=1e-4)
    assert first.candidate_token == q[first.window, first.position].argmax()
    assert len(result.worst) == 10


def test_a_model_has_not_drifted_from_itself_and_one_without_numbers_has():
    model = make_llama()
    same = kl_drift(model, copy.deepcopy(model), IDS, **SMALL)
    assert same.mean_kl < 1e-6 and same.same_token == 1.0
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="vocabulary of 260 tokens and the candidate one of 261"):
        kl_drift(model, make_llama(vocab_size=261), IDS, **SMALL)
    assert math.isnan(kl_drift(model, broken, IDS, **SMALL).mean_kl)


def test_the_command_raises_an_alarm_after_it_has_told_everything(tmp_path, capsys):
    for seed, name in enumerate(("served", "new")):
        make_llama(seed).save_pretrained(tmp_path / name)
        make_byte_tokenizer().save_pretrained(tmp_path / name)
    output = tmp_path / "drift.json"
    served, new = str(tmp_path / "served"), str(tmp_path / "new")
    options = ["--length", "40", "--windows", "2", "--output", str(output)]
    assert main(["drift", served, served, *options, "--alarm", "0.001"]) == 0
    assert capsys.readouterr().out.startswith("KL(reference || candidate): ")
    assert main(["drift", served, new, *options]) == 0
    drift = read_report(output)["drift"]
    output.unlink()
    assert main(["drift", served, new, *options, "--alarm", str(drift["mean_kl"] * 0.99), "--worst", "1"]) == 1
    printed = capsys.readouterr()
    assert "alarm: " in printed.err and read_report(output)["drift"]["tokens"] == 80
    place = drift["worst"][0]
    end = place["window"] * 40 + place["position"] + 1
    assert repr(make_byte_tokenizer().decode(IDS[max(0, end - 12) : end])) in printed.out.splitlines()[-1]
    assert main(["drift", served, new, *options, "--alarm", "-1"]) == 1
    assert "--alarm -1.0 must be 0 or more" in capsys.readouterr().err
