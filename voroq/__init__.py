"""voroq: extremely low-bit quantization of language models by vectors.

    voroq.quantize_model(source, out, plan)          model, tokenizer = voroq.load(out)

`import voroq` loads neither torch nor transformers; names are imported on first use. It makes transformers load our folders:
at once when transformers is there already, otherwise at the moment transformers imports its table of quantizers.
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
    "VoroqConfig": "voroq.streaming",
    "lora": "voroq.integrations.peft",
    "PyramidCache": "voroq.integrations.cache",
    "quantize_model": "voroq.front",
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


_TABLE = "transformers.quantizers.auto"


class _AfterImport:
    """Finder that registers our loader right after `transformers.quantizers.auto` is imported, and does nothing else.

    Importing that module ourselves costs seconds, so we wait for whoever needs it; every way into `from_pretrained` passes it.
    The finder lets the usual finders locate the module and adds a step to the loader they found; once the module has run, the
    original loader is in its place and the finder is out of `sys.meta_path`.
    """

    looking = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _TABLE or self.looking:
            return None
        self.looking = True  # the search below comes here again
        try:
            spec = find_spec(fullname)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self)
        return spec


class _Registering:
    """The loader of the quantizer table, followed by our registration."""

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
        import_module("voroq.integrations.transformers")


if _TABLE in sys.modules:
    import_module("voroq.integrations.transformers")
else:
    sys.meta_path.insert(0, _AfterImport())
