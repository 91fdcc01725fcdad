"""Peak memory of a stretch of a program."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak since it was made: of the GPU's allocator, or of this process's resident set on the CPU.

    Where the kernel cannot reset the latter (not Linux, or not allowed) it is the peak since the process
    began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif _CLEAR.exists():
            with contextlib.suppress(PermissionError):
                _CLEAR.write_text("5")

    def mib(self) -> float:
        """The peak so far in MiB."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device)) / 2**20
        if _STATUS.exists():
            line = next(row for row in _STATUS.read_text().splitlines() if row.startswith("VmHWM:"))
            return int(line.split()[1]) / 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
