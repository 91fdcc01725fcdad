"""What the references share: their registration as opaque operators, dtypes, and unit vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def accumulator(*tensors: Tensor) -> torch.dtype:
    """float64 if any operand is, else float32: the dtype of sums and results."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def reference_op(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function of plain torch as the operator `cisc_ext::name`.

    Opaque to `torch.compile`, so that it may read values and work in pieces; its body runs without autocast.
    """

    def register(body: Callable[..., Any]) -> Any:
        @functools.wraps(body)
        def without_autocast(*args: Any) -> Any:
            device = next(a.device.type for a in args if isinstance(a, Tensor))
            with torch.autocast(device, enabled=False):
                return body(*args)

        op = torch.library.custom_op(f"cisc_ext::{name}", without_autocast, mutates_args=(), schema=schema)
        op.register_fake(fake)
        return op

    return register


def norms(pixels: Tensor, eps: float) -> Tensor:
    """1 / norm of each column of [C,n], 0 where the norm is below `eps`; NaN stays NaN."""
    # Several times faster than vector_norm along this dimension.
    norm = (pixels * pixels).sum(0).sqrt_()
    return torch.where(norm < eps, torch.zeros_like(norm), norm.reciprocal())


def unit_rows(pixels: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns of [C,n] as unit vectors [n,C], 0 where the norm is below `eps`, and 1 / norm [n]."""
    columns = pixels.to(dtype)
    inverse = norms(columns, eps)
    return (columns * inverse).t().contiguous(), inverse


def through_norm(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient with respect to vectors [n,C] from that to their unit vectors."""
    along = (grad * unit).sum(1, keepdim=True)
    return (grad - along * unit) * inverse[:, None]
