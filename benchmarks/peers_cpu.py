"""The peers of `decode_cpu.py`, in an environment of their own where voroq is not installed (`make .venv-peers/installed`).

    python peers_cpu.py '{"shapes": [[4096, 4096]], "batches": [1], "repeats": 5, ...}'      JSON rows in the last line

Every peer is measured in turns with dense bfloat16; weights are random. A peer that cannot be had says why.
"""

import contextlib
import importlib
import importlib.util
import json
import sys
import time
import types

import torch
import torch._inductor.config

SECONDS = 2
"""After which no further round begins: some peers take a second for a product."""


def in_turns(works, repeats, clock):
    best, start = dict.fromkeys(works, float("inf")), time.perf_counter()
    for rounds in range(repeats + 1):
        if rounds > 1 and time.perf_counter() - start > SECONDS:
            break
        for name, work in works.items():
            begun = clock()
            work()
            best[name] = min(best[name], clock() - begun)
    return best


def clock_of(job):
    return time.process_time if job["cpu_time"] else time.perf_counter


def official_vptq(out, columns, main, residual):
    for name in ("sentence_transformers", "sentence_transformers.SentenceTransformer"):  # imported for one isinstance check
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].SentenceTransformer = type("SentenceTransformer", (), {})
    vptq = importlib.import_module("vptq")
    module = vptq.VQuantLinear(
        in_features=columns, out_features=out, vector_lens=(-1, 8), num_centroids=(-1, main), num_res_centroids=(-1, residual),
        group_num=1, group_size=columns, outlier_size=0, indices_as_float=False, enable_norm=True, enable_perm=False,
        is_indice_packed=True, bias=False, enable_proxy_error=False, dtype=torch.float32,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.normal_()
            else:
                parameter.random_()
    return module


def aqlm(out, columns, codebooks, bits):
    module = importlib.import_module("aqlm").QuantizedLinear(columns, out, 8, 1, codebooks, bits, bias=False, dtype=torch.float32)
    with torch.no_grad():
        module.codebooks.normal_()
        module.scales.fill_(0.1)
        module.codes.random_()
    return module


def gptqmodel(out, columns, main, residual):
    """Its VPTQ linear as it stands, compiled as its loader does. The packages above it stay bare: they import what it does not use."""
    for name in ("gptqmodel", "gptqmodel.models"):
        if name not in sys.modules:
            found = importlib.util.find_spec(name)
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__, sys.modules[name].__path__ = found, found.submodule_search_locations
    sys.modules["gptqmodel"].DEBUG_ON = False
    module = importlib.import_module("gptqmodel.nn_modules.qlinear.vptq_torch").VPTQLinear(
        2, columns, out, vector_lens=(-1, 8), num_centroids=(-1, main), num_res_centroids=(-1, residual), group_num=1,
        enable_norm=False, enable_perm=True, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.normal_()
        module.indices.random_()
    module.post_init()
    return module


MATRICES = {
    "official vptq, torch, v8 k256+256": (lambda out, columns: official_vptq(out, columns, 256, 256), 2.0),
    "official vptq, torch, v8 k65536": (lambda out, columns: official_vptq(out, columns, 1 << 16, -1), 2.0),
    "GPTQModel, VPTQ, v8 k256+256": (lambda out, columns: gptqmodel(out, columns, 256, 256), 2.0),
    "GPTQModel, VPTQ, v8 k65536": (lambda out, columns: gptqmodel(out, columns, 1 << 16, -1), 2.0),
    "aqlm 2x8, its CPU kernel": (lambda out, columns: aqlm(out, columns, 2, 8), 2.0),
}


def matrices(job):
    rows = []
    for out, columns in job["shapes"]:
        dense = torch.randn(out, columns, dtype=torch.bfloat16)
        for name, (make, bits) in MATRICES.items():
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    module = make(out, columns)
                for batch in job["batches"]:
                    x16 = torch.randn(batch, columns).bfloat16()
                    x = x16.to(next(t.dtype for t in module.parameters() if t.is_floating_point()))
                    with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):
                        works = {"dense": lambda x=x16, w=dense: x @ w.T, "peer": lambda x=x, m=module: m(x)}
                        found = in_turns(works, job["repeats"], clock_of(job))
                    rows.append(row(f"{out} x {columns}", batch, name, bits, found["peer"], found["dense"]))
            except Exception as problem:  # a peer's failure is a row, not the end
                rows.append(row(f"{out} x {columns}", 0, name, bits, None, None, f"{type(problem).__name__}: {problem}"[:200]))
    return rows


def models(job):
    """llama.cpp on a model of the given shape; `dense` is its own bfloat16."""
    given = (job["llama"], job["prompt"], job["new"], job["repeats"], torch.get_num_threads(), clock_of(job))
    try:
        found = importlib.import_module("peers_llama").rows(*given)
    except Exception as problem:
        return [row(job["what"], 1, "llama.cpp", None, None, None, f"{type(problem).__name__}: {problem}"[:200])]
    dense = next(times for name, _, *times in found if name == "BF16")
    rows = []
    for name, bits, *times in found:
        for kind, took, base in zip(("prefill", "decode"), times, dense, strict=True):
            note = f"{1 / took:.0f} tokens/s; ratio to its own BF16" if took else "llama.cpp crashes on this machine"
            rows.append(row(f"{job['what']}, {kind}, ms a token", 1, f"llama.cpp {name}", bits, took, base, note))
    return rows


def row(what, batch, name, bits, seconds, dense, note=""):
    return {"what": what, "batch": batch, "name": name, "bits": bits, "seconds": seconds, "dense": dense, "note": note}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    print(json.dumps([*matrices(job), *models(job)]))
