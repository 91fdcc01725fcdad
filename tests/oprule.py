"""The rule of numerics.py for a call of an operator."""

from __future__ import annotations

from typing import Any

import torch
from fuzzjudge import consistency_sizes
from numerics import assert_close, assert_equal, assert_rounding
from opcases import as_dtype, is_empty, reference, run, run_operator
from torch import Tensor

from benchmarks.naive import MAGNITUDES, ORACLES
from cisc_ext.ops.registry import Operator


def assert_meets_rule(operator: Operator, impl: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Require dtypes and values of results and gradients, and give them."""
    got = run_operator(operator, inputs, impl)
    want = reference(operator, inputs)
    names = "/".join(
        str(inputs[name].dtype).removeprefix("torch.") for name in operator.features if name in inputs
    )
    for name, value in got.items():
        if name.startswith("grad_"):
            assert value.dtype == inputs[name.removeprefix("grad_")].dtype, name
        elif value.is_floating_point():
            assert value.dtype == torch.float32, name
    if is_empty(inputs):
        for name, value in got.items():
            assert_close(value, want[name], 0, what=f"{name} of {names}")
        return got
    # What is not finite is judged by its place; the sizes are those of the rest.
    finite = {
        name: value.nan_to_num(0, 0, 0) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    naive = run(ORACLES[operator.name], as_dtype(finite, torch.float32), operator.differentiable)
    exact = as_dtype(finite, torch.float64, "cpu")
    magnitude: Any = MAGNITUDES[operator.name](**exact) if operator.differentiable else 0.0
    # Near 0 and 1 a rounding of the map is many of the slope.
    sizes = consistency_sizes(**exact) if operator.name == "map_consistency" else {}
    for name, value in got.items():
        what = f"{name} of {names}"
        if not value.is_floating_point():
            assert_equal(value.cpu(), want[name], what=what)
            continue
        size = want[name].nan_to_num(0, 0, 0).abs().max() if name.startswith("grad_") else magnitude
        size = sizes[name] if name.startswith("grad_") and name in sizes else size
        assert_rounding(value, want[name], naive[name].to(value.dtype), size, what=what)
    return got
