"""Pixels against pixels: inputs at the sizes that `cross_similarity` is measured at on a GPU, and checks of
what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Call, Case, Result, call_of, cotangent, outputs
from cisc_ext.ops._workloads import CHANNELS, regions
from cisc_ext.ops.registry import OPERATORS, Workload

OP = "cross_similarity"
STREETS = {
    **{"road": 36.9, "sidewalk": 6.1, "building": 22.8, "wall": 0.66, "fence": 0.88, "pole": 1.23},
    **{"traffic light": 0.21, "traffic sign": 0.55, "vegetation": 15.9, "terrain": 1.16, "sky": 4.0},
    **{"person": 1.22, "rider": 0.14, "car": 7.0, "truck": 0.27, "bus": 0.24, "train": 0.23},
    **{"motorcycle": 0.1, "bicycle": 0.41},
}
"""Per cent of the pixels of Cityscapes, by class."""


def dense_case(
    low: tuple[int, int], dtype: torch.dtype, device: str, reduction: str = "max", batch: int = 1
) -> Case:
    """Every pixel against every pixel."""
    generator = torch.Generator(device).manual_seed(41)
    query, guide = (
        torch.randn(batch, CHANNELS, *low, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    inputs = {
        **{"query": query, "guide": guide, "reduction": reduction},
        "guide_labels": torch.zeros(batch, *low, dtype=torch.uint8, device=device),
        "classes": torch.zeros(batch, 1, dtype=torch.int64, device=device),
    }
    pixels = low[0] * low[1]
    shape = {"B": batch, "C": CHANNELS, "N": pixels, "M": pixels}
    name = f"n{pixels}_dense_{reduction}"
    workload = Workload(name, shape, dict, ("forward",), mode="dense", reduction=reduction)
    return Case(OPERATORS[OP], workload, dtype, "forward", inputs)


def own_case(case: Case, query_labels: Tensor, guide_labels: Tensor) -> Case:
    """The same pixels, each against those of its own label; labels [1,H,W] of any size."""
    device = case.inputs["query"].device
    shared = {name: value for name, value in case.inputs.items() if name != "classes"}
    labels = {"query_labels": query_labels.to(device), "guide_labels": guide_labels.to(device)}
    workload = replace(case.workload, name=case.workload.name.replace("dense", "own"), mode="own")
    return replace(case, workload=workload, inputs={**shared, **labels})


def street_labels(height: int, width: int, seed: int) -> Tensor:
    """Labels [1,H,W] uint8 in regions, each class about as frequent as in Cityscapes."""
    generator = torch.Generator().manual_seed(seed)
    return regions(1, height, width, len(STREETS), generator, crop=False, shares=list(STREETS.values()))


def operations(case: Case) -> int:
    """Of the products of all pairs."""
    query, guide = case.inputs["query"], case.inputs["guide"]
    return 2 * query.shape[1] * len(query) * query.shape[2:].numel() * guide.shape[2:].numel()


def _some(case: Case) -> list[int]:
    """The first row of the query's pixels, one in the middle, and the last."""
    height = case.inputs["query"].shape[2]
    return sorted({0, height // 2, height - 1})


def _in_float64(case: Case, rows: Sequence[int]) -> dict[str, Any]:
    """The arguments for these rows of the query's pixels alone."""
    inputs = dict(case.inputs)
    query = inputs["query"]
    if "query_labels" in inputs:
        labels = inputs["query_labels"]
        height = query.shape[2]
        picked = [(2 * row + 1) * labels.shape[1] // (2 * height) for row in rows]
        inputs["query_labels"] = labels[:, picked]
    inputs["query"] = query[:, :, list(rows)].double()
    inputs["guide"] = inputs["guide"].double()
    return inputs


@torch.no_grad()
def error(case: Case, result: Result) -> float:
    """Of some pixels, the largest distance of a value from that in float64, and of the cosine with the guide
    pixel that is said to be the best from the best. Infinite where a number is none."""
    rows = _some(case)
    inputs = _in_float64(case, rows)
    (want, *best) = outputs(OPERATORS[OP].function(**inputs, impl="reference"))
    worst = _largest(result[0][:, :, rows].double() - want)
    if case.inputs.get("return_index") and len(result) > 1:
        index = result[1][:, :, rows]  # [B,S,r,w]
        found = index >= 0
        if not bool((found == (best[0] >= 0)).all()):
            return float("inf")
        q, g = (F.normalize(inputs[name].flatten(2), dim=1) for name in ("query", "guide"))
        cosines = []
        for at in (index, best[0]):
            columns = at.clamp(min=0).flatten(2)  # [B,S,r*w]
            winners = [g[b][:, columns[b, s]] for b in range(len(g)) for s in range(columns.shape[1])]
            chosen = torch.stack(winners).unflatten(0, columns.shape[:2])
            cosines.append((q[:, None] * chosen).sum(2).view_as(want))
        worst = max(worst, _largest((cosines[0] - cosines[1]) * found))
    return worst


def _largest(difference: Tensor) -> float:
    value = float(difference.abs().max()) if difference.numel() else 0.0
    return value if value == value else float("inf")


def with_gradients(case: Case, impl: str) -> Call:
    """Value and gradients in one call, from a gradient of the value that lies there."""
    leaves = case.leaves()
    wanted = [leaves[name] for name in case.operator.differentiable]
    query = case.inputs["query"]
    start = cotangent(torch.empty(len(query), 1, *query.shape[2:], device=query.device))

    def call() -> Result:
        (value, *_) = outputs(case.operator.function(**leaves, impl=impl))
        return value.detach(), *torch.autograd.grad(value, wanted, start)

    return call


def reference_gradients(case: Case) -> Result:
    """The same by the reference, in float32."""
    features = {name: case.inputs[name].float() for name in case.operator.features}
    wide = replace(case.with_inputs(**features), dtype=torch.float32, passes="backward")
    return call_of(lambda **x: wide.operator.function(**x, impl="reference"), wide, whole=True)()
