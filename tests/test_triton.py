"""Triton's kernels on a GPU: the same bits each time, in CUDA graphs and compiled graphs, without waiting, in
little memory. What they compute is tested with all other implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import memory_probe
import pytest
import torch
from opcases import as_dtype, cast, cotangent, is_empty
from torch import Tensor

from benchmarks.measure import peak_extra_mib
from cisc_ext.ops.registry import EXTRA_BYTES_CPU, OPERATORS, Call, Operator, capability, decide

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

RUNS = 20
MIB = 2**20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Inputs = dict[str, Any]


def _samples() -> list[Any]:
    return [
        pytest.param(operator, sample, id=f"{operator.name}-triton-{sample.name}-cuda")
        for operator in OPERATORS.values()
        for sample in operator.samples()
        if not is_empty(sample.inputs)
    ]


def _workloads() -> list[Any]:
    return [
        pytest.param(operator, workload, id=f"{operator.name}-triton-{workload.name}-cuda")
        for operator in OPERATORS.values()
        for workload in operator.workloads()
        if not workload.ladder
    ]


def _on_gpu(inputs: Inputs) -> Inputs:
    return {key: value.cuda() if isinstance(value, Tensor) else value for key, value in inputs.items()}


def _call(operator: Operator, inputs: Inputs, impl: str = "triton") -> Callable[[], list[Tensor]]:
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
        result = operator.function(**leaves, impl=impl)
        outputs = [
            value for value in (result if isinstance(result, tuple) else (result,)) if value is not None
        ]
        if not wanted:
            return outputs
        if not start:
            start.append(cotangent(outputs[0].detach()))
        return [value.detach() for value in outputs] + list(torch.autograd.grad(outputs[0], wanted, start[0]))

    return run


def _same_bits(got: list[Tensor], want: list[Tensor], what: str) -> None:
    assert len(got) == len(want)
    for place, (one, other) in enumerate(zip(got, want, strict=True)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), f"{what}: tensor {place}"
        bits = (x.contiguous().view(-1).view(torch.uint8) for x in (one, other))
        assert torch.equal(*bits), f"{what}: tensor {place} differs"


def _settings(operator: Operator) -> Iterator[tuple[torch.dtype, ...]]:
    for dtype in DTYPES:
        yield (dtype,) * len(operator.features)


@pytest.mark.parametrize("name", OPERATORS)
def test_auto_takes_triton(name: str) -> None:
    chip = capability("cuda", None)
    dtypes = (torch.bfloat16,) * len(OPERATORS[name].features)
    chosen, passed_over = decide(name, None, Call("cuda", dtypes, chip))
    assert chosen.name in ("cpp", "triton"), passed_over


@pytest.mark.parametrize(("operator", "sample"), _samples())
def test_samples_give_the_same_bits(operator: Operator, sample: Any) -> None:
    for dtypes in _settings(operator):
        call = _call(operator, cast(operator, sample, dtypes, "cuda"))
        want = call()
        for number in range(RUNS - 1):
            _same_bits(call(), want, f"{dtypes[0]}, run {number + 2}")


@pytest.mark.parametrize(("operator", "workload"), _workloads())
def test_workloads_give_the_same_bits(operator: Operator, workload: Any) -> None:
    made = _on_gpu(workload.make())
    for dtype in DTYPES:
        call = _call(operator, as_dtype(made, dtype))
        want = call()
        for number in range(RUNS - 1):
            _same_bits(call(), want, f"{dtype}, run {number + 2}")


def _changed(operator: Operator, inputs: Inputs) -> Inputs:
    """Other values of the same shapes: features turned round, labels and classes in another order."""
    return {
        key: value.flip(-1) * (0.5 if key in operator.features else 1) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
    }


def _replayed(operator: Operator, inputs: Inputs, dtype: torch.dtype) -> None:
    """A graph of forward and backward, replayed on other values, gives the bits of a call on these."""
    first = as_dtype(inputs, dtype)
    second = as_dtype(_changed(operator, inputs), dtype)
    fixed = {key: value.clone() if isinstance(value, Tensor) else value for key, value in first.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = _call(operator, fixed)
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = call()
    for values in (second, first):
        for key, value in values.items():
            if isinstance(value, Tensor):
                fixed[key].copy_(value)
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        _same_bits(kept, _call(operator, values)(), f"{dtype}")


@pytest.mark.parametrize(("operator", "sample"), _samples())
def test_cuda_graphs_of_samples(operator: Operator, sample: Any) -> None:
    _replayed(operator, _on_gpu(sample.inputs), torch.float32)


@pytest.mark.parametrize(("operator", "workload"), _workloads())
def test_cuda_graphs_of_workloads(operator: Operator, workload: Any) -> None:
    _replayed(operator, _on_gpu(workload.make()), torch.bfloat16)


@pytest.mark.parametrize(("operator", "sample"), _samples())
def test_nothing_waits_for_the_gpu(operator: Operator, sample: Any) -> None:
    call = _call(operator, cast(operator, sample, (torch.float32,) * len(operator.features), "cuda"))
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_by_inductor(name: str) -> None:
    operator = OPERATORS[name]
    sample = next(operator.samples())
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features), "cuda")
    torch._dynamo.reset()
    compiled = torch.compile(operator.function, fullgraph=True)
    with torch.no_grad():
        result = compiled(**inputs, impl="triton")
        want = operator.function(**inputs, impl="triton")
    pairs = [(x if isinstance(x, tuple) else (x,)) for x in (result, want)]
    for got, wanted in zip(*pairs, strict=True):
        if got is not None:
            _same_bits([got], [wanted], "compiled")


@pytest.mark.parametrize("key", memory_probe.SIZES)
def test_extra_memory(key: str) -> None:
    """Beyond inputs, outputs, gradients and saved winners, of forward alone and of both passes."""
    name, make = memory_probe.SIZES[key]
    operator = OPERATORS[name]
    inputs = _on_gpu(make())
    saved = memory_probe._saved_mib(name, inputs)
    both = _call(operator, inputs)
    for call in (lambda: _without_gradient(operator, inputs), both):
        extra = peak_extra_mib(call, device="cuda") - (saved if call is both else 0)
        assert extra <= EXTRA_BYTES_CPU / MIB, f"{extra:.1f} MiB"


def _without_gradient(operator: Operator, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        result = operator.function(**inputs, impl="triton")
    return [value for value in (result if isinstance(result, tuple) else (result,)) if value is not None]
