"""Checks of operator arguments: one line that names the argument, what was expected and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

FEATURES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = (torch.uint8, torch.int32, torch.int64)
CLASSES = (torch.int32, torch.int64)
_ROWS = 128


def tensor(op: str, name: str, value: Tensor, shape: str, dtypes: Sequence[torch.dtype]) -> None:
    """Require a tensor of the rank that `shape` ("[B,C,h,w]") shows and of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must be one of {names}, got {str(value.dtype).removeprefix('torch.')}")
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {shape}, got shape {tuple(value.shape)}")


def sizes(op: str, name: str, value: Tensor, expected: Sequence[int | None], source: str) -> None:
    """Require `value.shape` to be `expected` (None: any); `source` says where the expectation comes from."""
    for got, want in zip(value.shape, expected, strict=True):
        if want is not None and got != want:
            wanted = ", ".join("any" if n is None else str(n) for n in expected)
            raise ValueError(
                f"{op}: {name} must have shape ({wanted}) to match {source}, got {tuple(value.shape)}"
            )


def pixels(op: str, name: str, value: Tensor) -> None:
    """Require at least one pixel in the last two dimensions, since nothing can be interpolated from none."""
    if value.shape[-1] == 0 or value.shape[-2] == 0:
        raise ValueError(f"{op}: {name} must have at least one pixel, got shape {tuple(value.shape)}")


def same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require both tensors on one device."""
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other.device} like {other_name}, got {value.device}")


def choice(op: str, name: str, value: str, allowed: Sequence[str]) -> None:
    """Require one of a few words."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def number(
    op: str, name: str, value: float, *, least: float, strict: bool = False, most: float = math.inf
) -> None:
    """Require a real number of at least `least`, or above it where `strict`, and of at most `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not (value > least if strict else value >= least):
        raise ValueError(f"{op}: {name} must be {'above' if strict else 'at least'} {least:g}, got {value}")
    if not value <= most:
        raise ValueError(f"{op}: {name} must be at most {most:g}, got {value}")


def whole(op: str, name: str, value: int | torch.SymInt, *, least: int | None = None) -> None:
    """Require an int, of at least `least` where given."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: {name} must fit into 64 bits, got {value}")


def invalid_values(invalid: Tensor, expected: str, values: Tensor) -> Tensor | None:
    """Deal with wrong *values*: raise on the CPU, return a 0-dim mask to poison the result with elsewhere.

    On a GPU reading a value would synchronise; there the mask goes to `poison`, unless `CISC_CHECK=1` asks
    for the synchronisation and the error.
    """
    bad = invalid.any()
    if bad.device.type == "cpu" or os.environ.get("CISC_CHECK") == "1":
        if bool(bad):
            raise ValueError(f"{expected}, got values from {int(values.min())} to {int(values.max())}")
        return None
    return bad


def poison(result: Tensor, *masks: Tensor | None) -> Tensor:
    """`result`, or NaN throughout where one of the masks is set."""
    for mask in masks:
        if mask is not None:
            result = result.masked_fill(mask, float("nan"))
    return result


def class_values(op: str, classes: Tensor, least_label: int = -1, limit: int | None = None) -> Tensor | None:
    """Classes are -1 (none) or a class; below `limit` where the number of classes is known."""
    invalid = classes < least_label
    wanted = "-1 or a class"
    if limit is not None:
        invalid = invalid | (classes >= limit)
        wanted = f"-1 or in [0, {limit})"
    return invalid_values(invalid, f"{op}: classes must be {wanted}", classes)


def label_values(op: str, labels: Tensor, limit: int, ignore_index: int) -> Tensor | None:
    """Labels are in [0, limit) or `ignore_index`."""
    invalid = torch.zeros((), dtype=torch.bool, device=labels.device)
    for image in labels:
        for rows in image.split(_ROWS):
            # As int64: a uint8 tensor compared with -1 or 256 wraps the number around.
            values = rows.to(torch.int64)
            invalid = invalid | (((values < 0) | (values >= limit)) & (values != ignore_index)).any()
    return invalid_values(invalid, f"{op}: labels must be in [0, {limit}) or {ignore_index}", labels)
