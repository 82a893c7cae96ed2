"""How much memory a process has taken at most, where the operating system says so; and giving back what it no longer needs."""

import ctypes
import sys
from pathlib import Path

import torch


def peak_memory() -> dict[str, int | None]:
    """Bytes: {"rss": peak resident set of this process since its start, "cuda": peak allocated on all GPUs together}.

    None where that is not known (rss on Windows, cuda without a GPU). The resident set counts imported libraries too.
    """
    return {"rss": _resident(), "cuda": _cuda()}


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still take on `device` (CPU or CUDA), or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _listed("/proc/meminfo", "MemAvailable:")


def give_back() -> None:
    """Return freed memory to the operating system, where the C library can.

    glibc keeps freed blocks of up to 32 MB; after a dozen model blocks of ever other sizes they are a tenth of the process.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in musl
        if trim is not None:
            trim(0)


def _resident() -> int | None:
    # Linux: getrusage inherits the peak of the process that started this one, /proc does not
    listed = _listed("/proc/self/status", "VmHWM:")
    if listed is not None:
        return listed
    try:
        import resource
    except ImportError:  # Windows has no such module
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kibibytes


def _listed(file: str, name: str) -> int | None:
    """Bytes that the line `name` of a file of Linux's /proc states in kibibytes, or None where there is no such file or line."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def _cuda() -> int | None:
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
