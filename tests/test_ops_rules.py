"""The rules that all operators and implementations share, case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from numerics import assert_close, assert_equal
from opcases import (
    CASES,
    DEVICES,
    RUNS,
    as_dtype,
    cast,
    cotangent,
    is_empty,
    run,
    run_operator,
    skip_unless_able,
)
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import naive as oracles
from cisc_ext import ops
from cisc_ext.ops import _bilinear, _checks, _cross_reference
from cisc_ext.ops.registry import OPERATORS, Implementation, Operator, Sample

FLOAT32_ROUNDING = 16 * torch.finfo(torch.float32).eps
"""Of the largest magnitude: the same sums in another order."""


def _layouts(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values, otherwise laid out."""
    yield "transposed", value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if value.dim() == 4:
        yield "channels-last", value.contiguous(memory_format=torch.channels_last)
    order = list(range(value.dim()))[::-1]
    yield "reversed dimensions", value.permute(order).contiguous().permute(order)
    wide = value.new_full((*value.shape[:-1], 3 * value.shape[-1] + 2), 77)
    wide[..., 1:-1:3] = value
    yield "sliced", wide[..., 1:-1:3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation", "sample"), CASES)
def test_strides_do_not_matter(
    operator: Operator, implementation: Implementation, sample: Sample, device: str
) -> None:
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features), device)
    skip_unless_able(operator, implementation, inputs)
    want = run_operator(operator, inputs, implementation.name)
    for argument, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        for layout, view in _layouts(value):
            assert_equal(view, value, what=layout)
            got = run_operator(operator, inputs | {argument: view}, implementation.name)
            for name, result in got.items():
                relative = FLOAT32_ROUNDING if result.is_floating_point() else 0
                assert_close(result, want[name], relative, what=f"{name} with {argument} {layout}")


class _Watch(TorchDispatchMode):
    """Notes what would make a GPU's host wait, also inside our operators."""

    WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "_unique2", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cisc_ext":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args)
        masked = "index" in func._schema.name and any(
            part is not None and part.dtype == torch.bool
            for part in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else [])
        )
        if masked or func._schema.name.removeprefix("aten::") in self.WAITS:
            self.waits.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("operator", "sample"),
    [
        pytest.param(operator, sample, id=f"{name}-{sample.name}")
        for name, operator in OPERATORS.items()
        for sample in operator.samples()
    ],
)
def test_references_never_wait_for_a_gpu(
    operator: Operator, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where values are not checked, as on a GPU, and what depends on sizes alone is there already."""
    monkeypatch.setattr(_checks, "invalid_values", lambda invalid, expected, values: invalid.any())
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features))
    run_operator(operator, inputs, "reference")
    with _Watch() as watch:
        run_operator(operator, inputs, "reference")
    assert watch.waits == []


def test_waiting_is_noticed() -> None:
    query = torch.rand(1, 2, 3, 3)
    labels = torch.zeros(1, 3, 3, dtype=torch.int64)
    with _Watch() as watch:
        torch.ones(2).nonzero()
        torch.ones(2)[torch.ones(2) > 0]
        bool(torch.ones(()))
        ops.cross_similarity(
            query, query, labels, query_labels=labels, reduction="mean", impl="reference"
        )  # says so itself
    assert watch.waits == ["aten::nonzero", "aten::index", "aten::_local_scalar_dense", "aten::_unique2"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation", "sample"), CASES)
def test_second_derivatives_are_right_or_refused(
    operator: Operator, implementation: Implementation, sample: Sample, device: str
) -> None:
    """A gradient that is taken for a constant would be silently wrong in a gradient penalty."""
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features), device)
    skip_unless_able(operator, implementation, inputs)
    if not operator.differentiable or is_empty(inputs):
        pytest.skip("nothing to differentiate")
    for name in operator.differentiable:
        leaf = inputs[name].detach().requires_grad_()

        def penalty(leaf: Tensor, name: str, result: Callable[..., Any]) -> Tensor:
            output = result(**(inputs | {name: leaf}))
            output = output[0] if isinstance(output, tuple) else output
            loss = 7 * output.square().sum() + leaf.pow(3).sum()
            return torch.autograd.grad(loss, leaf, create_graph=True)[0].square().sum()

        ours = penalty(leaf, name, lambda **given: operator.function(**given, impl=implementation.name))
        if operator.name != "masked_average_pool":
            with pytest.raises(RuntimeError, match="no autograd formula"):
                ours.backward()
            continue
        ours.backward()
        naive = leaf.detach().clone().requires_grad_()
        penalty(naive, name, oracles.masked_average_pool).backward()
        assert leaf.grad is not None and naive.grad is not None
        assert_close(leaf.grad, naive.grad, 4 * FLOAT32_ROUNDING, what=f"penalty's gradient to {name}")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by make_dual
@pytest.mark.parametrize(("operator", "implementation"), RUNS)
def test_forward_mode_is_refused(operator: Operator, implementation: Implementation) -> None:
    inputs = cast(operator, next(operator.samples()), (torch.float32,) * len(operator.features))
    skip_unless_able(operator, implementation, inputs)
    for name in operator.differentiable:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
            with pytest.raises(NotImplementedError, match=f"^{operator.name}: forward-mode"):
                operator.function(**(inputs | {name: dual}), impl=implementation.name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation", "sample"), CASES)
def test_expanded_batch(
    operator: Operator, implementation: Implementation, sample: Sample, device: str
) -> None:
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features), device)
    skip_unless_able(operator, implementation, inputs)
    for argument, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape[0] == 0:
            continue
        expanded = value[:1].expand_as(value)
        got = run_operator(operator, inputs | {argument: expanded}, implementation.name)
        want = run_operator(operator, inputs | {argument: expanded.contiguous()}, implementation.name)
        for name, result in got.items():
            assert_close(result, want[name], FLOAT32_ROUNDING, what=f"{name} with {argument} expanded")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation", "sample"), CASES)
def test_integer_types(
    operator: Operator, implementation: Implementation, sample: Sample, device: str
) -> None:
    """uint8, int32 and int64 labels, int32 and int64 classes, and any number for ignored pixels."""
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features), device)
    skip_unless_able(operator, implementation, inputs)
    want = run_operator(operator, inputs, implementation.name)

    def check(changed: dict[str, Any], what: str) -> None:
        for name, result in run_operator(operator, inputs | changed, implementation.name).items():
            relative = FLOAT32_ROUNDING if result.is_floating_point() else 0
            assert_close(result, want[name], relative, what=f"{name} with {what}")

    labels = [name for name in inputs if name.endswith("labels")]
    ignored = inputs.get("ignore_index", 255)
    for dtype in (torch.int32, torch.int64):
        check({name: inputs[name].to(dtype) for name in labels}, f"{dtype} labels")
        if inputs.get("classes") is not None:
            check({"classes": inputs["classes"].to(dtype)}, f"{dtype} classes")
        if operator.name in ("masked_average_pool", "prototype_similarity"):
            continue
        for other in (-1, 255, 300, -(2**31)):
            changed = {
                name: torch.where(inputs[name] == ignored, other, inputs[name].to(dtype)) for name in labels
            }
            check(changed | {"ignore_index": other}, f"{dtype} labels ignoring {other}")
    if ignored == -1 and labels:  # predict's samples: bring them to uint8
        changed = {name: torch.where(inputs[name] < 0, 255, inputs[name]).to(torch.uint8) for name in labels}
        if inputs["logits"].shape[1] < 256:
            check(changed | {"ignore_index": 255}, "uint8 labels")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation"), RUNS)
def test_uint8_labels_do_not_wrap(operator: Operator, implementation: Implementation, device: str) -> None:
    """Class 300 is not label 44, `ignore_index` -1 is not label 255, 299 not 43."""
    features = torch.rand(1, 3, 4, 4, device=device) + 0.1
    labels = torch.full((1, 8, 8), 44, dtype=torch.uint8, device=device)
    classes = torch.tensor([[300, 44]], device=device)
    skip_unless_able(operator, implementation, dict.fromkeys(operator.features, features))
    impl = implementation.name
    if operator.name == "masked_average_pool":
        result = ops.masked_average_pool(features, labels, classes, impl=impl)
        assert_equal(result[:, 0].cpu(), torch.zeros(1, 3), what="class 300")
        assert float(result[:, 1].min()) > 0.05
    elif operator.name == "cross_similarity":
        for reduction in _cross_reference.REDUCTIONS:
            result = ops.cross_similarity(features, features, labels, classes, reduction=reduction, impl=impl)
            assert_equal(result[:, 0].cpu(), torch.zeros(1, 4, 4), what="class 300")
            assert float(result[:, 1].min()) > 0.05
            own = {"query_labels": labels, "reduction": reduction, "impl": impl}
            result = ops.cross_similarity(features, features, labels, **own, ignore_index=300)
            assert float(result.min()) > 0.05
            result = ops.cross_similarity(features, features, labels, **own, ignore_index=44)
            assert_equal(result.cpu(), torch.zeros(1, 1, 4, 4), what="ignored")
    elif operator.name == "map_consistency":
        maps = torch.full((1, 2, 4, 4), 0.25, device=device)
        for ignore_index in (-1, 300):
            loss = ops.map_consistency(maps, labels, classes, ignore_index=ignore_index, impl=impl)
            want = -0.5 * (torch.tensor(0.75).log() + torch.tensor(0.25).log())
            assert_close(loss.cpu(), want, 1e-6, what="loss")
    elif operator.name == "rectified_cross_entropy":
        logits = torch.zeros(1, 50, 4, 4, device=device)
        for ignore_index in (-1, 300):
            loss = ops.rectified_cross_entropy(logits, labels, ignore_index=ignore_index, impl=impl)
            assert_close(loss.cpu(), torch.tensor(50.0).log(), 1e-6, what="loss")
    elif operator.name == "predict":
        logits = torch.zeros(1, 50, 4, 4, device=device)
        for ignore_index in (-1, 300):
            _, confusion = ops.predict(logits, (8, 8), labels, ignore_index=ignore_index, impl=impl)
            assert confusion is not None and int(confusion[44, 0]) == 64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation"), RUNS)
def test_class_minus_one(operator: Operator, implementation: Implementation, device: str) -> None:
    """Zeros and no gradient for class -1, even where a pixel is labeled -1."""
    features = torch.randn(2, 3, 4, 4, device=device)
    labels = torch.full((2, 8, 8), -1, dtype=torch.int32, device=device)
    classes = torch.full((2, 2), -1, dtype=torch.int32, device=device)
    skip_unless_able(operator, implementation, dict.fromkeys(operator.features, features))
    maps = torch.rand(2, 2, 4, 4, device=device)
    impl = implementation.name

    def zero(inputs: dict[str, Any], **more: Any) -> None:
        for name, value in run(operator.function, inputs, operator.differentiable, impl=impl, **more).items():
            expected = torch.full_like(value, -1 if not value.is_floating_point() else 0)
            assert_equal(value, expected, what=name)

    if operator.name == "masked_average_pool":
        zero({"features": features, "labels": labels, "classes": classes})
    elif operator.name == "cross_similarity":
        for reduction in _cross_reference.REDUCTIONS:
            inputs = {"query": features, "guide": features, "guide_labels": labels, "classes": classes}
            zero(inputs, reduction=reduction, return_index=True)
    elif operator.name == "map_consistency":
        zero({"similarity": maps, "labels": labels, "classes": classes}, ignore_index=255)
    elif operator.name == "rectified_cross_entropy":
        inputs = {"logits": features, "labels": labels.clamp(min=0)}
        got = run_operator(operator, inputs | {"similarity": maps, "classes": classes}, impl)
        for name, value in run_operator(operator, inputs, impl).items():
            assert_equal(got[name], value, what=f"{name} without a valid class")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation"), RUNS)
def test_mean_over_nothing(operator: Operator, implementation: Implementation, device: str) -> None:
    """All pixels ignored, no pixels at all, no image: 0 with gradient 0."""
    for batch, height, width, label in ((2, 9, 7, 255), (0, 9, 7, 0), (2, 0, 7, 0), (2, 9, 0, 0)):
        labels = torch.full((batch, height, width), label, dtype=torch.uint8, device=device)
        classes = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        features = torch.randn(batch, 2, 4, 3, device=device)
        skip_unless_able(operator, implementation, dict.fromkeys(operator.features, features))
        cases: dict[str, list[dict[str, Any]]] = {
            "masked_average_pool": [{"features": features, "labels": labels, "classes": classes}],
            "map_consistency": [{"similarity": features, "labels": labels, "classes": classes}],
            "rectified_cross_entropy": [
                {"logits": features, "labels": labels, "reduction": reduction, **more}
                for reduction in ("mean", "valid_mean", "sum", "none")
                for more in (
                    {},
                    {"similarity": features, "classes": classes},
                    {"ohem_threshold": 0.7, "ohem_min_kept": 3},
                )
            ],
            "predict": [{"logits": features, "size": (height, width), "labels": labels}],
        }
        for inputs in cases.get(operator.name, []):
            for name, value in run_operator(operator, inputs, implementation.name).items():
                if name != "output0" or operator.name != "predict":
                    assert_equal(value, torch.zeros_like(value), what=f"{name} of {tuple(labels.shape)}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_vectors(dtype: torch.dtype, device: str) -> None:
    """A vector shorter than eps has cosine 0 and gradient 0."""
    query = torch.randn(1, 5, 3, 4, dtype=dtype, device=device)
    query[:, :, 1, 2] = 0
    query[:, :, 2, 0] = 1e-10
    guide = torch.randn(1, 5, 4, 2, dtype=dtype, device=device)
    guide[:, :, 0, 0] = 0
    labels = torch.zeros(1, 4, 2, dtype=torch.uint8, device=device)
    classes = torch.zeros(1, 1, dtype=torch.int64, device=device)
    prototypes = torch.stack([guide[:, :, 0, 0], guide[:, :, 1, 1]], 1)
    calls: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
        (ops.prototype_similarity, {"query": query, "prototypes": prototypes}, "prototypes")
    ]
    for reduction in _cross_reference.REDUCTIONS:
        inputs = {"query": query, "guide": guide, "guide_labels": labels, "classes": classes}
        calls.append((ops.cross_similarity, inputs | {"reduction": reduction}, "guide"))
    for function, inputs, other in calls:
        got = run(function, inputs, ("query", other))
        for name in ("output0", "grad_query"):
            for at in ((1, 2), (2, 0)):
                assert float(got[name][..., at[0], at[1]].abs().max()) == 0, name
            assert float(got[name].abs().max()) > 0, name
        zero = got["grad_prototypes"][:, 0] if other == "prototypes" else got["grad_guide"][:, :, 0, 0]
        assert float(zero.abs().max()) == 0
        assert float(got[f"grad_{other}"].abs().max()) > 0
        assert all(bool(value.isfinite().all()) for value in got.values())


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_binary_cross_entropy_outside_the_open_interval(device: str) -> None:
    """0 at and beyond 0 and 1, and logs are floored at -100."""
    maps = torch.tensor([[-0.5, 0.0, 0.5, 1.0, 1.5], [1.0, 1.5, 0.25, 0.0, -0.5]], device=device)[None, None]
    labels = torch.tensor([[1] * 5, [0] * 5], dtype=torch.uint8, device=device)[None]
    classes = torch.ones(1, 1, dtype=torch.int64, device=device)
    got = run(
        ops.map_consistency, {"similarity": maps, "labels": labels, "classes": classes}, ("similarity",)
    )
    log = torch.tensor([0.5, 0.75]).log().sum()
    assert_close(got["output0"].cpu(), (400 - log) / 10, 1e-6, what="loss")
    want = torch.tensor([[0, 0, -2, 0, 0], [0, 0, 1 / 0.75, 0, 0]])[None, None] / 10
    assert_close(got["grad_similarity"].cpu(), want, 1e-6, what="gradient")


@pytest.mark.parametrize("device", DEVICES)
def test_tiny_probabilities_have_floored_logs(device: str) -> None:
    maps = torch.full((1, 1, 2, 2), 1e-60, dtype=torch.float64, device=device)
    labels = torch.ones(1, 2, 2, dtype=torch.uint8, device=device)
    classes = torch.ones(1, 1, dtype=torch.int64, device=device)
    got = run(
        ops.map_consistency, {"similarity": maps, "labels": labels, "classes": classes}, ("similarity",)
    )
    assert float(got["output0"]) == 100
    assert_equal(got["grad_similarity"], torch.zeros_like(maps), what="gradient")


@pytest.mark.parametrize(
    ("operator", "sample"),
    [
        pytest.param(operator, sample, id=f"{operator.name}-{sample.name}")
        for operator in OPERATORS.values()
        for sample in operator.samples()
    ],
)
def test_tiles_do_not_matter(operator: Operator, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows one by one, and tiles of a few pixels of a row, give the reference's result to rounding."""
    inputs = as_dtype(sample.inputs, torch.float64)
    want = run_operator(operator, inputs, "reference")
    for piece_bytes, query_pixels, guide_pixels, total_bytes in (
        (1, 1, 1, 1),
        (600, 3, 5, 400),
        (2000, 7, 2, 900),
    ):
        monkeypatch.setattr(_bilinear, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(_cross_reference, "_QUERY_PIXELS", query_pixels)
        monkeypatch.setattr(_cross_reference, "_GUIDE_PIXELS", guide_pixels)
        monkeypatch.setattr(_cross_reference, "_TOTAL_BYTES", total_bytes)
        monkeypatch.setattr(_cross_reference, "_TOPK_CANDIDATES", 10 * query_pixels)
        for name, value in run_operator(operator, inputs, "reference").items():
            assert_close(value, want[name], 1e-13 if value.is_floating_point() else 0, what=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("operator", "implementation"), RUNS)
def test_without_gradient(operator: Operator, implementation: Implementation, device: str) -> None:
    """No gradient is asked for: the same numbers, and nothing to call backward on."""
    sample = next(operator.samples())
    inputs = cast(operator, sample, (torch.float32,) * len(operator.features), device)
    skip_unless_able(operator, implementation, inputs)
    want = run_operator(operator, inputs, implementation.name)
    leaves = {
        name: value.requires_grad_() if name in operator.features else value
        for name, value in as_dtype(inputs, torch.float32).items()
    }
    with torch.no_grad():
        quiet = operator.function(**leaves, impl=implementation.name)
    first = quiet[0] if isinstance(quiet, tuple) else quiet
    assert not first.requires_grad
    assert_equal(first, want["output0"], what="output")
    loud = operator.function(**leaves, impl=implementation.name)
    assert (loud[0] if isinstance(loud, tuple) else loud).requires_grad == bool(operator.differentiable)


def test_images_without_pixels() -> None:
    for h, w in ((0, 3), (3, 0), (0, 0)):
        query, prototypes = torch.randn(2, 4, h, w), torch.randn(2, 3, 4)
        got = run(
            ops.prototype_similarity, {"query": query, "prototypes": prototypes}, ("query", "prototypes")
        )
        assert got["output0"].shape == (2, 3, h, w)
        assert_equal(got["grad_prototypes"], torch.zeros_like(prototypes), what="gradient")
        guide = torch.randn(2, 4, 5, 2)
        labels = torch.zeros(2, 5, 2, dtype=torch.uint8)
        classes = torch.zeros(2, 1, dtype=torch.int64)
        for reduction in _cross_reference.REDUCTIONS:
            for one, other in ((query, guide), (guide, query)):
                inputs = {"query": one, "guide": other, "guide_labels": labels, "classes": classes}
                got = run(ops.cross_similarity, inputs | {"reduction": reduction}, ("query", "guide"))
                assert_equal(got["output0"], torch.zeros(2, 1, *one.shape[2:]), what=reduction)
                assert_equal(got["grad_query"], torch.zeros_like(one), what=reduction)
                assert_equal(got["grad_guide"], torch.zeros_like(other), what=reduction)


def test_gradient_of_one_operand_only() -> None:
    sample = next(OPERATORS["cross_similarity"].samples())
    for reduction in _cross_reference.REDUCTIONS:
        inputs = sample.inputs | {"reduction": reduction}
        both = run(ops.cross_similarity, inputs, ("query", "guide"))
        for one in ("query", "guide"):
            got = run(ops.cross_similarity, inputs, (one,))
            assert_equal(got[f"grad_{one}"], both[f"grad_{one}"], what=f"{one} of {reduction}")


def test_no_gradient_to_similarity_of_rectified_cross_entropy() -> None:
    sample = next(s for s in OPERATORS["rectified_cross_entropy"].samples() if s.name == "one_class")
    inputs = dict(sample.inputs)
    inputs["similarity"] = inputs["similarity"].clone().requires_grad_()
    inputs["logits"] = inputs["logits"].clone().requires_grad_()
    for reduction in ("mean", "none"):
        loss = ops.rectified_cross_entropy(**inputs, reduction=reduction)
        loss.sum().backward()
    assert inputs["similarity"].grad is None
    assert inputs["logits"].grad is not None


def test_gradient_scales_with_what_comes_back() -> None:
    for operator in OPERATORS.values():
        sample = next(operator.samples())
        if not operator.differentiable or is_empty(sample.inputs):
            continue
        plain = run_operator(operator, sample.inputs, None)

        def tripled(_function: Any = operator.function, **inputs: Any) -> Tensor:
            result: Tensor = _function(**inputs)
            return 3 * result

        for name, value in run(tripled, sample.inputs, operator.differentiable).items():
            assert_close(value, 3 * plain[name], 1e-14, what=f"{operator.name} {name}")


def test_oracle_weight_lies_between_0_and_1() -> None:
    """Guards the oracle itself, by a case worked by hand."""
    labels = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    similarity = torch.tensor([0.25, -3.0]).view(1, 1, 1, 2)
    got = oracles.weight(labels, similarity, torch.tensor([[0]]))
    assert_equal(torch.as_tensor(got), torch.tensor([[[0.25, 1.0]]]), what="weight")
    assert cotangent(torch.zeros(2)).tolist() == pytest.approx([1.0, 0.5403023])
