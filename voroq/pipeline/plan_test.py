"""Plans: what is predicted is what is stored, budgets are kept and used up, and options mean what they say."""

import math
import zlib
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from voroq.errors import VoroqError
from voroq.methods import GPTQ, METHODS, PVQ, RTN, VPTQ
from voroq.moments import Moments, observe
from voroq.packed.format import pack, total_bytes
from voroq.pipeline.allocation import Choice, spend
from voroq.pipeline.plan import THINNED, Budget, Plan, distortion, gaussian_factor, make_plan, menu, parse_options

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
SIDES = st.integers(6, 40)


def really_stored(method, out: int, columns: int, dtype: torch.dtype, layout: str) -> int:
    """Bits of a random linear after quantizing and packing it."""
    rng = torch.Generator().manual_seed(out * 64 + columns)
    moments = observe(Moments.empty(columns), torch.randn(2 * columns, columns, generator=rng))
    return 8 * total_bytes(pack(method(torch.randn(out, columns, generator=rng), moments, rng), dtype, layout))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(out=SIDES, columns=SIDES, dtype=DTYPES, data=st.data())
def test_vptq_stores_what_it_predicts(out, columns, dtype, data):
    """Tables, residuals, outliers, groups, scales and shifts, permutations stored or absorbed, rows that do not divide."""
    table_bits = data.draw(st.integers(1, 4))
    method = VPTQ(
        vector_length=data.draw(st.integers(1, 9)),
        table_bits=table_bits,
        residual_bits=data.draw(st.integers(0, table_bits)),
        groups=data.draw(st.integers(1, 3)),
        outlier_percent=data.draw(st.sampled_from([0.0, 5.0, 30.0])),
        outlier_vector_length=data.draw(st.integers(2, 5)),
        outlier_table_bits=5,  # not a table_bits: outliers like all other bands would be stored as one more group
        normalize=data.draw(st.sampled_from(["none", "std"])),
        permute=data.draw(st.booleans()),
        kmeans_steps=1,
        rounds=0,
    )
    try:
        method.columns(columns)
    except VoroqError:  # rows too short for the official reader: refused before anything is fitted
        assume(False)
    assert method.stored_bits((out, columns), 8 * dtype.itemsize) == really_stored(method, out, columns, dtype, "vptq")


GRIDS = {"bits": st.integers(1, 8), "group_size": st.one_of(st.none(), st.integers(1, 50))}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(out=SIDES, columns=SIDES, dtype=DTYPES, options=st.fixed_dictionaries({**GRIDS, "act_order": st.booleans()}))
def test_gptq_stores_what_it_predicts(out, columns, dtype, options):
    method = GPTQ(grid="minmax", **options)
    assert method.stored_bits((out, columns), 8 * dtype.itemsize) == really_stored(method, out, columns, dtype, "voroq")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(out=SIDES, columns=SIDES, dtype=DTYPES, options=st.fixed_dictionaries(GRIDS))
def test_rtn_stores_what_it_predicts(out, columns, dtype, options):
    method = RTN(**options)
    assert method.stored_bits((out, columns), 8 * dtype.itemsize) == really_stored(method, out, columns, dtype, "voroq")


PYRAMIDS = {
    "bits": st.sampled_from([1.5, 2.0, 3.0]),
    "dim": st.sampled_from([8, 16]),
    "rotation": st.sampled_from(["none", "input", "both"]),
    "gains": st.sampled_from(["levels", "paper"]),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(out=SIDES, columns=SIDES, dtype=DTYPES, options=st.fixed_dictionaries(PYRAMIDS), along=st.sampled_from(["output", "input"]))
def test_pvq_stores_what_it_predicts(out, columns, dtype, options, along):
    columns *= options["dim"] if along == "input" else 1
    method = PVQ(**options, along=along, sweeps=0)
    assert method.stored_bits((out, columns), 8 * dtype.itemsize) == really_stored(method, out, columns, dtype, "voroq")


def llama(hidden: int, inner: int, kv: int, blocks: int) -> list[tuple[str, tuple[int, int]]]:
    shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return [(f"layers.{block}.{name}", shape) for block in range(blocks) for name, shape in shapes.items()]


MODELS = {"demo": llama(384, 1024, 128, 5), "7B": llama(4096, 11008, 4096, 32)}


def spent(plan: Plan, sites) -> float:
    """Bits per weight of a plan."""
    bits = sum(plan.method_for(name).stored_bits(shape) for name, shape in sites)
    return bits / sum(math.prod(shape) for _, shape in sites)


GRID_RATES = [("gptq", 2.1), ("gptq", 4.25), ("rtn", 3.0)]
RATES = [("pvq", 1.3), ("pvq", 2.0), ("pvq", 3.25), ("pvq", 5.0), ("vptq", 1.6), ("vptq", 2.0), ("vptq", 3.3), *GRID_RATES]


@pytest.mark.parametrize(("model", "method", "bits"), [*[("demo", *rate) for rate in RATES], ("7B", "vptq", 2.0), ("7B", "gptq", 4.25)])
def test_a_budget_is_kept_and_used_up(model, method, bits):
    plan = Budget(method, bits).plan(MODELS[model])
    assert 0.98 * bits < spent(plan, MODELS[model]) <= bits
    assert {type(made) for made in plan.methods()} == {METHODS[method]}


def test_a_budget_leaves_given_options_alone():
    fixed = (("outlier_percent", 1.0), ("permute", False), ("rounds", 0))
    plan = Budget("vptq", 2.5, fixed).plan(MODELS["demo"])
    assert all(getattr(made, name) == value for made in plan.methods() for name, value in fixed)
    assert 0.98 * 2.5 < spent(plan, MODELS["demo"]) <= 2.5
    plan = Budget("vptq", 3.0, (("residual_bits", 6),)).plan(MODELS["demo"])
    assert all(made.residual_bits == 6 <= made.table_bits for made in plan.methods())
    assert spent(plan, MODELS["demo"]) <= 3.0


def test_wider_tables_count_for_more():
    """The same bits per weight cost twice as much in float32 tables, so that such a plan has fewer or smaller ones."""
    half, full = (Budget("vptq", 2.0).plan(MODELS["demo"], float_bits=bits) for bits in (16, 32))
    weights = sum(math.prod(shape) for _, shape in MODELS["demo"])
    assert sum(full.method_for(name).stored_bits(shape, 32) for name, shape in MODELS["demo"]) <= 2.0 * weights
    assert half != full


@pytest.mark.parametrize(("method", "bits"), [("vptq", 0.1), ("gptq", 2.0), ("rtn", 1.0)])
def test_bits_out_of_reach_name_the_range_and_its_end_is_reachable(method, bits):
    with pytest.raises(VoroqError, match=rf"{bits:g} bits per weight cannot be reached by {method} on this model: \d") as caught:
        Budget(method, bits).plan(MODELS["demo"])
    least = float(str(caught.value).rpartition("at least ")[2])
    assert spent(Budget(method, least).plan(MODELS["demo"]), MODELS["demo"]) == pytest.approx(least, abs=2e-3)
    assert "\n" not in str(caught.value)


def test_more_bits_than_the_method_can_use_give_the_best_it_has():
    plan = Budget("rtn", 16.0).plan(MODELS["demo"])
    assert {(made.bits, made.group_size) for made in plan.methods()} == {(8, 32)}


def test_what_is_chosen_together_has_tiles_of_one_height():
    sites = MODELS["demo"]
    pairs = [(f"layers.{block}.gate", f"layers.{block}.up") for block in range(5)]
    worth = {name: 1 + 7 * (zlib.crc32(name.encode()) % 11) for name, _ in sites}
    costs = []
    for together in ((), pairs):
        plan = Budget("vptq", 2.6).plan(sites, cost=lambda name, method: worth[name] * distortion(method), together=together)
        assert 0.98 * 2.6 < spent(plan, sites) <= 2.6 and [name for name, _ in plan.rules] == [name for name, _ in sites]
        alike = [len({plan.method_for(name).vector_length for name in pair}) == 1 for pair in pairs]
        costs.append(sum(worth[name] * distortion(method) for name, method in plan.rules))
        assert all(alike) == bool(together)
    assert costs[0] < costs[1] < 1.1 * costs[0]


def test_every_setting_of_a_menu_fits_and_says_its_true_price():
    for name in METHODS:
        for choice in menu(name, {}, (1024, 384), 16):
            assert choice.bits == choice.methods[0].stored_bits((1024, 384), 16)
            assert choice.cost > 0


def test_menus_thin_columns_only_where_that_can_be_priced_and_read():
    def percents(fixed: dict, width: int = 384, **how) -> set[float]:
        return {choice.methods[0].outlier_percent for choice in menu("vptq", fixed, (1024, width), 16, **how)}

    assert percents({}) == {0.0} and percents({}, thin=True) == {0.0, *THINNED}
    assert percents({"permute": False}, thin=True) == {0.0} and percents({"outlier_percent": 2.0}, thin=True) == {2.0}
    assert percents({"table_bits": 3}, width=8, thin=True) == {0.0, *THINNED} - {30.0, 40.0, 50.0}, "rows under 17 bits are misread"


PAIRS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 1000)), min_size=1, max_size=5)
SITES = st.lists(PAIRS, min_size=1, max_size=4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sites=SITES, budget=st.floats(0, 120))
def test_spending_is_exhaustive_search(sites, budget):
    """Never over the budget; None only if nothing fits; the best of all combinations."""
    menus = [[Choice((RTN(),), bits, float(cost)) for bits, cost in pairs] for pairs in sites]
    combinations = [c for c in product(*menus) if sum(choice.bits for choice in c) <= budget]
    found = spend(menus, budget)
    if not combinations:
        assert found is None
        return
    assert sum(choice.bits for choice in found) <= budget
    assert sum(choice.cost for choice in found) == min(sum(choice.cost for choice in c) for c in combinations)


def test_longer_vectors_suffer_less_down_to_the_limit_of_one():
    factors = [gaussian_factor(length) for length in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24)]
    assert factors[0] == pytest.approx(math.sqrt(3) * math.pi / 2, rel=1e-3)  # Panter and Dite
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] > 1


def test_options_are_parsed_to_the_types_of_their_fields():
    given = {"vector_length": "8", "outlier_percent": "1.5", "permute": "No", "normalize": " std"}
    assert parse_options("vptq", {**given, "normalize": "std"}) == {
        "vector_length": 8,
        "outlier_percent": 1.5,
        "permute": False,
        "normalize": "std",
    }
    for word, value in {"none": None, "NULL": None, "64": 64}.items():
        assert parse_options("gptq", {"group_size": word}) == {"group_size": value}
    for word, value in {"true": True, "ON": True, "1": True, "yes": True, "false": False, "off": False, "0": False}.items():
        assert parse_options("gptq", {"act_order": word}) == {"act_order": value}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gptq", {"colour": "red"}, "gptq has no option 'colour'; valid options are bits, group_size, act_order, grid, damping"),
        ("gptq", {"bits": "four"}, "option bits=four is not of type int"),
        ("gptq", {"bits": "4.0"}, "option bits=4.0 is not of type int"),
        ("gptq", {"bits": "none"}, "option bits=none is not of type int"),
        ("gptq", {"act_order": "maybe"}, "option act_order=maybe is not true or false"),
        ("gptq", {"damping": "1,5"}, "option damping=1,5 is not of type float"),
        ("gptq", {"grid": "log"}, "grid='log' is unknown; choose minmax or mse"),
        ("gptq", {"group_size": "0"}, "group_size=0 is out of range"),
        ("rtn", {"bits": "0"}, "bits=0 is out of range; a grid has 1 to 8 bits"),
        ("vptq", {"outlier_percent": "51"}, "outlier_percent=51 is out of range; give 0 to 50"),
        ("vptq", {"residual_bits": "9", "table_bits": "8"}, "residual_bits=9 is out of range; give 0 to 8"),
        ("aqlm", {}, "unknown method 'aqlm'; choose one of vptq, pvq, gptq, rtn"),
    ],
)
def test_options_that_cannot_be_are_refused(method, options, message):
    with pytest.raises(VoroqError) as caught:
        make_plan(method, None, options)
    assert message in str(caught.value)


def test_options_that_set_the_rate_make_a_plan_and_others_a_budget():
    assert make_plan("vptq", None, {"table_bits": "8"}) == Plan(VPTQ(table_bits=8))
    assert make_plan("gptq", None, {"bits": "3", "group_size": "none"}) == Plan(GPTQ(bits=3, group_size=None))
    assert make_plan("vptq", None, {"damping": "0.1"}) == Budget("vptq", 2.0, (("damping", 0.1),))
    assert make_plan("rtn", None, {}) == Budget("rtn", 4.25)
    assert make_plan("pvq", None, {"rotation": "none"}) == Budget("pvq", 3.25, (("rotation", "none"),))
    assert make_plan("pvq", None, {"bits": "3.25"}) == Plan(PVQ(bits=3.25))
    assert make_plan("vptq", 3.0, {"vector_length": "4"}) == Budget("vptq", 3.0, (("vector_length", 4),))


@pytest.mark.parametrize("bits", [0.0, -1.0, 16.5, math.nan, math.inf])
def test_rates_that_cannot_be_are_refused(bits):
    with pytest.raises(VoroqError, match="out of range; give more than 0 and at most 16"):
        make_plan("vptq", bits, {})


def test_a_budget_for_an_unknown_method_names_the_known_ones():
    with pytest.raises(VoroqError, match="unknown method 'awq'; choose one of vptq, pvq, gptq, rtn"):
        Budget("awq", 4.0).plan(MODELS["demo"])


def test_the_first_rule_that_matches_decides():
    plan = Plan(RTN(), (("*.layers.0.*", None), ("*.down_proj", GPTQ()), ("*.layers.[12].*", VPTQ())))
    expected = {
        "model.layers.0.mlp.down_proj": None,
        "model.layers.1.mlp.down_proj": GPTQ(),
        "model.layers.2.mlp.up_proj": VPTQ(),
        "model.layers.3.mlp.up_proj": RTN(),
        "model.LAYERS.0.mlp.up_proj": RTN(),
    }
    assert {name: plan.method_for(name) for name in expected} == expected
    assert plan.methods() == (RTN(), GPTQ(), VPTQ())
    assert Plan(None, (("a", RTN()),)).method_for("b") is None
