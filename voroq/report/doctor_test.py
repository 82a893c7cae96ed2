"""The doctor tells right from wrong."""

import json

import torch
from typer.testing import CliRunner

from voroq import native
from voroq.cli.app import app
from voroq.kernels import cpu
from voroq.report.doctor import PACKAGES, SPECS, diagnose

RUNNER = CliRunner()


def test_every_kernel_is_tested_and_right():
    found = diagnose()
    assert found.healthy
    lacking = {"cpu": native.library() is None, "triton": not torch.cuda.is_available()}
    assert [(test.kernel, test.spec) for test in found.tests] == [(kernel, spec) for kernel in lacking for spec in SPECS]
    assert all((test.error is None) == lacking[test.kernel] for test in found.tests)
    assert found.versions.keys() == {"python", *PACKAGES}
    assert found.versions["torch"] == torch.__version__


def test_a_kernel_that_is_wrong_fails_the_command(monkeypatch):
    monkeypatch.setattr(cpu, "supports", lambda spec, x: True)
    monkeypatch.setattr(cpu, "matmul", lambda x, packed: x.new_ones(x.shape[0], packed.spec.shape[0]))
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "WRONG" in result.stdout


def test_a_missing_library_is_explained(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "isas", lambda: ())
    monkeypatch.setattr(native, "problem", lambda: "libvoroq_cpu.so was not built; install a C++ compiler")
    result = RUNNER.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["cpu_library"], "install a C++ compiler" in found["cpu_problem"]) == (None, True)
    assert all(test["error"] is None for test in found["tests"])


def test_a_library_of_another_version_is_not_used(monkeypatch):
    native._load.cache_clear()
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    try:
        if native.PATH.exists():
            assert "was built from other sources" in native._load()[1]
        monkeypatch.setattr(native, "PATH", native.PATH.with_name("missing.so"))
        native._load.cache_clear()
        found, why = native._load()
        assert (found, why.split(";")[0]) == (None, "missing.so was not built")
    finally:
        native._load.cache_clear()
