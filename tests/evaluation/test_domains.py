"""Losses and experts by domain against counts made by hand, and what the command makes of them."""

import pytest
import torch
from conftest import make_byte_tokenizer, make_hybrid, make_llama
from test_evaluate_command import evaluate_with

from modeling_deepseek_r1 import DeepseekR1ForCausalLM, DeepseekR1TextConfig
from modeling_deepseek_r1.evaluation import measure_domains, read_report
from modeling_deepseek_r1.evaluation.expert_report import expert_table, heat_map
from tests.models import random_ids, tiny_model


def test_shares_purity_and_losses_are_those_of_the_model():
    model = tiny_model("expert_domains")
    texts = {"code": random_ids(2, 12), "prose": random_ids(3, 12, seed=1)}
    seen = []
    result = measure_domains(model, texts, lambda *progress: seen.append(progress))
    assert seen == [(number, 5) for number in range(1, 6)]
    assert [layer.domains for layer in result.layers] == [{"code": 2, "text": 3}] * 2 + [{"fusion": 6}]
    assert set(result.layers[0].purity) == {"code"} and not result.layers[2].purity
    for name, windows in texts.items():
        with torch.no_grad():
            output = model(windows, labels=windows)
            routed = model.model(windows, output_router_logits=True).routed
        assert result.losses[name] == pytest.approx(output.loss.item(), rel=1e-5)
        assert len(result.window_losses[name]) == len(windows)
        for layer, chosen in zip(result.layers, routed, strict=True):
            slots = chosen.top_k_index[chosen.top_k_weights > 0]
            shares = [(slots == expert).float().mean().item() for expert in range(len(layer.shares[name]))]
            assert layer.shares[name] == pytest.approx(shares)
            assert sum(layer.utilisation[name].values()) == pytest.approx(1.0)
        if name == "code":
            assert result.layers[0].purity == {"code": pytest.approx((routed[0].logits.argmax(-1) < 2).float().mean().item())}
    first = result.layers[0]
    together = torch.tensor([first.shares["code"], first.shares["prose"]]).mean(0)
    assert first.least_used == pytest.approx(together.min().item() * 5)
    assert first.relative_entropy == pytest.approx((torch.special.entr(together).sum() / torch.tensor(5.0).log()).item())
    found = result.to_dict()
    assert found["mean"]["least_used"] == min(layer.least_used for layer in result.layers)
    assert found["perplexity"]["code"] == pytest.approx(torch.tensor(result.losses["code"]).exp().item())


def test_a_model_without_experts_has_losses_only():
    result = measure_domains(make_llama(), {"a": random_ids(1, 9)})
    assert result.layers == [] and result.to_dict()["mean"] is None and result.losses["a"] > 0
    with pytest.raises(ValueError, match=r"one length.*theirs are \[9, 10\]"):
        measure_domains(make_llama(), {"a": random_ids(1, 9), "b": random_ids(1, 10)})


def test_stages_with_other_domains_are_drawn(tmp_path):
    model = tiny_model("expert_domains")
    result = measure_domains(model, {"code": random_ids(2, 12), "text": random_ids(2, 12, seed=1)}).to_dict()
    heat_map({"before": result, "after": result}, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    table = expert_table({"tiny": result})
    assert table.startswith("| tiny | entropy of use | least used expert | code: to its domain | text: to its domain |")
    assert len(table.splitlines()) == 2 + 3 + 1 + 2 and "| layer 2 |" in table and "fusion 100%" in table


@pytest.fixture
def experts(tmp_path):
    torch.manual_seed(0)
    fields = make_hybrid().config.to_dict() | {
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "moe_intermediate_size": 16,
        "routing": {"expert_topology": [{"code": 2, "prose": 2}]},
    }
    DeepseekR1ForCausalLM(DeepseekR1TextConfig.from_dict(fields)).save_pretrained(tmp_path / "experts")
    make_llama().save_pretrained(tmp_path / "dense")
    for name in ("experts", "dense"):
        make_byte_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def test_the_command_prints_and_draws(experts, capsys):
    (experts / "own.txt").write_text("some words of prose, " * 40)
    arguments = ("--tasks", "domains", "--lengths", 300, "--windows", 2, "--domains", "code=code")
    evaluate_with(
        *(experts / "dense", "--against", experts / "experts", *arguments, f"prose={experts / 'own.txt'}"),
        *("--output", experts / "r.json", "--table", experts / "t.md", "--heat-map", experts / "map.png"),
    )
    printed = capsys.readouterr().out
    assert printed == (experts / "t.md").read_text()
    assert printed.startswith("|  | Perplexity of code, 300 tokens | Perplexity of prose, 300 tokens |")
    assert "| experts | entropy of use |" in printed and "| layer 1 |" in printed
    assert (experts / "map.png").read_bytes().startswith(b"\x89PNG")
    result = read_report(experts / "r.json")["domains"]
    assert result["dense"]["layers"] == [] and len(result["experts"]["window_losses"]["prose"]) == 2
    for wrong, message in (
        ((experts / "dense", *arguments, "--heat-map", experts / "map.png"), "no model has experts"),
        ((experts / "dense", "--tasks", "perplexity", "--heat-map", experts / "map.png"), "belongs to --tasks domains"),
        (
            (experts / "experts", *arguments[:-1], f"mine={experts / 'own.txt'}", "--windows", 9),
            "--domains mine: .*but there are",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_with(*wrong)
