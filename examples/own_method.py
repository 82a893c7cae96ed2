"""Any callable is a method: rows of two signs, W ~ scale * sign(W), in a dozen lines. Stored in the native format, loaded like any other.

    python examples/own_method.py OUT
"""

import sys
from dataclasses import dataclass

import torch

import voroq
from voroq.codebook.table import Table
from voroq.moments import Moments
from voroq.pipeline.text import DEMO_MODEL
from voroq.quantized import Band, Quantized, Tile
from voroq.rounding.nearest import round_to_nearest
from voroq.transform.chain import Chain


@dataclass(frozen=True)
class Sign:
    """One bit per weight and one scale per row, the mean magnitude."""

    def __call__(self, w: torch.Tensor, moments: Moments, rng: torch.Generator) -> Quantized:
        signs = Table(torch.tensor([[-1.0], [1.0]], device=w.device))
        band = Band(0, w.shape[1], Tile(1, 1), signs, scale=w.abs().mean(1))
        bands, codes = round_to_nearest(w, [band])
        return Quantized((w.shape[0], w.shape[1]), Chain(), bands, codes)


def main(out: str) -> float:
    report = voroq.quantize_model(DEMO_MODEL, out, Sign(), samples=8, context=256)
    model, _ = voroq.load(out)
    print(model.model.layers[0].self_attn.q_proj)
    return report["bits_per_weight"]


if __name__ == "__main__":
    print(f"{main(sys.argv[1]):.3f} bits per weight")
