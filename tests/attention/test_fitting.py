"""Maps of queries, harmless at zero, and gates: both fitted to what full attention does."""

import torch
import torch.nn.functional as F

from modeling_deepseek_r1.attention.fitting import GATES, cluster_mass, fit_query_map, gate_bias, gate_errors
from modeling_deepseek_r1.attention.kmeans import choose_clusters


def test_mass_is_what_full_attention_gives_to_the_remote_keys_of_a_cluster():
    torch.manual_seed(0)
    query, key, clusters = torch.randn(4, 3, 8), torch.randn(2, 20, 8), torch.randint(5, (2, 20))
    positions = torch.tensor([6, 19, 13])
    mass = cluster_mass(query, key, clusters, positions, 5, window=4, num_sink_tokens=2, scaling=0.3)
    for head in range(4):
        for sample, position in enumerate(positions.tolist()):
            weights = (key[head // 2, : position + 1] @ query[head, sample] * 0.3).softmax(-1)
            for cluster in range(5):
                remote = [j for j in range(2, position - 4 + 1) if clusters[head // 2, j] == cluster]
                torch.testing.assert_close(mass[head, sample, cluster], weights[remote].sum())


def test_a_map_finds_the_clusters_that_queries_attend_to():
    """Every head attends to the cluster that its queries, turned by a matrix of its own, point to."""
    torch.manual_seed(0)
    centroids = F.normalize(torch.randn(2, 6, 8), dim=-1)
    turn = torch.linalg.qr(torch.randn(4, 8, 8)).Q
    queries = torch.randn(4, 1500, 8)
    wanted = choose_clusters((queries @ turn)[None], centroids, 1)
    mass = torch.zeros(4, 1500, 6).scatter_(2, wanted[0], 1.0)
    fitted = fit_query_map(queries[:, :1000], mass[:, :1000], centroids)
    held_out, wanted = queries[None, :, 1000:], wanted[:, :, 1000:]

    def found(query_map):
        return (choose_clusters(held_out, centroids, 1, query_map) == wanted).float().mean()

    assert found(fitted) > 0.9
    assert found(None) < 0.4


def test_a_map_of_zero_changes_nothing_and_no_mass_makes_no_map():
    queries, centroids = torch.randn(2, 6, 9, 8), F.normalize(torch.randn(3, 7, 8), dim=-1)
    nothing = fit_query_map(queries[0], torch.zeros(6, 9, 7), centroids)
    assert not nothing.any()
    assert torch.equal(choose_clusters(queries, centroids, 3, nothing), choose_clusters(queries, centroids, 3))
    assert not fit_query_map(queries[0, :, :0], torch.zeros(6, 0, 7), centroids).any()


def test_gates_make_up_for_what_is_not_found():
    """Heads that find all remote keys keep a gate of 1; one that finds half of equal keys counts these twice, or nearly."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 5, 8), torch.randn(1, 30, 8), torch.randn(1, 30, 8)
    # Remote keys and their values come in pairs of equal ones.
    key[:, 3:20:2], value[:, 3:20:2] = key[:, 2:20:2], value[:, 2:20:2]
    positions, places = torch.tensor([29, 28, 27, 26, 25]), torch.arange(30)
    local = (places <= positions[:, None]) & ((places < 2) | (places >= 20))
    remote = ((places >= 2) & (places < 20)).expand(2, 5, 30).clone()
    remote[1, :, 3:20:2] = False
    errors = gate_errors(query, key, value, local, remote, positions, 0.3)
    torch.testing.assert_close(2 * gate_bias(errors).sigmoid(), torch.tensor([1.0, max(GATES)]))

    def outputs(head, gate):
        logits = (key[0] @ query[head].T * 0.3).T.exp() * (local + gate * remote[head])
        return logits / logits.sum(-1, keepdim=True) @ value[0]

    for row, gate in enumerate(GATES):
        causal = (key[0] @ query[1].T * 0.3).T.masked_fill(places > positions[:, None], float("-inf")).softmax(-1) @ value[0]
        torch.testing.assert_close(errors[row, 1], (outputs(1, gate) - causal).square().sum())
