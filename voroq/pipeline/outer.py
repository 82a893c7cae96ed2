"""What lies outside the blocks (the embedding, mostly), materialised only while it runs and only as far as it runs."""

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from voroq.errors import VoroqError
from voroq.pipeline.capture import Captured, Recorder
from voroq.pipeline.weights import Weights, put


class Outer:
    """Inside `with`, modules of `skeleton` outside the blocks get their weights when they are first called.

    Parts that are never called (head, vision tower) cost nothing. Afterwards all parameters are on meta again; buffers stay on
    the device.
    """

    def __init__(self, skeleton: nn.Module, blocks_name: str, weights: Weights, device: torch.device) -> None:
        self.skeleton = skeleton
        self.blocks_name = blocks_name
        self.weights = weights
        self.device = device
        self._done: Callable[[], bool] = bool
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._loaded: dict[nn.Module, dict[str, Tensor | None]] = {}  # module -> its parameters on meta

    def __enter__(self) -> "Outer":
        for name, module in self.skeleton.named_modules():
            if name.startswith(f"{self.blocks_name}."):
                continue
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(self.device)
            if any("." not in key for key in module.state_dict()):
                self._hooks.append(module.register_forward_pre_hook(self._loader(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, parameters in self._loaded.items():
            module._parameters.update(parameters)
        self._hooks.clear()
        self._loaded.clear()

    def run(self, tokens: Int[Tensor, "b ctx"], recorder: Recorder, *, whole: bool = False) -> Any:
        """Run the model on `tokens` until all blocks were called; they are stubs that report to `recorder`. With `whole` run it to its
        end and return what it returns.

        A model may look at a weight before calling the module that has it (`ids.to(embedding.weight.device)`), and would compute
        with memory that was never written. So only a run during which nothing had to be loaded counts.
        """
        self._done = lambda: recorder.done and not whole
        while True:
            loaded, output = len(self._loaded), None
            recorder.start()
            try:
                with suppress(Captured):
                    output = self.skeleton(input_ids=tokens.to(self.device), **({"use_cache": False} if whole else {}))
            except Exception as error:  # of a run that does not count, whatever it computed with
                if len(self._loaded) > loaded:
                    continue
                if "meta" not in str(error) or not isinstance(error, RuntimeError):
                    raise
                kind = type(self.skeleton).__name__
                raise VoroqError(
                    f"{kind} uses weights outside its blocks other than by calling their module; this is not supported"
                ) from error
            if len(self._loaded) == loaded:
                return output

    def _loader(self, path: str):
        def load(module: nn.Module, args: tuple) -> None:
            # The first weights needed after the last block are those of the final norm or the head.
            if self._done():
                raise Captured
            if module in self._loaded:
                return
            names = {key: f"{path}.{key}" if path else key for key in module.state_dict() if "." not in key}
            stored = {key: self.weights.tied(name) for key, name in names.items()}
            for key in module._parameters.keys() & stored.keys():
                if stored[key] is None:
                    raise VoroqError(f"the checkpoint has no tensor for {names[key]}; it is incomplete or of another architecture")
            # A tensor that cannot be read must not count as progress: its error is the one to show.
            tensors = list(self.weights.read(name for name in stored.values() if name is not None))
            self._loaded[module] = dict(module._parameters)
            for source, tensor in tensors:
                for key in (key for key, name in stored.items() if name == source):
                    put(module, key, tensor)

        return load
