"""What the GPU's kernels of the losses do in ways of their own: where sums between rows of cells are kept,
pieces of large and of small cells, tasks left to the general kernel, and bands that depend on the number of
multiprocessors. Other builds run the same cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_equal
from opcases import DEVICES, SIMULATED, run_operator, skip_unless_able
from oprule import assert_meets_rule
from torch import Tensor

from cisc_ext import ops
from cisc_ext.ops.registry import OPERATORS

IGNORED = 255
SIZES = {  # b, planes, h, w, height, width
    "carry_in_workspace": (1, 100, 4, 3, 13, 9),
    "more_tasks_than_carries": (5, 4000, 14, 1, 14, 2),
    "many_warps_in_a_row": (1, 2, 3, 70, 9, 277),
    "large_cells": (1, 3, 2, 3, 70, 45),
    "one_point": (2, 2, 1, 1, 19, 37),
    "same_size": (1, 3, 9, 40, 9, 40),
    "fewer_pixels": (1, 3, 23, 70, 7, 9),
    "rows_up_columns_down": (1, 3, 3, 70, 31, 9),
}


def _inputs(name: str, size: tuple[int, ...], device: str = "cpu") -> dict[str, Any]:
    b, planes, h, w, height, width = size
    generator = torch.Generator().manual_seed(29)
    labels = torch.randint(0, planes, (b, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORED
    if name == "map_consistency":
        maps = torch.rand(b, planes, h, w, generator=generator) * 1.2 - 0.1
        inputs: dict[str, Any] = {
            "similarity": maps,
            "labels": labels,
            "classes": torch.arange(planes).repeat(b, 1),
        }
    else:
        inputs = {"logits": torch.randn(b, planes, h, w, generator=generator) * 3, "labels": labels}
    return {key: value.to(device) for key, value in inputs.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ["map_consistency", "rectified_cross_entropy"])
def test_shape(name: str, size: tuple[int, ...], device: str) -> None:
    operator = OPERATORS[name]
    if name == "map_consistency" and size[1] > 1000:
        size = (size[0], 150, *size[2:])
    inputs = _inputs(name, size, device)
    implementation = next(one for one in operator.implementations if one.name == "cpp")
    skip_unless_able(operator, implementation, inputs)
    assert_meets_rule(operator, "cpp", inputs)


def _far_below(inputs: dict[str, Any]) -> dict[str, Any]:
    """With a label whose probability, in one cell, is far below what a sum relative to the corners shows."""
    inputs["logits"][0, :, 2, 2] = -300.0
    inputs["logits"][0, 0, 2, 2] = 0.0
    inputs["logits"][0, 1, 2, 3] = 300.0
    return inputs


@pytest.mark.skipif(not SIMULATED, reason="only the simulator has a number of multiprocessors to choose")
@pytest.mark.parametrize("more", [{}, {"ohem_threshold": 0.5, "ohem_min_kept": 40}], ids=["all", "ohem"])
@pytest.mark.parametrize("far_below", [False, True], ids=["plain", "far_below"])
def test_same_bits_on_any_number_of_multiprocessors(
    monkeypatch: pytest.MonkeyPatch, far_below: bool, more: dict[str, Any]
) -> None:
    for name in ("map_consistency", "rectified_cross_entropy"):
        inputs = _inputs(name, (2, 4, 21, 40, 80, 157))
        if name == "rectified_cross_entropy":
            inputs = (_far_below(inputs) if far_below else inputs) | more
            assert_meets_rule(OPERATORS[name], "cpp", inputs)
        results = []
        for multiprocessors in ("1", "7", "50"):
            monkeypatch.setenv("CISC_SIMT_MULTIPROCESSORS", multiprocessors)
            results.append(run_operator(OPERATORS[name], inputs, "cpp"))
        for key, value in results[0].items():
            for other in results[1:]:
                assert_equal(other[key], value, what=f"{name}: {key}")


@pytest.mark.skipif(not SIMULATED, reason="CISC_CHECK=0 is for GPUs: the CPU's kernels always check")
@pytest.mark.parametrize("reduction", ["mean", "valid_mean", "sum", "none"])
@pytest.mark.parametrize("wrong", ["label", "class", "class_without_pixels"])
def test_wrong_values_give_nan(monkeypatch: pytest.MonkeyPatch, wrong: str, reduction: str) -> None:
    monkeypatch.setenv("CISC_CHECK", "0")
    inputs = _inputs("rectified_cross_entropy", (2, 3, 4, 5, 13, 17))
    maps, classes = torch.rand(2, 2, 6, 6, requires_grad=True), torch.tensor([[0, -1], [2, 1]])
    logits, labels = inputs["logits"].requires_grad_(), inputs["labels"]
    if wrong == "label":
        labels[1, 12, 16] = 3
    else:
        classes[1, 1] = -2
    if wrong == "class_without_pixels":
        labels = labels[:, :0]
    results: list[Tensor] = []
    if wrong != "class_without_pixels" or reduction != "none":
        for more in ({}, {"ohem_threshold": 0.3, "ohem_min_kept": 20}):
            loss = ops.rectified_cross_entropy(
                logits, labels, maps.detach(), classes, reduction=reduction, impl="cpp", **more
            )
            results += [loss, *torch.autograd.grad(loss.sum(), logits)]
    if wrong != "label":
        loss = ops.map_consistency(maps, labels, classes, impl="cpp")
        results += [loss, *torch.autograd.grad(loss, maps)]
    if wrong == "label" and reduction == "none":  # a gradient of its own launch
        assert len(results) == 4
    for value in results:
        assert bool(value.isnan().all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [8.0, 20.0, 60.0])
@pytest.mark.parametrize(
    "size",
    [(1, 3, 3, 9, 23, 40), (1, 3, 5, 9, 40, 15), (1, 3, 4, 6, 29, 41)],
    ids=["pieces", "steps", "whole"],
)
def test_corners_far_apart(size: tuple[int, ...], scale: float, device: str) -> None:
    """Exponentials of a row follow from the first one and a ratio: up to where those are no numbers."""
    inputs = _inputs("rectified_cross_entropy", size, device)
    inputs["logits"] *= scale
    operator = OPERATORS["rectified_cross_entropy"]
    skip_unless_able(operator, next(one for one in operator.implementations if one.name == "cpp"), inputs)
    assert_meets_rule(operator, "cpp", inputs)
