"""Random calls under AddressSanitizer and UBSan, and the fuzzer itself: it must see what is wrong."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fuzz
import fuzzcases
import pytest
import torch
from fuzzjudge import RULES, describe
from numerics import assert_equal

from cisc_ext.ops.registry import OPERATORS, Call, Implementation

ROOT = Path(__file__).resolve().parents[1]
CASES, SIMULATED = 2000, 120
INTERPRETED, MOST_WORK = 5, 3000
"""Cases of an operator in Triton's interpreter, which is slow, and pixels times classes of each."""

sanitizers = pytest.mark.skipif(not fuzz.preloads(), reason=f"no g++ with {', '.join(fuzz.LIBRARIES)}")


def _fuzz(folder: Path, cases: int, *more: str) -> dict[str, Any]:
    """The fuzzer as it is called by hand, but for a build folder of its own."""
    out = folder / "fuzz.json"
    words = ["--cases", str(cases), "--build", str(folder / "build"), "--json", str(out), *more]
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["cases"] == cases and result["failures"] == 0
    assert set(result["operators"]) == {
        name for name, one in OPERATORS.items() if any(i.name == "cpp" for i in one.implementations)
    }
    assert set(result["kinds"]) == {"value", "bad argument", "raw"}
    return result


@sanitizers
def test_cases_under_sanitizers(tmp_path: Path) -> None:
    assert set(_fuzz(tmp_path, CASES)["instruction_sets"]) == set(fuzz.isas_here())


@sanitizers
def test_simulated_cuda_kernels_under_sanitizers(tmp_path: Path) -> None:
    result = _fuzz(tmp_path, SIMULATED, "--simt")
    assert set(result["orders"]) == set(fuzz.ORDERS) and set(result["chips"]) == set(fuzz.CHIPS)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_triton_in_its_interpreter(name: str) -> None:
    (one,) = (one for one in OPERATORS[name].implementations if one.name == "triton")
    if reasons := one.obstacles(Call("cpu", (torch.float32,))):
        pytest.skip("; ".join(reasons))
    small = (seed for seed in range(2000) if 0 < _work(seed, name) <= MOST_WORK)
    seeds = list(itertools.islice(small, INTERPRETED))
    assert len(seeds) == INTERPRETED
    failures = [fuzz.run_case(seed, (name,), "triton")[1] for seed in seeds]
    assert [failure for failure in failures if failure is not None] == []


def _work(seed: int, name: str) -> int:
    """Pixels times classes, or pixels times pixels, of a case with values; 0 of the others."""
    case = fuzzcases.make(seed, (name,))
    if case.kind != "value":
        return 0
    sizes = [value.numel() for value in case.inputs.values() if isinstance(value, torch.Tensor)]
    pixels = max(sizes)
    if name == "cross_similarity":
        return pixels * case.inputs["guide"].shape[2:].numel()
    if name == "predict":
        height, width = case.inputs["size"]
        return pixels + height * width * case.inputs["logits"].shape[:2].numel()
    first = (
        case.inputs["logits"] if "logits" in case.inputs else case.inputs.get("classes", torch.zeros(1, 1))
    )
    return pixels * first.shape[1]


FAULTS = """
extern "C" int beyond(const int* data, int place) { return data[place]; }
extern "C" int overflow(int value) { return value + 1; }
extern "C" int cast(double value) { return static_cast<int>(value); }
"""
PROBE = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
data = torch.arange(8, dtype=torch.int32)
library.beyond.argtypes = [ctypes.c_void_p, ctypes.c_int]
library.cast.argtypes = [ctypes.c_double]
assert (library.beyond(data.data_ptr(), 7), library.overflow(6), library.cast(7.5)) == (7, 7, 7)
print("right", flush=True)
{"beyond": lambda: library.beyond(data.data_ptr(), 8), "overflow": lambda: library.overflow(2**31 - 1),
 "cast": lambda: library.cast(float("nan"))}[sys.argv[2]]()
print("unseen")
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with faults, built by the flags of setup.py."""
    spec = importlib.util.spec_from_file_location("setup_of_fuzz", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.cpp").write_text(FAULTS)
    command = ["g++", *module.SANITIZE, "-fPIC", "-shared", "faults.cpp", "-o", "faults.so"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "faults.so"


@sanitizers
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("beyond", "heap-buffer-overflow"),
        ("overflow", "signed integer overflow"),
        ("cast", "nan is outside the range of representable values"),
    ],
)
def test_sanitizers_act(fault: str, report: str, faults: Path) -> None:
    """Behind the end of a tensor too: torch's memory has guards as well."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(faults), fault],
        env=fuzz.environment(ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["right"] and done.returncode != 0, done.stderr
    assert report in done.stderr


def test_another_package_than_asked_for_is_refused(tmp_path: Path) -> None:
    task = fuzz.Task((0,), "portable", "reference", ("predict",), str(tmp_path))
    with pytest.raises(SystemExit, match=r"loaded .* instead of"):
        fuzz.supervise(task, fuzz.environment(ROOT, sanitized=False))


def _with(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any], Any], place: int = 0) -> None:
    """As "triton", the reference with its first result changed, or that at `place`."""
    operator = OPERATORS[name]
    others = tuple(one for one in operator.implementations if one.name != "triton")
    right = next(one for one in others if one.name == "reference")

    def wrong(*arguments: Any) -> Any:
        result = right.function(*arguments)
        if not isinstance(result, tuple):
            return change(result)
        return (*result[:place], change(result[place]), *result[place + 1 :])

    changed = replace(operator, implementations=(*others, Implementation("triton", wrong, lambda call: [])))
    monkeypatch.setitem(OPERATORS, name, changed)


FEW = 60


def _failures(name: str, impl: str) -> list[int]:
    return [seed for seed in range(FEW) if fuzz.run_case(seed, (name,), impl)[1] is not None]


def _shift_one_class(classes: torch.Tensor) -> torch.Tensor:
    changed = classes.clone()
    changed.view(-1)[-1:] += 1
    return changed


@pytest.mark.parametrize("name", RULES)
def test_wrong_results_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + 1e-5 times the result, or one pixel of another class; the right one passes in its place."""
    small = _shift_one_class if name == "predict" else (lambda value: value * (1 + 1e-5))
    _with(monkeypatch, name, lambda value: value.clone())
    assert _failures(name, "triton") == []
    _with(monkeypatch, name, small)
    assert len(_failures(name, "triton")) > FEW / 4


def test_a_wrong_index_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, "cross_similarity", _shift_one_class, place=1)
    assert len(_failures("cross_similarity", "triton")) > FEW / 4


def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value's is 1 + 1e-4 times the right one; bfloat16 and float16 do not show it."""
    _with(monkeypatch, "cross_similarity", lambda value: value.detach() + _scaled(value))
    assert len(_failures("cross_similarity", "triton")) > FEW / 10


def _scaled(value: torch.Tensor) -> torch.Tensor:
    """0, with a gradient a little too large."""
    return (value - value.detach()).nan_to_num() * (1 + 1e-4)


def test_what_a_failure_says(monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, "predict", _shift_one_class)
    seed = _failures("predict", "triton")[0]
    counted, failure = fuzz.run_case(seed, ("predict",), "triton")
    case = fuzzcases.make(seed, ("predict",))
    assert failure is not None
    assert (failure["seed"], failure["operator"], failure["kind"]) == (seed, "predict", case.kind)
    assert failure["arguments"] == describe(case.inputs) and "logits: " in failure["arguments"]
    assert failure["message"]
    assert counted[:2] == ["operator predict", f"kind {case.kind}"]


@pytest.mark.parametrize("name", fuzzcases.VALUES)
def test_a_case_is_a_function_of_its_seed(name: str) -> None:
    for seed in range(20):
        torch.manual_seed(seed)  # must not matter
        first, second = fuzzcases.make(seed, (name,)), fuzzcases.make(seed, (name,))
        assert describe(first.inputs) == describe(second.inputs)
        assert (first.kind, first.what, first.threads, first.error) == (
            second.kind,
            second.what,
            second.threads,
            second.error,
        )
        for key, value in first.inputs.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                assert_equal(value, second.inputs[key], what=key)


DYING = """
import os, fuzz

def run(seed, operators, impl):
    if seed in (3, 7):
        os.abort()
    return ["kind value"], {"seed": seed, "message": "wrong"} if seed == 5 else None

fuzz.work(run)
"""


def test_a_process_that_dies_is_a_failure_and_the_rest_is_run() -> None:
    task = fuzz.Task(tuple(range(10)), "portable", "reference", ("predict",), str(ROOT))
    tally = fuzz.supervise(task, fuzz.environment(ROOT, sanitized=False), ("-c", DYING))
    assert [failure["seed"] for failure in tally.failures] == [3, 5, 7]
    assert "process ended with -6" in tally.failures[0]["message"]
    assert tally.failures[1]["message"] == "wrong"
    assert (tally.counts["cases"], tally.counts["kind value"]) == (10, 8)


def test_all_seeds_are_planned_once() -> None:
    for words in (["--cases", "1003", "--seed", "7"], ["--cases", "1", "--jobs", "5"], ["--cases", "30000"]):
        settings = fuzz.parse([*words, "--operators", "predict", "--isa", *fuzz.ISAS])
        tasks = fuzz.plan(settings, ROOT)
        seeds = [seed for task in tasks for seed in task.seeds]
        assert sorted(seeds) == list(range(settings.seed, settings.seed + settings.cases))
        assert all(fuzz.ISAS and 0 < len(task.seeds) <= fuzz.CHUNK for task in tasks)
    settings = fuzz.parse(["--only", "12", "--operators", "predict", "--isa", "portable", "avx2"])
    assert [(task.seeds, task.isa) for task in fuzz.plan(settings, ROOT)] == [
        ((12,), "portable"),
        ((12,), "avx2"),
    ]


def test_exit_status_and_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "fuzz.json"
    words = ["--plain", "--impl", "reference", "--cases", "12", "--isa", "portable", "--json", str(out)]
    assert fuzz.main(words) == 0
    result = json.loads(out.read_text())
    assert (result["cases"], result["failures"], result["sanitizers"]) == (12, 0, [])
    assert sum(result["operators"].values()) == sum(result["kinds"].values()) == 12
    monkeypatch.setattr(
        fuzz, "supervise", lambda task, env: fuzz.Tally(failures=[{"seed": 1, "message": "m"}])
    )
    assert fuzz.main(words) == 1
    assert {"seed": 1, "message": "m"} in json.loads(out.read_text())["failed"]


def test_operator_without_cases_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(fuzzcases.VALUES, "masked_average_pool")
    monkeypatch.setitem(
        OPERATORS,
        "masked_average_pool",
        replace(
            OPERATORS["masked_average_pool"], implementations=(Implementation("cpp", len, lambda call: []),)
        ),
    )
    with pytest.raises(AssertionError, match="no cases for masked_average_pool"):
        fuzz.fuzzed("cpp")
