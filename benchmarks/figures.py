"""The figures of docs/pvq.md and docs/vptq.md, from results that are committed: python benchmarks/figures.py

docs/figures/pvq-gaussian.svg    mean squared error of unit Gaussians against bits, above the rate-distortion bound (results/pvq.json)
docs/figures/pvq-quality.svg     gap to full precision on the bundled model against bits (results/quality*.json, pvq_model.json)
docs/figures/vptq-quality.svg    the same of VPTQ's efforts beside reference implementations (results/quality.json, `ANCHORS`)
"""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # the back end comes first

HERE = Path(__file__).resolve().parent
RESULTS, FIGURES = HERE / "results", HERE.parent / "docs" / "figures"
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.00950}
"""Mean squared errors of the best scalar quantizers of a unit Gaussian (Max 1960)."""

ANCHORS = {
    "VPTQ": [(2.050, 0.0967), (2.107, 0.0824), (2.137, 0.0795), (2.325, 0.0785), (3.043, 0.0142), (3.111, 0.0181)],
    "GPTQModel 7.7 VPTQ": [(2.073, 0.0936), (2.107, 0.0825), (2.326, 0.0841), (3.111, 0.0166)],
    "GPTVQ": [(2.133, 0.0959), (2.157, 0.0799)],
    "AQLM 2x8, untuned": [(2.327, 0.0749)],
    "GPTQ, g128": [(2.175, 0.1243), (3.182, 0.0172)],
    "llama.cpp's formats": [(2.062, 0.1741), (2.312, 0.1040), (2.562, 0.0645), (2.625, 0.0930), (3.062, 0.0297)],
}
"""Reference implementations on the bundled model, same texts and windows, at their best settings: bits and gap, by method."""


def rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def newest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every method, number of bits and effort the row that was measured last; what others were is for the tables."""
    return list({(r["row"], r["setting"].partition(" --effort ")[0], effort_of(r), round(r["bpw"], 1)): r for r in found}.values())


def effort_of(r: dict[str, Any]) -> str:
    """The word behind --effort, whatever texts follow it."""
    return r["setting"].partition("--effort ")[2].partition(" ")[0] or "fast"


def decibels(bits: float, error: float) -> float:
    """Above the least error that any code of so many bits has, 4^-bits."""
    return 10 * math.log10(error * 4**bits)


def gaussian() -> None:
    found = [(float(r["part"].split()[1]), r) for r in rows("pvq") if r["part"].startswith("gaussian")]
    lines = {
        "union of pyramids, 16 weights": [(bits, r["voroq"]) for bits, r in found],
        "gain and shape (the paper's form), 16 weights": [(bits, r["paper"]) for bits, r in found if r["paper"]],
        "scalars (Lloyd-Max)": list(LLOYD_MAX.items()),
    }
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, points in lines.items():
        axes.plot([bits for bits, _ in points], [decibels(*point) for point in points], "o-", label=label)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="bits per weight", ylabel="error above the bound, dB", title="Unit Gaussians")
    axes.legend()
    save(figure, "pvq-gaussian")


def quality() -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in ("quality", "quality-other", "quality-pvq"):
        for r in newest(rows(name)):
            method = r["setting"].split()[0].strip(",").lower()
            effort = effort_of(r)
            label = f"{method}, reference code" if r["row"] == "reference" else f"{method}, {effort}"
            lines.setdefault(label, []).append((r["bpw"], r["gap"]))
    free = [(r["bits"], r["gap"]) for r in rows("pvq_model") if r["part"] == "free"]
    lines |= {"pvq, while loading, no data": free} if free else {}
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label, points in sorted(lines.items()):
        points = sorted(set(points))
        style = "s--" if "reference" in label else "o-"
        axes.plot([bits for bits, _ in points], [gap for _, gap in points], style, label=label, markersize=4)
    axes.set(yscale="log", xlabel="bits per weight, everything stored", ylabel="mean ln(perplexity / full precision's)")
    axes.set_title("Bundled model")
    axes.legend(fontsize=8, loc="upper right")
    save(figure, "pvq-quality")


def vptq() -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label, points in ANCHORS.items():
        axes.plot([bits for bits, _ in points], [gap for _, gap in points], "s", label=label, markersize=4, alpha=0.6)
    efforts: dict[str, list[tuple[float, float]]] = {}
    for r in newest(rows("quality")):
        if r["row"] == "voroq" and r["setting"].startswith("vptq"):
            efforts.setdefault(effort_of(r), []).append((r["bpw"], r["gap"]))
    for effort, points in efforts.items():
        points.sort()
        axes.plot([bits for bits, _ in points], [gap for _, gap in points], "o-", label=f"voroq vptq, {effort}", linewidth=2)
    axes.set(yscale="log", xlabel="bits per weight, everything stored", ylabel="mean ln(perplexity / full precision's)")
    axes.set_title("Bundled model: VPTQ beside reference implementations")
    axes.legend(fontsize=8)
    save(figure, "vptq-quality")


def save(figure: Any, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "voroq"  # the same figure is the same file
    gaussian()
    quality()
    vptq()
