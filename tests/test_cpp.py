"""The compiled CPU kernels: instruction sets, threads, plans, small sizes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import assert_close, assert_equal
from opcases import reference, run_operator
from torch import Tensor

from benchmarks import naive
from cisc_ext import ops
from cisc_ext.ops import _library
from cisc_ext.ops.registry import OPERATORS, Implementation, Operator

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not _library.LOADED, reason=f"no compiled operators: {_library.REASON}")

COMPILED = [
    pytest.param(operator, one, id=name)
    for name, operator in OPERATORS.items()
    for one in operator.implementations
    if one.name == "cpp"
]
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")


def build_facts() -> dict[str, Any]:
    from cisc_ext import _build

    return dict(_build.info())


def run_with(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CISC_ISA": isa, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def shapes_of(inputs: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the tensors and sizes among them."""
    return {
        name: tuple(getattr(value, "shape", value))
        for name, value in inputs.items()
        if isinstance(value, (Tensor, tuple))
    }


def large(operator: Operator) -> dict[str, Any]:
    """Inputs that are cut into several tasks, and into strips where labels are walked over."""
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    labels = torch.randint(0, 19, (2, 41, 12001), generator=generator).to(torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    classes = torch.tensor([[3, 7], [0, -1]])
    every: dict[str, dict[str, Any]] = {
        "masked_average_pool": {"features": normal(2, 37, 11, 3001), "labels": labels, "classes": classes},
        "prototype_similarity": {"query": normal(2, 133, 41, 61), "prototypes": normal(2, 2, 133)},
        # Away from 0 and 1, where the derivative jumps.
        "map_consistency": {
            "similarity": 0.1 + 0.8 * normal(2, 2, 11, 3001).sigmoid(),
            "labels": labels,
            "classes": classes,
        },
        "rectified_cross_entropy": {
            "logits": normal(2, 19, 11, 3001),
            "labels": labels,
            "similarity": normal(2, 2, 11, 3001),
            "classes": classes,
        },
        "predict": {"logits": normal(2, 19, 11, 3001), "size": (41, 12001), "labels": labels},
        # Deep, so that the guide is packed in pieces, and its sums are at hand in blocks.
        "cross_similarity": {
            "query": normal(2, 4100, 5, 7),
            "guide": normal(2, 4100, 3, 701),
            "guide_labels": labels,
            "classes": classes,
            "reduction": "softmax",
        },
    }
    return every[operator.name]


@pytest.mark.parametrize(("operator", "implementation"), COMPILED)
def test_seams_do_not_show(operator: Operator, implementation: Implementation) -> None:
    """Tasks, strips and tiles give what the reference gives for the whole."""
    from cisc_ext import _build

    inputs = large(operator)
    shapes = shapes_of(inputs)
    tile = _build.plan(operator.name, shapes, backward=bool(operator.differentiable))["tile"]
    assert tile.get("tasks", 2) > 1
    assert tile.get("label_columns", 0) < 12001
    assert tile.get("guide_pixels_at_hand", 0) < 3 * 701
    got = run_operator(operator, inputs, implementation.name)
    if operator.name == "predict":
        best = naive.upsample(inputs["logits"].double(), inputs["size"], True).topk(2, 1).values
        clear = best[:, 0] - best[:, 1] > 1e-5  # else rounding may decide
        want, confusion = naive.predict(inputs["logits"].double(), inputs["size"], inputs["labels"])
        assert_equal(got["output0"][clear], want[clear], what="classes")
        assert confusion is not None
        assert int((got["output1"] - confusion).abs().sum()) <= 2 * int((~clear).sum())
        return
    for name, want in reference(operator, inputs).items():
        assert_close(got[name].double(), want, 4e-6, what=name)


@pytest.mark.parametrize(("operator", "implementation"), COMPILED)
def test_threads_do_not_change_a_bit(operator: Operator, implementation: Implementation) -> None:
    """Sums have one order, whatever the number of threads; the second of two runs is as the first."""
    inputs, before = large(operator), torch.get_num_threads()
    if operator.name == "rectified_cross_entropy":
        inputs |= {"ohem_threshold": 0.2, "ohem_min_kept": 5000}
    want = run_operator(operator, inputs, implementation.name)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for name, value in run_operator(operator, inputs, implementation.name).items():
                assert_equal(value, want[name], what=f"{name} on {threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    """The operators' tests once more where another set is in use than the one chosen by itself."""
    facts = build_facts()
    if isa == facts["instruction_set_in_use"]:
        pytest.skip(f"{isa} is what all other tests use")
    found = run_with(isa, "-c", "from cisc_ext import _build; print(_build.info()['instruction_set_in_use'])")
    if "CISC_ISA must be" in found.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert found.stdout.strip() == isa, found.stderr
    files = [
        "tests/test_golden.py",
        "tests/test_ops.py",
        "tests/test_ops_rules.py",
        "tests/test_ops_special.py",
    ]
    chosen = "(cpp or special) and not compile and not opcheck and not cuda"
    chosen += " and not instruction and not auto_is and not info"  # not this test again
    done = run_with(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen)
    assert done.returncode == 0, done.stdout


def test_a_wrong_instruction_set_is_one_line() -> None:
    x = "torch.zeros(1, 2, 3, 3)"
    labels, classes = "torch.zeros(1, 4, 4, dtype=torch.uint8)", "torch.zeros(1, 1, dtype=torch.int64)"
    pool = "torch.ops.cisc_ext.masked_average_pool_backward"
    for call in (
        f"ops.predict({x}, (4, 4))",
        f"{pool}(torch.zeros(1, 1, 2), {labels}, {classes}, 3, 3, 1.0, torch.float32)",
    ):
        done = run_with("mmx", "-c", f"import torch; from cisc_ext import ops; {call}")
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode != 0
        assert last.startswith("ValueError: CISC_ISA must be one of portable") and last.endswith("got 'mmx'")


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "masked_average_pool": {"features": (2, 256, 181, 181), "labels": (2, 721, 721), "classes": (2, 1)},
    "prototype_similarity": {"query": (2, 256, 181, 181), "prototypes": (2, 1, 256)},
    "map_consistency": {"similarity": (2, 1, 181, 181), "labels": (2, 721, 721)},
    "rectified_cross_entropy": {
        "logits": (2, 19, 181, 181),
        "labels": (2, 721, 721),
        "similarity": (2, 1, 181, 181),
    },
    "predict": {"logits": (2, 19, 181, 181), "size": (721, 721)},
    "cross_similarity": {
        "query": (2, 256, 181, 181),
        "guide": (2, 256, 181, 181),
        "guide_labels": (2, 721, 721),
        "classes": (2, 1),
    },
}


@pytest.mark.parametrize(("operator", "implementation"), COMPILED)
def test_plans(operator: Operator, implementation: Implementation) -> None:
    from cisc_ext import _build

    def plan(**more: Any) -> dict[str, Any]:
        return dict(_build.plan(operator.name, SHAPES[operator.name], **more))

    one = plan(dtype="float32", device="cpu", threads=1)
    assert set(one) == {"tile", "workspace_bytes", "flops", "bytes"}
    assert all(isinstance(value, int) and value > 0 for value in one["tile"].values())
    assert 0 < one["workspace_bytes"] <= plan(threads=2)["workspace_bytes"] < operator.extra_bytes_cpu
    assert plan(dtype="bfloat16")["bytes"] < one["bytes"] and one["flops"] > 0
    if operator.name == "cross_similarity":  # the winners' gradient is less than all products
        assert plan(backward=True, reduction="softmax")["flops"] > plan(reduction="softmax")["flops"]
    elif operator.differentiable:
        # The average's gradient costs as many operations as the average.
        assert plan(backward=True)["flops"] >= one["flops"]


def test_plans_refuse() -> None:
    from cisc_ext import _build

    good: dict[str, Any] = {"op": "predict", "shapes": SHAPES["predict"]}
    for wrong, message in (
        ({"op": "unheard_of"}, "no C\\+\\+ kernel of unheard_of"),
        (
            {"op": "cross_similarity", "shapes": SHAPES["cross_similarity"], "reduction": "min"},
            "reduction must",
        ),
        ({"op": "cross_similarity", "shapes": SHAPES["cross_similarity"], "k": 0}, "k must be at least 1"),
        ({"device": "cuda"}, "device must be cpu, sm_75, sm_80 or sm_90a, got cuda"),
        ({"device": "sm_90a"}, "cross_similarity's forward only"),
        (
            {
                "op": "cross_similarity",
                "shapes": SHAPES["cross_similarity"],
                "device": "sm_80",
                "reduction": "mean",
            },
            "reduction must be max, topk or softmax on a GPU, got mean",
        ),
        ({"dtype": "float64"}, "dtype must be"),
        ({"threads": 0}, "threads must be"),
        ({"shapes": {"logits": (2, 19, 181, 181)}}, "needs the shape of size"),
        ({"shapes": {"logits": (2, 19, 181), "size": (3, 3)}}, "logits must have 4 dimensions"),
        ({"shapes": {"logits": (2, 19, 181, -1), "size": (3, 3)}}, "none negative"),
    ):
        with pytest.raises(ValueError, match=message):
            _build.plan(**(good | wrong))


@pytest.mark.parametrize("device", ["sm_75", "sm_80", "sm_90a"])
@pytest.mark.parametrize("reduction", ["max", "topk", "softmax"])
def test_plans_for_gpus_keep_to_the_memory_that_there_is(device: str, reduction: str) -> None:
    """Packed operands of one pair, or of several in 256 MiB; the rest in 64 MiB."""
    from cisc_ext import _build

    for batch, channels, h, w, slots in (
        *((1, 256, 256, 512, 1), (1, 256, 256, 512, 21), (16, 256, 181, 181, 1), (16, 304, 81, 81, 4)),
        *((3, 2048, 41, 41, 2), (1, 64, 700, 700, 1), (400, 5, 9, 7, 3), (1, 256, 1, 1, 1)),
    ):
        for dtype, numbers in (("bfloat16", 1), ("float32", 2)):
            for mode in ({"classes": (batch, slots)}, {}):
                shapes = {"query": (batch, channels, h, w), "guide": (batch, channels, h, w), **mode}
                for k in (1, 8, 50):
                    made = _build.plan("cross_similarity", shapes, dtype, device, reduction=reduction, k=k)
                    pair = 2 * h * w * -(-channels // 64) * 64 * 2 * numbers
                    images = made["tile"]["images_at_once"]
                    assert made["packed_bytes"] == (0 if device == "sm_75" else images * pair)
                    assert made["packed_bytes"] <= max(pair, 256 << 20)
                    assert 0 < made["workspace_bytes"] - made["packed_bytes"] <= 64 << 20, (shapes, k)


@pytest.mark.parametrize("device", ["sm_75", "sm_80", "sm_90a"])
@pytest.mark.parametrize("reduction", ["max", "topk", "softmax"])
def test_plans_for_gpus_of_what_is_empty(device: str, reduction: str) -> None:
    """Nothing where forward has no result; of a guide without pixels no packed row."""
    from cisc_ext import _build

    for batch, query, guide, slots in ((0, 4, 4, 1), (2, 0, 4, 1), (2, 4, 4, 0), (2, 4, 0, 1)):
        shapes = {"query": (batch, 8, query, 3), "guide": (batch, 8, guide, 3), "classes": (batch, slots)}
        made = _build.plan("cross_similarity", shapes, device=device, reduction=reduction)
        assert made["packed_bytes"] == made["flops"] == 0
        assert (made["workspace_bytes"] == 0) == (made["bytes"] == 0) == (guide > 0)


@pytest.mark.parametrize("device", ["cpu", "sm_75", "sm_80", "sm_90a"])
def test_plans_count_labels_and_results(device: str) -> None:
    """A byte of each label, and 8 of an index, where it is given."""
    from cisc_ext import _build

    def moved(own: bool = False, **more: Any) -> int:
        shapes = {"query": (2, 8, 3, 5), "guide": (2, 8, 4, 7)} | ({} if own else {"classes": (2, 1)})
        return _build.plan("cross_similarity", shapes, device=device, **more)["bytes"]

    pixels, best = 2 * 3 * 5, moved(reduction="max")
    assert moved(own=True) == best + pixels
    assert moved(return_index=True) == best
    for reduction, saved in (("topk", 3 * 8), ("softmax", 4)):
        without, having = (moved(reduction=reduction, k=3, return_index=one) for one in (False, True))
        assert having == without + 8 * pixels == best + saved * pixels


SMALL = (1, 2, 3, 5, 8, 13, 21, 34, 55, 81, 128, 181)
"""Sides of the features; labels are four times as large."""


def small_inputs(name: str, side: int) -> dict[str, Any]:
    labels = torch.randint(0, 19, (1, 4 * side, 4 * side), dtype=torch.uint8)
    classes, maps = torch.tensor([[3]]), torch.rand(1, 1, side, side)
    logits, features = torch.randn(1, 19, side, side), torch.randn(1, 64, side, side)
    every: dict[str, dict[str, Any]] = {
        "masked_average_pool": {"features": features, "labels": labels, "classes": classes},
        "prototype_similarity": {"query": features, "prototypes": torch.randn(1, 1, 64)},
        "map_consistency": {"similarity": maps, "labels": labels, "classes": classes},
        "rectified_cross_entropy": {
            "logits": logits,
            "labels": labels,
            "similarity": maps,
            "classes": classes,
        },
        "predict": {"logits": logits, "size": (4 * side, 4 * side), "labels": labels},
        "cross_similarity": {
            "query": features,
            "guide": features.flip(-1),
            "guide_labels": labels,
            "classes": classes,
        },
    }
    return every[name]


def least_times(*calls: Callable[[], object], repeats: int = 20) -> list[float]:
    """Least seconds of each call, their runs interleaved."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - begin)
    return best


@pytest.mark.parametrize(("operator", "implementation"), COMPILED)
def test_auto_is_never_slower_than_the_reference(operator: Operator, implementation: Implementation) -> None:
    """At most 1.1 times its time and 10 microseconds, however small the images."""
    # Of pixels against pixels, more would only take the reference longer.
    for side in SMALL[:9] if operator.name == "cross_similarity" else SMALL:
        inputs = small_inputs(operator.name, side)
        for impl_inputs in (
            inputs,
            {**inputs, **{n: inputs[n].to(torch.bfloat16) for n in operator.features if n in inputs}},
        ):
            auto, reference = least_times(
                lambda x=impl_inputs: run_operator(operator, x, None),  # type: ignore[misc]
                lambda x=impl_inputs: run_operator(operator, x, "reference"),  # type: ignore[misc]
                repeats=20 if side < 128 else 5,
            )
            assert auto <= 1.1 * reference + 10e-6, f"{side}: {auto * 1e6:.0f} us, not {reference * 1e6:.0f}"


def test_peak_is_a_rate() -> None:
    rate = torch.ops.cisc_ext.fma_peak(torch.zeros(1), 2)
    pairs = torch.ops.cisc_ext.fma_peak(torch.zeros(1, dtype=torch.bfloat16), 2)
    assert 1e8 < rate < 1e15 and 0.5 * rate < pairs < 8 * rate
    with pytest.raises(ValueError, match=r"^fma_peak: repeats"):
        torch.ops.cisc_ext.fma_peak(torch.zeros(1), 0)


def test_info_shows_the_plans(capsys: pytest.CaptureFixture[str]) -> None:
    from cisc_ext.__main__ import main

    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert f"instruction set in use: {build_facts()['instruction_set_in_use']}" in shown
    for name in SHAPES:
        assert any(
            line.strip().startswith(f"{name} at ") and "workspace" in line for line in shown.splitlines()
        )


def test_strips_and_tasks_meet_without_a_seam() -> None:
    """Images so wide, and so many classes, that they are cut: the gradient is that of the reference."""
    logits = torch.randn(1, 150, 9, 700, dtype=torch.float64).mul_(2)
    labels = torch.randint(0, 150, (1, 31, 2500), dtype=torch.uint8)
    results = []
    for impl, dtype in (("cpp", torch.float32), ("reference", torch.float64)):
        leaf = logits.to(torch.float32).to(dtype).requires_grad_()
        loss = ops.rectified_cross_entropy(leaf, labels, reduction="sum", impl=impl)
        loss.backward()
        assert leaf.grad is not None
        results.append((loss.detach().double(), leaf.grad.double()))
    (loss, grad), (true_loss, true_grad) = results
    assert abs(loss - true_loss) <= 1e-6 * true_loss
    assert float((grad - true_grad).abs().max()) <= 2e-6 * float(true_grad.abs().max())


@pytest.mark.parametrize("height", [1, 3])
def test_many_rows_of_labels_on_one_of_maps(height: int) -> None:
    """A thousand equal terms of the gradient are not added one by one."""
    similarity = torch.full((1, 1, height, 4), 0.3)
    labels = torch.zeros(1, 1001, 4, dtype=torch.uint8)
    inputs = {"similarity": similarity, "labels": labels, "classes": torch.zeros(1, 1, dtype=torch.int64)}
    operator = OPERATORS["map_consistency"]
    want = reference(operator, inputs)["grad_similarity"]
    got = run_operator(operator, inputs, "cpp")["grad_similarity"]
    assert_close(got, want, 1e-6, what="gradient")


LARGE: dict[str, list[dict[str, tuple[int, ...]]]] = {
    "masked_average_pool": [
        {"features": (1, channels, height, width), "labels": (1, 8, 8), "classes": (1, slots)}
        for channels, height, width, slots in (
            (256, 181, 181, 21),
            (2048, 4096, 4096, 19),
            (1, 1, 1 << 27, 1),
            (4096, 7, 7, 65536),
        )
    ],
    "prototype_similarity": [
        {"query": (batch, channels, 256, 512), "prototypes": (batch, slots, channels)}
        for batch, channels, slots in ((64, 2048, 150), (2, 256, 8192), (1, 2048, 1024))
    ],
    "map_consistency": [
        {"similarity": (batch, maps, h, w), "labels": (batch, scale * h, scale * w)}
        for batch, maps, h, w in ((64, 19, 256, 512), (1, 65536, 64, 64), (1, 1, 8, 1 << 16))
        for scale in (1, 4)
    ],
    "rectified_cross_entropy": [
        {
            "logits": (batch, classes, h, w),
            "labels": (batch, scale * h, scale * w),
            "similarity": (batch, 1, h, w),
        }
        for batch, classes, h, w in ((64, 19, 256, 512), (1, 65536, 64, 64), (2, 256, 8, 1 << 16))
        for scale in (1, 4)
    ],
    "predict": [
        {"logits": (batch, classes, h, w), "size": (scale * h, scale * w)}
        for batch, classes, h, w in ((64, 19, 256, 512), (8, 256, 256, 512), (1, 64, 8, 1 << 16))
        for scale in (1, 4)
    ],
    "cross_similarity": [
        {
            "query": (batch, channels, *query),
            "guide": (batch, channels, *guide),
            "guide_labels": (batch, 8, 8),
            "classes": (batch, slots),
        }
        for batch, channels, query, guide, slots in (
            (64, 256, (256, 512), (256, 512), 19),
            (1, 2048, (512, 512), (512, 512), 1),
            (1, 3, (1, 1 << 19), (1, 1 << 19), 2),
            (2, 256, (1, 1), (1, 1 << 19), 1),
            (1, 16384, (64, 64), (64, 64), 100),
        )
    ],
}


@pytest.mark.parametrize("threads", [1, 8, 64, 256])
@pytest.mark.parametrize(("operator", "implementation"), COMPILED)
def test_plans_keep_to_the_bound(operator: Operator, implementation: Implementation, threads: int) -> None:
    """However large the images, the batch, the classes, as far as registry.py says, and the threads."""
    from cisc_ext import _build

    variants: list[dict[str, Any]] = [{"ohem": False}, {"ohem": True}]
    if operator.name == "cross_similarity":
        variants = [{"reduction": name, "k": 8} for name in ("max", "topk", "softmax", "mean")]
    for shapes in LARGE[operator.name]:
        for backward in (False, True):
            for variant in variants:
                made = _build.plan(operator.name, shapes, backward=backward, threads=threads, **variant)
                assert 0 < made["workspace_bytes"] <= operator.extra_bytes_cpu, (shapes, variant, made)


@pytest.mark.parametrize(("operator", "implementation"), COMPILED)
def test_plans_do_no_less_than_the_least(operator: Operator, implementation: Implementation) -> None:
    """The operations that benchmarks count are at most those that a kernel makes."""
    from cisc_ext import _build

    workload = next(operator.workloads())
    inputs = workload.make()
    sized = shapes_of(inputs)
    for passes in workload.passes:
        made = _build.plan(operator.name, sized, backward=passes != "forward")
        assert operator.cost(inputs, passes).flops <= made["flops"], passes


def test_rows_of_many_classes_are_shared_out() -> None:
    """A row of all classes' logits is long, and yet there are tasks for more than one thread."""
    from cisc_ext import _build

    shapes = {"logits": (1, 1000, 128, 1024), "labels": (1, 512, 4096)}
    assert _build.plan("rectified_cross_entropy", shapes, backward=True)["tile"]["tasks"] > 1


def test_hard_pixels_are_in_the_plan() -> None:
    from cisc_ext import _build

    plain, hard = (
        _build.plan("rectified_cross_entropy", SHAPES["rectified_cross_entropy"], threads=2, ohem=ohem)
        for ohem in (False, True)
    )
    assert hard["workspace_bytes"] > plain["workspace_bytes"] and hard["flops"] > plain["flops"]


def test_more_pixels_than_positions_count() -> None:
    """A tile that begins with the last pixels ends within 32 bits."""
    query, guide = torch.zeros(1, 1, 1, 1).expand(1, 1, 2, 2**30 - 255), torch.zeros(1, 1, 2, 2)
    labels, classes = torch.zeros(1, 2, 2, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(
        (ValueError, RuntimeError), match="query must have at most 2147483136 pixels, got 2 x"
    ):
        ops.cross_similarity(query, guide, labels, classes, impl="cpp")
