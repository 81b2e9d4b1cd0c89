"""Maps of queries: fitted to where full attention goes, harmless at zero."""

import torch
import torch.nn.functional as F

from modeling_deepseek_r1.attention.kmeans import choose_clusters
from modeling_deepseek_r1.attention.query_map import cluster_mass, fit_query_map


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
