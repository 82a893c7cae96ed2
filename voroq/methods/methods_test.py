"""Every option of every method changes a result, and the methods do what their papers say."""

from dataclasses import fields, replace

import pytest
import torch

from voroq.codebook.residual import Residual
from voroq.errors import VoroqError
from voroq.methods import GPTQ, METHODS, PVQ, RTN, VPTQ, Method
from voroq.methods.gptq import activation_order
from voroq.methods.vptq import Thinning, absorb, column_order, column_statistics
from voroq.moments import Moments, observe
from voroq.numerics.linalg import damped, inverse_factor, proxy_loss, relative_proxy_loss
from voroq.quantized import Band, Quantized, Tile
from voroq.rounding.metric import Metric, outputs_metric
from voroq.transform.affine import ColumnAffine
from voroq.transform.chain import Chain
from voroq.transform.permute import Permute

OUT, IN = 48, 64


def rng(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def problem() -> tuple[torch.Tensor, Moments]:
    """Correlated inputs whose scales differ, as in real layers."""
    x = torch.randn(400, IN, generator=rng()) @ torch.randn(IN, IN, generator=rng(1)) * torch.exp(torch.randn(IN, generator=rng(2)))
    return torch.randn(OUT, IN, generator=rng(3)) + 0.3 * torch.randn(IN, generator=rng(4)), observe(Moments.empty(IN), x)


def run(method: Method) -> Quantized:
    return method(*problem(), rng())


def loss(q: Quantized) -> float:
    w, moments = problem()
    return relative_proxy_loss(w, q.dequantize(), moments.hessian())


BASE = {
    "vptq": VPTQ(vector_length=2, table_bits=4, outlier_table_bits=4, outlier_vector_length=2, kmeans_steps=5, rounds=1),
    "pvq": PVQ(bits=2.0),
    "gptq": GPTQ(bits=3, group_size=16),
    "rtn": RTN(bits=3, group_size=16),
}
OTHER = {
    "vptq": dict(
        vector_length=4, table_bits=5, residual_bits=2, groups=2, outlier_percent=5.0, outliers="cheapest", outlier_vector_length=4,
        outlier_table_bits=3, normalize="std", permute=False, damping=0.5, kmeans_steps=1, restarts=3, rounds=0, sweeps=0, anneal=20,
        beam=1,
    ),
    "pvq": dict(bits=2.5, dim=8, along="input", rotation="both", gains="paper", order="class", sweeps=0, anneal=20, damping=0.5),
    "gptq": dict(bits=2, group_size=None, act_order=False, grid="minmax", damping=0.5),
    "rtn": dict(bits=2, group_size=None, grid="mse"),
}  # fmt: skip


@pytest.mark.parametrize("name, option", [(name, field.name) for name, kind in METHODS.items() for field in fields(kind)])
def test_every_option_changes_the_result(name: str, option: str):
    outliers, residual = {"outlier_percent": 5.0}, {"residual_bits": 3}
    needed = {name: outliers for name in ("outliers", "outlier_vector_length", "outlier_table_bits")}
    needed |= {"beam": residual, "order": {"dim": 8}}
    base = replace(BASE[name], **needed.get(option, {}))
    changed = replace(base, **{option: OTHER[name][option]})
    first, second = run(base), run(changed)
    codes = [torch.cat([part.flatten() for part in q.codes]) for q in (first, second)]
    assert not torch.equal(first.dequantize(), second.dequantize()) or not torch.equal(*codes)  # an order changes numbers only


@pytest.mark.parametrize("name", METHODS)
def test_same_generator_same_bits(name: str):
    a, b = run(BASE[name]), run(BASE[name])
    assert all(torch.equal(x, y) for x, y in zip(a.codes, b.codes, strict=True)) and torch.equal(a.dequantize(), b.dequantize())


def test_methods_are_ordered_as_the_field_knows_them():
    assert loss(run(BASE["gptq"])) < loss(run(BASE["rtn"]))
    assert loss(run(replace(BASE["vptq"], residual_bits=2))) < loss(run(BASE["vptq"]))
    tuned, residual = BASE["vptq"], replace(BASE["vptq"], residual_bits=3)
    assert loss(run(replace(tuned, rounds=3))) < loss(run(tuned)) < loss(run(replace(tuned, sweeps=0)))
    assert loss(run(replace(tuned, sweeps=0))) < loss(run(replace(tuned, rounds=0)))
    assert loss(run(residual)) < loss(run(replace(residual, beam=1)))


def test_act_order_is_natural_order_on_permuted_columns():
    w, moments = problem()
    q = run(BASE["gptq"])
    perm = q.transform.steps[0].perm
    assert torch.equal(perm, torch.argsort(moments.second.diagonal(), descending=True, stable=True))
    permuted = Moments(moments.second[perm][:, perm], moments.first[perm], moments.count)
    natural = replace(BASE["gptq"], act_order=False)(w[:, perm], permuted, rng())
    torch.testing.assert_close(natural.dequantize(), q.dequantize()[:, perm])


def test_absorbed_permutation_is_lossless():
    w, moments = problem()
    method = BASE["vptq"]
    q = method(w, moments, rng())
    assert q.transform == Chain()
    kept = Quantized((OUT, IN), Chain((Permute(torch.randperm(IN, generator=rng(5))),)), q.bands, q.codes)
    assert torch.equal(absorb(kept).dequantize(), kept.dequantize())


def test_permutation_is_kept_where_it_cannot_be_absorbed():
    for method in (replace(BASE["vptq"], groups=2), replace(BASE["vptq"], outlier_percent=5.0)):
        assert isinstance(run(method).transform.steps[-1], Permute)


@pytest.mark.parametrize("outliers", ["costliest", "cheapest"])
def test_outliers_are_chosen_by_what_they_cost_and_lead_the_order(outliers: str):
    """The literal cost: the mean square of a column's weights over the diagonal of the inverse Hessian."""
    w, moments = problem()
    w[:, 11] *= 20  # a small activation with large weights: no candidate by activation alone
    h, _ = damped(moments.hessian(), 0.01)
    order = column_order(w, h, 4, outliers == "cheapest")
    cost = [float(w[:, j].square().mean() / torch.linalg.inv(h)[j, j]) for j in range(IN)]
    assert set(order[:4].tolist()) == set(sorted(range(IN), key=lambda j: cost[j], reverse=outliers == "costliest")[:4])
    assert (11 in order[:4]) == (outliers == "costliest") and 11 not in moments.second.diagonal().topk(4).indices
    for part in (order[:4], order[4:]):
        assert part.tolist() == sorted(part.tolist(), key=lambda j: -float(h[j, j]))
    assert sorted(order.tolist()) == list(range(IN))
    assert torch.equal(column_order(w, h, 0), torch.argsort(h.diagonal(), descending=True))
    q = replace(BASE["vptq"], outlier_percent=6.0, outliers=outliers)(w, moments, rng())
    assert q.bands[0].stop == 4 and torch.equal(q.transform.steps[-1].perm, order)


def some_moments(w: torch.Tensor, moments: Moments) -> Moments:
    y = torch.randn(300, w.shape[0], generator=rng(6)) @ torch.randn(w.shape[0], w.shape[0], generator=rng(7))
    return replace(moments, outputs=y.T @ y / 300)


@pytest.mark.parametrize("sided", [1, 2])
def test_thinning_says_what_dropping_columns_costs(sided: int):
    """Brute force: columns left out, the others free to answer; nothing left out is an error like any other, everything is the whole."""
    w, moments = problem()
    moments = some_moments(w, moments) if sided == 2 else moments
    h, _ = damped(moments.hessian(), 0.01)
    g = torch.eye(OUT) if sided == 1 else outputs_metric(moments.outputs, 0.01)[0]
    h, g = h.double(), g.double()
    found = Thinning.of(w, moments, 0.01)
    assert found.dropped[0] == 0 and found.kept[0] == 1 and found.kept[-1] == 0 and found.error(0, 0.25) == 0.25
    assert bool((found.kept.diff() <= 0).all())
    cost = w.double().square().mean(0) / torch.linalg.inv(h).diagonal()
    ratios = []
    for n in (1, 5, IN // 2, IN):
        out = cost.argsort()[:n]
        left = torch.tensor([j for j in range(IN) if j not in out.tolist()], dtype=torch.long)
        error = torch.zeros_like(w, dtype=torch.float64)
        error[:, out] = w[:, out].double()
        if len(left):
            error[:, left] = -error[:, out] @ h[out][:, left] @ torch.linalg.inv(h[left][:, left])
        ratios.append(float(torch.trace(g @ error @ h @ error.T)) / float(found.dropped[n]))
    assert ratios == pytest.approx([ratios[0]] * 4, rel=1e-3)
    u = inverse_factor(h[order := activation_order(h)][:, order])
    assert ratios[0] == pytest.approx(float((w.double().square().sum(0)[order] / u.diagonal().square()).sum()), rel=1e-3)


def test_bits_of_cheap_columns_are_better_spent_on_the_others():
    """Half of the columns hardly matter. At fewer bits, with those in long vectors, the loss is a fraction of what it was."""
    w, moments = problem()
    scale = torch.ones(IN)
    scale[::2] = 0.03
    moments = replace(moments, second=moments.second * scale * scale[:, None])
    plain = VPTQ(vector_length=2, table_bits=6, rounds=1)
    hardly = {"outliers": "cheapest", "outlier_percent": 45.0, "outlier_vector_length": 48, "outlier_table_bits": 1}
    thin = VPTQ(vector_length=2, table_bits=7, rounds=1, **hardly)
    out = [method(w.repeat(8, 1), moments, rng()) for method in (plain, thin)]
    losses = [relative_proxy_loss(w.repeat(8, 1), q.dequantize(), moments.hessian()) for q in out]
    assert thin.stored_bits((8 * OUT, IN)) < plain.stored_bits((8 * OUT, IN)) and losses[1] < 0.6 * losses[0]


def test_tables_know_the_places_that_count_more():
    """Rows of equal size, every second of which counts 16 times as much: their places in the tiles get more of the bits."""
    w = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([16.0, 1.0]).repeat(32)
    known = Metric(torch.eye(48), counts.diag())
    vptq, tile = VPTQ(vector_length=2, table_bits=5), Tile(2, 1)

    def cost(metric: Metric) -> float:
        """Under `known`, of nearest words of a table trained under `metric`."""
        band = Band(0, 48, tile, vptq._table(w, metric.diagonal(64), tile, 5, rng()))
        return float(known.feedback(w, [band]).loss.sum())

    assert cost(known) < 0.9 * cost(Metric(torch.eye(48)))


def test_groups_have_tables_of_their_own():
    q = run(replace(BASE["vptq"], groups=4))
    assert [band.stop - band.start for band in q.bands] == [16] * 4
    assert not torch.equal(q.bands[0].codebook.centroids, q.bands[1].codebook.centroids)


def test_outlier_columns_absorb_what_groups_leave_over():
    method = VPTQ(groups=3, outlier_percent=1.0)
    outliers, edges = method.columns(64)
    assert (outliers, edges) == (1, [1, 22, 43, 64])


def test_residual_belongs_to_the_main_columns_only():
    q = run(replace(BASE["vptq"], outlier_percent=5.0, residual_bits=2))
    assert [isinstance(band.codebook, Residual) for band in q.bands] == [False, True]


def test_normalisation_rescales_the_hessian():
    """The loss seen inside is the loss outside; the reference's un-rescaled Hessian breaks just this."""
    w, moments = problem()
    affine, h, error = column_statistics(w), moments.hessian(), torch.randn(OUT, IN, generator=rng(6))
    torch.testing.assert_close(proxy_loss(error * affine.scale, h), proxy_loss(error, affine.hessian(h)), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(affine.weight(w).mean(0), torch.zeros(IN), atol=1e-5, rtol=0)
    assert isinstance(run(replace(BASE["vptq"], normalize="std")).transform.steps[0], ColumnAffine)


def test_constant_columns_survive_normalisation():
    w, moments = problem()
    w[:, 5] = 0.25
    q = replace(BASE["vptq"], normalize="std")(w, moments, rng())
    assert torch.isfinite(q.dequantize()).all()


def test_padding_rows_are_dropped():
    w, moments = problem()
    assert replace(BASE["vptq"], vector_length=5)(w[:47], moments, rng()).dequantize().shape == (47, IN)


def test_grid_range_contains_zero_and_reaches_the_ends():
    w = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    q = RTN(bits=8, group_size=None)(w, Moments.empty(3), rng())
    torch.testing.assert_close(q.dequantize(), w, atol=0.01, rtol=0)
    assert q.dequantize()[2].abs().max() == 0


@pytest.mark.parametrize("make", [
    lambda: VPTQ(vector_length=0), lambda: VPTQ(table_bits=17), lambda: VPTQ(residual_bits=13), lambda: VPTQ(normalize="minmax"),
    lambda: VPTQ(damping=-0.1), lambda: GPTQ(bits=9), lambda: GPTQ(group_size=0), lambda: GPTQ(grid="best"), lambda: RTN(bits=0),
    lambda: run(VPTQ(groups=100)),
])  # fmt: skip
def test_options_out_of_range_are_refused_with_the_range(make):
    with pytest.raises(VoroqError, match=r"out of range; |unknown; choose|do not fit"):
        make()


def test_dead_columns_are_reported_and_keep_a_value():
    w, moments = problem()
    second = moments.second.clone()
    second[7] = 0
    second[:, 7] = 0
    q = BASE["gptq"](w, Moments(second, moments.first, moments.count), rng())
    assert "1 of 64 input columns never moved" in q.notes[0]
    assert torch.isfinite(q.dequantize()).all() and (q.dequantize()[:, 7] - w[:, 7]).abs().mean() < w[:, 7].abs().mean()


def test_rows_too_short_for_the_official_reader_are_refused_at_once():
    with pytest.raises(VoroqError, match=r"a group of 16 columns with 1 bits each is under 17 bits"):
        VPTQ(vector_length=2, table_bits=1).stored_bits((8, 16))
    assert VPTQ(vector_length=2, table_bits=1).stored_bits((8, 17)) > 0
