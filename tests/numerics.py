"""Comparison of results: where inf and nan lie, element by element, and as a whole.

The rule for results of limited precision: the error against float64 is at most twice that of the naive
expression at the same precision, plus four roundings of the same computation on absolute values. Nothing here
is to be loosened for one test.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = 4
NAIVE_SHARE = 2.0


def assert_close(got: Tensor, want: Tensor, relative: float, *, what: str) -> None:
    """Require `got` to be `want` to `relative` of the largest finite magnitude in `want`."""
    finite = want.detach().double()
    scale = float(finite[finite.isfinite()].abs().max()) if bool(finite.isfinite().any()) else 0.0
    _compare(got, want, torch.full_like(finite, relative * scale), relative * scale, what)


def assert_rounding(
    got: Tensor, reference: Tensor, naive: Tensor, magnitude: Tensor | float, *, what: str
) -> None:
    """Require the rule of this file.

    Args:
        got: result to judge; its dtype is the precision meant.
        reference: the same in float64.
        naive: the naive expression at the precision of `got`.
        magnitude: the reference on absolute values, for the rounding band; broadcast to the result.
    """
    truth = reference.detach().double().cpu()
    loss = (naive.detach().double().cpu() - truth).abs()
    loss = loss[loss.isfinite()]
    worst, mean_square = (float(loss.max()), float(loss.square().mean())) if len(loss) else (0.0, 0.0)
    size = torch.as_tensor(magnitude, dtype=torch.float64).detach().cpu().expand_as(truth)
    band = ROUNDINGS * torch.finfo(got.dtype).eps * size
    limit = NAIVE_SHARE * worst + band
    rms_band = float(band.square().mean().sqrt()) if band.numel() else 0.0
    _compare(got, truth, limit, NAIVE_SHARE * mean_square**0.5 + rms_band, what)


def assert_equal(got: Tensor, want: Tensor, *, what: str) -> None:
    """Require the same dtype, shape and bits (NaN equals NaN)."""
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    _compare(got, want, torch.zeros(want.shape, dtype=torch.float64), 0.0, what)


def _compare(got: Tensor, want: Tensor, limit: Tensor, rms_limit: float, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if got.numel() == 0:
        return
    left, right = got.detach().double().cpu(), want.detach().double().cpu()
    for name, kind in (
        ("nan", torch.isnan),
        ("inf", lambda t: t == torch.inf),
        ("-inf", lambda t: t == -torch.inf),
    ):
        wrong = kind(left) != kind(right)
        if bool(wrong.any()):
            place = _place(wrong.flatten().to(torch.uint8).argmax(), wrong)
            count = int(wrong.sum())
            raise AssertionError(
                f"{what}: {name} at other places ({count} of {wrong.numel()}), first {place}: "
                f"{float(left[place])!r}, expected {float(right[place])!r}"
            )
    error = torch.where(right.isfinite(), (left - right).abs(), 0)
    excess = error - limit.cpu()
    place = _place(excess.flatten().argmax(), excess)
    if float(excess[place]) > 0:
        raise AssertionError(
            f"{what}: worst at {place}: {float(left[place])!r}, expected {float(right[place])!r}, "
            f"error {float(error[place]):.3e} above {float(limit[place]):.3e} "
            f"({int((excess > 0).sum())} of {excess.numel()} too far)"
        )
    rms = float(error.square().mean().sqrt())
    assert rms <= rms_limit, f"{what}: root mean square error {rms:.3e} above {rms_limit:.3e}"


def _place(flat: Tensor, like: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat, like.shape))
