"""voroq: extremely low-bit quantization of language models by vectors.

    best = voroq.EFFORTS["best"];  voroq.quantize_with(best, source, out, voroq.make_plan("vptq", 2.1, best.completed("vptq", {})))
    voroq.quantize_model(source, out, plan)          model, tokenizer = voroq.load(out)

`import voroq` loads neither torch nor transformers; names are imported on first use. It makes transformers load our folders:
at once when transformers is there already, otherwise at the moment transformers imports its config reader and its table of
quantizers.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from voroq.errors import FormatError, VoroqError

__version__ = "0.1.0"

_HOME = {
    "load": "voroq.integrations.load",
    "speed_up": "voroq.integrations.decoder",
    "VoroqConfig": "voroq.streaming",
    "lora": "voroq.integrations.peft",
    "PyramidCache": "voroq.integrations.cache",
    "quantize_model": "voroq.front",
    "quantize_with": "voroq.prelude",
    "EFFORTS": "voroq.pipeline.effort",
    **dict.fromkeys(["plan_model", "read_plan"], "voroq.pipeline.planning"),
    "make_plan": "voroq.pipeline.plan",
    "rotate_model": "voroq.pipeline.rotate",
    **dict.fromkeys(["VPTQ", "PVQ", "GPTQ", "RTN", "METHODS"], "voroq.methods"),
    "Method": "voroq.methods.base",
    "Moments": "voroq.moments",
    **dict.fromkeys(["Quantized", "Band", "Tile"], "voroq.quantized"),
    **dict.fromkeys(["pack", "unpack", "bits_per_weight"], "voroq.packed.format"),
    "QuantLinear": "voroq.layer",
}
"""Public names by the module that defines them."""

__all__ = ["FormatError", "VoroqError", "__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'voroq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


_STEPS = {
    "transformers.configuration_utils": "voroq.integrations.configs",
    "transformers.quantizers.auto": "voroq.integrations.transformers",
}
"""Modules of transformers, and ours that has something to add to each."""


class _AfterImport:
    """Finder that imports `ours` right after transformers' module `theirs` is imported, and does nothing else.

    Importing transformers ourselves costs seconds, so we wait for whoever needs it; every way into `from_pretrained` passes both
    modules. The finder lets the usual finders locate the module and adds a step to the loader they found; once the module has run, the
    original loader is in its place and the finder is out of `sys.meta_path`.
    """

    def __init__(self, theirs: str, ours: str) -> None:
        self.theirs, self.ours, self.looking = theirs, ours, False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.theirs or self.looking:
            return None
        self.looking = True  # the search below comes here again
        try:
            spec = find_spec(fullname)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, self)
        return spec


class _Followed:
    """The loader of a module of transformers, followed by our step."""

    def __init__(self, loader: Any, finder: _AfterImport) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path.remove(self.finder)
        import_module(self.finder.ours)


for _theirs, _ours in _STEPS.items():
    if _theirs in sys.modules:
        import_module(_ours)
    else:
        sys.meta_path.insert(0, _AfterImport(_theirs, _ours))
