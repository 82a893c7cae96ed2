"""Which method for which site.

A `Plan` is a default and rules by name. A `Budget` becomes a plan once the sites are known: it picks, per site, settings from a
menu so that everything stored ends at or below the bits asked for. Its yardstick is the distortion a Gaussian suffers at the
menu's settings, times the site's weights; or what was measured of the site (`planning.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from voroq.codebook import presets
from voroq.errors import VoroqError
from voroq.methods import GPTQ, METHODS, PVQ, RTN, VPTQ, Method, tile_height
from voroq.packed.vptq_format import LEAST_ROW
from voroq.pipeline.allocation import Choice, spend, useful

Shape = tuple[int, int]
THINNED = (5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0)
"""Percentages of the columns that may be left next to nothing."""
THIN = {"outliers": "cheapest", "outlier_vector_length": 64, "outlier_table_bits": 1}
"""And how: the format has 16 bits for every code of them, so vectors are long; and tables hardly matter, so they are small."""
STEEPER = 3.5
"""How much faster the divergence grows than the square of an error (measured: docs/vptq.md, "Which bits where")."""


@dataclass(frozen=True)
class Plan:
    """`default` for every site, except where the glob of a rule matches its name; the first match wins. None leaves a site alone."""

    default: Method | None
    rules: tuple[tuple[str, Method | None], ...] = ()

    def method_for(self, name: str) -> Method | None:
        return next((method for pattern, method in self.rules if fnmatchcase(name, pattern)), self.default)

    def methods(self) -> tuple[Method, ...]:
        return tuple(method for method in (self.default, *[method for _, method in self.rules]) if method is not None)


@dataclass(frozen=True)
class Budget:
    """At most `bits` per weight over all sites, everything stored counted, with `fixed` fields of the method left as they are."""

    method: str
    bits: float
    fixed: tuple[tuple[str, Any], ...] = ()

    def plan(
        self,
        sites: Sequence[tuple[str, Shape]],
        *,
        float_bits: int = 16,
        cost: Callable[[str, Method], float] | None = None,
        together: Sequence[Sequence[str]] = (),
    ) -> Plan:
        """The plan for `sites`, (name, (out, in)) each; `cost` says what a setting costs a site (if None: distortion times its number of
        weights). The tiles of sites `together` become equally high.

        Raises VoroqError where no setting reaches `bits`.
        """
        _check_known(self.method)
        shapes = dict(sites)
        menus = {shape: menu(self.method, dict(self.fixed), shape, float_bits, thin=cost is not None) for shape in set(shapes.values())}
        weights = sum(math.prod(shape) for shape in shapes.values())
        tied = {name for group in together for name in group}
        groups = [*(tuple(group) for group in together), *((name,) for name in shapes if name not in tied)]
        priced = {name: [_priced(choice, name, shape, cost) for choice in menus[shape]] for name, shape in sites}
        choices = spend([_alike([priced[name] for name in group]) for group in groups], self.bits * weights)
        if choices is None:
            ends = [[pick(choice.bits for choice in menus[shape]) for _, shape in sites] for pick in (min, max)]
            low, high = (sum(end) / weights for end in ends)
            given = "".join(f" with {name}={value}" for name, value in self.fixed)
            raise VoroqError(
                f"{self.bits:g} bits per weight cannot be reached by {self.method}{given} on this model: {low:.3f} to {high:.3f} can "
                f"(tables, scales and permutations included); ask for at least {math.ceil(low * 1000) / 1000:.3f}"
            )
        found = {
            name: method for group, choice in zip(groups, choices, strict=True) for name, method in zip(group, choice.methods, strict=True)
        }
        return Plan(None, tuple((name, found[name]) for name in shapes))


def make_plan(method: str, bits: float | None, options: dict[str, str]) -> Plan | Budget:
    """What the command line asked for: a budget where `bits` is given, else the method with `options` for every site.

    With neither bits nor an option that sets the rate, the budget is 2 bits for vptq, 3.25 for pvq and 4.25 for the grids.
    """
    _check_known(method)
    fixed = parse_options(method, options)
    METHODS[method](**fixed)  # refuses values out of range now, not after an hour
    if bits is None and {"bits", "vector_length", "table_bits"} & set(fixed):
        return Plan(METHODS[method](**fixed))
    if bits is None:
        bits = {"vptq": 2.0, "pvq": 3.25}.get(method, 4.25)
    if not 0 < bits <= 16:
        raise VoroqError(f"{bits:g} bits per weight is out of range; give more than 0 and at most 16")
    return Budget(method, bits, tuple(fixed.items()))


def _check_known(method: str) -> None:
    if method not in METHODS:
        raise VoroqError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")


def parse_options(method: str, options: dict[str, str]) -> dict[str, Any]:
    """`key=value` strings as typed fields of the method. Raises VoroqError naming the valid keys, or the type a key needs."""
    hints = get_type_hints(METHODS[method])
    valid = [field.name for field in fields(METHODS[method])]
    out = {}
    for key, text in options.items():
        if key not in valid:
            raise VoroqError(f"{method} has no option {key!r}; valid options are {', '.join(valid)}")
        out[key] = _parse(key, text, hints[key])
    return out


def _parse(key: str, text: str, hint: Any) -> Any:
    kinds = get_args(hint) or (hint,)
    word = text.strip().lower()
    if type(None) in kinds and word in ("none", "null"):
        return None
    kind = next(k for k in kinds if k is not type(None))
    if kind is bool:
        if word in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return word in ("true", "yes", "on", "1")
        raise VoroqError(f"option {key}={text} is not true or false")
    try:
        return kind(text)
    except ValueError:
        raise VoroqError(f"option {key}={text} is not of type {kind.__name__}") from None


def menu(name: str, fixed: dict[str, Any], shape: Shape, float_bits: int, *, thin: bool = False) -> list[Choice]:
    """All settings of a method worth trying on a matrix of `shape`, the `fixed` fields respected; `cost` is the expected distortion, which
    does not know what columns are worth. Those that leave the cheapest of them next to nothing are among them where `thin`.

    Raises VoroqError where there is none.
    """
    if name == "pvq":
        found = _pyramid_menu(fixed, shape)
    else:
        found = _vptq_menu(fixed, shape, thin) if name == "vptq" else _grid_menu(METHODS[name], fixed)
    if not found:
        raise VoroqError(f"no setting of the method fits a matrix of {shape[0]} x {shape[1]}")
    return [Choice((method,), method.stored_bits(shape, float_bits), distortion(method)) for method in found]


def distortion(method: VPTQ | PVQ | GPTQ | RTN) -> float:
    """What a unit Gaussian is expected to suffer: exact to a few percent for pyramids and tables, roughly for grids."""
    if isinstance(method, PVQ):
        return presets.distortion(method.dim, round(method.bits * method.dim))
    if isinstance(method, VPTQ):
        stages = 1.3 * 2.0 ** (-2 * method.residual_bits / method.vector_length) if method.residual_bits else 1.0
        return gaussian_factor(method.vector_length) * 2.0 ** (-2 * method.table_bits / method.vector_length) * stages
    # the square of a group's range is about six times the log of its size; the step is range / (2^b - 1), the error step^2 / 12
    return math.log(method.group_size or 4096) / (2**method.bits - 1) ** 2 / 2


def steep(distortion: float) -> float:
    """What a relative error of this size costs, up to a factor: more than in proportion, where second order no longer tells all."""
    return distortion * (1 + STEEPER * distortion)


def _priced(choice: Choice, name: str, shape: Shape, cost: Callable[[str, Method], float] | None) -> Choice:
    (method,) = choice.methods
    return replace(choice, cost=cost(name, method) if cost else choice.cost * math.prod(shape))


def _alike(menus: Sequence[Sequence[Choice]]) -> Sequence[Choice]:
    """Choices for several sites at once, whose tiles are equally high."""
    if len(menus) == 1:
        return menus[0]
    joint = []
    for height in sorted({tile_height(choice.methods[0]) for choice in menus[0]}):
        ends = [Choice((), 0, 0.0)]
        for menu in menus:
            own = useful([choice for choice in menu if tile_height(choice.methods[0]) == height])
            ends = useful([Choice((*a.methods, *b.methods), a.bits + b.bits, a.cost + b.cost) for a in ends for b in own])
        joint += ends
    return joint


def _vptq_menu(fixed: dict[str, Any], shape: Shape, thin: bool) -> list[VPTQ]:
    lengths = [fixed["vector_length"]] if "vector_length" in fixed else [2, 3, 4, 5, 6, 8, 10, 12, 16]
    # 4096 entries keep a table in a core's own cache and its training in minutes; ask for more by option
    widths = [fixed["table_bits"]] if "table_bits" in fixed else range(3, 13)
    found = []
    for length in lengths:
        for bits in widths:
            vectors = -(-shape[0] // length) * shape[1]
            if "table_bits" not in fixed and 2**bits > vectors / 8:
                continue
            if fixed.get("residual_bits", 0) > bits or shape[1] * (bits + fixed.get("residual_bits", 0)) < LEAST_ROW:
                continue
            found.append(VPTQ(**{**fixed, "vector_length": length, "table_bits": bits}))
    if not thin or not fixed.get("permute", True) or any(name.startswith("outlier") for name in fixed):
        return found
    thinned = (replace(method, **THIN, outlier_percent=percent) for method in found for percent in THINNED)
    return found + [method for method in thinned if _is_readable(method, shape[1])]


def _is_readable(method: VPTQ, width: int) -> bool:
    """Whether the official reader can read the rows of codes in a matrix of `width` columns."""
    try:
        method.columns(width)
    except VoroqError:
        return False
    return True


def _pyramid_menu(fixed: dict[str, Any], shape: Shape) -> list[PVQ]:
    dims = [fixed["dim"]] if "dim" in fixed else presets.dims()
    found = []
    for dim in dims:
        if fixed.get("along") == "input" and shape[1] % dim:
            continue
        for width in presets.widths(dim):
            if "bits" not in fixed or round(fixed["bits"] * dim) == width:
                found.append(PVQ(**{**fixed, "dim": dim, "bits": width / dim}))
    return found


def _grid_menu(kind: type[GPTQ] | type[RTN], fixed: dict[str, Any]) -> list[GPTQ | RTN]:
    widths = [fixed["bits"]] if "bits" in fixed else range(2, 9)
    groups = [fixed["group_size"]] if "group_size" in fixed else [32, 64, 128, 256, None]
    return [kind(**{**fixed, "bits": bits, "group_size": group}) for bits in widths for group in groups]


@lru_cache
def gaussian_factor(length: int) -> float:
    """Zador's factor f(d) in D = f(d) 2^(-2R) for the best quantizer of d unit Gaussians at once: 2.72 at d = 1, 1 in the limit.

    f(d) = 2 pi G(d) ((d + 2) / d)^((d + 2) / 2), with Conway and Sloane's best known second moments G(d) of lattices.
    """
    known = {1: 0.08333, 2: 0.08019, 3: 0.07854, 4: 0.07660, 5: 0.07562, 6: 0.07424, 8: 0.07168, 12: 0.07010, 16: 0.06830, 24: 0.06577}
    below, above = max(d for d in known if d <= min(length, 24)), min((d for d in known if d >= length), default=24)
    share = 0.0 if above == below else (length - below) / (above - below)
    moment = known[below] * (1 - share) + known[above] * share
    return 2 * math.pi * moment * ((length + 2) / length) ** ((length + 2) / 2)
