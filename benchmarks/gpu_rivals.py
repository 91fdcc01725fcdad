"""Rivals that run on a GPU only, where their packages are installed: FlashLib, FlexAttention, Liger, and Cut
Cross-Entropy. See rivals.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import naive
from benchmarks.cases import Call, CannotRunError, Case, call_of
from benchmarks.cross_rivals import Hidden, against, forward_only, module

_LEAST_WIDTH = 16
"""Numbers in a row that Cut Cross-Entropy multiplies at least."""


def _on_a_gpu(case: Case, who: str) -> None:
    if case.device != "cuda":
        raise CannotRunError(f"{who} runs on a GPU only")


def flashlib(case: Case, whole: bool, chunk: int) -> Call:
    """Neighbours of unit vectors, whose squared distance is 2 - 2 cosine; the class gathered first."""
    reduction = forward_only(case, "max", "topk")
    _on_a_gpu(case, "FlashLib")
    search = module("flashlib", "flashlib").flash_knn
    count = case.inputs.get("k", 8) if reduction == "topk" else 1

    def kernel(q: Tensor, g: Tensor, hidden: Hidden | None) -> Tensor:
        distance, _ = search(q.contiguous(), g.contiguous(), count)
        return (1 - distance / 2).mean(1)

    return call_of(partial(against, kernel, True), case)


def flex_attention(case: Case, whole: bool, chunk: int) -> Call:
    """FlexAttention, compiled, with the guide's unit vectors as values: its output times the query's."""
    if case.inputs.get("reduction") != "softmax":
        raise CannotRunError("attention is a softmax")
    _on_a_gpu(case, "FlexAttention")
    temperature = case.inputs.get("temperature", 0.07)
    attend = torch.compile(module("torch.nn.attention.flex_attention", "torch").flex_attention)

    def kernel(q: Tensor, g: Tensor, hidden: Hidden | None) -> Tensor:
        operands = (x.contiguous()[None, None] for x in (q, g, g))
        return (q * attend(*operands, scale=1 / temperature)[0, 0]).sum(1)

    return call_of(partial(against, kernel, True), case, whole=whole)


def by_rows(case: Case, whole: bool, rows_loss: Callable[[Tensor, Tensor], Tensor]) -> Call:
    """The naive expression with another cross-entropy of rows of logits [n,K] and labels [n], without
    reduction."""
    if "ohem_threshold" in case.inputs:
        raise CannotRunError("has no OHEM")

    def pixel_loss(up: Tensor, labels: Tensor) -> Tensor:
        rows = up.permute(0, 2, 3, 1).reshape(-1, up.shape[1])
        return rows_loss(rows, labels.flatten()).view(labels.shape)

    return call_of(partial(naive.rectified_cross_entropy, pixel_loss=pixel_loss), case, whole=whole)


def liger(case: Case, whole: bool, chunk: int) -> Call:
    """Liger's cross-entropy of the upsampled logits."""
    _on_a_gpu(case, "Liger")
    loss = module("liger_kernel.transformers.functional", "liger-kernel").liger_cross_entropy

    def rows_loss(rows: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = loss(rows, labels, reduction="none")
        return result

    return by_rows(case, whole, rows_loss)


def cut_cross_entropy(case: Case, whole: bool, chunk: int) -> Call:
    """Cut Cross-Entropy with the upsampled logits as features and the identity as classifier."""
    _on_a_gpu(case, "Cut Cross-Entropy")
    if case.dtype == torch.float32:
        raise CannotRunError("Cut Cross-Entropy computes in 16 bits")
    loss = module("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy

    def rows_loss(rows: Tensor, labels: Tensor) -> Tensor:
        classes = rows.shape[1]
        width = max(_LEAST_WIDTH, 1 << (classes - 1).bit_length())
        identity = torch.eye(classes, width, dtype=rows.dtype, device=rows.device)
        padded = F.pad(rows, (0, width - classes))
        result: Tensor = loss(padded, identity, labels, reduction="none")
        return result

    return by_rows(case, whole, rows_loss)
