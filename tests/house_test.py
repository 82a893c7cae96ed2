"""The floors and the wall, read from the imports of every file; and the few habits that keep the house readable."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent / "voroq"
FLOOR = {
    **{"shapes": 0, "errors": 0, "native": 0, "numerics": 1, "moments": 2, "activations": 2, "codebook": 2, "transform": 2},
    **{"quantized": 3, "experts": 3},
    **{"products": 4, "rounding": 4, "tuning": 4, "packed": 4, "methods": 5, "kernels": 5, "layer": 6, "pipeline": 6},
    **{"integrations": 7, "evaluation": 8, "report": 8, "front": 9, "streaming": 9, "convert": 9, "prelude": 10, "cli": 11},
}
LIVING, MAKING = {"packed", "kernels", "layer", "integrations"}, {"rounding", "tuning", "methods", "pipeline"}
OWNERS = {
    "transformers": ("pipeline/compat.py", "pipeline/tokenizer.py", "integrations/", "evaluation/"),
    "triton": ("kernels/triton_",),
    "peft": ("integrations/peft",),
    "ray": ("pipeline/ray",),
    "typer": ("cli/",),
    "rich": ("cli/", "report/"),
}
"""Packages that only these files may import."""
FILES = sorted(path for path in HOUSE.rglob("*.py") if not path.name.endswith("_test.py") and path.name != "conftest.py")
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))


def room(path: Path) -> str:
    """The room a file belongs to: the folder in the house, or the file itself."""
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside functions; of `from a.b import c` both a.b and a.b.c (c may be a module)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(path: Path) -> set[str]:
    """The other rooms a file imports from."""
    parts = [name.split(".") for name in imports(path)]
    return {part[1] for part in parts if part[0] == "voroq" and len(part) > 1 and part[1] in FLOOR} - {room(path)}


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} - {"__init__"} <= FLOOR.keys()


@EVERY_FILE
def test_a_room_imports_only_from_lower_floors(path):
    if path == HOUSE / "__init__.py":  # the front of the house names what is inside, without opening any door
        assert rooms(path) == {"errors"}
        return
    assert {other: FLOOR[other] for other in rooms(path) if FLOOR[other] >= FLOOR[room(path)]} == {}


@EVERY_FILE
def test_the_wall_between_living_and_making(path):
    if room(path) in LIVING:
        assert rooms(path) & MAKING == set()
    if room(path) in MAKING:
        assert rooms(path) & {"kernels", "layer", "integrations"} == set()


@EVERY_FILE
def test_a_package_is_imported_only_by_its_owners(path):
    mine = str(path.relative_to(HOUSE))
    roots = {name.split(".")[0] for name in imports(path)}
    assert [name for name, owners in OWNERS.items() if name in roots and not mine.startswith(owners)] == []


@EVERY_FILE
def test_files_and_functions_are_short_and_keep_to_the_habits(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"
        assert not isinstance(node, ast.Global), f"global in line {node.lineno}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"bare except in line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and room(path) != "cli":
            assert node.func.id != "print", f"print in line {node.lineno}"


@pytest.mark.parametrize("name", ["numerics", "codebook", "transform", "rounding"])
def test_mathematics_knows_no_files_and_no_models(name):
    """Pure functions on tensors: no paths, no logging, no devices by name, no configuration."""
    for path in (path for path in FILES if room(path) == name):
        roots = {module.split(".")[0] for module in imports(path)}
        assert roots & {"os", "pathlib", "logging", "json", "safetensors", "huggingface_hub", "sys"} == set(), path
