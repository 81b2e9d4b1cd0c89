"""A model whose experts are read from its file computes the same as one that has them all, within its budget."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1.cli import main
from modeling_deepseek_r1.moe.offload import CachedExperts, attach_expert_cache, offload_experts, packed_matrices
from tests.data.tokenizers import make_tokenizer
from tests.models import random_ids, tiny_model

PATTERNS = ["experts", "expert_domains", "shared_expert"]


def saved(folder, pattern="experts", **options):
    model = tiny_model(pattern)
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def expert_bytes(model) -> int:
    return max(
        sum(p[0].nbytes for p in layer.mlp.experts.parameters()) for layer in model.model.layers if "experts" in dir(layer.mlp)
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prefetch", [True, False])
def test_the_same_bit_for_bit(pattern, prefetch, tmp_path):
    model = saved(tmp_path, pattern)
    budget = 5 * expert_bytes(model)
    cached = offload_experts(tmp_path, budget, prefetch)
    cache, ids = cached.expert_cache, random_ids(3, 21)
    with torch.no_grad():
        assert torch.equal(cached(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options["return_dict_in_generate"] = True
    for prompt in (ids[:1, :5], ids):
        expected, found = model.generate(prompt, **options), cached.generate(prompt, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert 0 < cache.resident_bytes <= budget < cache.total_bytes
    assert cache.resident_bytes == sum(sum(m.nbytes for m in entry.matrices) for entry in cache._resident.values())
    assert 0 < cache.statistics.hit_rate < 1 and cache.statistics.reads >= cache.statistics.misses
    assert (cache.statistics.prefetched > 0) == prefetch
    assert not any("experts" in name and "shared" not in name for name, _ in cached.named_parameters())


def test_bfloat16_and_several_files(tmp_path):
    model = saved(tmp_path, dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    cached, ids = offload_experts(tmp_path, 2 * expert_bytes(model)), random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(cached(ids).logits, model(ids).logits)


def test_with_room_for_all_nothing_is_read_twice(tmp_path):
    model = saved(tmp_path)
    cached = offload_experts(tmp_path, 10**9)
    for _ in range(2):
        with torch.no_grad():
            cached(random_ids(4, 40))
    statistics = cached.expert_cache.statistics
    assert statistics.reads == statistics.misses == 10 and statistics.hits == 10
    assert cached.expert_cache.resident_bytes == cached.expert_cache.total_bytes == 10 * expert_bytes(model)


def test_experts_in_use_stay_and_counts_are_right(tmp_path):
    model = saved(tmp_path)
    cache = attach_expert_cache(model, tmp_path, 4 * expert_bytes(model), prefetch=False)
    packed = dict(packed_matrices(tmp_path))

    def ask(layer, *experts):
        cache.begin(layer, experts)
        for expert in experts:
            gate_up, down = cache.get(layer, expert)
            for matrix, part in ((gate_up, "gate_up_proj"), (down, "down_proj")):
                expected = torch.empty_like(matrix)
                packed[f"model.layers.{layer}.mlp.experts.{part}"].read(expert, expected)
                assert torch.equal(matrix, expected)

    for _ in range(5):
        ask(0, 1, 2)
    ask(2, 0)
    assert (cache.statistics.hits, cache.statistics.misses) == (8, 3)
    for expert in (1, 2, 3, 4, 0):
        ask(2, expert)
    # The experts of layer 2 came once each, and left for each other.
    cache.reset_statistics()
    ask(0, 1, 2)
    assert (cache.statistics.hits, cache.statistics.misses, cache.statistics.hit_rate) == (2, 0, 1.0)


def test_reading_in_advance_while_others_compute(tmp_path):
    """Many prefetches against many readers in the smallest budget: every matrix is the right one, and nobody waits for ever."""
    model = saved(tmp_path)
    expected = {
        (number, expert): [parameter[expert].clone() for parameter in layer.mlp.experts.parameters()]
        for number, layer in enumerate(model.model.layers)
        if number != 1
        for expert in range(5)
    }
    cache = attach_expert_cache(model, tmp_path, 2 * expert_bytes(model), prefetch=False)
    wrong = []

    def compute():
        generator = torch.Generator().manual_seed(0)
        for number in range(400):
            layer, expert = (number % 2) * 2, int(torch.randint(5, (), generator=generator))
            cache.begin(layer, [expert])
            cache.prefetch(2 - layer, torch.randint(5, (2,), generator=generator).tolist())
            found = cache.get(layer, expert)
            if not all(torch.equal(a, b) for a, b in zip(found, expected[layer, expert], strict=True)):
                wrong.append((layer, expert))

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and wrong == []
    assert cache.resident_bytes <= cache.budget_bytes and cache.statistics.prefetched > 0


def test_the_command(tmp_path, capsys):
    tiny_model("experts", vocab_size=259, eos_token_id=None).save_pretrained(tmp_path)
    make_tokenizer(None).save_pretrained(tmp_path)
    command = ["generate", str(tmp_path), "--raw", "--prompt", "some words", "--temperature", "0", "--max-new-tokens", "12"]
    assert main(command) == 0
    expected = capsys.readouterr().out
    assert main([*command, "--expert-memory", "0.06"]) == 0
    found = capsys.readouterr()
    assert found.out == expected and "in memory when they were needed: " in found.err
    assert main([*command, "--expert-memory", "0.001"]) == 1
    assert "does not hold two experts" in capsys.readouterr().err
    assert main([*command, "--expert-memory", "0.06", "--device", "cuda"]) == 1
    assert "--expert-memory computes on the CPU; leave out --device cuda" in capsys.readouterr().err


PEAK = """
import re, sys, torch
from modeling_deepseek_r1.moe.offload import offload_experts

def resident():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

before = resident()
model = offload_experts(sys.argv[1], 24 * 2**20)
with torch.no_grad():
    model(torch.arange(3, 90)[None])
print(resident() - before, model.expert_cache.total_bytes, model.expert_cache.statistics.reads)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_model_larger_than_its_budget_stays_small(tmp_path):
    """Every expert of 201 MB is used, in far less memory."""
    tiny_model("experts", hidden_size=256, moe_intermediate_size=1024, num_experts=32).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, total, reads = map(int, done.stdout.split())
    assert total == 201_326_592 and reads >= 64 and peak < 0.75 * total


def test_what_cannot_be_is_refused(tmp_path):
    model = saved(tmp_path / "model")
    size, folder = expert_bytes(model), tmp_path / "model"
    saved(tmp_path / "other", "shared_expert")
    tiny_model("low_rank_experts").save_pretrained(tmp_path / "low")
    for arguments, message in (
        ((tiny_model("low_rank_experts"), tmp_path / "low", 10**9), "share one MLP"),
        ((tiny_model("full"), tmp_path / "low", 10**9), "no experts"),
        ((model, folder, size), r"does not hold two experts of .* all of them have"),
        ((model, tmp_path / "other", 10**9), "not the checkpoint of this model"),
        ((tiny_model("experts").bfloat16(), folder, 10**9), "bfloat16 on cpu in the model and torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            attach_expert_cache(*arguments)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        attach_expert_cache(model, tmp_path / "none", 10**9)
    attach_expert_cache(model, folder, 10**9)
    assert isinstance(model.model.layers[0].mlp.experts, CachedExperts)
    with pytest.raises(RuntimeError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(RuntimeError, match="for inference"):
        model(random_ids(1, 5))
