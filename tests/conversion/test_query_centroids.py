"""Query centroids find the clusters that full attention gives most to."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_deepseek_r1.attention.gate import DeepseekR1Router
from modeling_deepseek_r1.attention.kmeans import assign_keys, fit_centroids
from modeling_deepseek_r1.attention.layer import layer_pattern
from modeling_deepseek_r1.attention.pattern import AttentionPattern
from modeling_deepseek_r1.conversion.query_centroids import fit_query_centroids, remote_shares
from modeling_deepseek_r1.conversion.recorded import record, sampled_positions
from tests.models import random_ids, tiny_model


def test_shares_are_those_of_full_attention(monkeypatch):
    """Against the weights that the model itself gives, added up key by key: the last three of each cluster."""
    monkeypatch.setattr("modeling_deepseek_r1.conversion.recorded.BLOCK", 5)
    model, pattern = tiny_model("full"), AttentionPattern(4, 2, 1, 3)
    windows = random_ids(2, 20)
    positions = sampled_positions(pattern, 20, 2, seed=0)
    assert positions.tolist() == list(range(6, 20))
    recorded = record(model, {1: positions}, windows)[1]
    assert all(layer.self_attn.router is None for layer in model.model.layers)
    centroids = fit_centroids(torch.cat(recorded.keys, 1).float(), 3)
    queries, shares = remote_shares(recorded, centroids, pattern, rotary=True)
    with torch.no_grad():
        weights = model(windows, output_attentions=True).attentions[1].to_dense()
    expected = torch.zeros(2, 6, 20, 3)
    for window in range(2):
        clusters = assign_keys(recorded.keys[window][None], centroids)[0].repeat_interleave(3, 0)
        for head in range(6):
            for query in range(20):
                for cluster in range(3):
                    keys = [key for key in range(2, query - 3) if clusters[head, key] == cluster][-3:]
                    expected[window, head, query, cluster] = weights[window, head, query, keys].sum()
    assert queries.shape == (6, 28, 8)
    # Recorded in bfloat16.
    torch.testing.assert_close(shares.unflatten(1, (2, 14)).transpose(0, 1), expected[:, :, 6:], rtol=0.02, atol=2e-3)


def test_a_text_without_remote_keys_leaves_the_centroids():
    pattern = AttentionPattern(30, 2, 1, 9)
    assert not len(sampled_positions(pattern, 20, 2, seed=0))
    assert len(sampled_positions(pattern, 5000, 1024, seed=0)) == 4
    centroids = torch.randn(2, 3, 8)
    for count in (0, 5):
        fitted = fit_query_centroids(torch.randn(6, count, 8), torch.zeros(6, count, 3), centroids, seed=0)
        assert torch.equal(fitted, centroids.repeat_interleave(3, 0))


def test_fitted_queries_find_what_centroids_do_not():
    """Attention follows other directions than those of the clusters' means."""
    torch.manual_seed(0)
    centroids, queries = torch.nn.functional.normalize(torch.randn(1, 12, 8), dim=-1), 3 * torch.randn(2, 4000, 8)
    truth = torch.randn(2, 12, 8)
    shares = 0.4 * (queries @ truth.transpose(1, 2)).softmax(-1)
    fitted = fit_query_centroids(queries[:, :3000], shares[:, :3000], centroids, seed=0)
    found = []
    for points in (centroids.expand(2, -1, -1), fitted, truth):
        chosen = (queries[:, 3000:] @ points.transpose(1, 2)).topk(2, -1).indices
        found.append(float(shares[:, 3000:].gather(-1, chosen).sum() / shares[:, 3000:].sum()))
    assert found[0] < 0.5 * found[2] and found[1] > 0.97 * found[2]


@pytest.fixture
def router():
    torch.manual_seed(0)
    router = DeepseekR1Router(16, 4, 2, 8, num_clusters=5, routed_clusters=2)
    router.centroids.copy_(torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=-1))
    router.query_centroids.copy_(torch.randn(4, 5, 8))
    return router


def test_queries_choose_by_their_own_centroids_and_keys_by_theirs(router):
    query, key = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8)
    routing = router(torch.randn(1, 7, 16), query, key)
    expected = (query @ router.query_centroids.transpose(1, 2)).topk(2, -1).indices
    assert torch.equal(routing.query_clusters, expected)
    assert torch.equal(routing.key_clusters, (key @ router.centroids.transpose(1, 2)).argmax(-1))


def test_they_move_along_with_the_centroids(router):
    before = router.centroids.clone(), router.query_centroids.clone()
    router.train().gathers_statistics = True
    router(torch.randn(1, 7, 16), torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8))
    router.move_centroids(0.5)
    moved = router.centroids - before[0]
    assert moved.abs().max() > 0.1
    torch.testing.assert_close(router.query_centroids - before[1], moved.repeat_interleave(2, 0))


def test_a_checkpoint_from_before_them_looks_where_it_looked(tmp_path):
    model = tiny_model("routed")
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("query_centroids")}
    assert len(state) < len(model.state_dict())
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for layer_idx, layer in enumerate(loaded.model.layers):
        router, own = layer.self_attn.router, model.model.layers[layer_idx].self_attn.router
        assert (router is None) == (not layer_pattern(model.config, layer_idx).routed_clusters)
        if router is not None:
            assert torch.equal(router.centroids, own.centroids)
            assert torch.equal(router.query_centroids, own.centroids.repeat_interleave(3, 0))
