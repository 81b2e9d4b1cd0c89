"""MLPs cut into experts: the same function while all are active, and the thresholds that leave some out."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1.moe.metrics import ExpertUsage
from modeling_deepseek_r1.moe.split import SHARPNESS, group_neurons, set_active_share, split_mlps
from modeling_deepseek_r1.moe.surgery import measure_usage
from tests.models import random_ids, tiny_model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("pattern", "layers"), [("full", None), ("routed", [1, 2]), ("per_layer", None)])
def test_the_same_function_saved_loaded_and_trained(pattern, layers, tmp_path):
    fields = {"per_layer_config": {1: {"intermediate_size": 32}}} if pattern == "full" else {}
    model, ids = tiny_model(pattern, **fields), random_ids(3, 40)
    split = split_mlps(model, random_ids(8, 40, seed=1), 4, layers)
    assert split.config.mlp_layer_types == ["sparse" if layers is None or n in layers else "dense" for n in range(3)]
    torch.testing.assert_close(logits(split, ids), logits(model, ids), atol=20 * SHARPNESS, rtol=0)
    for router in split.model.routers:
        router.scores.weight.data.zero_()
    torch.testing.assert_close(logits(split, ids), logits(model, ids), atol=2e-5, rtol=1e-5)
    split.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and torch.equal(logits(loaded, ids), logits(split, ids))
    loaded.train()(ids, labels=ids).loss.backward()
    assert all(router.scores.weight.grad.any() for router in loaded.model.routers)


def test_neurons_that_go_together_stay_together():
    generator = torch.Generator().manual_seed(0)
    causes = torch.rand(200, 4, generator=generator)
    owner = torch.randperm(32, generator=generator) % 4
    activity = causes[:, owner] * (1 + 0.1 * torch.rand(200, 32, generator=generator))
    groups = group_neurons(activity, 4)
    assert sorted(groups.flatten().tolist()) == list(range(32))
    assert all(len({int(owner[neuron]) for neuron in group}) == 1 for group in groups)


def test_the_router_leaves_out_what_is_small():
    """On the text that it was fitted to, the least of a token's experts are smaller than any others of equal number would be."""
    model, ids = tiny_model("full"), random_ids(6, 40)
    split = split_mlps(model, ids, 8)
    shares = set_active_share(split, ids, 0.6)
    usage: dict[int, ExpertUsage] = measure_usage(split, ids)
    active = {number: counts.mean_active_experts[0] / 8 for number, counts in usage.items()}
    assert active == pytest.approx(shares, abs=0.1) and sum(active.values()) / 3 <= 0.66
    chosen = (logits(split, ids) - logits(model, ids)).square().mean()
    generator = torch.Generator().manual_seed(1)
    for router in split.model.routers:
        router.scores.weight.data.copy_(torch.randn(router.scores.weight.shape, generator=generator) * 1e-3)
    set_active_share(split, ids, 0.6)
    assert chosen < 0.7 * (logits(split, ids) - logits(model, ids)).square().mean()
    assert set_active_share(split, ids, 1.0) == {0: 1.0, 1: 1.0, 2: 1.0}
    torch.testing.assert_close(logits(split, ids), logits(model, ids), atol=0.05, rtol=0)


def test_what_cannot_be_is_refused():
    ids = random_ids(4, 40)
    for arguments, message in (
        ((tiny_model("full"), ids, 5), "64 must be divisible"),
        ((tiny_model("full"), ids, 1), "cannot be cut into 1"),
        ((tiny_model("full", mlp_bias=True), ids, 4), "biases"),
        ((tiny_model("full"), ids[:1], 4), "40 tokens are too few"),
        ((tiny_model("full"), ids, 4, [3]), "layer 3 does not exist"),
        ((tiny_model("experts"), ids, 4), "has experts already"),
        ((tiny_model("experts"), ids, 4, [1]), "experts in other layers"),
    ):
        with pytest.raises(ValueError, match=message):
            split_mlps(*arguments)
    for model, share, message in (
        (tiny_model("experts"), 0.5, "number of active experts varies"),
        (tiny_model("expert_domains"), 0.0, r"\(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            set_active_share(model, ids, share)
