"""Inputs beside the registry's small and odd ones: planes that start aligned, pixels one after another
(channels-last), and more of them than a block of a GPU's kernel holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cisc_ext.ops.registry import Operator, Sample

_CHANNELS = 72
_LOW, _SQUARE, _FULL = (32, 64), (64, 64), (128, 256)
_LOGITS, _LABELS = (16, 32), (64, 128)
_QUERY, _GUIDE = (8, 32), (16, 32)
_REDUCTIONS = ("max", "topk", "softmax", "mean")
_IGNORED = 0.1
"""Share of the labels."""


class _Draw:
    """Random tensors, float64 and on the CPU, as those of the registry."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(43)

    def planes(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def pixels(self, *size: int) -> Tensor:
        """The same with the channels next to each other."""
        return self.planes(*size).contiguous(memory_format=torch.channels_last)

    def labels(self, b: int, size: tuple[int, int], classes: int) -> Tensor:
        labels = torch.randint(0, classes, (b, *size), generator=self.generator)
        labels[torch.rand(labels.shape, generator=self.generator) < _IGNORED] = 255
        return labels.to(torch.uint8)


def _pool(draw: _Draw) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, features, full, classes in (
        ("aligned", draw.planes(2, _CHANNELS, *_LOW), _FULL, [[1], [0]]),
        ("channels_last", draw.pixels(2, _CHANNELS, *_LOW), _FULL, [[1, 3, -1], [0, 2, 2]]),
        ("square", draw.planes(1, 24, *_SQUARE), _SQUARE, [[3, 1]]),
    ):
        labels = draw.labels(len(features), full, 4)
        yield name, {"features": features, "labels": labels, "classes": torch.tensor(classes)}


def _prototypes(draw: _Draw) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, query, slots in (
        ("aligned", draw.planes(2, _CHANNELS, *_LOW), 1),
        ("channels_last", draw.pixels(2, _CHANNELS, *_LOW), 3),
        ("square", draw.planes(1, 24, *_SQUARE), 5),
    ):
        yield name, {"query": query, "prototypes": draw.planes(len(query), slots, query.shape[1])}


def _cross(draw: _Draw) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, lay in (("aligned", draw.planes), ("channels_last", draw.pixels)):
        for reduction in _REDUCTIONS:
            inputs = {
                "query": lay(1, _CHANNELS, *_QUERY),
                "guide": lay(1, _CHANNELS, *_GUIDE),
                "guide_labels": draw.labels(1, (64, 128), 3),
                "reduction": reduction,
            }
            if name == "aligned":
                yield f"{name}_{reduction}", {**inputs, "classes": torch.tensor([[1, 0]])}
            else:
                labels = draw.labels(1, (32, 128), 3)
                yield f"{name}_{reduction}", {**inputs, "query_labels": labels, "k": 3}


def _logits(draw: _Draw) -> Iterator[tuple[str, Tensor]]:
    yield "aligned", draw.planes(2, 21, *_LOGITS) * 2
    yield "channels_last", draw.pixels(2, 19, *_LOGITS) * 2
    yield "square", draw.planes(1, 5, *_SQUARE) * 2


def _predict(draw: _Draw) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, logits in _logits(draw):
        labels = draw.labels(len(logits), _LABELS, logits.shape[1])
        yield name, {"logits": logits, "size": _LABELS, "labels": labels, "ignore_index": 255}


def _consistency(draw: _Draw) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, maps, classes in (
        ("aligned", draw.planes(2, 1, *_LOW), [[1], [0]]),
        ("channels_last", draw.pixels(2, 3, *_LOW), [[1, 2, -1], [0, 3, 3]]),
        ("square", draw.planes(1, 2, *_SQUARE), [[2, 0]]),
    ):
        labels = draw.labels(len(maps), _FULL, 4)
        yield name, {"similarity": maps * 0.5 + 0.4, "labels": labels, "classes": torch.tensor(classes)}


def _cross_entropy(draw: _Draw) -> Iterator[tuple[str, dict[str, Any]]]:
    more: dict[str, dict[str, Any]] = {
        "aligned": {},
        "channels_last": {"reduction": "none"},
        "square": {"ohem_threshold": 0.2, "ohem_min_kept": 1000},
    }
    for name, logits in _logits(draw):
        maps = draw.planes(len(logits), 2, *_LOGITS) * 0.5 + 0.4
        yield (
            name,
            {
                **{"logits": logits, "labels": draw.labels(len(logits), _LABELS, logits.shape[1])},
                **{"similarity": maps, "classes": torch.tensor([[1, 0]] * len(logits)), **more[name]},
            },
        )
    yield "plain", {"logits": draw.planes(2, 19, *_LOGITS), "labels": draw.labels(2, _LABELS, 19)}


_OF = {
    "cross_similarity": _cross,
    "map_consistency": _consistency,
    "masked_average_pool": _pool,
    "predict": _predict,
    "prototype_similarity": _prototypes,
    "rectified_cross_entropy": _cross_entropy,
}


def aligned_samples(operator: Operator) -> Iterator[Sample]:
    """Samples like the registry's, the planes first."""
    for name, inputs in _OF[operator.name](_Draw()):
        yield Sample(name, inputs)
