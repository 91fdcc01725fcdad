"""Wrong arguments end with a TypeError or ValueError of one line that names operator and argument."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from cisc_ext import ops
from cisc_ext.ops import _implementations, registry
from cisc_ext.ops.registry import Call


def _inputs() -> dict[str, dict[str, Any]]:
    """Right arguments of every operator: B = 2, C = 4, K = 3, S = 1."""
    labels = torch.zeros(2, 9, 7, dtype=torch.uint8)
    classes = torch.zeros(2, 1, dtype=torch.int64)
    maps, features, logits = torch.rand(2, 1, 3, 5), torch.rand(2, 4, 3, 5), torch.rand(2, 3, 3, 5)
    return {
        "masked_average_pool": {"features": features, "labels": labels, "classes": classes},
        "prototype_similarity": {"query": features, "prototypes": torch.rand(2, 1, 4)},
        "cross_similarity": {
            "query": features,
            "guide": torch.rand(2, 4, 2, 6),
            "guide_labels": labels,
            "classes": classes,
        },
        "map_consistency": {"similarity": maps, "labels": labels, "classes": classes},
        "rectified_cross_entropy": {
            "logits": logits,
            "labels": labels,
            "similarity": maps,
            "classes": classes,
        },
        "predict": {"logits": logits, "size": (9, 7), "labels": labels},
    }


def _tensors(name: str) -> list[str]:
    return [key for key, value in _inputs()[name].items() if isinstance(value, torch.Tensor)]


OWN = {"classes": None, "query_labels": torch.zeros(2, 9, 7, dtype=torch.uint8)}
SMALL = torch.zeros(2, 1, dtype=torch.int64)
LABELS = torch.zeros(2, 9, 7, dtype=torch.int64)

# operator, changed arguments, error, what the message says of which argument
WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("masked_average_pool", {"labels": LABELS[:1]}, ValueError, "labels must have shape"),
    ("masked_average_pool", {"classes": SMALL[:1]}, ValueError, "classes must have shape"),
    (
        "masked_average_pool",
        {"features": torch.rand(2, 4, 0, 5)},
        ValueError,
        "features must have at least one pixel",
    ),
    ("masked_average_pool", {"classes": SMALL - 2}, ValueError, "classes must be -1 or a class"),
    ("masked_average_pool", {"eps": 0.0}, ValueError, "eps must be above 0"),
    ("masked_average_pool", {"eps": float("nan")}, ValueError, "eps must be above 0"),
    ("masked_average_pool", {"eps": "1"}, TypeError, "eps must be a number"),
    ("prototype_similarity", {"prototypes": torch.rand(2, 1, 5)}, ValueError, "prototypes must have shape"),
    ("prototype_similarity", {"prototypes": torch.rand(1, 1, 4)}, ValueError, "prototypes must have shape"),
    ("prototype_similarity", {"eps": -1.0}, ValueError, "eps must be above 0"),
    ("cross_similarity", {"guide": torch.rand(1, 4, 2, 6)}, ValueError, "guide must have shape"),
    ("cross_similarity", {"guide": torch.rand(2, 5, 2, 6)}, ValueError, "guide must have shape"),
    ("cross_similarity", {"guide_labels": LABELS[:1]}, ValueError, "guide_labels must have shape"),
    (
        "cross_similarity",
        {"guide_labels": LABELS[:, :0]},
        ValueError,
        "guide_labels must have at least one pixel",
    ),
    ("cross_similarity", {"classes": SMALL[:1]}, ValueError, "classes must have shape"),
    ("cross_similarity", {"classes": SMALL - 2}, ValueError, "classes must be -1 or a class"),
    ("cross_similarity", {"classes": None}, ValueError, "exactly one of classes and query_labels .* neither"),
    (
        "cross_similarity",
        {"query_labels": LABELS},
        ValueError,
        "exactly one of classes and query_labels .* both",
    ),
    ("cross_similarity", OWN | {"query_labels": LABELS[:1]}, ValueError, "query_labels must have shape"),
    (
        "cross_similarity",
        OWN | {"query_labels": LABELS[..., :0]},
        ValueError,
        "query_labels must have at least one",
    ),
    (
        "cross_similarity",
        OWN | {"query_labels": LABELS.float()},
        TypeError,
        "query_labels must be one of uint8",
    ),
    ("cross_similarity", OWN | {"query_labels": LABELS[0]}, ValueError, r"query_labels must be \[B,H,W\]"),
    (
        "cross_similarity",
        OWN | {"query_labels": LABELS.to("meta")},
        ValueError,
        "query_labels must be on cpu",
    ),
    ("cross_similarity", {"reduction": "min"}, ValueError, "reduction must be one of 'max'"),
    ("cross_similarity", {"k": 0}, ValueError, "k must be at least 1"),
    ("cross_similarity", {"k": 2.0}, TypeError, "k must be an int"),
    ("cross_similarity", {"k": True}, TypeError, "k must be an int"),
    ("cross_similarity", {"temperature": 0}, ValueError, "temperature must be at least 1.17549e-38"),
    ("cross_similarity", {"temperature": -0.1}, ValueError, "temperature must be at least 1.17549e-38"),
    (
        "cross_similarity",
        {"temperature": float("nan")},
        ValueError,
        "temperature must be at least 1.17549e-38",
    ),
    ("cross_similarity", {"temperature": 1e39}, ValueError, "temperature must be at most 3.40282e"),
    ("cross_similarity", {"temperature": None}, TypeError, "temperature must be a number"),
    ("cross_similarity", {"ignore_index": 2.5}, TypeError, "ignore_index must be an int"),
    ("cross_similarity", {"eps": 0}, ValueError, "eps must be above 0"),
    ("map_consistency", {"labels": LABELS[:1]}, ValueError, "labels must have shape"),
    ("map_consistency", {"classes": torch.cat([SMALL, SMALL], 1)}, ValueError, "classes must have shape"),
    (
        "map_consistency",
        {"similarity": torch.rand(2, 1, 3, 0)},
        ValueError,
        "similarity must have at least one pixel",
    ),
    ("map_consistency", {"classes": SMALL - 2}, ValueError, "classes must be -1 or a class"),
    ("map_consistency", {"ignore_index": None}, TypeError, "ignore_index must be an int"),
    ("rectified_cross_entropy", {"labels": LABELS[:1]}, ValueError, "labels must have shape"),
    (
        "rectified_cross_entropy",
        {"labels": LABELS + 3},
        ValueError,
        r"labels must be in \[0, 3\) or 255, .* 3 to 3",
    ),
    ("rectified_cross_entropy", {"labels": LABELS - 1}, ValueError, r"labels must be in \[0, 3\) or 255"),
    ("rectified_cross_entropy", {"labels": LABELS + 300}, ValueError, r"labels must be in \[0, 3\) or 255"),
    (
        "rectified_cross_entropy",
        {"labels": LABELS.to(torch.uint8) + 255, "ignore_index": -1},
        ValueError,
        r"labels must be in \[0, 3\) or -1",
    ),
    ("rectified_cross_entropy", {"classes": SMALL - 2}, ValueError, r"classes must be -1 or in \[0, 3\)"),
    ("rectified_cross_entropy", {"classes": SMALL + 3}, ValueError, r"classes must be -1 or in \[0, 3\)"),
    ("rectified_cross_entropy", {"similarity": None}, ValueError, "classes needs similarity"),
    (
        "rectified_cross_entropy",
        {"classes": None, "similarity": torch.rand(2, 2, 3, 5)},
        ValueError,
        r"similarity must have shape \(2, 1, any, any\)",
    ),
    (
        "rectified_cross_entropy",
        {"similarity": torch.rand(1, 1, 3, 5)},
        ValueError,
        "similarity must have shape",
    ),
    (
        "rectified_cross_entropy",
        {"similarity": torch.rand(2, 2, 3, 5)},
        ValueError,
        "classes must have shape",
    ),
    (
        "rectified_cross_entropy",
        {"similarity": torch.rand(2, 1, 0, 5)},
        ValueError,
        "similarity must have at least",
    ),
    (
        "rectified_cross_entropy",
        {"logits": torch.rand(2, 0, 3, 5)},
        ValueError,
        "logits must have at least one class",
    ),
    (
        "rectified_cross_entropy",
        {"logits": torch.rand(2, 3, 3, 0)},
        ValueError,
        "logits must have at least one pixel",
    ),
    ("rectified_cross_entropy", {"reduction": "max"}, ValueError, "reduction must be one of 'mean'"),
    ("rectified_cross_entropy", {"ohem_threshold": -0.1}, ValueError, "ohem_threshold must be at least 0"),
    (
        "rectified_cross_entropy",
        {"ohem_threshold": float("nan")},
        ValueError,
        "ohem_threshold must be at least 0",
    ),
    ("rectified_cross_entropy", {"ohem_threshold": "0.7"}, TypeError, "ohem_threshold must be a number"),
    ("rectified_cross_entropy", {"ohem_min_kept": -1}, ValueError, "ohem_min_kept must be at least 0"),
    ("rectified_cross_entropy", {"ohem_min_kept": 1.0}, TypeError, "ohem_min_kept must be an int"),
    ("rectified_cross_entropy", {"ignore_index": "255"}, TypeError, "ignore_index must be an int"),
    ("predict", {"logits": torch.rand(2, 257, 3, 5)}, ValueError, "logits must have 1 to 256 classes"),
    ("predict", {"logits": torch.rand(2, 0, 3, 5)}, ValueError, "logits must have 1 to 256 classes"),
    ("predict", {"logits": torch.rand(2, 3, 0, 5)}, ValueError, "logits must have at least one pixel"),
    ("predict", {"size": (9, 8)}, ValueError, "labels must have shape"),
    ("predict", {"size": (9,)}, ValueError, r"size must be \(H, W\)"),
    ("predict", {"size": (2, 9, 7)}, ValueError, r"size must be \(H, W\)"),
    ("predict", {"size": 9}, TypeError, r"size must be \(H, W\)"),
    ("predict", {"size": (9.0, 7)}, TypeError, "size must be an int"),
    ("predict", {"size": (-1, 7), "labels": None}, ValueError, "size must be at least 0"),
    ("predict", {"labels": LABELS[:1]}, ValueError, "labels must have shape"),
    ("predict", {"labels": LABELS + 3}, ValueError, r"labels must be in \[0, 3\) or 255"),
    ("predict", {"labels": LABELS - 1}, ValueError, r"labels must be in \[0, 3\) or 255"),
    ("predict", {"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
]


def _fails(name: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    call = Call("cpu", (torch.float32,))
    able = [one.name for one in registry.OPERATORS[name].implementations if not one.obstacles(call)]
    for impl in [None, *able]:
        with pytest.raises(error, match=f"^{name}: {message}") as raised:
            getattr(ops, name)(**(_inputs()[name] | changed), impl=impl)
        assert "\n" not in str(raised.value)
        assert type(raised.value) is error


@pytest.mark.parametrize("name", registry.OPERATORS)
def test_right_arguments(name: str) -> None:
    getattr(ops, name)(**_inputs()[name])


@pytest.mark.parametrize(("name", "changed", "error", "message"), WRONG)
def test_wrong_argument(name: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    _fails(name, changed, error, message)


@pytest.mark.parametrize(
    ("name", "argument"), [(name, arg) for name in registry.OPERATORS for arg in _tensors(name)]
)
def test_every_tensor_is_checked(name: str, argument: str) -> None:
    value = _inputs()[name][argument]
    for wrong in (np.zeros(value.shape), 3, [[1]]):
        _fails(name, {argument: wrong}, TypeError, rf"{argument} must be a tensor \[B,")
    is_features = value.is_floating_point()
    strange = (torch.int64, torch.complex64) if is_features else (torch.float32, torch.bool, torch.int16)
    for dtype in (*strange, *((torch.uint8,) if argument == "classes" else ())):
        _fails(
            name, {argument: value.to(dtype)}, TypeError, f"{argument} must be one of .*got {str(dtype)[6:]}"
        )
    for wrong in (value[0], value[None]):
        _fails(name, {argument: wrong}, ValueError, rf"{argument} must be \[B,[^\]]*\], got shape")
    if argument != _tensors(name)[0]:
        _fails(name, {argument: value.to("meta")}, ValueError, f"{argument} must be on cpu like .*, got meta")


@pytest.mark.parametrize("name", registry.OPERATORS)
def test_impl(name: str) -> None:
    inputs = _inputs()[name]
    function = getattr(ops, name)
    for unknown in ("cuda", "Reference", "", 3):
        with pytest.raises(
            ValueError, match=f"^{name}: impl must be 'auto', 'reference', 'cpp', 'triton' or None, got"
        ):
            function(**inputs, impl=unknown)
    doubles = {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    for refused in ("cpp", "triton"):
        with pytest.raises(
            ValueError, match=f"^{name}: impl='{refused}' (cannot run here: .+|does not exist)"
        ):
            function(**doubles, impl=refused)
    for impl in (None, "auto", "reference"):
        function(**doubles, impl=impl)


@pytest.mark.parametrize("name", registry.OPERATORS)
def test_triton_on_the_cpu_is_for_its_interpreter(name: str) -> None:
    found = _implementations.HERE
    if found.interpreted and not found.triton:
        getattr(ops, name)(**_inputs()[name], impl="triton")
        return
    reason = re.escape(found.triton) or r"Triton runs on the CPU in its interpreter only"
    with pytest.raises(ValueError, match=f"^{name}: impl='triton' cannot run here: {reason}"):
        getattr(ops, name)(**_inputs()[name], impl="triton")


def test_only_the_reference_takes_float64() -> None:
    for name, operator in registry.OPERATORS.items():
        for one in operator.implementations:
            if one.name != "reference":
                reasons = one.obstacles(Call("cpu", (torch.float64,) * len(operator.features)))
                assert any("float64" in reason for reason in reasons), (name, one.name)
