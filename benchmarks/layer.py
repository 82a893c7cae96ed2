"""Time of one large layer: 4096 x 4096, v = 8, k = 65536, and of the same with scikit-learn's k-means.

Ours: seeding, Lloyd iterations, error-feedback sweep: all that VPTQ does with rounds = 0. Theirs: the same with scikit-learn's Lloyd in
place of ours, from the same seeds. One iteration of theirs on a quarter of the points is timed and scaled up, since each compares every
point with every centroid.

    python benchmarks/layer.py --json benchmarks/results/layer.json
"""

import sys
import time

import torch
from common import arguments, publish
from sklearn.cluster import KMeans

from voroq.codebook.table import Table
from voroq.methods.gptq import activation_order
from voroq.moments import Moments, observe
from voroq.numerics.kmeans import kmeans, seed
from voroq.numerics.linalg import damped, proxy_loss
from voroq.pipeline.memory import peak_memory
from voroq.quantized import Band, Tile
from voroq.rounding.feedback import feedback


def problem(size: int) -> tuple[torch.Tensor, Moments]:
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(size, size, generator=rng) / size**0.5
    scale = torch.exp(0.5 * torch.randn(size, generator=rng))
    moments = Moments.empty(size)
    for _ in range(4):
        x = torch.randn(3 * size // 4, size, generator=rng)
        moments = observe(moments, (x + x.roll(1, 1)) * scale)
    return w, moments


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="Lloyd iterations of both")
    args = parser.parse_args()
    size, bits, share = (512, 10, 1) if args.quick else (4096, 16, 4)
    w, moments = problem(size)
    rng = torch.Generator().manual_seed(0)
    clock = Clock()

    h, _ = damped(moments.hessian(), 0.01)
    w = w[:, activation_order(h)]
    h = h[activation_order(h)][:, activation_order(h)]
    points = Tile(8, 1).cut(w)
    importance = h.diagonal().repeat(len(points) // size)
    clock("preparing")
    start = seed(points, importance, 2**bits, rng)
    seeding = clock("seeding")
    centroids = kmeans(points, importance, 2**bits, rng, steps=args.steps, start=start)
    lloyd = clock(f"{args.steps} Lloyd iterations")
    done = feedback(w, h, [Band(0, size, Tile(8, 1), Table(centroids))])
    sweep = clock("sweep")
    loss = float(done.loss.sum() / proxy_loss(w, h).sum())
    memory = peak_memory()["rss"]

    some = slice(0, len(points) // share)
    clock("")
    KMeans(2**bits, init=start.numpy(), n_init=1, max_iter=1, tol=0).fit(points[some].numpy(), sample_weight=importance[some].numpy())
    # one iteration and the assignment that follows it; each costs in proportion to the points
    theirs = clock("scikit-learn, one iteration") * share / 2 * (args.steps + 1)

    parts = {"seeding_s": seeding, "lloyd_s": lloyd, "sweep_s": sweep}
    rows = [
        {"k-means": "voroq", **parts, "whole_s": sum(parts.values()), "ratio": 1.0},
        {"k-means": "scikit-learn", **parts, "lloyd_s": theirs, "whole_s": seeding + theirs + sweep,
         "ratio": (seeding + theirs + sweep) / sum(parts.values())},
    ]  # fmt: skip
    title = f"{size} x {size}, v = 8, k = {2**bits}, {args.steps} Lloyd iterations"
    publish(title, rows, args, relative_proxy_loss=loss, peak_rss=memory, sklearn_share_of_points=1 / share)


class Clock:
    """Seconds since it was last asked, told as they pass."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def __call__(self, what: str) -> float:
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        if what:
            print(f"{what}: {passed:.1f} s", file=sys.stderr, flush=True)
        return passed


if __name__ == "__main__":
    main()
