"""One site's work, and how a block's sites are shared among devices.

The work is a pure call: weight, moments and a generator derived from (seed, site name) go in, a packed linear comes out. Where it
runs changes nothing but the time.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from voroq.errors import VoroqError
from voroq.methods import Method
from voroq.moments import Moments
from voroq.numerics.linalg import relative_proxy_loss
from voroq.packed.base import Packed
from voroq.packed.format import bits_per_weight, pack, unpack
from voroq.shapes import Matrix

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class SiteDone:
    """A quantized site: `row` is its line in the report."""

    name: str
    packed: Packed = field(repr=False)
    row: dict


@dataclass(frozen=True)
class SiteJob:
    name: str
    method: Method
    weight: Matrix = field(repr=False)
    moments: Moments = field(repr=False)
    seed: int
    dtype: torch.dtype
    layout: str
    notes: tuple[str, ...] = ()

    def __call__(self, device: torch.device) -> SiteDone:
        """Quantize, pack and measure. Raises VoroqError naming the site."""
        began = time.perf_counter()
        w = self.weight.to(device=device, dtype=torch.float32)
        moments = self.moments.to(device)
        try:
            quantized = self.method(w, moments, generator(self.seed, self.name))
            if quantized.shape != tuple(w.shape):
                raise ValueError(f"the method made a matrix of {quantized.shape} from one of {tuple(w.shape)}")
            packed = pack(quantized, self.dtype, self.layout)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise VoroqError(f"{self.name}: {error}") from error
        row = {
            "name": self.name,
            "shape": list(w.shape),
            "method": describe(self.method),
            "bits_per_weight": bits_per_weight(packed),
            "loss": self.loss(packed),
            "tokens": self.moments.count,
            "notes": [*self.notes, *quantized.notes],
            "seconds": time.perf_counter() - began,
        }
        stored = Packed(packed.spec, {name: tensor.cpu() for name, tensor in packed.tensors.items()})
        return SiteDone(self.name, stored, row)


    def loss(self, packed: Packed) -> float:
        """The relative proxy loss of `packed`, computed where it lies."""
        made = unpack(packed).dequantize()
        h = self.moments.hessian().to(made.device) if self.moments.count else torch.eye(made.shape[1], device=made.device)
        return relative_proxy_loss(self.weight.to(made.device, torch.float32), made, h)


def describe(method: Method) -> str:
    """`repr` without the addresses in it, so that another process says the same of the same function."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(method))


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the run's seed and the site's name only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def share(call: Callable[[Job, torch.device], Result], jobs: Sequence[Job], devices: Sequence[torch.device]) -> Iterator[Result]:
    """`call(job, device)` for every job, results in the order of the jobs; one thread per device, jobs dealt in turn."""
    if len(devices) == 1:
        for job in jobs:
            yield call(job, devices[0])
        return
    pools = [ThreadPoolExecutor(1) for _ in devices]
    try:
        waiting = [pools[i % len(devices)].submit(call, job, devices[i % len(devices)]) for i, job in enumerate(jobs)]
        for result in waiting:
            yield result.result()
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


def resolve_devices(device: str) -> tuple[torch.device, ...]:
    """`auto`, `cpu`, `cuda` (all of them), or a list like `cuda:0,cuda:1`. Raises VoroqError for a device that is not there."""
    count = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if count else "cpu"
    if device == "cuda" and count:
        return tuple(torch.device("cuda", i) for i in range(count))
    found = []
    for name in device.split(","):
        try:
            one = torch.device(name.strip())
        except RuntimeError:
            raise VoroqError(f"unknown device {name!r}; give auto, cpu, cuda or a list like cuda:0,cuda:1") from None
        if one.type == "cuda" and (one.index or 0) >= count:
            raise VoroqError(f"device {name} is not available: this machine has {count} CUDA devices; use --device cpu")
        if one.type not in ("cpu", "cuda"):
            raise VoroqError(f"device {name} is not supported; give auto, cpu or cuda")
        found.append(one)
    return tuple(found)
