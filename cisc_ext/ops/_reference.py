"""What the references share: dtypes, pixels of an image in pieces, unit vectors, and gradients that were made
in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ._bilinear import pieces
from ._opaque import opaque_op


def accumulator(*tensors: Tensor) -> torch.dtype:
    """float64 if any operand is, else float32: the dtype of sums and results."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def pixel_ranges(height: int, width: int, most: int) -> list[tuple[int, int]]:
    """First and last pixel of pieces of about `most` pixels at most: whole rows, or parts of one row."""
    most = max(1, most)
    if width > most:
        starts = [row * width + column for row in range(height) for column in range(0, width, most)]
        return [(start, min(start + most, (start // width + 1) * width)) for start in starts]
    step = max(1, most // max(1, width))
    rows = range(0, height if width else 0, step)
    return [(row * width, min(row + step, height) * width) for row in rows]


def part(image: Tensor, first: int, last: int) -> Tensor:
    """Pixels first..last, whole rows or a part of one, of an image [C,h,w] as [C,t]."""
    width = image.shape[2]
    row, column = divmod(first, width)
    if last - first < width:
        return image[:, row, column : column + last - first]
    return image[:, row : last // width].flatten(1)


def set_part(image: Tensor, first: int, last: int, pixels: Tensor) -> None:
    """Write pixels [C,t] to where `part` reads them."""
    width = image.shape[2]
    row, column = divmod(first, width)
    if last - first < width:
        image[:, row, column : column + last - first] = pixels
    else:
        image[:, row : last // width] = pixels.unflatten(1, (-1, width))


def norms(pixels: Tensor, eps: float, dim: int = 0) -> Tensor:
    """1 / norm of each column of [C,n], or of each row for `dim=1`; 0 where the norm is below `eps`; NaN
    stays NaN."""
    # Several times faster than vector_norm along the columns.
    norm = (pixels * pixels).sum(dim).sqrt_()
    # The root of a sum of squares is 0 or far above that: with it, 0 is below any eps.
    eps = max(eps, torch.finfo(norm.dtype).tiny)
    return torch.where(norm < eps, torch.zeros_like(norm), norm.reciprocal())


def unit_rows(pixels: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns of [C,n] as unit vectors [n,C], 0 where the norm is below `eps`, and 1 / norm [n].

    Each row is summed by itself: equal pixels have equal unit vectors, to the last bit.
    """
    rows = pixels.to(dtype).t().contiguous()
    inverse = norms(rows, eps, 1)
    return rows * inverse[:, None], inverse


def through_norm(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient with respect to vectors [n,C] from that to their unit vectors."""
    along = (grad * unit).sum(1, keepdim=True)
    return (grad - along * unit) * inverse[:, None]


def _fake_scaled(saved: Tensor, grad: Tensor, like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@opaque_op("scaled_gradient", "(Tensor saved, Tensor grad, Tensor input) -> Tensor", _fake_scaled)
def scaled_gradient(saved: Tensor, grad: Tensor, like: Tensor) -> Tensor:
    """`saved` times the scalar `grad`, in the dtype of `like`, without a temporary of its size.

    `like` is the operand of which `saved` is the gradient. There is no formula for the gradient of this
    operator: through `like`, autograd refuses second derivatives, instead of taking `saved` for a constant.
    """
    result = _fake_scaled(saved, grad, like)
    if saved.device.type == "cuda":  # converts as it multiplies
        return torch.mul(saved, grad, out=result)
    into, source = result.view(-1), saved.view(-1)
    for start, stop in pieces(saved.numel(), saved.itemsize):
        into[start:stop] = source[start:stop] * grad
    return result
