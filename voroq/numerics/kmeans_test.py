import pytest
import torch
from sklearn.cluster import KMeans

from voroq.numerics import kmeans as module
from voroq.numerics.kmeans import kmeans, seed
from voroq.numerics.nearest import nearest


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def objective(points: torch.Tensor, importance: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(((torch.cdist(points, centroids).min(1).values ** 2) * importance).sum())


@pytest.mark.parametrize("k", [2, 16, 1024, 2048])
@pytest.mark.parametrize("metric", [False, True])
def test_nearest_agrees_with_brute_force(k: int, metric: bool):
    v, table = torch.randn(50, 3, dtype=torch.float64, generator=rng()), torch.randn(k, 3, dtype=torch.float64, generator=rng(1))
    root = torch.randn(3, 3, dtype=torch.float64, generator=rng(2))
    m = root @ root.T + torch.eye(3) if metric else torch.eye(3, dtype=torch.float64)
    delta = v[:, None] - table
    brute = torch.einsum("nkd,de,nke->nk", delta, m.double(), delta).argmin(1)
    assert torch.equal(nearest(v, table, m.double() if metric else None), brute)


def test_objective_is_not_worse_than_scikit_learn():
    points, importance = torch.randn(4000, 4, generator=rng()), torch.rand(4000, generator=rng(1)) + 0.1
    ours = objective(points, importance, kmeans(points, importance, 64, rng(2), steps=60))
    theirs = KMeans(64, n_init=1, max_iter=60, random_state=0).fit(points.numpy(), sample_weight=importance.numpy())
    assert ours <= 1.01 * objective(points, importance, torch.from_numpy(theirs.cluster_centers_))


def test_restarts_keep_the_best_of_seedings_drawn_one_after_the_other():
    points, importance = torch.randn(300, 2, generator=rng()), torch.rand(300, generator=rng(1)) + 0.1
    one_by_one = rng(2)
    found = [kmeans(points, importance, 8, one_by_one, steps=5) for _ in range(6)]
    costs = [objective(points, importance, centroids) for centroids in found]
    best = min(range(6), key=costs.__getitem__)
    assert best > 0 and torch.equal(kmeans(points, importance, 8, rng(2), steps=5, restarts=5), found[best])


def test_lloyd_from_the_same_start_is_scikit_learns():
    points, importance = torch.randn(500, 3, generator=rng()), torch.rand(500, generator=rng(1)) + 0.1
    start = points[:16].clone()
    theirs = KMeans(16, init=start.numpy(), n_init=1, max_iter=5, tol=0, algorithm="lloyd").fit(
        points.numpy(), sample_weight=importance.numpy()
    )
    ours = kmeans(points, importance, 16, rng(), steps=5, start=start)
    torch.testing.assert_close(ours, torch.from_numpy(theirs.cluster_centers_), atol=1e-4, rtol=1e-4)


def test_same_generator_same_bits():
    points, importance = torch.randn(3000, 4, generator=rng()), torch.ones(3000)
    assert torch.equal(kmeans(points, importance, 32, rng(5)), kmeans(points, importance, 32, rng(5)))
    assert not torch.equal(kmeans(points, importance, 32, rng(5)), kmeans(points, importance, 32, rng(6)))


def test_importance_pulls_centroids():
    points = torch.cat([torch.zeros(10, 1), torch.ones(10, 1)])
    heavy = torch.cat([torch.ones(10), 3 * torch.ones(10)])
    start = torch.tensor([[0.4], [50.0]])
    assert kmeans(points, heavy, 2, rng(), steps=1, start=start)[0].item() == pytest.approx(0.75)


def test_empty_cluster_moves_to_the_costliest_point():
    points = torch.tensor([[0.0], [0.1], [9.0]])
    found = kmeans(points, torch.ones(3), 2, rng(), steps=5, start=torch.tensor([[0.0], [1000.0]]))
    assert sorted(found[:, 0].tolist()) == pytest.approx([0.05, 9.0])


def test_fewer_points_than_centroids_is_fine():
    points = torch.randn(5, 2, generator=rng())
    found = kmeans(points, torch.ones(5), 8, rng())
    assert found.shape == (8, 2) and objective(points, torch.ones(5), found) == pytest.approx(0, abs=1e-10)


def test_weightless_points_are_never_seeds():
    points = torch.cat([torch.randn(100, 2, generator=rng()), 100 + torch.randn(100, 2, generator=rng(1))])
    importance = torch.cat([torch.ones(100), torch.zeros(100)])
    assert seed(points, importance, 16, rng(2)).max() < 50


def test_cell_search_never_raises_the_objective_and_is_nearly_exact(monkeypatch):
    points, importance = torch.randn(20000, 6, generator=rng()), torch.ones(20000)
    exact = objective(points, importance, kmeans(points, importance, 1024, rng(1), steps=6))
    monkeypatch.setattr(module, "CELLS_FROM", 1024)
    costs = [objective(points, importance, kmeans(points, importance, 1024, rng(1), steps=steps)) for steps in (1, 3, 6)]
    assert costs[0] > costs[1] > costs[2]
    assert costs[2] < 1.01 * exact
