"""Every operator x implementation x sample of the registry, and how a test runs one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cisc_ext.ops.registry import OPERATORS, Call, Implementation, Operator, Sample, capability

CUDA_MARKS = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA_MARKS)]
SIMULATED = "simt" in Path(os.environ.get("CISC_OPS", "")).parts
"""Whether the library is the CUDA kernels on the CPU (CISC_SIMT=1)."""
SAMPLES = {
    (name, sample.name): sample for name, operator in OPERATORS.items() for sample in operator.samples()
}


def runs_of(*names: str) -> list[Any]:
    """Operators with each of their implementations, as parameters of a test."""
    return [
        pytest.param(OPERATORS[name], implementation, id=f"{name}-{implementation.name}")
        for name in names
        for implementation in OPERATORS[name].implementations
    ]


RUNS = runs_of(*OPERATORS)
CASES = [
    pytest.param(operator, implementation, sample, id=f"{operator.name}-{implementation.name}-{sample.name}")
    for operator in OPERATORS.values()
    for implementation in operator.implementations
    for sample in operator.samples()
]


def dtype_choices(operator: Operator, *, mixed: bool = True) -> Iterator[tuple[torch.dtype, ...]]:
    """Dtypes of `operator.features`: all alike in each precision, then mixed."""
    low = (torch.float32, torch.bfloat16, torch.float16)
    for dtype in low:
        yield (dtype,) * len(operator.features)
    if mixed and len(operator.features) == 2:
        yield from (
            (torch.float32, torch.bfloat16),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float16),
        )


def cast(
    operator: Operator, sample: Sample, dtypes: tuple[torch.dtype, ...], device: str = "cpu"
) -> dict[str, Any]:
    """A sample's inputs in `dtypes` on `device`."""
    of = dict(zip(operator.features, dtypes, strict=True))
    return {
        name: value.to(device=device, dtype=of.get(name, value.dtype)) if isinstance(value, Tensor) else value
        for name, value in sample.inputs.items()
    }


def as_dtype(inputs: dict[str, Any], dtype: torch.dtype, device: str | None = None) -> dict[str, Any]:
    """The same inputs with all floating-point tensors in `dtype`."""
    return {
        name: value.detach().to(
            device=device or value.device, dtype=dtype if value.is_floating_point() else None
        )
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def skip_unless_able(
    operator: Operator, implementation: Implementation, inputs: dict[str, Any], device: str | None = None
) -> None:
    """Skip, with the reasons, what this implementation cannot run on `device`, or where the inputs are."""
    features = [inputs[name] for name in operator.features if isinstance(inputs.get(name), Tensor)]
    device = device or features[0].device.type
    dtypes = tuple(feature.dtype for feature in features)
    if reasons := implementation.obstacles(Call(device, dtypes, capability(device, None))):
        pytest.skip("; ".join(reasons))


def is_interpreted(implementation: Implementation, device: str) -> bool:
    """Whether Triton's interpreter runs it, which takes a hundred times as long as the others."""
    return implementation.name == "triton" and device == "cpu"


def cotangent(like: Tensor) -> Tensor:
    """cos(0), cos(1), ...: what the goldens use."""
    return torch.arange(like.numel(), dtype=torch.float64).cos().view(like.shape).to(like)


def run(
    function: Callable[..., Any], inputs: dict[str, Any], differentiable: tuple[str, ...], **more: Any
) -> dict[str, Tensor]:
    """Outputs as output0, output1, ... and gradients as grad_<input> of sum(output0 * cotangent)."""
    leaves = {
        name: value.detach().requires_grad_(name in differentiable and value.is_floating_point())
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }
    result = function(**leaves, **more)
    outputs = result if isinstance(result, tuple) else (result,)
    named = {f"output{i}": value.detach() for i, value in enumerate(outputs) if value is not None}
    if differentiable:
        outputs[0].backward(cotangent(outputs[0]))
        for name in differentiable:
            grad = leaves[name].grad
            named[f"grad_{name}"] = torch.zeros_like(leaves[name]) if grad is None else grad.detach()
    return named


def run_operator(operator: Operator, inputs: dict[str, Any], impl: str | None) -> dict[str, Tensor]:
    return run(operator.function, inputs, operator.differentiable, impl=impl)


def reference(operator: Operator, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The float64 reference on the CPU, from the very values of `inputs`."""
    return run_operator(operator, as_dtype(inputs, torch.float64, "cpu"), "reference")


def is_empty(inputs: dict[str, Any]) -> bool:
    return any(isinstance(value, Tensor) and value.numel() == 0 for value in inputs.values())


BAD_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("masked_average_pool", {"features": torch.rand(1, 2, 3, 3), "labels": 0, "classes": -2}),
    (
        "cross_similarity",
        {"query": torch.rand(1, 2, 3, 3), "guide": torch.rand(1, 2, 3, 3), "guide_labels": 0, "classes": -2},
    ),
    ("map_consistency", {"similarity": torch.rand(1, 1, 3, 3), "labels": 0, "classes": -2}),
    ("rectified_cross_entropy", {"logits": torch.rand(1, 2, 3, 3), "labels": 2}),
    ("rectified_cross_entropy", {"logits": torch.rand(1, 2, 3, 3), "labels": 2, "reduction": "none"}),
    (
        "rectified_cross_entropy",
        {"logits": torch.rand(1, 2, 3, 3), "labels": 0, "similarity": torch.rand(1, 1, 3, 3), "classes": 2},
    ),
    ("predict", {"logits": torch.rand(1, 2, 3, 3), "size": (5, 5), "labels": 7}),
]


def bad_inputs(given: dict[str, Any], device: str) -> dict[str, Any]:
    """The inputs that an entry of `BAD_VALUES` stands for: one label, or all classes, are wrong."""
    inputs: dict[str, Any] = {}
    for key, value in given.items():
        if key.endswith("labels"):
            inputs[key] = torch.zeros(1, 5, 5, dtype=torch.int64, device=device)
            inputs[key][0, 4, 3] = value
        elif key == "classes":
            inputs[key] = torch.full((1, 1), value, device=device)
        else:
            inputs[key] = value.to(device) if isinstance(value, Tensor) else value
    return inputs
