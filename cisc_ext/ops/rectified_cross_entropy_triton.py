"""`rectified_cross_entropy` in Triton: what is launched, by `reduction` and with hard pixels alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import _checks as checks
from . import _triton
from ._cross_entropy_triton import (
    BY_CLASSES,
    DIGITS,
    GRADIENT,
    HISTOGRAM,
    LOSS,
    NO_WEIGHT,
    OWN,
    PIXELS,
    cross_entropy,
    select,
)
from ._tiles import Row, Tile, Tiles
from ._upsample_triton import Axis, Plan, far, launch_count, launch_finish

_NAME = "rectified_cross_entropy"
_COPIES = 16
_TILES = Tiles(
    _NAME,
    (
        Row({"CELLS": 32, "ROWS": 2, "num_warps": 1, "maxnreg": 224}, at_most={"rows": 4096}),
        Row({"CELLS": 32, "ROWS": 4, "num_warps": 1, "maxnreg": 224}, at_most={"rows": 12288}),
        Row({"CELLS": 32, "ROWS": 16, "num_warps": 1, "maxnreg": 224}),
    ),
    (
        {"CELLS": 32, "ROWS": 12, "num_warps": 1, "maxnreg": 224},
        {"CELLS": 32, "ROWS": 8, "num_warps": 1, "maxnreg": 224},
        {"CELLS": 64, "ROWS": 8, "num_warps": 2},
    ),
)


@dataclass
class _Problem:
    """The arguments, as every launch takes them."""

    logits: Tensor  # [B,K,h,w]
    labels: Tensor  # [B,H,W]
    similarity: Tensor | None  # [B,S,h',w']
    classes: Tensor | None  # [B,S]
    ignore_index: int
    state: Tensor  # [3] int64
    limit: Tensor | None = None  # [] float32

    def __post_init__(self) -> None:
        num_classes = self.logits.shape[1]
        if self.logits.device.type == "cpu" or os.environ.get("CISC_CHECK") == "1":
            checks.label_values(_NAME, self.labels, num_classes, self.ignore_index)
            if self.classes is not None:
                checks.class_values(_NAME, self.classes, limit=num_classes)
        launch_count(self.labels, self.classes, self.ignore_index, num_classes, self.state)

    def run(
        self,
        task: int,
        *,
        grad: Tensor | None = None,  # [B,K,h,w]
        loss: Tensor | None = None,  # [B,H,W]
        given: Tensor | None = None,  # [B,H,W]
        histogram: Tensor | None = None,  # [copies,65536]
        search: Tensor | None = None,  # [2]
        word: int = 0,
        count: int = -1,
        pixels: int = 1,
    ) -> Tensor:  # [programs] float64
        """Launch the kernel; the partial sums of the loss."""
        logits, labels, similarity, classes = self.logits, self.labels, self.similarity, self.classes
        batch, num_classes, h, w = logits.shape
        height, width = labels.shape[1:]
        rows, columns = Axis.of(h, height, True), Axis.of(w, width, True)
        maps = logits if similarity is None else similarity
        map_rows, map_columns = Axis.of(maps.shape[2], height, False), Axis.of(maps.shape[3], width, False)
        tensors = [t for t in (logits, labels, similarity, classes, given, grad) if t is not None]
        weight = (NO_WEIGHT if similarity is None else OWN if classes is None else BY_CLASSES).value
        gradient = task == GRADIENT.value

        def launch(tile: Tile) -> Tensor:
            images = batch if height * width > 0 else 0
            plan = Plan.of(images, h, w, num_classes, tile["ROWS"], tile["CELLS"], gradient)
            partial = torch.empty(plan.programs, dtype=torch.float64, device=logits.device)
            carry = torch.empty(plan.carry, dtype=torch.float32, device=logits.device)
            # What a launch adds to: a search of tiles launches often.
            if histogram is not None:
                histogram.zero_()
            elif self.limit is not None:
                self.state[2:].zero_()
            for start in plan.starts():
                _triton.launch(
                    cross_entropy,
                    min(plan.chunk, plan.programs - start),
                    logits,
                    labels,
                    maps,
                    self.state if classes is None else classes,
                    partial if given is None else given,
                    partial if self.limit is None else self.limit,
                    self.state,
                    self.state if search is None else search,
                    num_classes,
                    *rows.arguments,
                    *columns.arguments,
                    *_triton.strides(logits, labels),
                    maps.shape[1],
                    *map_rows.arguments,
                    *map_columns.arguments,
                    *maps.stride(),
                    *((0, 0) if classes is None else classes.stride()),
                    *((0, 0, 0) if given is None else given.stride()),
                    *((0, 0, 0, 0) if grad is None else grad.stride()),
                    self.ignore_index,
                    pixels,
                    plan.bands,
                    plan.tiles,
                    start,
                    carry,
                    partial,
                    partial if grad is None else grad,
                    partial if loss is None else loss,
                    self.state if histogram is None else histogram,
                    TASK=task,
                    WEIGHT=weight,
                    RECOMPUTE=given is not None,
                    HARD=self.limit is not None,
                    COUNT=count,
                    WORD=word,
                    COPIES=_COPIES,
                    WHOLE_CELLS=rows.whole_cells and columns.whole_cells,
                    WIDE=any(axis.wide for axis in (rows, columns, map_rows, map_columns)),
                    FAR=any(far(tensor) for tensor in tensors),
                    RY=rows.piece,
                    RX=columns.piece,
                    **tile,
                )
            return partial

        shape = {"K": num_classes, "H": height, "W": width, "h": h, "w": w}
        shape["rows"] = batch * h * triton.cdiv(w, 32)
        shape |= {"task": task, "weight": weight, "bytes": self.logits.itemsize}
        return _TILES.run(launch, _triton.capability(logits.device), logits.device, shape)

    def find_limit(self, threshold: float | None, min_kept: int) -> None:
        """Set `limit` to the largest probability that a pixel may have to be kept: as the reference does it,
        by counting the bit patterns, 16 bits a pass."""
        if threshold is None:
            return
        device = self.logits.device
        limit = torch.full((), threshold, dtype=torch.float32, device=device)
        if min_kept > 0:
            search = torch.zeros(2, dtype=torch.int64, device=device)
            for word in range(2):
                histogram = torch.empty(_COPIES, DIGITS, dtype=torch.int64, device=device)
                self.run(HISTOGRAM.value, histogram=histogram, search=search, word=word)
                digits = histogram.view(_COPIES, 256, 256).sum(0)
                _triton.launch(
                    select,
                    1,
                    digits,
                    digits.sum(1),
                    self.state,
                    min_kept,
                    threshold,
                    search,
                    limit,
                    WORD=word,
                    num_warps=4,
                )
        self.limit = limit


def forward(
    logits: Tensor,  # [B,K,h,w]
    labels: Tensor,  # [B,H,W]
    similarity: Tensor | None,  # [B,S,h',w']
    classes: Tensor | None,  # [B,S]
    ignore_index: int,
    reduction: str,
    ohem_threshold: float | None,
    ohem_min_kept: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:  # [] or [B,H,W], and [B,K,h,w] or [0]
    """Loss and gradient, as the reference's."""
    device = logits.device
    state = torch.zeros(3, dtype=torch.int64, device=device)
    problem = _Problem(logits, labels, similarity, classes, ignore_index, state)
    problem.find_limit(ohem_threshold, ohem_min_kept)
    shape = labels.shape if reduction == "none" else ()
    loss = torch.empty(shape, dtype=torch.float32, device=device)
    grad = torch.empty(logits.shape if need_grad else (0,), dtype=torch.float32, device=device)
    if reduction == "none":
        problem.run(PIXELS.value, loss=loss)
        return loss, grad
    hard = ohem_threshold is not None
    count = (2 if hard else 0) if reduction == "valid_mean" else -1
    pixels = max(labels.numel(), 1) if reduction == "mean" else 1
    # How many hard pixels there are is known only afterwards.
    by_hard = count == 2
    if need_grad:
        partial = problem.run(GRADIENT.value, grad=grad, count=-1 if by_hard else count, pixels=pixels)
        if by_hard:
            # As the kernel divides by a number that is known before.
            grad *= state[2].clamp(min=1).to(torch.float32).reciprocal()
    else:
        partial = problem.run(LOSS.value)
    launch_finish(partial, state, pixels, count, loss)
    # Without pixels the loss is 0, or NaN for a wrong class, and so is its gradient.
    return loss, grad if labels.shape[1] * labels.shape[2] > 0 else grad.copy_(loss)


def backward(
    grad: Tensor,  # [B,H,W]
    logits: Tensor,  # [B,K,h,w]
    labels: Tensor,  # [B,H,W]
    similarity: Tensor | None,  # [B,S,h',w']
    classes: Tensor | None,  # [B,S]
    ignore_index: int,
    reduction: str,
    ohem_threshold: float | None,
    ohem_min_kept: int,
) -> Tensor:  # [B,K,h,w]
    """Gradient to the logits from that to each pixel's loss."""
    state = torch.zeros(3, dtype=torch.int64, device=logits.device)
    problem = _Problem(logits, labels, similarity, classes, ignore_index, state)
    problem.find_limit(ohem_threshold, ohem_min_kept)
    result = torch.empty_like(logits) if grad.numel() > 0 else torch.zeros_like(logits)
    problem.run(GRADIENT.value, grad=result, given=grad)
    return result
