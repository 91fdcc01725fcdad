"""What the machine can do at most, measured in the same run as what is judged by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import measure
from cisc_ext.ops import _library
from cisc_ext.ops.registry import Cost

GEMM_SIZE = 8192
_COPY_BYTES = 2**28
_RUNS = {"cpu": 2, "cuda": 10}
_FMA_RUNS = 50


def _best_ms(fn: Callable[[], Any], device: str) -> float:
    return min(measure.time_ms(fn, device=device) for _ in range(_RUNS[device]))


def gemm_tflops(dtype: torch.dtype, size: int, device: str) -> float:
    """Rate of `torch.mm` of two square matrices."""
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    out = torch.empty_like(a)
    torch.mm(a[:64], b, out=out[:64])
    return 2e-9 * size**3 / _best_ms(lambda: torch.mm(a, b, out=out), device)


def copy_gbps(device: str, size: int = _COPY_BYTES) -> float:
    """Rate of a copy, bytes read and bytes written."""
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device).unbind()
    return 2e-6 * size / _best_ms(lambda: target.copy_(source), device)


def fma_tflops(dtype: torch.dtype) -> float | None:
    """Rate of fused multiply-adds in registers: of bfloat16 where the processor has instructions for such,
    else of float32; None where nothing is compiled."""
    if not _library.LOADED:
        return None
    return round(torch.ops.cisc_ext.fma_peak(torch.empty(0, dtype=dtype), _FMA_RUNS) / 1e12, 4)


def measured(dtypes: Sequence[str], device: str, *, size: int = GEMM_SIZE) -> dict[str, Any]:
    """Ceilings by name; `flops` are those that `share` uses, by dtype, in TFLOP/s. `dtypes` have float32."""
    fma = {name: fma_tflops(getattr(torch, name)) if device == "cpu" else None for name in dtypes}
    gemm = {name: round(gemm_tflops(getattr(torch, name), size, device), 4) for name in dtypes}
    flops = {name: max(rate, fma[name] or 0.0) for name, rate in gemm.items()}
    return {
        "gemm_size": size,
        "gemm_tflops": gemm,
        "fma_tflops": fma,
        "copy_gbps": round(copy_gbps(device), 2),
        "flops": flops,
    }


def share(ceilings: dict[str, Any], dtype: str, cost: Cost, time_ms: float) -> float:
    """The larger of least time for the operations and least time for the bytes, over the time."""
    rate = ceilings["flops"][dtype if cost.products else "float32"]
    least_ms = max(cost.flops / (1e9 * rate), cost.bytes / (1e6 * ceilings["copy_gbps"]))
    return float(least_ms / time_ms)
