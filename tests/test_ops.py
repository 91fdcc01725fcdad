"""Every operator x implementation x sample x dtype, and every way torch may call them."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from numerics import assert_close, assert_equal
from opcases import (
    CASES,
    DEVICES,
    RUNS,
    SAMPLES,
    cast,
    dtype_choices,
    is_empty,
    is_interpreted,
    reference,
    run,
    run_operator,
    skip_unless_able,
)
from oprule import assert_meets_rule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.naive import MAGNITUDES, ORACLES
from cisc_ext.ops.registry import OPERATORS, Implementation, Operator, Sample

REFERENCES = [
    pytest.param(OPERATORS[name], sample, id=f"{name}-{sample.name}") for (name, _), sample in SAMPLES.items()
]
DIFFERENTIABLE = [
    pytest.param(OPERATORS[name], sample, id=f"{name}-{sample.name}")
    for (name, _), sample in SAMPLES.items()
    if OPERATORS[name].differentiable and not is_empty(sample.inputs)
]
FORWARD_AND_BACKWARD = 2


def test_every_operator_has_an_oracle() -> None:
    assert set(ORACLES) == set(OPERATORS)
    assert set(MAGNITUDES) == {name for name, operator in OPERATORS.items() if operator.differentiable}


@pytest.mark.parametrize(("operator", "sample"), REFERENCES)
def test_reference_is_the_naive_expression(operator: Operator, sample: Sample) -> None:
    got = reference(operator, sample.inputs)
    if is_empty(sample.inputs):
        for name, value in got.items():
            none = -1 if name == "output1" and operator.name == "cross_similarity" else 0
            assert_equal(value, torch.full_like(value, none), what=name)
        return
    want = run(ORACLES[operator.name], sample.inputs, operator.differentiable)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == want[name].dtype
        assert_close(value, want[name], 0 if not value.is_floating_point() else 1e-12, what=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation", "sample"), CASES)
def test_implementation(
    operator: Operator, implementation: Implementation, sample: Sample, device: str
) -> None:
    # For the interpreter, all dtypes and mixed ones in the smaller samples; in the others one low precision.
    small = max(value.numel() for value in sample.inputs.values() if isinstance(value, Tensor)) < 200
    whole = small or not is_interpreted(implementation, device)
    for dtypes in islice(dtype_choices(operator, mixed=whole), None if whole else 2):
        inputs = cast(operator, sample, dtypes, device)
        skip_unless_able(operator, implementation, inputs)
        got = assert_meets_rule(operator, implementation.name, inputs)
        for name, value in got.items():
            assert value.device.type == device, name


def _smooth(operator: Operator, sample: Sample) -> dict[str, Any]:
    """Inputs with a derivative: no zero vectors, maps away from the clamp's kinks at 0 and 1."""
    inputs = dict(sample.inputs)
    if operator.name == "prototype_similarity":
        inputs["prototypes"] = torch.where(inputs["prototypes"] == 0, 0.5, inputs["prototypes"])
    if operator.name == "map_consistency":
        inputs["similarity"] = 0.1 + 0.8 * inputs["similarity"].sigmoid()
    return inputs


@pytest.mark.parametrize(("operator", "sample"), DIFFERENTIABLE)
def test_gradcheck(operator: Operator, sample: Sample) -> None:
    inputs = _smooth(operator, sample)
    leaves = [inputs[name].clone().requires_grad_() for name in operator.differentiable]
    rest = {name: value for name, value in inputs.items() if name not in operator.differentiable}

    def function(*tensors: Tensor) -> Tensor:
        result = operator.function(**dict(zip(operator.differentiable, tensors, strict=True)), **rest)
        return result[0] if isinstance(result, tuple) else result

    few = sum(leaf.numel() for leaf in leaves) <= 300
    assert torch.autograd.gradcheck(function, leaves, fast_mode=not few)


class _Recorder(TorchDispatchMode):
    """Keeps the calls of this package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cisc_ext":
            assert not kwargs
            self.calls.setdefault(func, tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation"), RUNS)
def test_opcheck(operator: Operator, implementation: Implementation, device: str) -> None:
    sample = next(s for s in operator.samples() if not is_empty(s.inputs))
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features), device)
    skip_unless_able(operator, implementation, inputs)
    with _Recorder() as recorder:
        run_operator(operator, inputs, implementation.name)
    assert recorder.calls
    for op, args in recorder.calls.items():
        leaves = tuple(
            arg.clone().requires_grad_()
            if isinstance(arg, Tensor)
            and argument.name in operator.differentiable
            and "backward" not in str(op)
            else arg
            for argument, arg in zip(op._schema.arguments, args, strict=True)
        )
        torch.library.opcheck(op, leaves)
    backward = [op for op in recorder.calls if "backward" in str(op)]
    gradient_in_forward = operator.name in ("map_consistency", "rectified_cross_entropy")
    if operator.differentiable and not gradient_in_forward:
        assert backward, "the backward pass called no operator"


def test_opcheck_of_recomputing_backward() -> None:
    """`reduction="none"` is the one case whose gradient is not made in the forward pass."""
    operator = OPERATORS["rectified_cross_entropy"]
    inputs = SAMPLES[operator.name, "per_pixel"].inputs
    with _Recorder() as recorder:
        run_operator(operator, inputs, "reference")
    assert len(recorder.calls) == FORWARD_AND_BACKWARD
    for op, args in recorder.calls.items():
        torch.library.opcheck(op, args)


def _compiled_cases() -> list[Any]:
    """One sample of each implementation, and those that take another path through Python."""
    more = {
        "cross_similarity": ("topk_classes", "softmax_own", "mean_classes"),
        "rectified_cross_entropy": ("own_likeness", "per_pixel", "ohem"),
    }
    return [
        pytest.param(operator, one, SAMPLES[operator.name, name], id=f"{operator.name}-{one.name}-{name}")
        for operator in OPERATORS.values()
        for one in operator.implementations
        for name in (next(operator.samples()).name, *more.get(operator.name, ()))
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation", "sample"), _compiled_cases())
def test_compile(operator: Operator, implementation: Implementation, sample: Sample, device: str) -> None:
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features), device)
    skip_unless_able(operator, implementation, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(operator.function, fullgraph=True, backend="aot_eager")
    got = run(compiled, inputs, operator.differentiable, impl=implementation.name)
    want = run_operator(operator, inputs, implementation.name)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert_equal(value, want[name], what=name)


def test_compile_with_dynamic_sizes() -> None:
    torch._dynamo.reset()
    for operator in OPERATORS.values():
        compiled = torch.compile(operator.function, fullgraph=True, backend="aot_eager", dynamic=True)
        sample = next(operator.samples())
        inputs = cast(operator, sample, (torch.float32,) * len(operator.features))
        got = run(compiled, inputs, operator.differentiable)
        for name, value in run_operator(operator, inputs, None).items():
            assert_equal(got[name], value, what=f"{operator.name} {name}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation", "sample"), CASES)
def test_autocast_changes_nothing(
    operator: Operator, implementation: Implementation, sample: Sample, device: str
) -> None:
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features), device)
    skip_unless_able(operator, implementation, inputs)
    want = run_operator(operator, inputs, implementation.name)
    with torch.autocast(device, torch.bfloat16):
        got = run_operator(operator, inputs, implementation.name)
    for name, value in got.items():
        assert_equal(value, want[name], what=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation", "sample"), CASES)
def test_poisoned_memory_and_repeatable(
    operator: Operator, implementation: Implementation, sample: Sample, device: str
) -> None:
    """Two runs agree in every bit, though in the second all fresh memory holds NaN or the largest integer."""
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features), device)
    skip_unless_able(operator, implementation, inputs)
    want = run_operator(operator, inputs, implementation.name)
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        got = run_operator(operator, inputs, implementation.name)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
    for name, value in got.items():
        assert_equal(value, want[name], what=name)
