"""Hidden states of every calibration window between two blocks: [windows ctx d], in memory or in a file.

Blocks read and write them batch by batch in order. A file is read and written with plain calls, not mapped, so that what
spills does not count as memory of the process.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from voroq.errors import VoroqError


class Activations:
    """A store of `shape` (windows, context, width). In memory up to `limit` bytes, else in an unnamed file in `folder`.

    Raises VoroqError if the folder has not enough free space.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, *, limit: int, folder: Path) -> None:
        self.shape = shape
        self.dtype = dtype
        self.bytes = math.prod(shape) * dtype.itemsize
        self._memory = torch.empty(shape, dtype=dtype) if self.bytes <= limit else None
        self._file = None if self.bytes <= limit else self._reserve(folder)

    @property
    def spilled(self) -> bool:
        """Whether the states are on disk."""
        return self._file is not None

    def read(self, start: int, stop: int) -> Float[Tensor, "b ctx d"]:
        """Windows start..stop on the CPU; a copy, so it may be changed."""
        if self._file is None:
            return self._memory[start:stop].clone()
        part = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        view = memoryview(part.view(torch.uint8).numpy()).cast("B")
        self._seek(start)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise VoroqError(f"the activation file ended early in window {start}; the work folder was changed while running, run again")
            done += count
        return part

    def write(self, start: int, part: Float[Tensor, "b ctx d"]) -> None:
        """Store `part` as windows start..start+b; it must have the store's context, width and dtype."""
        if part.shape[1:] != self.shape[1:] or part.dtype != self.dtype or start + part.shape[0] > self.shape[0]:
            raise ValueError(f"a store of {self.shape} {self.dtype} cannot hold {tuple(part.shape)} {part.dtype} at window {start}")
        if self._file is None:
            self._memory[start : start + part.shape[0]] = part.cpu()
            return
        view = memoryview(part.detach().cpu().contiguous().view(torch.uint8).numpy()).cast("B")
        self._seek(start)
        try:
            done = 0
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            raise VoroqError(f"cannot store activations ({error.strerror}); free {self.bytes} bytes for them and resume") from error

    def batches(self, size: int) -> Iterator[tuple[int, Float[Tensor, "b ctx d"]]]:
        """(first window, states) of every batch in order; the last may be smaller."""
        for start in range(0, self.shape[0], size):
            yield start, self.read(start, min(start + size, self.shape[0]))

    def close(self) -> None:
        """Give memory or disk back; the store cannot be used afterwards."""
        self._memory = None
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "Activations":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _seek(self, start: int) -> None:
        self._file.seek(start * math.prod(self.shape[1:]) * self.dtype.itemsize)

    def _reserve(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < self.bytes:
            raise VoroqError(f"activations need {self.bytes} bytes in {folder}, which has {free}; free some space or use fewer samples")
        # An unnamed file: the system deletes it even after a kill.
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - lives as long as the store
        os.ftruncate(file.fileno(), self.bytes)
        return file
