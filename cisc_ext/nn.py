"""The operators as modules without state: the settings in the constructor, the tensors in the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .ops.cross_similarity import cross_similarity
from .ops.map_consistency import map_consistency
from .ops.masked_average_pool import masked_average_pool
from .ops.prototype_similarity import prototype_similarity
from .ops.rectified_cross_entropy import rectified_cross_entropy

__all__ = [
    "CrossSimilarity",
    "MapConsistencyLoss",
    "MaskedAveragePool",
    "PrototypeSimilarity",
    "RectifiedCrossEntropyLoss",
]


class _Operator(nn.Module):
    """Keeps the keyword arguments of an operator."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class MaskedAveragePool(_Operator):
    """`cisc_ext.ops.masked_average_pool`: prototypes [B,S,C]."""

    def __init__(self, *, eps: float = 5e-4, impl: str | None = None) -> None:
        super().__init__(eps=eps, impl=impl)

    def forward(self, features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        """Features [B,C,h,w], labels [B,H,W], classes [B,S]."""
        return masked_average_pool(features, labels, classes, **self.settings)


class PrototypeSimilarity(_Operator):
    """`cisc_ext.ops.prototype_similarity`: similarity [B,S,h,w]."""

    def __init__(self, *, eps: float = 1e-8, impl: str | None = None) -> None:
        super().__init__(eps=eps, impl=impl)

    def forward(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """Query features [B,C,h,w], prototypes [B,S,C]."""
        return prototype_similarity(query, prototypes, **self.settings)


class CrossSimilarity(_Operator):
    """`cisc_ext.ops.cross_similarity`: similarity [B,S,h,w], with `return_index` a pair with the index."""

    def __init__(
        self,
        *,
        reduction: str = "max",
        k: int = 8,
        temperature: float = 0.07,
        ignore_index: int = 255,
        return_index: bool = False,
        eps: float = 1e-8,
        impl: str | None = None,
    ) -> None:
        super().__init__(
            reduction=reduction,
            k=k,
            temperature=temperature,
            ignore_index=ignore_index,
            return_index=return_index,
            eps=eps,
            impl=impl,
        )

    def forward(
        self,
        query: Tensor,
        guide: Tensor,
        guide_labels: Tensor,
        classes: Tensor | None = None,
        query_labels: Tensor | None = None,
    ) -> Any:
        """Features [B,C,h,w] and [B,C,h',w'], labels [B,H,W], classes [B,S] or the query's labels."""
        return cross_similarity(
            query, guide, guide_labels, classes, query_labels=query_labels, **self.settings
        )


class MapConsistencyLoss(_Operator):
    """`cisc_ext.ops.map_consistency`: scalar loss."""

    def __init__(self, *, ignore_index: int = 255, impl: str | None = None) -> None:
        super().__init__(ignore_index=ignore_index, impl=impl)

    def forward(self, similarity: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        """Similarity [B,S,h,w], labels [B,H,W], classes [B,S]."""
        return map_consistency(similarity, labels, classes, **self.settings)


class RectifiedCrossEntropyLoss(_Operator):
    """`cisc_ext.ops.rectified_cross_entropy`: scalar loss, or [B,H,W] for reduction "none"."""

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        reduction: str = "mean",
        ohem_threshold: float | None = None,
        ohem_min_kept: int = 100000,
        impl: str | None = None,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            reduction=reduction,
            ohem_threshold=ohem_threshold,
            ohem_min_kept=ohem_min_kept,
            impl=impl,
        )

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        similarity: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Logits [B,K,h,w], labels [B,H,W], similarity [B,S,h',w'], classes [B,S]."""
        return rectified_cross_entropy(logits, labels, similarity, classes, **self.settings)
