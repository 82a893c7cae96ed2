"""The peers of `decode_cpu.py`, in an environment of their own where voroq is not installed (`make .venv-peers/installed`).

    python peers_cpu.py '{"shapes": [[4096, 4096]], "batches": [1], "repeats": 5}'      JSON rows in the last line

Every peer is measured in turns with dense bfloat16; weights are random. A peer that cannot be had says why.
"""

import contextlib
import importlib
import json
import sys
import time
import types

import torch


def in_turns(works, repeats):
    best = dict.fromkeys(works, float("inf"))
    for _ in range(repeats + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - begun)
    return best


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


MATRICES = {
    "official vptq, torch, v8 k256+256": (lambda out, columns: official_vptq(out, columns, 256, 256), 2.0),
    "official vptq, torch, v8 k65536": (lambda out, columns: official_vptq(out, columns, 1 << 16, -1), 2.0),
    "aqlm 2x8, its CPU kernel": (lambda out, columns: aqlm(out, columns, 2, 8), 2.0),
}
PACKAGES = {"llama.cpp": "llama_cpp", "GPTQModel": "gptqmodel"}


def matrices(job):
    rows = []
    for out, columns in job["shapes"]:
        dense = torch.randn(out, columns, dtype=torch.bfloat16)
        for name, (make, bits) in MATRICES.items():
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    module = make(out, columns)
                for batch in job["batches"]:
                    x = torch.randn(batch, columns)
                    x16 = x.bfloat16()
                    with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):
                        works = {"dense": lambda x=x16, w=dense: x @ w.T, "peer": lambda x=x, m=module: m(x)}
                        found = in_turns(works, job["repeats"])
                    rows.append(row(f"{out} x {columns}", batch, name, bits, found["peer"], found["dense"]))
            except Exception as problem:  # a peer's failure is a row, not the end
                rows.append(row(f"{out} x {columns}", 0, name, bits, None, None, f"{type(problem).__name__}: {problem}"[:200]))
    return rows


def absent():
    """Peers that are compared by whole models, which is not written yet, or are not there."""
    rows = []
    for name, package in PACKAGES.items():
        try:
            importlib.import_module(package)
            rows.append(row("whole model", 0, name, None, None, None, "installed; not measured by this script"))
        except Exception as problem:
            rows.append(row("whole model", 0, name, None, None, None, f"{type(problem).__name__}: {problem}"[:200]))
    return rows


def row(what, batch, name, bits, seconds, dense, note=""):
    return {"what": what, "batch": batch, "name": name, "bits": bits, "seconds": seconds, "dense": dense, "note": note}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps([*matrices(job), *absent()]))
