"""What the tests on a GPU are made of, tried on the CPU; and inputs larger than a block of the kernels, there
and here."""

from __future__ import annotations

import pytest
import torch
from gpucases import (
    DTYPES,
    IMPLEMENTATIONS,
    aligned,
    alike,
    call_of,
    changed,
    one_elsewhere,
    same_bits,
    samples,
    skip_unless_there,
    without_gradient,
    workloads,
)
from opcases import cast
from oprule import assert_meets_rule
from torch import Tensor

from benchmarks.aligned_samples import aligned_samples
from cisc_ext.ops.registry import OPERATORS, Operator, Sample

CPP = [pytest.param(OPERATORS[name], id=f"{name}-cpp") for name in OPERATORS]


@pytest.mark.parametrize("operator", CPP)
def test_runs_are_alike(operator: Operator) -> None:
    skip_unless_there(operator, "cpp", "cpu")
    for dtype in DTYPES:
        inputs = cast(operator, next(operator.samples()), (dtype,) * len(operator.features))
        call = call_of(operator, inputs, "cpp")
        alike(call, 3, str(dtype))
        outputs = without_gradient(operator, inputs, "cpp")
        assert len(call()) == len(outputs) + len(operator.differentiable)
        same_bits(outputs[1:], call()[1 : len(outputs)], "without a gradient")


@pytest.mark.parametrize(
    ("operator", "impl", "sample", "device"), aligned("cpu", "cpp") + aligned("cuda", *IMPLEMENTATIONS)
)
def test_aligned_planes_and_channels_last(operator: Operator, impl: str, sample: Sample, device: str) -> None:
    skip_unless_there(operator, impl, device)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = cast(operator, sample, (dtype,) * len(operator.features), device)
        assert_meets_rule(operator, impl, inputs)


def test_aligned_samples_are_aligned() -> None:
    """Every operator has planes that start at 16 bytes in each precision, and pixels with channels together,
    and casting keeps both."""
    for operator in OPERATORS.values():
        last = []
        for sample in aligned_samples(operator):
            inputs = cast(operator, sample, (torch.float16,) * len(operator.features))
            maps = [inputs[name] for name in operator.features if name in inputs and inputs[name].dim() == 4]
            assert maps and all(one.shape[-2:].numel() * one.element_size() % 16 == 0 for one in maps)
            last.append(all(one.stride(1) == 1 and one.stride(3) > 1 for one in maps[:1] if one.shape[1] > 1))
        assert any(last) and not all(last), operator.name


@pytest.mark.parametrize("operator", CPP)
def test_changed_values_give_another_result(operator: Operator) -> None:
    """Or a graph that is replayed on them would show nothing."""
    skip_unless_there(operator, "cpp", "cpu")
    sample = next(operator.samples())
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features))
    other = changed(operator, inputs)
    for key, value in inputs.items():
        if isinstance(value, Tensor):
            assert (other[key].dtype, other[key].shape) == (value.dtype, value.shape)
    before, after = (call_of(operator, one, "cpp")() for one in (inputs, other))
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_bit_that_differs_is_seen() -> None:
    value = torch.zeros(3)
    same_bits([value], [value.clone()], "equal")
    same_bits([torch.full((2,), torch.nan)], [torch.full((2,), torch.nan)], "NaN")
    for other in (torch.tensor([0.0, -0.0, 0.0]), torch.zeros(4), torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(AssertionError, match="what: tensor 0"):
            same_bits([value], [other], "what")
    with pytest.raises(AssertionError):
        same_bits([value], [value, value], "what")
    drawn = iter([torch.zeros(1), torch.zeros(1), torch.ones(1)])
    with pytest.raises(AssertionError, match="what, run 3: tensor 0 differs"):
        alike(lambda: [next(drawn)], 3, "what")


def test_every_operator_is_there() -> None:
    for made in (samples(), workloads()):
        assert {(one.values[0].name, one.values[1]) for one in made} == {
            (name, impl) for name in OPERATORS for impl in ("cpp", "triton")
        }


@pytest.mark.parametrize("operator", CPP)
def test_a_tensor_on_another_device_is_refused(operator: Operator) -> None:
    """Here one without data, which is on no CPU either."""
    skip_unless_there(operator, "cpp", "cpu")
    inputs = cast(operator, next(operator.samples()), (torch.float32,) * len(operator.features))
    found = list(one_elsewhere(inputs, "meta"))
    assert [key for key, _ in found] == [key for key, value in inputs.items() if isinstance(value, Tensor)][
        1:
    ]
    for _, wrong in found:
        with pytest.raises(ValueError, match=f"^{operator.name}: .*must be on"):
            operator.function(**wrong, impl="cpp")
