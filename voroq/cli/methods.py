"""`voroq methods`: every method and its options."""

import ast
from dataclasses import fields
from inspect import getdoc, getsource
from itertools import pairwise
from textwrap import dedent
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from voroq.cli import options
from voroq.cli.console import emit


def methods(as_json: options.Json = False) -> None:
    """List the methods of voroq quantize and the options of each, with defaults.

    [bold]Examples[/]

      voroq methods

      voroq quantize MODEL OUT --method vptq --option vector_length=4 --option table_bits=8
    """
    from voroq.methods import METHODS

    found = {name: {"about": getdoc(cls).splitlines()[0], "options": method_options(cls)} for name, cls in METHODS.items()}
    emit(found, as_json, *(view(name, method) for name, method in found.items()))


def method_options(cls: type) -> dict[str, dict[str, Any]]:
    """Field -> {"default", "help"} of a method's dataclass; the help is the string that follows the field in the source."""
    body = ast.parse(dedent(getsource(cls))).body[0].body
    texts = {
        field.target.id: text.value.value
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    return {field.name: {"default": field.default, "help": texts.get(field.name, "")} for field in fields(cls)}


def view(name: str, method: dict) -> Group:
    """One method, one row per option."""
    table = Table("option", "default", "meaning")
    for key, option in method["options"].items():
        table.add_row(key, str(option["default"]), Text(option["help"]))
    return Group(Text(f"{name}: {method['about']}"), table)
