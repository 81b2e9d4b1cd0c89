"""A static cache: the text of the dynamic one, and decoding steps that are one graph."""

import copy
import operator

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from tests.models import PATTERNS, random_ids, tiny_model
from tests.test_generate import generate


def padded(batch, length, missing):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, :missing] = 0
    return mask


def static_cache(model, length=40):
    return StaticCache(config=model.config, max_cache_len=length)


@torch.no_grad()
def steps(model, ids, mask, cache, cuts, forward=None):
    """Logits of all tokens, given in pieces, all but the first to `forward`."""
    parts, done = [], 0
    for cut in cuts:
        run = forward if forward is not None and done else model
        parts.append(run(ids[:, done : done + cut], attention_mask=mask[:, done : done + cut], past_key_values=cache).logits)
        done += cut
    return torch.cat(parts, 1)


def assert_equal(actual, expected, mask):
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("implementation, missing", [("sdpa", 0), ("sdpa", 6), ("eager", 6)])
def test_steps_and_pieces_equal_one_forward(pattern, implementation, missing):
    ids, mask, model = random_ids(2, 40), padded(2, 40, missing), tiny_model(pattern, implementation)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    cache = static_cache(model)
    assert_equal(steps(model, ids, mask, cache, [3, 1, 1, 1, 13, *[1] * 10, 11]), expected, mask)
    assert cache.get_seq_length() == 40 and all(layer.is_closed for layer in cache.layers)
    cache.reset()
    assert_equal(steps(model, ids, mask, cache, [20, *[1] * 20]), expected, mask)


@pytest.mark.parametrize("pattern, missing", [("mixed", 0), ("global_mixed", 6)])
def test_a_step_is_one_graph(pattern, missing):
    ids, mask, model = random_ids(2, 40), padded(2, 40, missing), tiny_model(pattern)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
        assert_equal(steps(model, ids, mask, static_cache(model, 48), [20] + [1] * 20, compiled), expected, mask)


@pytest.mark.parametrize("pattern, missing", [("mixed", 0), ("mixed", 6), ("global_mixed", 6)])
def test_a_compiled_step_reads_many_bfloat16_keys_by_products(pattern, missing, monkeypatch):
    ids, mask, model = random_ids(2, 40), padded(2, 40, missing), tiny_model(pattern).bfloat16().float()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    model.bfloat16()
    products = {}
    for fused in (1, 2048):
        monkeypatch.setattr("modeling_deepseek_r1.attention.static_step.FUSED_KEYS", fused)
        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend)
        actual = steps(model, ids, mask, static_cache(model, 48), [20] + [1] * 20, compiled)[mask.bool()].float()
        assert (actual - expected).norm() / expected.norm() < 0.03
        products[fused] = sum(node.target is operator.matmul for node in graphs[0].graph.nodes)
    assert products[1] == products[2048] + 2 * model.config.num_hidden_layers


def test_experts_that_are_one_product_are_compiled_too():
    model, ids, mask = tiny_model("experts"), random_ids(2, 30), padded(2, 30, 6)
    assert not static_cache_of(model).is_compileable
    model.set_experts_implementation("batched_mm")
    assert static_cache_of(model).is_compileable
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    assert_equal(steps(model, ids, mask, static_cache(model), [20] + [1] * 10, compiled), expected, mask)


def static_cache_of(model):
    cache = static_cache(model)
    with torch.no_grad():
        model(random_ids(1, 4), past_key_values=cache)
    return cache


def test_generate_compiles_its_steps_and_keeps_the_text():
    model, ids, mask = tiny_model("mixed"), random_ids(2, 19), padded(2, 19, 6)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True
    options = {"attention_mask": mask, "cache_implementation": "static", "compile_config": config}
    assert torch.equal(generate(model, ids, **options), generate(model, ids, attention_mask=mask))
    assert len(graphs) == 1
    # Pieces of a prompt are compiled as well.
    assert torch.equal(generate(model, ids, prefill_chunk_size=5, **options), generate(model, ids, attention_mask=mask))
    assert len(graphs) > 1


@pytest.mark.parametrize("pattern", ["routed", "global", "mixed"])
@pytest.mark.parametrize("missing", [0, 6])
def test_rows_are_reordered_repeated_and_selected(pattern, missing):
    model, ids, mask, last = tiny_model(pattern), random_ids(2, 25), padded(2, 25, missing), random_ids(4, 3, seed=1)
    cache = static_cache(model)
    steps(model, ids, mask, cache, [24, 1])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 2, 0, 3]))
    rows = torch.tensor([1, 1, 0, 1])
    whole, whole_mask = torch.cat((ids[rows], last), 1), torch.cat((mask[rows], torch.ones_like(last)), 1)
    with torch.no_grad():
        expected = model(whole, attention_mask=whole_mask, use_cache=False).logits[:, -3:]
    ones = torch.ones_like(last)
    assert_equal(steps(model, last, ones, copy.deepcopy(cache), [1, 1, 1]), expected, ones)
    cache.batch_select_indices(torch.tensor([1, 3]))
    assert_equal(steps(model, last[[1, 3]], ones[:2], cache, [1, 2]), expected[[1, 3]], ones[:2])


@pytest.mark.parametrize("make", [lambda model: DynamicCache(), static_cache], ids=["dynamic", "static"])
@pytest.mark.parametrize("pattern", ["mixed", "routed", "global"])
def test_a_prefix_is_read_once_for_several_continuations(pattern, make):
    model, prefix, cache = tiny_model(pattern), random_ids(1, 14), None
    cache = make(model)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    for seed in range(2):
        whole = torch.cat((prefix, random_ids(1, 5, seed=seed)), 1)
        assert torch.equal(generate(model, whole, past_key_values=copy.deepcopy(cache)), generate(model, whole))


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "offloaded"}, {"cache_implementation": "offloaded_static"}], ids=str
)
def test_offloading_does_nothing_on_a_cpu(options):
    model, ids = tiny_model("global_mixed"), random_ids(2, 19)
    assert torch.equal(generate(model, ids, **options), generate(model, ids))


def test_refusals():
    model, ids = tiny_model("mixed"), random_ids(1, 12)
    with pytest.raises(ValueError, match="static cache was made for 10 tokens: 0 are in it and 12 more"):
        steps(model, ids, torch.ones_like(ids), static_cache(model, 10), [12])
    with pytest.raises(ValueError, match="made for 11 tokens: 11 are in it and 1 more"):
        steps(model, ids, torch.ones_like(ids), static_cache(model, 11), [10, 1, 1])
    with pytest.raises(ValueError, match="no gradients"):
        model(ids, past_key_values=static_cache(model))
    with pytest.raises(RuntimeError, match="takes no tokens back"):
        static_cache_of(model).crop(-1)
    with pytest.raises(ValueError, match='"quantized" is not supported'):
        generate(model, ids, cache_implementation="quantized")
    with pytest.raises(ValueError, match="assisted generate is not supported with Static cache"):
        generate(model, ids, cache_implementation="static", prompt_lookup_num_tokens=3)


@pytest.mark.slow
def test_inductor_keeps_the_text_and_writes_products_of_one_row_as_sums(monkeypatch):
    from modeling_deepseek_r1.generation import compiled, compiled_decoding

    model, ids = tiny_model("global_mixed"), random_ids(1, 19)
    replaced, replace = [], compiled.OneRowProducts._replace
    monkeypatch.setattr(
        compiled.OneRowProducts, "_replace", staticmethod(lambda *args: replaced.append(args[1]) or replace(*args))
    )
    options = compiled_decoding(39)
    assert options["max_cache_len"] == 256
    with torch._inductor.config.patch(force_disable_caches=True):
        assert torch.equal(generate(model, ids, **options), generate(model, ids))
    assert len(replaced) >= 7 * len(model.model.layers)
    # An equal configuration does not compile again.
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(generate(model, ids, **compiled_decoding(39)), generate(model, ids))
