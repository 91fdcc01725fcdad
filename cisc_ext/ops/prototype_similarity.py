"""The CISC map of the paper: cosine of each query pixel with class prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _library
from ._bilinear import in_a_piece
from ._implementations import implementations
from ._opaque import opaque_op, triton_body
from ._reference import (
    accumulator,
    norms,
    part,
    pixel_ranges,
    set_part,
    through_norm,
    unit_rows,
)
from ._workloads import CHANNELS, Size, sizes
from .registry import Cost, Operator, Sample, Workload, choose, register

_NAME = "prototype_similarity"


def prototype_similarity(
    query: Tensor,  # [B,C,h,w]
    prototypes: Tensor,  # [B,S,C]
    *,
    eps: float = 1e-8,
    impl: str | None = None,
) -> Tensor:  # [B,S,h,w]
    """Cosine of each query pixel with each prototype.

    Replaces

        unit = F.normalize(query, dim=1)
        similarity = torch.einsum("bchw,bsc->bshw", unit, F.normalize(prototypes, dim=2))

    without the normalised copy of `query`.

    Args:
        query: features, float32, bfloat16 or float16, any strides; float64 for the reference.
        prototypes: of any of these dtypes.
        eps: a vector with a smaller norm has cosine 0 and gradient 0.
        impl: "reference", "cpp", "triton", or None / "auto".

    Returns:
        Similarity in float32 (float64 if an operand is float64). Gradient to both.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Wu et al., TPAMI 2023, the cross-image semantic consistency map.
    """
    checks.tensor(_NAME, "query", query, "[B,C,h,w]", checks.FEATURES)
    checks.tensor(_NAME, "prototypes", prototypes, "[B,S,C]", checks.FEATURES)
    checks.sizes(_NAME, "prototypes", prototypes, (query.shape[0], None, query.shape[1]), "query")
    checks.same_device(_NAME, "prototypes", prototypes, "query", query)
    checks.number(_NAME, "eps", eps, least=0.0, strict=True)
    similarity: Tensor = choose(_NAME, impl, query, prototypes)(query, prototypes, float(eps))
    return similarity


def _ranges(query: Tensor, dtype: torch.dtype) -> list[tuple[int, int]]:
    return pixel_ranges(query.shape[2], query.shape[3], in_a_piece(query.shape[1] * dtype.itemsize))


def _fake(query: Tensor, prototypes: Tensor, eps: float) -> Tensor:
    shape = (query.shape[0], prototypes.shape[1], *query.shape[2:])
    return torch.empty(shape, dtype=accumulator(query, prototypes), device=query.device)


_SCHEMA = "(Tensor query, Tensor prototypes, float eps) -> Tensor"


@opaque_op(f"{_NAME}_reference", _SCHEMA, _fake)
def _reference(query: Tensor, prototypes: Tensor, eps: float) -> Tensor:
    dtype = accumulator(query, prototypes)
    similarity = _fake(query, prototypes, eps)
    for b in range(query.shape[0]):
        units, _ = unit_rows(prototypes[b].t(), eps, dtype)
        for first, last in _ranges(query, dtype):
            pixels = part(query[b], first, last).to(dtype)
            set_part(similarity[b], first, last, (units @ pixels).mul_(norms(pixels, eps)))
    return similarity


def _fake_backward(grad: Tensor, query: Tensor, prototypes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(prototypes)


_BACKWARD_SCHEMA = "(Tensor grad, Tensor query, Tensor prototypes, float eps) -> (Tensor, Tensor)"


@opaque_op(f"{_NAME}_reference_backward", _BACKWARD_SCHEMA, _fake_backward)
def _reference_backward(grad: Tensor, query: Tensor, prototypes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = grad.dtype
    grad_query, grad_prototypes = torch.empty_like(query), torch.empty_like(prototypes)
    for b in range(query.shape[0]):
        units, inverse = unit_rows(prototypes[b].t(), eps, dtype)
        grad_units = torch.zeros_like(units)
        for first, last in _ranges(query, dtype):
            pixels = part(query[b], first, last).to(dtype)
            inverse_norm = norms(pixels, eps)
            pixels = pixels * inverse_norm
            share = part(grad[b], first, last)
            grad_units += share @ pixels.t()
            along = (share * (units @ pixels)).sum(0)
            back = (units.t() @ share).sub_(pixels.mul_(along)).mul_(inverse_norm)
            set_part(grad_query[b], first, last, back)
        grad_prototypes[b] = through_norm(grad_units, units, inverse)
    return grad_query, grad_prototypes


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, prototypes, ctx.eps = inputs
    ctx.save_for_backward(query, prototypes)


def _backward_by(operator: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*operator(grad, *ctx.saved_tensors, ctx.eps), None)

    return backward


_reference.register_autograd(_backward_by(_reference_backward), setup_context=_save)

_triton = opaque_op(f"{_NAME}_triton", _SCHEMA, _fake)(triton_body(_NAME, "forward"))
_triton_backward = opaque_op(f"{_NAME}_triton_backward", _BACKWARD_SCHEMA, _fake_backward)(
    triton_body(_NAME, "backward")
)
_triton.register_autograd(_backward_by(_triton_backward), setup_context=_save)

_cpp_backward = _library.compiled(f"{_NAME}_backward")
_library.register(_NAME, _fake, _backward_by(_cpp_backward), _save)
_library.register(f"{_NAME}_backward", _fake_backward, _library.refuse)


def _samples() -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(11)
    for name, (b, c, s, h, w) in {
        "one_class": (2, 16, 1, 9, 9),
        "odd": (1, 7, 3, 5, 11),
        "many_classes": (1, 70, 13, 5, 7),
        "one_pixel": (2, 3, 2, 1, 1),
        "no_classes": (1, 4, 0, 3, 3),
        "no_images": (0, 4, 2, 3, 3),
        "no_pixels": (1, 4, 2, 0, 3),
    }.items():
        prototypes = torch.randn(b, s, c, generator=generator, dtype=torch.float64)
        if s > 1:
            prototypes[:, -1] = 0
        yield Sample(
            name,
            {
                "query": torch.randn(b, c, h, w, generator=generator, dtype=torch.float64),
                "prototypes": prototypes,
            },
        )


def _workloads() -> Iterator[Workload]:
    for size, ladder in sizes():
        for slots in (1,) if ladder else (1, size.classes):

            def make(size: Size = size, slots: int = slots) -> dict[str, Any]:
                generator = torch.Generator().manual_seed(11)
                prototypes = torch.randn(size.batch, slots, CHANNELS, generator=generator)
                return {"query": size.features(generator), "prototypes": prototypes.relu_()}

            name = size.name if slots == 1 else f"{size.name}_all_classes"
            shape = {**size.shape(channels=True, labels=False), "S": slots}
            passes = ("forward",) if ladder else ("forward", "backward")
            dtypes = ("float32",) if ladder or slots > 1 else ("float32", "bfloat16")
            yield Workload(name, shape, make, passes, dtypes, ladder=ladder)


def _cost(inputs: dict[str, Any], passes: str) -> Cost:
    query, prototypes = inputs["query"], inputs["prototypes"]
    pixels, slots = query.shape[0] * query.shape[2] * query.shape[3], prototypes.shape[1]
    # Per channel, forward: the norm and a product per prototype. Backward, which may know the similarity: the
    # norm, a product per prototype towards the pixel, what lies along it, which is taken away, and a product
    # per prototype towards that.
    forward, backward = 2 * query.numel() * (slots + 1), 2 * query.numel() * (2 * slots + 2)
    read, maps = query.nbytes + prototypes.nbytes, 4 * pixels * slots
    return {
        "forward": Cost(forward, read + maps),
        "backward": Cost(backward, 2 * read + maps),
        "both": Cost(forward + backward, 2 * read + 2 * maps),
    }[passes]


register(
    Operator(
        name=_NAME,
        function=prototype_similarity,
        implementations=implementations(
            _NAME, cpp=_library.compiled(_NAME), triton=_triton, reference=_reference
        ),
        samples=_samples,
        cost=_cost,
        workloads=_workloads,
        differentiable=("query", "prototypes"),
        features=("query", "prototypes"),
    )
)
