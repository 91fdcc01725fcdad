"""Calls of an operator over and over, and whether they give the same bits: what test_gpu.py is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from opcases import CUDA_MARKS, cotangent, is_empty
from torch import Tensor

from benchmarks.aligned_samples import aligned_samples
from cisc_ext.ops.registry import OPERATORS, Operator

IMPLEMENTATIONS = ("cpp", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Inputs = dict[str, Any]


def samples() -> list[Any]:
    """Operator, implementation and sample of each that is not empty."""
    return [
        pytest.param(operator, impl, sample, id=f"{operator.name}-{impl}-{sample.name}-cuda")
        for operator in OPERATORS.values()
        for impl in IMPLEMENTATIONS
        for sample in operator.samples()
        if not is_empty(sample.inputs)
    ]


def workloads() -> list[Any]:
    """Operator, implementation and workload of each that is not of a ladder."""
    return [
        pytest.param(operator, impl, workload, id=f"{operator.name}-{impl}-{workload.name}-cuda")
        for operator in OPERATORS.values()
        for impl in IMPLEMENTATIONS
        for workload in operator.workloads()
        if not workload.ladder
    ]


def aligned(device: str, *impls: str) -> list[Any]:
    """Operator, implementation, aligned sample and device."""
    return [
        pytest.param(
            *(operator, impl, sample, device),
            id=f"{operator.name}-{impl}-{sample.name}-{device}",
            marks=CUDA_MARKS if device == "cuda" else [],
        )
        for operator in OPERATORS.values()
        for impl in impls
        for sample in aligned_samples(operator)
    ]


def skip_unless_there(operator: Operator, impl: str, device: str = "cuda") -> None:
    if reasons := operator.obstacles(impl, device):
        pytest.skip("; ".join(reasons))


def moved(inputs: Inputs, device: str | torch.device) -> Inputs:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def values_of(result: Any) -> list[Tensor]:
    """The outputs that are there."""
    return [value for value in (result if isinstance(result, tuple) else (result,)) if value is not None]


def call_of(operator: Operator, inputs: Inputs, impl: str) -> Callable[[], list[Tensor]]:
    """Outputs and gradients of the operator, as often as it is called."""
    leaves = {
        key: value.detach().requires_grad_(key in operator.differentiable)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in inputs.items()
    }
    wanted = [leaves[key] for key in operator.differentiable]
    start: list[Tensor] = []

    def run() -> list[Tensor]:
        outputs = values_of(operator.function(**leaves, impl=impl))
        if not wanted:
            return outputs
        if not start:
            start.append(cotangent(outputs[0].detach()))
        return [value.detach() for value in outputs] + list(torch.autograd.grad(outputs[0], wanted, start[0]))

    return run


def without_gradient(operator: Operator, inputs: Inputs, impl: str) -> list[Tensor]:
    with torch.no_grad():
        return values_of(operator.function(**inputs, impl=impl))


def same_bits(got: list[Tensor], want: list[Tensor], what: str) -> None:
    assert len(got) == len(want), what
    for place, (one, other) in enumerate(zip(got, want, strict=True)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), f"{what}: tensor {place}"
        bits = (x.contiguous().view(-1).view(torch.uint8) for x in (one, other))
        assert torch.equal(*bits), f"{what}: tensor {place} differs"


def alike(call: Callable[[], list[Tensor]], runs: int, what: str) -> None:
    """So many runs give the same bits."""
    want = call()
    for number in range(runs - 1):
        same_bits(call(), want, f"{what}, run {number + 2}")


def changed(operator: Operator, inputs: Inputs) -> Inputs:
    """Other values of the same shapes: features turned round, labels and classes in another order."""
    return {
        key: value.flip(-1) * (0.5 if key in operator.features else 1) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
    }


def one_elsewhere(inputs: Inputs, device: str) -> Iterator[tuple[str, Inputs]]:
    """The inputs with one tensor, not the first, on another device; and that tensor's name."""
    tensors = [key for key, value in inputs.items() if isinstance(value, Tensor)]
    for key in tensors[1:]:
        yield key, {**inputs, key: inputs[key].to(device)}
