"""The kernels on a GPU, in CUDA and in Triton: the same bits each time, on any stream and GPU, in CUDA graphs
and compiled graphs, without waiting, in little memory. What they compute is tested with all other
implementations.
"""

from __future__ import annotations

import os
from typing import Any

import memory_probe
import pytest
import torch
from gpucases import (
    DTYPES,
    IMPLEMENTATIONS,
    Inputs,
    aligned,
    alike,
    call_of,
    changed,
    moved,
    one_elsewhere,
    same_bits,
    samples,
    skip_unless_there,
    without_gradient,
    workloads,
)
from opcases import BAD_VALUES, CUDA_MARKS, as_dtype, bad_inputs, cast
from torch import Tensor

from benchmarks.measure import peak_extra_mib
from cisc_ext import ops
from cisc_ext.ops._implementations import OLDEST_CAPABILITY, OLDEST_CUDA
from cisc_ext.ops.registry import EXTRA_BYTES_CPU, OPERATORS, Operator, capability, decide

pytestmark = CUDA_MARKS

RUNS = 20
MIB = 2**20
SLEEP_CYCLES = 20_000_000

BY_NAME = [
    pytest.param(name, impl, id=f"{name}-{impl}-cuda") for name in OPERATORS for impl in IMPLEMENTATIONS
]


def _first(operator: Operator, dtype: torch.dtype = torch.float32) -> Inputs:
    """The first sample on the GPU."""
    return cast(operator, next(operator.samples()), (dtype,) * len(operator.features), "cuda")


@pytest.mark.parametrize("name", OPERATORS)
def test_auto_takes_a_kernel(name: str) -> None:
    """There is one in CUDA, unless CISC_CUDA=0 says that they were left out, and one in Triton: without them
    the tests of it would all be skipped, and be green."""
    operator, chip = OPERATORS[name], capability("cuda", None)
    assert chip is not None
    if os.environ.get("CISC_CUDA") != "0" and chip >= OLDEST_CUDA:
        assert operator.obstacles("cpp", "cuda") == []
    if chip >= OLDEST_CAPABILITY:
        assert operator.obstacles("triton", "cuda") == []
    if all(operator.obstacles(impl, "cuda") for impl in IMPLEMENTATIONS):
        pytest.skip("no implementation runs on this GPU")
    chosen, passed_over = decide(name, None, operator.call("cuda", torch.bfloat16))
    assert chosen.name in IMPLEMENTATIONS, passed_over


@pytest.mark.parametrize(("operator", "impl", "sample"), samples())
def test_samples_give_the_same_bits(operator: Operator, impl: str, sample: Any) -> None:
    skip_unless_there(operator, impl)
    for dtype in DTYPES:
        inputs = cast(operator, sample, (dtype,) * len(operator.features), "cuda")
        alike(call_of(operator, inputs, impl), RUNS, f"{dtype}")


@pytest.mark.parametrize(("operator", "impl", "sample", "device"), aligned("cuda", "cpp"))
def test_aligned_samples_give_the_same_bits(operator: Operator, impl: str, sample: Any, device: str) -> None:
    skip_unless_there(operator, impl)
    for dtype in DTYPES:
        inputs = cast(operator, sample, (dtype,) * len(operator.features), device)
        alike(call_of(operator, inputs, impl), RUNS, f"{dtype}")


@pytest.mark.parametrize(("operator", "impl", "workload"), workloads())
def test_workloads_give_the_same_bits(operator: Operator, impl: str, workload: Any) -> None:
    skip_unless_there(operator, impl)
    made = moved(workload.make(), "cuda")
    for dtype in DTYPES:
        alike(call_of(operator, as_dtype(made, dtype), impl), RUNS, f"{dtype}")


def _replayed(operator: Operator, impl: str, inputs: Inputs, dtype: torch.dtype) -> None:
    """A graph of forward and backward, replayed on other values, gives the bits of a call on these."""
    first = as_dtype(inputs, dtype)
    second = as_dtype(changed(operator, inputs), dtype)
    fixed = {key: value.clone() if isinstance(value, Tensor) else value for key, value in first.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = call_of(operator, fixed, impl)
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
        same_bits(kept, call_of(operator, values, impl)(), f"{dtype}")


@pytest.mark.parametrize(("operator", "impl", "sample"), samples())
def test_cuda_graphs_of_samples(operator: Operator, impl: str, sample: Any) -> None:
    skip_unless_there(operator, impl)
    _replayed(operator, impl, moved(sample.inputs, "cuda"), torch.float32)


@pytest.mark.parametrize(("operator", "impl", "workload"), workloads())
def test_cuda_graphs_of_workloads(operator: Operator, impl: str, workload: Any) -> None:
    skip_unless_there(operator, impl)
    _replayed(operator, impl, moved(workload.make(), "cuda"), torch.bfloat16)


@pytest.mark.parametrize(("operator", "impl", "sample"), samples())
def test_nothing_waits_for_the_gpu(operator: Operator, impl: str, sample: Any) -> None:
    skip_unless_there(operator, impl)
    call = call_of(operator, cast(operator, sample, (torch.float32,) * len(operator.features), "cuda"), impl)
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "impl"), BY_NAME)
def test_a_call_comes_back_before_the_gpu_is_done(name: str, impl: str) -> None:
    """What runs before is longer than the call: it must not be waited for."""
    operator = OPERATORS[name]
    skip_unless_there(operator, impl)
    call = call_of(operator, _first(operator), impl)
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(50 * SLEEP_CYCLES)
    done = torch.cuda.Event()
    done.record()
    call()
    assert not done.query(), "the call has waited"
    torch.cuda.synchronize()


@pytest.mark.parametrize(("name", "impl"), BY_NAME)
def test_compiled_by_inductor(name: str, impl: str) -> None:
    operator = OPERATORS[name]
    skip_unless_there(operator, impl)
    inputs = _first(operator)
    torch._dynamo.reset()
    compiled = torch.compile(operator.function, fullgraph=True)
    with torch.no_grad():
        result = compiled(**inputs, impl=impl)
        want = operator.function(**inputs, impl=impl)
    pairs = [(x if isinstance(x, tuple) else (x,)) for x in (result, want)]
    for got, wanted in zip(*pairs, strict=True):
        if got is not None:
            same_bits([got], [wanted], "compiled")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("key", memory_probe.SIZES)
def test_extra_memory(key: str, impl: str) -> None:
    """Beyond inputs, outputs, gradients and saved winners, of forward alone and of both passes."""
    name, make = memory_probe.SIZES[key]
    operator = OPERATORS[name]
    skip_unless_there(operator, impl)
    inputs = moved(make(), "cuda")
    saved = memory_probe._saved_mib(name, inputs)
    both = call_of(operator, inputs, impl)
    for call in (lambda: without_gradient(operator, inputs, impl), both):
        extra = peak_extra_mib(call, device="cuda") - (saved if call is both else 0)
        assert extra <= (EXTRA_BYTES_CPU + _packed_bytes(name, inputs)) / MIB, f"{extra:.1f} MiB"


def _packed_bytes(name: str, inputs: Inputs) -> int:
    """Of the operands of cross_similarity as 16-bit numbers, of which float32 takes two."""
    if name != "cross_similarity":
        return 0
    query, guide = inputs["query"], inputs["guide"]
    return (query.numel() + guide.numel()) * (4 if torch.float32 in (query.dtype, guide.dtype) else 2)


@pytest.mark.parametrize("return_index", [False, True])
@pytest.mark.parametrize("reduction", ["max", "topk", "softmax"])
def test_workspace_is_as_planned(reduction: str, return_index: bool) -> None:
    from cisc_ext import _build

    skip_unless_there(OPERATORS["cross_similarity"], "cpp")
    chip = {(7, 5): "sm_75", (9, 0): "sm_90a"}.get(torch.cuda.get_device_capability(), "sm_80")
    query, guide = torch.randn(2, 2, 96, 100, 120, device="cuda").bfloat16()
    classes = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    labels = torch.zeros(2, 100, 120, dtype=torch.uint8, device="cuda")

    asked: dict[str, Any] = {"reduction": reduction, "return_index": return_index}

    def call() -> Any:
        return ops.cross_similarity(query, guide, labels, classes, impl="cpp", **asked)

    shapes = {"query": query.shape, "guide": guide.shape, "classes": classes.shape}
    planned = _build.plan("cross_similarity", shapes, "bfloat16", chip, **asked)
    indices = 8 if return_index and reduction != "max" else 0
    results = 2 * 100 * 120 * (4 + indices + {"max": 8, "topk": 64, "softmax": 4}[reduction])
    extra = peak_extra_mib(call, device="cuda") * MIB
    assert planned["workspace_bytes"] <= extra <= planned["workspace_bytes"] + results + 2 * MIB


@pytest.mark.parametrize(("operator", "impl", "sample"), [p for p in samples() if p.values[1] == "cpp"])
def test_cuda_and_triton_choose_the_same(operator: Operator, impl: str, sample: Any) -> None:
    """Classes, counts and indices are equal; all else, each has to meet the reference's by itself."""
    for one in IMPLEMENTATIONS:
        skip_unless_there(operator, one)
    for dtype in DTYPES:
        inputs = cast(operator, sample, (dtype,) * len(operator.features), "cuda")
        pairs = zip(*(without_gradient(operator, inputs, one) for one in IMPLEMENTATIONS), strict=True)
        for cuda, triton in pairs:
            assert cuda.dtype == triton.dtype and cuda.shape == triton.shape
            if not cuda.is_floating_point():
                assert torch.equal(cuda, triton), f"{dtype}"


@pytest.mark.parametrize(("name", "impl"), BY_NAME)
def test_a_side_stream(name: str, impl: str) -> None:
    """The call goes to the current stream: its inputs are there only once that stream has waited."""
    operator = OPERATORS[name]
    skip_unless_there(operator, impl)
    inputs = _first(operator)
    want = call_of(operator, inputs, impl)()
    late = {k: torch.zeros_like(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for key, value in late.items():
            if isinstance(value, Tensor):
                value.copy_(inputs[key])
        got = call_of(operator, late, impl)()
    stream.synchronize()
    same_bits(got, want, "side stream")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize(("name", "impl"), BY_NAME)
def test_a_gpu_that_is_not_the_current_one(name: str, impl: str) -> None:
    operator = OPERATORS[name]
    skip_unless_there(operator, impl)
    inputs = _first(operator)
    want = call_of(operator, inputs, impl)()
    got = call_of(operator, moved(inputs, "cuda:1"), impl)()
    assert torch.cuda.current_device() == 0
    assert all(value.device == torch.device("cuda:1") for value in got)
    if capability("cuda", 0) == capability("cuda", 1):
        same_bits([value.to("cuda:0") for value in got], want, "cuda:1")
    for _, wrong in one_elsewhere(inputs, "cuda:1"):
        with pytest.raises(ValueError, match=f"^{name}: .*must be on"):
            operator.function(**wrong, impl=impl)


@pytest.mark.parametrize(("name", "impl"), BY_NAME)
def test_a_tensor_on_the_cpu_is_refused(name: str, impl: str) -> None:
    operator = OPERATORS[name]
    skip_unless_there(operator, impl)
    for _, wrong in one_elsewhere(_first(operator), "cpu"):
        with pytest.raises(ValueError, match=f"^{name}: .*must be on"):
            operator.function(**wrong, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "given"), BAD_VALUES)
def test_wrong_values(name: str, given: Inputs, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN without waiting; with CISC_CHECK=1 an error that names the argument."""
    operator = OPERATORS[name]
    skip_unless_there(operator, impl)
    inputs = bad_inputs(given, "cuda")
    function = getattr(ops, name)
    monkeypatch.delenv("CISC_CHECK", raising=False)
    first, *rest = call_of(operator, inputs, impl)()
    if name == "predict":
        assert first.unique().tolist() == [255] and int(rest[0].sum()) == 0
    else:
        assert bool(first.isnan().all())
        in_forward = name in ("map_consistency", "rectified_cross_entropy")
        assert not in_forward or bool(rest[-1].isnan().all()), "a gradient is left that is finite"
    monkeypatch.setenv("CISC_CHECK", "1")
    with pytest.raises(ValueError, match=f"^{name}: (labels|guide_labels|classes) must be"):
        function(**inputs, impl=impl)
