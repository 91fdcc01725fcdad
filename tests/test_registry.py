"""Which implementation serves a call, and why the others do not."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor

from cisc_ext import ops
from cisc_ext.ops import registry
from cisc_ext.ops.registry import Call, Implementation, Operator, decide, never

FLOAT = Call("cpu", (torch.float32,))
DOUBLE = Call("cpu", (torch.float64,))


def _function(*_: Any) -> Tensor:
    return torch.zeros(())


def _refuses_float64(call: Call) -> list[str]:
    return ["float64 is the reference's", "second reason"] if torch.float64 in call.dtypes else []


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Operator:
    """An operator of its own: triton never runs, cpp not with float64."""
    operator = Operator(
        name="made",
        function=_function,
        implementations=(
            Implementation("triton", _function, lambda call: ["no GPU"]),
            Implementation("cpp", _function, _refuses_float64),
            Implementation("reference", _function, never),
        ),
        samples=lambda: iter(()),
        cost=lambda inputs, passes: registry.Cost(0, 0),
        workloads=lambda: iter(()),
    )
    monkeypatch.setitem(registry.OPERATORS, "made", operator)
    return operator


@pytest.mark.parametrize("auto", [None, "auto"])
def test_auto_takes_the_first_without_obstacles(made: Operator, auto: str | None) -> None:
    chosen, passed_over = decide("made", auto, FLOAT)
    assert chosen is made.implementations[1]
    assert passed_over == {"triton": ["no GPU"]}
    chosen, passed_over = decide("made", auto, DOUBLE)
    assert chosen is made.implementations[2]
    assert passed_over == {"triton": ["no GPU"], "cpp": ["float64 is the reference's", "second reason"]}


def test_a_name_is_taken_or_refused_with_all_reasons(made: Operator) -> None:
    for implementation in made.implementations[1:]:
        assert decide("made", implementation.name, FLOAT)[0] is implementation
    message = r"^made: impl='cpp' cannot run here: float64 is the reference's; second reason$"
    with pytest.raises(ValueError, match=message):
        decide("made", "cpp", DOUBLE)
    with pytest.raises(ValueError, match=r"^made: impl='triton' cannot run here: no GPU$"):
        decide("made", "triton", FLOAT)
    with pytest.raises(ValueError, match=r"^made: impl must be 'auto', 'reference', .* got 'cuda'$"):
        decide("made", "cuda", FLOAT)


def test_an_implementation_that_was_not_written(made: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(made, implementations=made.implementations[2:])
    monkeypatch.setitem(registry.OPERATORS, "made", short)
    with pytest.raises(ValueError, match=r"^made: impl='cpp' does not exist for this operator$"):
        decide("made", "cpp", FLOAT)


@pytest.mark.usefixtures("made")
def test_decide_is_a_pure_function() -> None:
    first = decide("made", None, FLOAT)
    decide("made", None, DOUBLE)
    assert decide("made", None, FLOAT) == first
    assert not any(key[0] == "made" for key in registry._logged)


@pytest.mark.usefixtures("made")
def test_a_choice_is_logged_once_with_its_reasons(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cisc_ext.ops"):
        for _ in range(3):
            assert registry.choose("made", "reference", torch.zeros(1)) is _function
            assert registry.choose("made", None, torch.zeros(1)) is _function
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("made")]
    registry._logged.difference_update({key for key in registry._logged if key[0] == "made"})
    assert lines == ["made on cpu: reference", "made on cpu: cpp; not triton: no GPU"]


@pytest.mark.parametrize("name", registry.OPERATORS)
def test_entries_are_complete(name: str) -> None:
    operator = registry.OPERATORS[name]
    assert operator.name == name
    assert operator.function is getattr(ops, name)
    named = [implementation.name for implementation in operator.implementations]
    assert named[-1] == "reference", "auto falls back on the reference"
    assert len(set(named)) == len(named)
    assert set(named) <= set(registry.IMPLEMENTATIONS)
    assert set(operator.differentiable) <= set(operator.features)
    samples = list(operator.samples())
    assert len({sample.name for sample in samples}) == len(samples) > 2
    for sample, again in zip(samples, operator.samples(), strict=True):
        for passes in registry.PASSES:
            cost = operator.cost(sample.inputs, passes)
            assert cost.flops >= 0 and cost.bytes >= 0
        for key, value in sample.inputs.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, again.inputs[key]), "samples are the same each time"
                assert not value.is_floating_point() or value.dtype == torch.float64
    workloads = list(operator.workloads())
    assert len({workload.name for workload in workloads}) == len(workloads) > 2
    assert {workload.ladder for workload in workloads} == {False, True}
    assert decide(name, None, DOUBLE)[0].name == "reference"
    for device in ("cpu", "cuda", "meta"):
        assert not operator.implementations[-1].obstacles(Call(device, (torch.bfloat16,)))


def test_operators_are_the_files_of_the_package() -> None:
    public = {module.name for module in pkgutil.iter_modules(ops.__path__) if not module.name.startswith("_")}
    assert public - {"registry"} == set(registry.OPERATORS) == set(ops.__all__)
    for name in registry.OPERATORS:
        assert importlib.import_module(f"cisc_ext.ops.{name}")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ops.nothing
