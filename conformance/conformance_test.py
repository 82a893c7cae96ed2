"""What the official package makes of our files, and we of its.

    official:  w = fl(fl(fl(main + res) * scale) + bias)     every fl rounds to the tables' dtype
    ours:      w = fl(main + res) * scale + bias             in float32, rounded once, to the dtype of the activations

With `order` we compute in the official order, and then every bit must agree: the same codes, tables, order of columns. Without
normalisation the two formulas are the same; with it, `docs/format.md` states the bound that is tested here.
"""

import itertools
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ask
from voroq.codebook.residual import Residual
from voroq.packed.checkpoint import open_folder, quantization_config
from voroq.packed.conftest import random_vptq
from voroq.packed.files import Entry, write_json, write_safetensors
from voroq.packed.format import LAYOUTS, pack, unpack
from voroq.quantized import Quantized
from voroq.transform.permute import Permute

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HALF_STEP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
AXES = {
    "v": (1, 2, 3, 4, 6, 8, 12, 16),
    "sizes": ((2,), (16,), (256,), (4096,), (65536,), (16, 4), (256, 256), (4096, 2), (4096, 64), (65536, 65536)),
    "groups": (1, 2, 3),
    "outliers": ((0, 2, 8), (6, 4, 16), (12, 3, 256), (18, 64, 2)),
    "steps": ((), ("affine",), ("permute",), ("affine", "permute")),
    "out": (23, 48),
    "bias": (False, True),
    "dtype": tuple(DTYPES),
}
CASES = random.Random(0).sample([dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())], 240)
COLUMNS = 72


def name_of(case: dict) -> str:
    flags = [f"v{case['v']}", "k" + "x".join(map(str, case["sizes"])), f"g{case['groups']}", f"o{case['outliers'][0]}"]
    return "-".join([*flags, *case["steps"], str(case["out"]), *(["bias"] if case["bias"] else []), case["dtype"]])


NAMES = {name_of(case): case for case in CASES}
EVERY_CASE = pytest.mark.parametrize("name", NAMES)


def linear_of(name: str) -> Quantized:
    case = NAMES[name]
    options = {key: case[key] for key in ("v", "sizes", "groups", "outliers", "steps")}
    return random_vptq(case["out"], COLUMNS, seed=len(name) + sum(map(ord, name)), **options)


def bias_of(name: str) -> dict[str, torch.Tensor]:
    case = NAMES[name]
    return {"bias": torch.linspace(-1, 1, case["out"]).to(DTYPES[case["dtype"]])} if case["bias"] else {}


def order(q: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """The weight in the official order of operations: a literal second implementation of docs/format.md, section 2.3."""
    parts = []
    for band, codes in zip(q.bands, q.codes, strict=True):
        stages = band.codebook.stages if isinstance(band.codebook, Residual) else (band.codebook,)
        words = [stage.centroids.to(dtype)[codes[..., s].long()] for s, stage in enumerate(stages)]  # [rows cols v]
        merged = words[0] if len(words) == 1 else words[0] + words[1]
        parts.append(merged.transpose(1, 2).reshape(-1, codes.shape[1])[: q.shape[0]])
    w = torch.cat(parts, dim=1)
    for step in reversed(q.transform.steps):
        w = w[:, step.perm.long().argsort()] if isinstance(step, Permute) else w * step.scale.to(dtype) + step.shift.to(dtype)
    return w


@pytest.fixture(scope="session")
def ours(tmp_path_factory):
    """Our files of every case, with the official module's weights beside them."""
    folder = tmp_path_factory.mktemp("ours")
    for name, case in NAMES.items():
        packed = pack(linear_of(name), DTYPES[case["dtype"]], "vptq")
        path = folder / name
        path.mkdir()
        tensors = {f"m.{local}": tensor for local, tensor in (dict(packed.tensors) | bias_of(name)).items()}
        write_safetensors(path / "model.safetensors", [Entry.of(*item) for item in tensors.items()], {"format": "pt"})
        config = quantization_config("vptq", {"m": packed.spec}, {"m"} if case["bias"] else ())
        write_json(path / "config.json", {"quantization_config": config})
    ask("weights", folder)
    return folder


@EVERY_CASE
def test_the_official_module_reads_our_files_bit_for_bit(ours, name):
    case, dtype = NAMES[name], DTYPES[NAMES[name]["dtype"]]
    official = load_file(ours / name / "official.safetensors")
    packed = open_folder(ours / name).packed("m")
    q = unpack(packed)
    assert official["weight"].dtype == dtype
    assert torch.equal(official["weight"], order(q, dtype))
    single = q.dequantize().to(dtype)
    if "affine" not in case["steps"]:
        assert torch.equal(single, official["weight"])
    else:
        assert within_bound(official["weight"].double(), single.double(), q, HALF_STEP[case["dtype"]]).all()


def within_bound(official: torch.Tensor, single: torch.Tensor, q: Quantized, u: float) -> torch.Tensor:
    """|official - ours| <= 2.1 u (|w| + |w - bias|) + 2**-23, w the exact weight and u half a step of the dtype (2**-8, 2**-11, 2**-24)."""
    exact, shift = order(q, torch.float64), next(step.shift for step in q.transform.steps if not isinstance(step, Permute))
    return (official - single).abs() <= 2.1 * u * (exact.abs() + (exact - shift.double()).abs()) + 2.0**-23


def test_how_far_one_rounding_is_from_the_official_three(ours, found):
    worst = dict.fromkeys(DTYPES, 0.0)
    same = dict.fromkeys(DTYPES, (0, 0))
    error = {dtype: [0.0, 0.0] for dtype in DTYPES}
    for name, case in NAMES.items():
        if "affine" not in case["steps"]:
            continue
        dtype = case["dtype"]
        q = unpack(open_folder(ours / name).packed("m"))
        official, single = load_file(ours / name / "official.safetensors")["weight"], q.dequantize().to(DTYPES[dtype])
        exact = order(q, torch.float64)
        step = HALF_STEP[dtype] * (exact.abs() + (exact - q.transform.steps[0].shift.double()).abs())
        worst[dtype] = max(worst[dtype], float(((official.double() - single.double()).abs() / step).max()))
        same[dtype] = (same[dtype][0] + int((official == single).sum()), same[dtype][1] + single.numel())
        for i, w in enumerate((official, single)):
            error[dtype][i] += float((w.double() - exact).square().sum())
    for dtype, (equal, count) in same.items():
        assert worst[dtype] <= 2.1 or dtype == "float32"
        ratio = (error[dtype][0] / error[dtype][1]) ** 0.5
        found(
            f"normalised weights, {dtype}: {equal / count:.1%} of {count} equal to the official ones bit for bit; largest difference "
            f"{worst[dtype]:.2f} u (|w| + |w - bias|); root mean square error of the official ones {ratio:.2f} x ours"
        )
    plain = sum("affine" not in case["steps"] for case in CASES)
    found(f"{len(CASES)} linears written by us: all equal in the official order bit for bit; the {plain} without normalisation in ours too")


@EVERY_CASE
def test_what_it_computes_from_them_is_what_we_compute(ours, name):
    from voroq.layer import QuantLinear

    dtype = DTYPES[NAMES[name]["dtype"]]
    official = load_file(ours / name / "official.safetensors")["y"]
    x = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = QuantLinear.holding(open_folder(ours / name).packed("m"), bias_of(name).get("bias"))
    scale = official.abs().max()
    assert torch.allclose(layer(x), official, rtol=0, atol=float(40 * HALF_STEP[NAMES[name]["dtype"]] * scale))


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    """The same linears packed by official code."""
    folder = tmp_path_factory.mktemp("theirs")
    for name, case in NAMES.items():
        dtype, q = DTYPES[case["dtype"]], linear_of(name)
        packed = pack(q, dtype, "vptq")
        given = {local: tensor.contiguous() for local, tensor in packed.tensors.items() if "indices" not in local and local != "perm"}
        codes = list(q.codes)
        if case["outliers"][0]:
            given["outlier"] = codes.pop(0)[None, ..., 0].long()
        given["main"] = torch.stack([c[..., 0] for c in codes]).long()
        if len(case["sizes"]) == 2:
            given["res"] = torch.stack([c[..., 1] for c in codes]).long()
        if "permute" in case["steps"]:
            given["perm"] = q.transform.steps[-1].perm.long()
        given |= bias_of(name)
        (folder / name).mkdir()
        save_file({key: tensor.contiguous().clone() for key, tensor in given.items()}, folder / name / "codes.safetensors")
        config = quantization_config("vptq", {"m": packed.spec}, {"m"} if case["bias"] else ())
        write_json(folder / name / "config.json", {"quantization_config": config})
    ask("make", folder)
    return folder


@EVERY_CASE
def test_we_read_what_official_code_packed_and_pack_the_same_bytes(theirs, name):
    dtype = DTYPES[NAMES[name]["dtype"]]
    packed = open_folder(theirs / name).packed("m")
    official = load_file(theirs / name / "official.safetensors")["weight"]
    assert torch.equal(order(unpack(packed), dtype), official)
    again = pack(linear_of(name), dtype, "vptq").tensors
    assert again.keys() == packed.tensors.keys()
    for local, tensor in again.items():
        assert torch.equal(tensor, packed.tensors[local]), local


def test_we_read_what_the_official_tools_make_of_whole_models(theirs, found):
    """`pack_model` (from unpacked indices) and `absorb_perm`: the same weights, bit for bit."""
    counts = {"pack_model": 0, "absorb_perm": 0}
    for name, case in NAMES.items():
        for tool in counts:
            path = theirs / name / f"{tool}.safetensors"
            if not path.exists():
                continue
            counts[tool] += 1
            layer = json.loads((theirs / name / "config.json").read_text())["quantization_config"]["config_for_layers"]["m"]
            spec = LAYOUTS["vptq"].from_json(layer | {"enable_perm": layer["enable_perm"] and tool == "pack_model"}, "m")
            tensors = {local.removeprefix("m."): tensor for local, tensor in load_file(path).items()}
            w = order(spec.unpack(tensors), DTYPES[case["dtype"]])
            assert torch.equal(w, load_file(theirs / name / "official.safetensors")["weight"]), (tool, name)
    assert min(counts.values()) >= 5, counts
    more = f"{counts['pack_model']} by pack_model, {counts['absorb_perm']} after absorb_perm"
    found(f"{len(CASES)} linears packed by official pack_index, {more}: all read bit for bit;")
    found("    what we pack of the same codes is the same bytes")
