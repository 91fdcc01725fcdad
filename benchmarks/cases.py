"""One operator at one size, precision and pass: how contenders run it, and what they must come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cisc_ext.ops.registry import OPERATORS, Operator, Workload

Result = tuple[Tensor, ...]
Call = Callable[[], Result]
Function = Callable[..., Any]

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest disagreement with the reference in float32."""
WINNERS_TOLERANCE = 5e-2
"""The same of gradients to winners, which rounding swaps where two are nearly as good."""
_CHECKED_PIXELS = 256


class CannotRunError(RuntimeError):
    """A contender cannot run a case; the message is the reason."""


class DisagreementError(RuntimeError):
    """A contender computes something else than what it is held against."""


@dataclass(frozen=True)
class Case:
    """`inputs` are on the device and in `dtype`."""

    operator: Operator
    workload: Workload
    dtype: torch.dtype
    passes: str
    inputs: dict[str, Any]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return next(v.device.type for v in self.inputs.values() if isinstance(v, Tensor))

    def with_inputs(self, **inputs: Any) -> Case:
        return replace(self, inputs={**self.inputs, **inputs})

    def leaves(self) -> dict[str, Any]:
        """The inputs, with gradients asked for where the operator gives one."""
        return {
            name: value.detach().requires_grad_() if name in self.operator.differentiable else value
            for name, value in self.inputs.items()
        }


def placed(operator: Operator, inputs: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The inputs on the device, with features in `dtype`: cast where they are, then moved."""
    return {
        name: value.to(dtype if name in operator.features else value.dtype).to(device)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def make_case(op: str, workload: str, dtype: str, passes: str, device: str) -> Case:
    operator = OPERATORS[op]
    one = next(w for w in operator.workloads() if w.name == workload)
    precision: torch.dtype = getattr(torch, dtype)
    return Case(operator, one, precision, passes, placed(operator, one.make(), precision, device))


def cotangent(like: Tensor) -> Tensor:
    """Gradient of the output to start backward from."""
    generator = torch.Generator().manual_seed(31)
    return torch.randn(like.shape, generator=generator).to(like)


def outputs(result: Any) -> Result:
    values = result if isinstance(result, tuple) else (result,)
    return tuple(value for value in values if value is not None)


def call_of(function: Function, case: Case, *, whole: bool = False) -> Call:
    """One run of the case's pass through `function`, which takes the operator's arguments.

    "forward" gives the outputs, "backward" the gradients from a graph that is there, "both" loss and
    gradients. `whole` runs forward before backward and gives all, as is needed to count memory.
    """
    if case.passes == "forward":

        def forward() -> Result:
            with torch.no_grad():
                return outputs(function(**case.inputs))

        return forward
    leaves = case.leaves()
    wanted = [leaves[name] for name in case.operator.differentiable]
    if case.passes == "both" or whole:

        def both() -> Result:
            (output, *_) = outputs(function(**leaves))
            return output.detach(), *torch.autograd.grad(
                output, wanted, cotangent(output) if output.dim() else None
            )

        return both
    (output, *_) = outputs(function(**leaves))
    start = cotangent(output)

    def backward() -> Result:
        return torch.autograd.grad(output, wanted, start, retain_graph=True)

    return backward


def implementation_call(case: Case, name: str, *, whole: bool = False) -> Call:
    return call_of(partial(case.operator.function, impl=name), case, whole=whole)


def in_float32(case: Case) -> Case:
    """The same case from the very values of its inputs."""
    features = {name: case.inputs[name].float() for name in case.operator.features if name in case.inputs}
    return replace(case.with_inputs(**features), dtype=torch.float32)


def narrowed(case: Case, pixels: int = _CHECKED_PIXELS) -> Case | None:
    """The case for its first few query pixels, where each is computed apart; None where they are not."""
    if "query" not in case.inputs or "classes" not in case.inputs or case.passes != "forward":
        return None
    query = case.inputs["query"]
    return case.with_inputs(query=query[:, :, : max(1, pixels // query.shape[3])])


def matching(result: Result, expected: Result) -> Result:
    """The part of `result` that `expected`, of a narrowed case, covers."""
    return tuple(
        value[:, :, : want.shape[2]] if value.shape != want.shape else value
        for value, want in zip(result, expected, strict=True)
    )


def disagreement(result: Result, expected: Result) -> float:
    """Largest over the tensors: norm of the difference over the norm, or share of integers that differ."""
    worst = 0.0
    for value, want in zip(result, expected, strict=True):
        if value.shape != want.shape:
            return float("inf")
        if want.is_floating_point():
            error = float((value.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))
        else:
            error = (
                float((value.long() - want.long()).ne(0).double().mean())
                if want.dim() == 3
                else float((value.long() - want.long()).abs().sum() / want.sum().clamp(min=1))
            )
        worst = error if not error <= worst else worst
    return worst


def expected(case: Case, *, few: bool = False) -> Result:
    """The reference's result in float32; with `few` for some pixels only, where that can be."""
    wide = in_float32(case)
    return implementation_call((narrowed(wide) if few else None) or wide, "reference")()


def off(case: Case, result: Result, expected: Result) -> str | None:
    """How far a result is off; None where it is as it should be."""
    error = disagreement(matching(result, expected), expected)
    limit = tolerance(case)
    return None if error <= limit else f"{error:.1e} off the float32 reference, {limit:g} is allowed"


def tolerance(case: Case) -> float:
    winners = case.passes == "backward" and case.inputs.get("reduction") in ("max", "topk")
    return max(TOLERANCE[case.dtype], WINNERS_TOLERANCE if winners else 0.0)
