"""Chosen experts: which, why, what is trained, what is written, and that everything else stays."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_deepseek_r1 import DeepseekR1ForSequenceClassification, cli
from modeling_deepseek_r1.training import (
    attach_experts,
    choose_experts,
    detach_experts,
    export_peft,
    import_peft,
    last_checkpoint,
    load_experts,
    measure_relevance,
    merge_experts,
    save_experts,
    unmerge_experts,
)
from tests.data.tokenizers import make_tokenizer
from tests.models import random_ids, tiny_config, tiny_model

from .runs import StopAfter, losses, make_trainer

DOMAINS = {"expert_topology": [{"text_a": 3, "code": 2}, {"text": 2, "text_b": 2, "image": 1}]}
CONFIG = {"text": 2, "code": 3}


def domain_model(**routing):
    return tiny_model("expert_domains", mlp_layer_types=["sparse", "dense", "sparse"], routing=DOMAINS | routing)


def batches(count=3):
    for number in range(count):
        ids = random_ids(2, 12, seed=number)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids}


def selected(model):
    return choose_experts(model, CONFIG, batches())


def moved(model, seed=0):
    """Moves what is trained away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def test_relevance_is_the_mean_probability_over_real_tokens():
    model = domain_model().train()
    relevance, tokens = measure_relevance(model, batches())
    assert tokens == 3 * (24 - 5) and model.training
    model.eval()
    outputs = [model(**batch, output_router_logits=True).router_logits for batch in batches()]
    masks = [batch["attention_mask"].flatten().bool() for batch in batches()]
    for number, layer in enumerate((0, 2)):
        rows = torch.cat([logits[number].softmax(-1)[mask] for logits, mask in zip(outputs, masks, strict=True)])
        torch.testing.assert_close(relevance[layer], rows.double().mean(0))
    assert measure_relevance(model, batches(), max_tokens=20)[1] == 2 * 19
    assert not model.model.routers[0]._forward_hooks


def test_the_most_relevant_experts_of_each_domain_are_chosen():
    selection = selected(domain_model())
    # Experts are numbered in the alphabetical order of their domains.
    assert selection.domains == {0: {"code": 2, "text_a": 3}, 2: {"image": 1, "text": 2, "text_b": 2}}
    members = {0: {"code": [0, 1], "text": [2, 3, 4]}, 2: {"code": [], "text": [1, 2, 3, 4]}}
    for layer, by_name in members.items():
        scores = selection.scores[layer]
        for name, experts in by_name.items():
            own = [expert for expert in selection.chosen[layer] if expert in experts]
            assert len(own) == min(CONFIG[name], len(experts))
            others = [scores[expert] for expert in experts if expert not in own]
            assert not others or min(scores[expert] for expert in own) >= max(others)
    assert selection.counts == {"text": 4, "code": 2}
    best = max(selection.chosen[2], key=lambda expert: selection.scores[2][expert])
    assert "| 2 | text | 2 | 4 | " in selection.table()
    assert f"| {best} ({selection.scores[2][best]:.3f}), " in selection.table()


@pytest.mark.parametrize("rank", [2, None])
def test_only_what_was_chosen_is_trained(rank):
    model = domain_model(domain_weights={"code": 3.0})
    before = [list(router.balance_target) for router in model.model.routers]
    ids = random_ids(2, 16)
    expected = model(ids).logits
    selection = selected(model)
    report = attach_experts(model, selection, rank=rank)
    torch.testing.assert_close(model(ids).logits, expected)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and all(".mlp.expert_adapter." in name for name in names)
    width, inner = 48, 16
    each = rank * (2 * width + 3 * inner) if rank else 3 * width * inner
    assert report.trainable == each * sum(map(len, selection.chosen.values()))
    assert report.matched == {"experts of text": 4, "experts of code": 2}
    first, second = (router.balance_target for router in model.model.routers)
    assert first == pytest.approx([3 / 5 / 2] * 2 + [2 / 5 / 3] * 3)
    assert second == pytest.approx(before[1])
    assert sum(first) == pytest.approx(1.0)
    detach_experts(model)
    assert [router.balance_target for router in model.model.routers] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(ids).logits, expected)


def test_routers_and_new_heads_if_wanted():
    model = domain_model()
    report = attach_experts(model, selected(model), rank=2, train_routers=True)
    assert report.matched["routers"] == 2
    assert all(parameter.requires_grad for parameter in model.model.routers[0].parameters())
    config = tiny_config("expert_domains", mlp_layer_types=["sparse", "dense", "sparse"], routing=DOMAINS, num_labels=3)
    classifier = DeepseekR1ForSequenceClassification(config)
    attach_experts(classifier, selected(classifier), rank=2)
    assert classifier.score.weight.requires_grad


@pytest.mark.parametrize("rank", [2, None])
def test_adapters_are_saved_loaded_and_merged(rank, tmp_path):
    model, ids = domain_model(), random_ids(2, 16)
    attach_experts(model, selected(model), rank=rank, alpha=3.0 if rank else None)
    expected = moved(model)(ids).logits
    save_experts(model, tmp_path)
    other = domain_model()
    report = load_experts(other, tmp_path)
    assert torch.equal(other(ids).logits, expected) and report.matched == {"experts": 6}
    merge_experts(other)
    torch.testing.assert_close(other(ids).logits, expected, rtol=1e-4, atol=1e-5)
    unmerge_experts(other)
    assert torch.equal(other(ids).logits, expected)
    merge_experts(other)
    detach_experts(other)
    assert other.state_dict().keys() == domain_model().state_dict().keys()
    torch.testing.assert_close(other(ids).logits, expected, rtol=1e-4, atol=1e-5)
    wider = tiny_model("expert_domains", hidden_size=24, routing=DOMAINS, mlp_layer_types=["sparse", "dense", "sparse"])
    with pytest.raises(ValueError, match=r"does not fit this model: 0\.down_proj.* is \[.*\] there and \[.*\] here"):
        load_experts(wider, tmp_path)
    with pytest.raises(ValueError, match="has no expert adapter"):
        save_experts(wider, tmp_path)


def test_trained_routers_are_saved_with_the_adapters(tmp_path):
    model, ids = domain_model(), random_ids(2, 16)
    attach_experts(model, selected(model), rank=2, train_routers=True)
    expected = moved(model)(ids).logits
    save_experts(model, tmp_path)
    with pytest.raises(ValueError, match=r"no place for model.layers.0.mlp.router.scores.weight, which is trained as well"):
        export_peft(model, tmp_path)
    other = domain_model()
    load_experts(other, tmp_path)
    assert torch.equal(other(ids).logits, expected)
    names = [{name for name, value in one.named_parameters() if value.requires_grad} for one in (model, other)]
    assert names[0] == names[1]


def test_low_rank_experts_train_their_own_factors(tmp_path):
    model, ids = tiny_model("low_rank_experts"), random_ids(2, 16)
    selection = choose_experts(model, {"all": 2}, batches())
    with pytest.raises(ValueError, match="low-rank deltas themselves"):
        attach_experts(model, selection, rank=2)
    attach_experts(model, selection)
    expected = moved(model)(ids).logits
    merge_experts(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="trained as they are: merge them instead"):
        export_peft(model, tmp_path)


def test_peft_reads_what_is_exported_and_the_other_way_round(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = domain_model(), random_ids(2, 16)
    selection = selected(model)
    attach_experts(model, selection, rank=2, alpha=3.0)
    expected = moved(model)(ids).logits
    sizes = export_peft(model, tmp_path / "peft")
    assert sizes["chosen"] * 10 == sizes["written"] * 6
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(domain_model(), tmp_path / "peft").eval()
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-5)
    ours = domain_model()
    import_peft(ours, tmp_path / "peft")
    assert {layer: block.chosen.tolist() for layer, block in adapters(ours).items()} == selection.chosen
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "again")
    again = domain_model()
    import_peft(again, tmp_path / "again")
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-6)
    other = peft.get_peft_model(domain_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "attention")
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight is no low-rank delta of this model's packed experts"):
        import_peft(domain_model(), tmp_path / "attention")


def adapters(model):
    return {number: layer.mlp.expert_adapter for number, layer in enumerate(model.model.layers) if number != 1}


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("own", [True, False], ids=["own Trainer", "plain Trainer"])
def test_a_run_trains_nothing_else_and_resumes_exactly(own, rank, tmp_path):
    def run(folder, stop=None, resume=None):
        model = domain_model(target_experts_per_tok=1.5, min_experts_per_tok=1).train()
        selection = selected(model)
        if resume:
            # Another choice: that of the checkpoint wins.
            selection = choose_experts(model, CONFIG, [{"input_ids": random_ids(1, 1, seed=9)}])
        torch.manual_seed(1)
        attach_experts(model, selection, rank=rank)
        kind = {} if own else {"trainer_class": Trainer, "arguments_class": TrainingArguments}
        fields = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        trainer = make_trainer(model, folder, callbacks=[StopAfter(stop)] if stop else [], **fields, **kind)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    fresh = domain_model()
    torch.manual_seed(1)
    attach_experts(fresh, selected(fresh), rank=rank)
    for name, parameter in fresh.named_parameters():
        assert torch.equal(whole.model.get_parameter(name), parameter) != parameter.requires_grad, name
    states = [state["exp_avg"] for state in whole.optimizer.state.values()]
    trained = [parameter for parameter in whole.model.parameters() if parameter.requires_grad]
    assert sum(state.numel() for state in states) == sum(parameter.numel() for parameter in trained)
    run(tmp_path / "parts", stop=4)
    resumed = run(tmp_path / "parts", resume=str(last_checkpoint(tmp_path / "parts")))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_recomputation_gives_the_same_gradients():
    ids, grads = random_ids(2, 20), []
    for checkpointing in (False, True):
        model = domain_model().train()
        attach_experts(model, selected(model), rank=2)
        moved(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "expert_config is empty; .* there are code, image, text, text_a, text_b"),
        ({"texts": 1}, "no layer has the domain 'texts'"),
        ({"text": 0}, "text=0 must be a whole number of experts, at least 1"),
        ({"text": 1, "text_a": 1}, "text and text_a both mean the domain 'text_a'"),
    ],
)
def test_impossible_choices(config, message):
    with pytest.raises(ValueError, match=message):
        choose_experts(domain_model(), config, batches())


def test_what_cannot_be_attached(tmp_path):
    with pytest.raises(ValueError, match="the model has no layer with experts"):
        choose_experts(tiny_model("mixed"), CONFIG, batches())
    with pytest.raises(ValueError, match="there is no token"):
        choose_experts(domain_model(), CONFIG, [])
    model = domain_model()
    selection = selected(model)
    attach_experts(model, selection, rank=2)
    with pytest.raises(ValueError, match="has expert adapters already"):
        attach_experts(model, selection, rank=2)
    with pytest.raises(ValueError, match=r"layers \[0, 2\] cannot have expert adapters"):
        attach_experts(tiny_model("mixed"), selection)


@pytest.mark.parametrize("rank", [2, None])
def test_the_command_writes_a_plain_checkpoint(rank, tmp_path, capsys):
    tiny_model(
        "expert_domains", vocab_size=259, mlp_layer_types=["sparse", "dense", "sparse"], routing=DOMAINS
    ).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog and " * 20)
    arguments = [
        "train",
        tmp_path / "source",
        tmp_path / "a.txt",
        "--output",
        tmp_path / "out",
        "--expert-config",
        "text=1,code=1",
    ]
    arguments += ["--clipping", "adaptive", "--max-steps", 3, "--length", 32, "--accumulation", 1, "--learning-rate", 1e-2]
    assert cli.main([*map(str, arguments), *(["--lora-rank", "2"] if rank else [])]) == 0
    printed = capsys.readouterr()
    assert "| 0 | code | 1 | 2 |" in printed.err and "gradients 0.0 MiB" in printed.err
    assert "experts of text (2), experts of code (1)" in printed.out
    chosen = json.loads((tmp_path / "out" / "experts.json").read_text())["chosen"]
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        parts = name.split(".")
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            changed = (tensor != after[name]).flatten(1).any(1).nonzero().flatten().tolist()
            assert changed == chosen[parts[2]]
        elif not name.endswith("threshold"):
            assert torch.equal(tensor, after[name]), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(random_ids(1, 9)).logits).all()
