"""The library of CPU kernels (`csrc/cpu`), which installing builds where there is a C++ compiler. Everything works without it, slowly.

It has a C interface and is loaded with ctypes: one binary serves every version of Python and of torch. The structures below are those
of `csrc/cpu/voroq.h`.
"""

import ctypes
import weakref
from collections import OrderedDict
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache, lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

ABI = 9
"""Of the interface; a library built from other sources is not used."""
PATH = Path(__file__).parent / "libvoroq_cpu.so"

REALS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TABLE, GRID, PYRAMID, PULSES = 0, 1, 2, 3


class Band(ctypes.Structure):
    """Consecutive columns in one codebook."""

    _fields_ = (
        *[("words", c_void_p), ("pitch", c_int64), ("first", c_int64), ("along", c_int64), ("column", c_int64)],
        *[(name, c_void_p) for name in ("table", "residual", "scale", "zeros", "pyramid")],
        *[(name, c_int32) for name in ("rows", "cols", "width", "bits", "residual_bits", "kind", "real")],
    )


class Product(ctypes.Structure):
    """x @ w.T for a packed w."""

    _fields_ = (
        *[(name, c_int64) for name in ("out", "in_", "batch", "count")],
        ("bands", ctypes.POINTER(Band)),
        *[(name, c_void_p) for name in ("x", "y", "perm", "scale", "shift", "row_scale", "row_shift")],
        *[(name, c_int32) for name in ("x_real", "real", "perm_bytes", "threads", "isa")],
    )


class Tables(ctypes.Structure):
    """The words of a tile: a table, and perhaps a second one."""

    _fields_ = (("main", c_void_p), ("rest", c_void_p), ("k", c_int64), ("k_rest", c_int64), ("v", c_int32), ("beam", c_int32))


class Union(ctypes.Structure):
    """Pyramids with a scale each."""

    _fields_ = (("dim", c_int32), ("levels", c_int32), ("pulses", ctypes.POINTER(c_int32)), ("scales", c_void_p))


class Sides(ctypes.Structure):
    """What an error in one row of tiles costs."""

    _fields_ = (("metric", c_void_p), ("inverse", c_void_p), ("columns", c_int64))


class Rows(ctypes.Structure):
    """The same for rows of tiles one below the other, and what each of them says to those below."""

    _fields_ = (*[(name, c_void_p) for name in ("metrics", "inverses", "below")], ("count", c_int64), ("columns", c_int64))


class Turn(ctypes.Structure):
    """A rotation: signs, then copies of a Hadamard matrix."""

    _fields_ = (("signs", c_void_p), ("core", c_void_p), ("n", c_int64), ("block", c_int32), ("order", c_int32))


class Linear(ctypes.Structure):
    """A linear of a step of decoding: packed, or dense where it has a weight."""

    _fields_ = (
        *[("product", Product), ("weight", c_void_p), ("bias", c_void_p), ("before", Turn), ("after", Turn)],
        *[(name, c_int32) for name in ("weight_real", "bias_real", "whole")],
    )


class Norm(ctypes.Structure):
    """Gains of a root-mean-square norm."""

    _fields_ = (("gains", c_void_p), ("real", c_int32), ("epsilon", c_float))


class Layer(ctypes.Structure):
    """One block of a decoder of Llama's form."""

    _fields_ = (
        *[(name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")],
        *[(name, Norm) for name in ("before", "between", "q_norm", "k_norm")],
        *[("keys", c_void_p), ("values", c_void_p), ("room", c_int64)],
    )


class Step(ctypes.Structure):
    """One token through all layers."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        *[(name, c_int64) for name in ("count", "hidden", "inner", "past")],
        *[("head", Linear), ("norm", Norm)],
        *[(name, c_void_p) for name in ("x", "cosines", "sines", "logits")],
        *[(name, c_int32) for name in ("heads", "pairs", "size")],
        ("scale", c_float),
        *[(name, c_int32) for name in ("real", "threads", "isa")],
    )


class Failed(RuntimeError):
    """The library refused a call; a fault of ours, not of the user's."""


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None: `problem` says why."""
    return _load()[0]


def problem() -> str | None:
    """Why there is no library, and how to get it; None if there is."""
    return _load()[1]


@cache
def isas() -> tuple[str, ...]:
    """Instruction sets that the library has and this machine understands, best first."""
    found = library()
    return tuple(found.voroq_isa(i).decode() for i in range(found.voroq_isa_count())) if found else ()


def call(name: str, *arguments: object) -> None:
    """One function of the library, which must exist and succeed."""
    status = getattr(library(), name)(*arguments)
    if status:
        raise Failed(f"{name} of {PATH.name} failed with status {status}; please report it")


class Index:
    """A table of centroids [k dim] made ready for the search; large ones are sorted, hence worth keeping (`index_of`)."""

    def __init__(self, table: Float[Tensor, "k dim"]) -> None:
        self.dim, held = table.shape[1], table.detach().float().contiguous()
        self._handle = library().voroq_index_new(held.data_ptr(), *held.shape)
        if not self._handle:
            raise MemoryError(f"no memory for the search among {table.shape[0]} centroids")

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            library().voroq_index_free(handle)

    def nearest(self, v: Float[Tensor, "n dim"], isa: int = -1) -> Int[Tensor, "n"]:
        """The place of the centroid nearest to each of `v`; of equally near ones, the first."""
        v, best = v.detach().contiguous(), torch.empty(v.shape[0], dtype=torch.int64)
        call("voroq_nearest", self._handle, v.data_ptr(), v.shape[0], best.data_ptr(), torch.get_num_threads(), isa)
        return best


class Pyramid:
    """What numbers of pyramids are decoded with, made once for a shape and kept: `pyramid`."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        weakref.finalize(self, library().voroq_pyramid_free, handle)


PYRAMID_DIMS = (8, 16)
MOST_PULSES = 127
MOST_LEVELS = 64


@lru_cache(maxsize=256)
def pyramid(dim: int, pulses: tuple[int, ...], bits: int, gains: int = 0, *, classes: bool = False) -> Pyramid | None:
    """The pyramids of a union, under one number of `bits` bits in the split order or that of `classes`, or one pyramid with `gains`; None
    where the library lacks them (the class order needs a table of all patterns, at most a million)."""
    if library() is None or dim not in PYRAMID_DIMS or max(pulses) > MOST_PULSES:
        return None
    handle = library().voroq_pyramid_new(dim, (c_int32 * len(pulses))(*pulses), len(pulses), bits, gains, classes)
    if not handle and not classes:
        raise MemoryError(f"no memory for pyramids of dimension {dim} with {pulses} pulses")
    return Pyramid(handle) if handle else None


def union(dim: int, pulses: tuple[int, ...], scales: Float[Tensor, "levels"]) -> Union:
    """The words scales[j] * y, y of pulses[j] pulses."""
    held = scales.detach().contiguous()
    words = Union(dim, len(pulses), (c_int32 * len(pulses))(*pulses), held.data_ptr())
    words.held = held  # the tensor lives as long as what points to it
    return words


def project(
    v: Float[Tensor, "n dim"], pulses: tuple[int, ...], scales: Float[Tensor, "levels"], isa: int = -1
) -> tuple[Int[Tensor, "n"], Float[Tensor, "n dim"]]:
    """Level and point y, of pulses[level] pulses, of the word scales[level] * y nearest to each of `v`; level len(pulses) is zero."""
    v = v.detach().contiguous()
    level, y = torch.empty(v.shape[0], dtype=torch.int64), torch.empty_like(v)
    words = union(v.shape[1], pulses, scales)
    call("voroq_project", words, v.data_ptr(), v.shape[0], level.data_ptr(), y.data_ptr(), torch.get_num_threads(), isa)
    return level, y


_KEPT: OrderedDict[int, tuple[weakref.ref, int, Index]] = OrderedDict()
_MOST = 8


def index_of(table: Float[Tensor, "k dim"]) -> Index:
    """The index of `table`, made once while the tensor lives and is not written to; the last few are kept."""
    found = _KEPT.get(id(table))
    if found is None or found[0]() is not table or found[1] != table._version:
        found = weakref.ref(table), table._version, Index(table)
        _KEPT[id(table)] = found
    _KEPT.move_to_end(id(table))
    while len(_KEPT) > _MOST:
        _KEPT.popitem(last=False)
    return found[2]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    mend = "install a C++ compiler (g++ or clang++) and install voroq again from source"
    if not PATH.exists():
        return None, f"{PATH.name} was not built; {mend}"
    try:
        found = ctypes.CDLL(str(PATH))
        version = int(found.voroq_abi())
    except (OSError, AttributeError) as error:
        return None, f"{PATH.name} cannot be loaded ({error}); {mend}"
    if version != ABI:
        return None, f"{PATH.name} has interface {version}, {ABI} is needed: it was built from other sources; {mend}"
    found.voroq_isa.restype, found.voroq_isa.argtypes = c_char_p, (c_int32,)
    found.voroq_product.argtypes = (ctypes.POINTER(Product),)
    found.voroq_decode.argtypes = (ctypes.POINTER(Product), c_int64, c_int64, c_void_p, c_int32)
    found.voroq_index_new.restype, found.voroq_index_new.argtypes = c_void_p, (c_void_p, c_int64, c_int32)
    found.voroq_index_free.restype, found.voroq_index_free.argtypes = None, (c_void_p,)
    found.voroq_nearest.argtypes = (c_void_p, c_void_p, c_int64, c_void_p, c_int32, c_int32)
    found.voroq_feedback_tile.argtypes = (ctypes.POINTER(Tables), c_void_p, c_void_p, c_int64, *[c_void_p] * 3)
    found.voroq_descend_tiles.argtypes = (ctypes.POINTER(Tables), ctypes.POINTER(Rows), *[c_void_p] * 4, ctypes.POINTER(c_int64))
    found.voroq_pyramid_new.restype = c_void_p
    found.voroq_pyramid_new.argtypes = (c_int32, ctypes.POINTER(c_int32), *[c_int32] * 4)
    found.voroq_pyramid_free.restype, found.voroq_pyramid_free.argtypes = None, (c_void_p,)
    found.voroq_project.argtypes = (ctypes.POINTER(Union), c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_int32)
    union, sides = ctypes.POINTER(Union), ctypes.POINTER(Sides)
    found.voroq_feedback_pulses.argtypes = (union, sides, *[c_void_p] * 4, c_int32)
    found.voroq_descend_pulses.argtypes = (union, sides, *[c_void_p] * 4, ctypes.POINTER(c_int64), c_int32)
    found.voroq_step.argtypes = (ctypes.POINTER(Step),)
    return found, None
