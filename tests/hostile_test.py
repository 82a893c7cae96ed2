"""300 damaged folders on every run; `python benchmarks/fuzz.py --cases 20000` is the long one."""

import random
import struct
from collections import Counter

import damage
import hostile
import pytest

CASES, PARTS = 300, 6


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return hostile.bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("part", range(PARTS))
def test_damage_is_refused_in_one_line_that_names_it_or_loads_as_something_valid(bases, part, tmp_path):
    kinds = Counter()
    for case in range(part, CASES, PARTS):
        found = hostile.outcome(bases[case % len(bases)], case, tmp_path)
        assert found.kind != "failed", f"case {case} ({found.damage}): {found.message}"
        kinds[found.kind] += 1
    assert kinds["refused"] > kinds["loaded"] > 0, kinds


@pytest.mark.parametrize("case", [3981, 6549, 13952, 14133, 17721])
def test_what_the_long_run_once_found(case, bases, tmp_path):
    found = hostile.outcome(bases[case % len(bases)], case, tmp_path)
    assert found.kind != "failed", found.message


def test_every_base_loads_unharmed_and_every_mutation_changes_something(bases, tmp_path):
    for base in bases:
        for name, data in base.items():
            (tmp_path / name).write_bytes(data)
        hostile._use(tmp_path, forward=True)
        for file in tmp_path.iterdir():
            file.unlink()
    for name, mutate in damage.MUTATIONS:
        changed = 0
        for seed in range(8 * len(bases)):
            files = dict(bases[seed % len(bases)])
            mutate(files, random.Random(seed))
            changed += files != bases[seed % len(bases)]
        assert changed >= 5, name


def test_the_judge_itself_sees_what_it_is_there_to_see(tmp_path, monkeypatch):
    base = {"model.safetensors": struct.pack("<Q", 2) + b"{}", "config.json": b"{}"}

    def crash(error):
        def use(*args, **kwargs):
            raise error

        monkeypatch.setattr(hostile, "_use", use)
        return hostile.outcome(base, 0, tmp_path).kind

    assert crash(IndexError("x")) == crash(hostile.VoroqError("two\nlines")) == crash(hostile.VoroqError("nothing")) == "failed"
    assert crash(hostile.FormatError("tensor a is missing")) == "refused"
    monkeypatch.setattr(hostile, "_use", lambda *a, **k: bytearray(2 * hostile.MEMORY))
    assert "MemoryError" in hostile.outcome(base, 0, tmp_path).message
    monkeypatch.setattr(hostile, "SECONDS", 1)

    def hang(*args, **kwargs):
        while True:
            pass

    monkeypatch.setattr(hostile, "_use", hang)
    assert "Hung" in hostile.outcome(base, 0, tmp_path).message
