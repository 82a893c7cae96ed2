"""What every part of VPTQ is worth, one after the other, at the bits of the reference row (docs/vptq.md has the table).

    python benchmarks/ablation.py --json benchmarks/results/ablation.json

Rows named + add to the row before them; rows named | change one thing of the row that they name. Nothing here was chosen by these texts.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bundled import measure
from common import arguments, publish

from voroq.pipeline.effort import EFFORTS, Effort
from voroq.pipeline.plan import make_plan

BITS = 2.107
PLAIN, SWEPT, FULL = {"rounds": "0"}, {"rounds": "1", "sweeps": "1"}, {"rounds": "2", "sweeps": "2"}
ONE, TWO = {"hessian": "input", "interleave": False}, {"hessian": "two-sided", "interleave": False}
STILL = {"embedding_rate": 0.0, "embedding_steps": 0}
INTERLEAVED = {"hessian": "two-sided", "interleave": True}


def settings() -> Iterator[tuple[str, dict[str, str], Effort, dict[str, Any]]]:
    """Label, options of the method, effort, options of the run."""
    yield "feedback alone, moments of inputs", PLAIN, Effort(), ONE
    yield "+ tables refitted, one descent sweep", SWEPT, Effort(), ONE
    yield "+ gradients at the outputs (two-sided)", SWEPT, Effort(), TWO
    yield "+ two rounds of two sweeps", FULL, Effort(), TWO
    yield "+ bits allocated", ALIKE, EFFORTS["fast"], TWO
    whole = replace(EFFORTS["balanced"], own_text=0, narrower=False)
    for label, left in (
        ("+ whole-model tuning", {"moves": 0.0, "guide": 0.0, "head_rate": 0.0, **STILL}),
        ("+ code moves", {"guide": 0.0, "head_rate": 0.0, **STILL}),
        ("+ guided by the blocks' outputs", {"head_rate": 0.0, **STILL}),
        ("+ the head", STILL),
        ("+ the embedding", {"embedding_steps": 0}),
        ("+ the embedding alone, before", {}),
    ):
        yield label, ALIKE, replace(whole, tuning=replace(whole.tuning, **left)), TWO
    yield "+ channels interleaved", ALIKE, whole, INTERLEAVED
    yield "+ cheap columns thinned", FULL, whole, INTERLEAVED
    yield "+ text of its own", FULL, replace(whole, own_text=EFFORTS["balanced"].own_text), INTERLEAVED
    yield "+ channels left out (balanced)", FULL, EFFORTS["balanced"], INTERLEAVED
    yield "| balanced, asymmetric", FULL, whole, {**INTERLEAVED, "mode": "asymmetric"}
    yield "| bits allocated, channels interleaved (fast)", ALIKE, EFFORTS["fast"], INTERLEAVED
    yield "| the same with cheap columns thinned (fast)", FULL, EFFORTS["fast"], INTERLEAVED
    yield "| the same, codes annealed in 100 sweeps (fast)", {**FULL, "anneal": "100"}, EFFORTS["fast"], INTERLEAVED
    yield "| two rounds, guided row groups instead of two-sided", FULL, Effort(), {**ONE, "hessian": "guided"}
    yield "| two rounds, sequential", FULL, Effort(), {**TWO, "mode": "sequential"}
    yield "| two rounds, asymmetric", FULL, Effort(), {**TWO, "mode": "asymmetric"}
    yield "| two rounds, 1 % outlier columns, v2 k64", {**FULL, **OUTLIERS}, Effort(), TWO
    yield "| two rounds, two tables a matrix", {**FULL, "groups": "2"}, Effort(), TWO
    yield "| two rounds, columns normalised", {**FULL, "normalize": "std"}, Effort(), TWO
    yield "| two rounds, best of four seedings", {**FULL, "restarts": "3"}, Effort(), TWO
    yield "| two rounds, codes annealed in 100 sweeps", {**FULL, "anneal": "100"}, Effort(), TWO
    yield "| two rounds, columns in their own order", {**FULL, "permute": "false"}, Effort(), TWO


ALIKE = {**FULL, "outlier_percent": "0"}
"""Columns of a linear all at one rate: plans are free to thin the cheapest where no percentage is given."""
OUTLIERS = {"outlier_percent": "1", "outlier_vector_length": "2", "outlier_table_bits": "6"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="the rows whose label holds this")
    parser.add_argument("--untuned", action="store_true", help="leave out the rows that tune the whole model")
    args = parser.parse_args()
    samples, windows = (16, 4) if args.quick else (512, 100)
    rows = []
    for label, options, effort, run in settings():
        if args.only in label and not (args.untuned and effort.tuning):
            rows.append(measure(label, make_plan("vptq", BITS, options), effort, samples=samples, windows=windows, **run))
    publish(f"VPTQ on the bundled model at {BITS} bits", rows, args, samples=samples, windows=windows)


if __name__ == "__main__":
    main()
