"""Variants of one computation, one of which is "published": they must agree, then they are timed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from benchmarks import measure
from benchmarks.cases import DisagreementError

TOLERANCE = 1e-4

Result = tuple[Tensor, ...]  # loss and gradients
Calls = Mapping[str, Callable[[], Result]]


def disagreement(result: Result, expected: Result) -> float:
    """Largest difference of loss and gradients, each relative to the largest expected value."""
    pairs = zip(result, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def agree(what: str, calls: Calls) -> None:
    """`DisagreementError` where one computes something else than the published arithmetic."""
    expected = calls["published"]()
    for name, call in calls.items():
        error = disagreement(call(), expected) if name != "published" else 0.0
        if not error <= TOLERANCE:
            raise DisagreementError(f"{what}: {name} is {error:.1e} off the published arithmetic")


def timed(calls: Calls, device: str, repeats: int, images: int | None = None) -> dict[str, dict[str, Any]]:
    """Of each variant: time, memory, and their ratios to the published; with the number of `images` in a call
    their rate. The runs take turns, after a first one of each that is not measured."""
    counted = device == "cuda" or measure.can_measure()
    extra = {}
    for name, call in calls.items():
        call()
        extra[name] = measure.peak_extra_mib(call, device=device, warm_up=False) if counted else None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(measure.time_ms(call, device=device))
    found = {}
    for name, of_variant in times.items():
        time_ms, mib, of_published = statistics.median(of_variant), extra[name], extra["published"]
        ratios = [p / t for p, t in zip(times["published"], of_variant, strict=True)]
        found[name] = {
            "time_ms": round(time_ms, 2),
            "time_min_ms": round(min(of_variant), 2),
            **({} if images is None else {"images_per_s": round(1e3 * images / time_ms, 2)}),
            "extra_mib": None if mib is None else round(mib, 2),
            "speedup": round(statistics.median(ratios), 2),
            "memory_ratio": None if mib is None or not of_published else round(mib / of_published, 4),
        }
    return found
