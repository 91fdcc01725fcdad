"""Prints, as JSON, the extra memory in MiB of every operator and implementation at sizes of real crops.

A process of its own, whose environment makes the measurement exact: test_ops_memory.py runs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import peak_extra_mib
from cisc_ext.ops.registry import OPERATORS, Call, Implementation

MIB = 2**20
CPU = Call("cpu", (torch.float32,))


def _labels(*shape: int, classes: int = 19) -> Tensor:
    """Patches of 16 x 16 pixels of one class, one in ten ignored."""
    small = torch.randint(0, classes, (*shape[:-2], shape[-2] // 16 + 1, shape[-1] // 16 + 1))
    small[torch.rand(small.shape) < 0.1] = 255
    large = small.to(torch.uint8).repeat_interleave(16, -2).repeat_interleave(16, -1)
    return large[..., : shape[-2], : shape[-1]].contiguous()


def _pool(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    features = torch.randn(2, 256, 181, 181, dtype=dtype)
    return {
        "features": features,
        "labels": _labels(2, 721, 721),
        "classes": torch.tensor([[1, 2, 3, -1]] * 2),
    }


def _pool_of(slots: int, features: tuple[int, ...], labels: tuple[int, int]) -> dict[str, Any]:
    return {
        "features": torch.randn(1, *features),
        "labels": _labels(1, *labels, classes=slots),
        "classes": torch.arange(slots)[None],
    }


def _prototypes(*size: int) -> dict[str, Any]:
    return {"query": torch.randn(*size), "prototypes": torch.randn(size[0], 19, size[1])}


def _cross(reduction: str, own: bool = False, size: tuple[int, int] = (80, 80), k: int = 8) -> dict[str, Any]:
    labels = _labels(2, 1, 381, 381, classes=4)
    rest = {"query_labels": labels[1]} if own else {"classes": torch.tensor([[0, 2]])}
    query, guide = torch.randn(2, 1, 128, *size).unbind()
    return {"query": query, "guide": guide, "guide_labels": labels[0], "reduction": reduction, "k": k, **rest}


def _cross_deep(reduction: str) -> dict[str, Any]:
    """Both sides larger than what is packed, or summed, at a time."""
    query, guide = torch.randn(1, 2048, 32, 96), torch.randn(1, 2048, 24, 128)
    labels, classes = _labels(1, 96, 512, classes=3), torch.arange(3)[None]
    inputs = {"query": query, "guide": guide, "guide_labels": labels, "classes": classes}
    return {**inputs, "reduction": reduction, "k": 8}


def _maps(slots: int, size: tuple[int, int], labels: tuple[int, int]) -> dict[str, Any]:
    classes = torch.arange(slots).repeat(2, 1)
    return {"similarity": torch.rand(2, slots, *size), "labels": _labels(2, *labels), "classes": classes}


def _rectified(**more: Any) -> dict[str, Any]:
    maps = {"similarity": torch.rand(2, 3, 181, 181), "classes": torch.arange(3).repeat(2, 1)}
    return {"logits": torch.randn(2, 19, 181, 181), "labels": _labels(2, 721, 721), **maps, **more}


def _many_classes(dtype: torch.dtype) -> dict[str, Any]:
    logits = torch.randn(16, 81, 129, 129, dtype=dtype)
    return {"logits": logits, "labels": _labels(16, 129, 129, classes=81)}


def _predict() -> dict[str, Any]:
    logits = torch.randn(1, 19, 256, 512)
    return {"logits": logits, "size": (1024, 2048), "labels": _labels(1, 1024, 2048)}


REDUCTIONS = ("max", "topk", "softmax", "mean")
SIZES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "masked_average_pool": ("masked_average_pool", _pool),
    "masked_average_pool-bfloat16": ("masked_average_pool", lambda: _pool(torch.bfloat16)),
    "masked_average_pool-one_row": (
        "masked_average_pool",
        lambda: _pool_of(3, (256, 1, 131072), (1, 262144)),
    ),
    "masked_average_pool-81_classes": (
        "masked_average_pool",
        lambda: _pool_of(81, (16, 256, 512), (512, 1024)),
    ),
    "masked_average_pool-large": ("masked_average_pool", lambda: _pool_of(3, (4, 256, 512), (2048, 4096))),
    "prototype_similarity": ("prototype_similarity", lambda: _prototypes(2, 256, 181, 181)),
    "prototype_similarity-one_row": ("prototype_similarity", lambda: _prototypes(1, 256, 1, 65536)),
    **{f"cross_similarity-{r}": ("cross_similarity", partial(_cross, r)) for r in REDUCTIONS},
    "cross_similarity-own": ("cross_similarity", lambda: _cross("softmax", own=True)),
    "cross_similarity-one_row": ("cross_similarity", lambda: _cross("max", size=(1, 6400))),
    "cross_similarity-large_k": ("cross_similarity", lambda: _cross("topk", size=(12, 64), k=700)),
    "cross_similarity-huge_k": ("cross_similarity", lambda: _cross("topk", size=(8, 8), k=10**6)),
    "map_consistency": ("map_consistency", lambda: _maps(4, (181, 181), (721, 721))),
    "map_consistency-large": ("map_consistency", lambda: _maps(2, (256, 512), (2048, 4096))),
    "rectified_cross_entropy": ("rectified_cross_entropy", _rectified),
    "rectified_cross_entropy-81_classes": (
        "rectified_cross_entropy",
        lambda: _many_classes(torch.float32),
    ),
    "rectified_cross_entropy-81_classes_bfloat16": (
        "rectified_cross_entropy",
        lambda: _many_classes(torch.bfloat16),
    ),
    "rectified_cross_entropy-none": ("rectified_cross_entropy", lambda: _rectified(reduction="none")),
    "rectified_cross_entropy-ohem": ("rectified_cross_entropy", lambda: _rectified(ohem_threshold=0.7)),
    "predict": ("predict", _predict),
}


MANY_THREADS = 64
MANY: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "masked_average_pool-many": ("masked_average_pool", lambda: _pool_of(4096, (64, 64, 64), (256, 256))),
    "prototype_similarity-many": ("prototype_similarity", lambda: _prototypes(2, 256, 181, 181)),
    "map_consistency-many": ("map_consistency", lambda: _maps(150, (64, 128), (256, 512))),
    "rectified_cross_entropy-many": (
        "rectified_cross_entropy",
        lambda: {"logits": torch.randn(1, 4096, 24, 64), "labels": _labels(1, 96, 256, classes=255)},
    ),
    "rectified_cross_entropy-many_ohem": (
        "rectified_cross_entropy",
        lambda: _rectified(ohem_threshold=0.7),
    ),
    "rectified_cross_entropy-many_columns": (
        "rectified_cross_entropy",
        lambda: {
            "logits": torch.randn(1, 4, 1, 2**16),
            "labels": _labels(1, 1, 2**18, classes=4),
            "similarity": torch.rand(1, 1, 1, 2**16),
        },
    ),
    **{
        f"cross_similarity-many_{r}": ("cross_similarity", partial(_cross_deep, r))
        for r in ("max", "topk", "softmax", "mean")
    },
    "predict-many": (
        "predict",
        lambda: {
            "logits": torch.randn(1, 256, 128, 256),
            "size": (512, 1024),
            "labels": _labels(1, 512, 1024),
        },
    ),
}
"""What the compiled operators are measured on with many threads."""


def _saved_mib(name: str, inputs: dict[str, Any]) -> float:
    """The index of "max", the winners N*S*k of "topk", the log totals of "softmax"; gradients in float32
    that the forward pass of a loss makes."""
    if name == "map_consistency" or (
        name == "rectified_cross_entropy" and inputs.get("reduction", "mean") != "none"
    ):
        return next(iter(inputs.values())).numel() * 4 / MIB
    if name != "cross_similarity":
        return 0.0
    slots = inputs["classes"].shape[1] if "classes" in inputs else 1
    winners = min(inputs.get("k", 8), inputs["guide"].shape[2] * inputs["guide"].shape[3])
    each = {"max": 8, "topk": 8 * winners, "softmax": 4, "mean": 0}[inputs["reduction"]]
    return inputs["query"].shape[2] * inputs["query"].shape[3] * slots * each / MIB


def extra_mib(name: str, impl: str, inputs: dict[str, Any]) -> float:
    """The larger of forward alone and of both passes, without inputs, outputs, gradients and saved winners.

    In both passes a gradient returned at the end would hide as much that the forward pass held for a moment.
    """
    operator = OPERATORS[name]

    def forward(leaves: dict[str, Any]) -> list[Tensor]:
        result = operator.function(**leaves, impl=impl)
        return [value for value in (result if isinstance(result, tuple) else (result,)) if value is not None]

    def both(leaves: dict[str, Any]) -> list[Tensor]:
        kept = forward(leaves)
        kept[0].sum().backward()
        return kept + [leaves[key].grad for key in operator.differentiable]

    def measure(step: Callable[[dict[str, Any]], list[Tensor]]) -> float:
        wanted = operator.differentiable
        leaves = {k: v.detach().requires_grad_() if k in wanted else v for k, v in inputs.items()}
        return peak_extra_mib(partial(step, leaves), warm_up=False) - _saved_mib(name, inputs)

    return max(measure(step) for step in ((forward, both) if operator.differentiable else (forward,)))


def planned_mib(name: str, inputs: dict[str, Any]) -> float:
    """What the launcher says that it will take."""
    from cisc_ext import _build  # only there once the extension is built

    shapes = {
        key: tuple(getattr(x, "shape", x)) for key, x in inputs.items() if isinstance(x, (Tensor, tuple))
    }
    more: dict[str, Any] = {"ohem": "ohem_threshold" in inputs}
    if name == "cross_similarity":
        more = {"reduction": inputs["reduction"], "k": inputs["k"]}
    made = [
        _build.plan(name, shapes, backward=backward, threads=MANY_THREADS, **more)["workspace_bytes"]
        for backward in (False, True)
    ]
    return max(made) / MIB


def able(name: str) -> list[Implementation]:
    """What can run here; of Triton's interpreter nothing is asked."""
    return [one for one in OPERATORS[name].implementations if not one.obstacles(CPU) + one.reservations(CPU)]


def self_test() -> dict[str, float]:
    """The measurement itself: 40 MiB held for a moment, and 40 MiB returned."""
    return {
        "held": peak_extra_mib(lambda: torch.ones(40 * 2**18).sum()),
        "returned": peak_extra_mib(lambda: torch.ones(40 * 2**18)),
    }


def main() -> None:
    result = self_test()
    for operator in OPERATORS.values():  # loads libraries
        for one in able(operator.name):
            inputs = {
                key: value.float() if key in operator.features else value
                for key, value in next(operator.samples()).inputs.items()
            }
            extra_mib(operator.name, one.name, inputs)
    for key, (name, make) in SIZES.items():
        for one in able(name):
            torch.manual_seed(0)
            result[f"{key}-{one.name}"] = extra_mib(name, one.name, make())
    torch.set_num_threads(MANY_THREADS)
    torch.rand(2**24).sum()  # the threads themselves take memory once
    for key, (name, make) in MANY.items():
        if all(one.name != "cpp" or one.obstacles(CPU) for one in OPERATORS[name].implementations):
            continue
        torch.manual_seed(0)
        inputs = make()
        result[f"{key}-cpp"] = extra_mib(name, "cpp", inputs)
        result[f"{key}-planned"] = planned_mib(name, inputs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
