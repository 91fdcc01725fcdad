"""Which implementation serves a call, and why the others do not."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cisc_ext import ops
from cisc_ext.ops import _implementations, registry
from cisc_ext.ops.registry import Call, Found, Implementation, Operator, decide, never

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


def test_cost_counts_what_labels_leave() -> None:
    operator = registry.OPERATORS["cross_similarity"]
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[:, 2:] = 1
    inputs = {"query": torch.ones(1, 8, 4, 4), "guide": torch.ones(1, 8, 4, 4), "guide_labels": labels}
    norms = 2 * 2 * 8 * 16
    half = operator.cost({**inputs, "classes": torch.zeros(1, 1, dtype=torch.int64)}, "forward")
    assert half.flops == 2 * 8 * 16 * 8 + norms
    own = operator.cost({**inputs, "query_labels": labels}, "forward")
    assert own.flops == 2 * 8 * (8 * 8 + 8 * 8) + norms
    none = operator.cost({**inputs, "classes": torch.full((1, 1), -1)}, "forward")
    assert none.flops == norms
    assert set(registry.PASSES) == {"forward", "backward", "both"}
    assert isinstance(half, registry.Cost)


HOPPER, AMPERE, TURING, VOLTA = (9, 0), (8, 0), (7, 5), (7, 0)
ALL = frozenset(registry.OPERATORS)
FASTER = frozenset((name, HOPPER) for name in ALL)
NO_LIBRARY, NO_TRITON = "_ops.so was not built", "Triton is not installed"
SLOWER, TESTS_ONLY = "was not measured to be faster than Triton's", "its interpreter is there for tests"

# machine, device, capability of its GPU, what "auto" takes, part of the reasons for what it passes over
CHOICES: dict[str, tuple[Found, str, tuple[int, int] | None, str, dict[str, str]]] = {
    "GPU, nothing but Triton": (Found(NO_LIBRARY, ""), "cuda", HOPPER, "triton", {"cpp": NO_LIBRARY}),
    "GPU, library without CUDA": (Found("", ""), "cuda", AMPERE, "triton", {"cpp": "no CUDA kernel"}),
    "GPU, CUDA measured to be faster": (
        Found("", "", cuda_kernels=ALL, cuda_faster=FASTER),
        "cuda",
        HOPPER,
        "cpp",
        {},
    ),
    "GPU, CUDA measured on another": (
        Found("", "", cuda_kernels=ALL, cuda_faster=FASTER),
        "cuda",
        AMPERE,
        "triton",
        {"cpp": SLOWER},
    ),
    "GPU, CUDA not measured to be faster": (
        Found("", "", cuda_kernels=ALL),
        "cuda",
        HOPPER,
        "triton",
        {"cpp": SLOWER},
    ),
    "GPU, CUDA without Triton": (Found("", NO_TRITON, cuda_kernels=ALL), "cuda", HOPPER, "cpp", {}),
    "GPU, neither": (
        Found(NO_LIBRARY, NO_TRITON),
        "cuda",
        HOPPER,
        "reference",
        {"cpp": NO_LIBRARY, "triton": NO_TRITON},
    ),
    "GPU, Triton without a C compiler": (
        Found(NO_LIBRARY, "", driver="Triton needs a C compiler"),
        "cuda",
        HOPPER,
        "reference",
        {"triton": "Triton needs a C compiler"},
    ),
    "CPU, interpreter without a C compiler": (
        Found(NO_LIBRARY, "", driver="Triton needs a C compiler", interpreted=True),
        "cpu",
        None,
        "reference",
        {"triton": TESTS_ONLY},
    ),
    "old GPU": (
        Found(NO_LIBRARY, ""),
        "cuda",
        TURING,
        "reference",
        {"triton": "Triton needs compute capability 8.0, this GPU has 7.5"},
    ),
    "old GPU, CUDA not measured": (Found("", "", cuda_kernels=ALL), "cuda", TURING, "cpp", {}),
    "older GPU, CUDA built": (
        Found("", "", cuda_kernels=ALL),
        "cuda",
        VOLTA,
        "reference",
        {
            "cpp": "the CUDA kernels need compute capability 7.5, this GPU has 7.0",
            "triton": "Triton needs compute capability 8.0, this GPU has 7.0",
        },
    ),
    "GPU, interpreter": (
        Found(NO_LIBRARY, "", interpreted=True),
        "cuda",
        HOPPER,
        "reference",
        {"triton": "TRITON_INTERPRET=1 has Triton run on the CPU"},
    ),
    "CPU": (Found("", ""), "cpu", None, "cpp", {}),
    "CPU, no library": (
        Found(NO_LIBRARY, ""),
        "cpu",
        None,
        "reference",
        {"cpp": NO_LIBRARY, "triton": "in its interpreter only"},
    ),
    "CPU, interpreter": (Found("", "", interpreted=True), "cpu", None, "cpp", {}),
    "CPU, interpreter, no library": (
        Found(NO_LIBRARY, "", interpreted=True),
        "cpu",
        None,
        "reference",
        {"cpp": NO_LIBRARY, "triton": TESTS_ONLY},
    ),
    "another device": (
        Found("", ""),
        "xpu",
        None,
        "reference",
        {"cpp": "for xpu tensors", "triton": "no Triton kernel for xpu tensors"},
    ),
}


@pytest.mark.parametrize("name", registry.OPERATORS)
@pytest.mark.parametrize("machine", CHOICES)
def test_auto_is_a_function_of_call_and_machine(machine: str, name: str) -> None:
    found, device, chip, wanted, reasons = CHOICES[machine]
    features = len(registry.OPERATORS[name].features)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        chosen, passed_over = decide(name, None, Call(device, (dtype,) * features, chip, found))
        assert chosen.name == wanted
        for other, reason in reasons.items():
            assert reason in "; ".join(passed_over[other])
    chosen, passed_over = decide(name, None, Call(device, (torch.float64,) * features, chip, found))
    assert chosen.name == "reference"
    assert all("float64 is the reference's" in passed_over[other] for other in ("cpp", "triton"))


@pytest.mark.parametrize("name", registry.OPERATORS)
def test_an_operators_obstacles_are_those_of_this_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = registry.OPERATORS[name]
    monkeypatch.setattr(registry, "capability", lambda device, _: TURING if device == "cuda" else None)
    monkeypatch.setattr(_implementations, "HERE", Found("", "", cuda_kernels=ALL - {name}))
    assert operator.obstacles("cpp", "cpu") == []
    assert operator.obstacles("cpp", "cpu", torch.float64) == ["float64 is the reference's"]
    assert operator.obstacles("cpp", "cuda") == [f"there is no CUDA kernel of {name} in this build"]
    assert operator.obstacles("triton", "cuda") == ["Triton needs compute capability 8.0, this GPU has 7.5"]
    monkeypatch.setattr(_implementations, "HERE", Found("", "", cuda_kernels=ALL))
    assert operator.obstacles("cpp", "cuda") == []


@pytest.mark.parametrize("name", registry.OPERATORS)
def test_triton_by_name(name: str) -> None:
    """Reservations do not count where it is asked for."""
    for found, device, chip in (
        (Found("", "", cuda_kernels=ALL, cuda_faster=FASTER), "cuda", HOPPER),
        (Found("", "", interpreted=True), "cpu", None),
    ):
        assert decide(name, "triton", Call(device, (torch.float32,), chip, found))[0].name == "triton"
    for found, device, message in (
        (Found("", ""), "cpu", r"in its interpreter only \(TRITON_INTERPRET=1\)"),
        (Found("", NO_TRITON), "cpu", NO_TRITON),
        (Found("", "", interpreted=True), "cuda", "TRITON_INTERPRET=1 has Triton run on the CPU"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: impl='triton' cannot run here: .*{message}"):
            decide(name, "triton", Call(device, (torch.float32,), None, found))


def test_between_the_oldest_chips_of_cuda_and_triton() -> None:
    """From 7.5 to below 8.0 the CUDA kernels are taken where they are there, measured or not."""
    some = Found("", "", cuda_kernels=frozenset({"predict"}))
    for chip, taken in (((7, 5), "cpp"), ((7, 9), "cpp"), ((8, 0), "triton"), ((7, 4), "reference")):
        call = Call("cuda", (torch.float32,), chip, some)
        chosen, passed_over = decide("predict", None, call)
        assert chosen.name == taken
        assert (chosen.name == "cpp") != ("cpp" in passed_over)
    other, why = decide("map_consistency", None, Call("cuda", (torch.float32,), TURING, some))
    assert other.name == "reference" and "no CUDA kernel of map_consistency" in why["cpp"][0]
    with pytest.raises(ValueError, match="impl='triton' cannot run here: Triton needs compute capability"):
        decide("predict", "triton", Call("cuda", (torch.float32,), TURING, some))


def test_choices_of_a_machine_that_is_not_here() -> None:
    only_triton = registry.choices("cuda", torch.bfloat16, Found(NO_LIBRARY, ""), HOPPER)
    without_cuda = "there is no CUDA kernel of {} in this build"
    assert only_triton == [
        f"{name}: triton (not cpp: {NO_LIBRARY}, {without_cuda.format(name)})" for name in sorted(ALL)
    ]
    some = Found("", "", cuda_kernels=ALL, cuda_faster=_implementations.faster(["sm_80", "sm_90a"]))
    lines = dict(line.split(": ", 1) for line in registry.choices("cuda", found=some, chip=HOPPER))
    assert lines.pop("cross_similarity") == "cpp"
    assert set(lines.values()) == {
        "triton (not cpp: its CUDA kernel was not measured to be faster than Triton's on such a GPU)"
    }
    older = dict(line.split(": ", 1) for line in registry.choices("cuda", found=some, chip=AMPERE))
    assert older["cross_similarity"].startswith("triton")
    # Without Hopper's own code it is another kernel that runs there.
    assert not _implementations.faster(["sm_75", "sm_80", "compute_90"])
    old = registry.choices("cuda", found=Found(NO_LIBRARY, ""), chip=TURING)
    assert all(": reference (not cpp: " in line and "; not triton: Triton needs" in line for line in old)


def test_what_triton_needs_to_start_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _implementations.driver_missing
    (tmp_path / "Python.h").touch()
    schemes: list[str] = []

    def get_path(name: str, scheme: str) -> str:
        schemes.append(scheme)
        return str(tmp_path)

    monkeypatch.setattr(_implementations.sysconfig, "get_path", get_path)
    bare = {"PATH": str(tmp_path)}
    assert missing(bare) == "Triton needs a C compiler (CC, gcc or clang) on a GPU, found none"
    assert missing({**bare, "CC": "cc"}) == ""
    (tmp_path / "clang").touch(mode=0o755)
    assert missing(bare) == ""
    (tmp_path / "Python.h").unlink()
    assert "the headers of this Python" in missing(bare)
    monkeypatch.setattr(_implementations.sysconfig, "get_default_scheme", lambda: "posix_local")
    missing(bare)
    assert schemes[-1] == "posix_prefix", "where Debian has the headers"


@pytest.mark.parametrize(
    ("value", "interpreted"), [("1", True), ("true", True), ("Yes", True), ("0", False), ("", False)]
)
def test_triton_interprets(value: str, interpreted: bool) -> None:
    """As Triton itself reads it."""
    assert _implementations.interprets({"TRITON_INTERPRET": value}) == interpreted
    assert not _implementations.interprets({})


def test_auto_on_the_cpu_never_takes_the_interpreter() -> None:
    """Whatever this machine has."""
    for line in registry.choices("cpu"):
        assert line.partition(": ")[2].startswith(("cpp", "reference"))


def test_operators_are_the_files_of_the_package() -> None:
    public = {module.name for module in pkgutil.iter_modules(ops.__path__) if not module.name.startswith("_")}
    kernels = {name for name in public if name.endswith("_triton")}
    assert public - kernels - {"registry"} == set(registry.OPERATORS) == set(ops.__all__)
    assert kernels == {f"{name}_triton" for name in registry.OPERATORS}
    for name in registry.OPERATORS:
        assert importlib.import_module(f"cisc_ext.ops.{name}")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ops.nothing
