"""Stored numbers of the published formulas: float64 to 1e-9, float32 by the rounding rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_close, assert_equal, assert_rounding
from opcases import DEVICES
from torch import Tensor

from benchmarks import naive as oracles
from cisc_ext.ops import registry

Load = Callable[[str], dict[str, Tensor]]

LOSSES = ("square", "wide", "unaligned", "heavy_ignore", "no_shared_class", "ohem")
DENSE = ("dense_small", "dense_rect")
REDUCTIONS = ("max", "topk", "softmax", "mean")
RELATIVE = 1e-9
INPUTS = {
    "feat_unlabeled",
    "feat_labeled",
    "mask_unlabeled",
    "mask_labeled",
    "map_unlabeled",
    "map_labeled",
    "classes",
    "logits_low",
    "ohem_threshold",
    "ohem_min_kept",
    "query",
    "guide",
    "guide_labels",
    "query_labels",
    "k",
    "temperature",
}
"""Keys that are not results. `map_*` are masks compared with the class, which the operators do themselves."""


def _able(name: str, device: str) -> list[str]:
    """The implementations of an operator that can run in float32 on a device."""
    operator = registry.OPERATORS[name]
    return [one.name for one in operator.implementations if not operator.obstacles(one.name, device)]


def _ours(impl: str | None, device: str = "cpu") -> dict[str, Callable[..., Any]]:
    """The operators, each by `impl` where it can and else by its own choice."""

    def by(name: str) -> Callable[..., Any]:
        chosen = impl if impl in _able(name, device) else None
        return lambda *args, **more: registry.OPERATORS[name].function(*args, impl=chosen, **more)

    return {name: by(name) for name in registry.OPERATORS}


def _losses(
    f: dict[str, Callable[..., Any]], gold: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every key of a loss golden, from the six functions `f`."""
    unlabeled, labeled, logits = (
        gold[key].to(dtype).requires_grad_() for key in ("feat_unlabeled", "feat_labeled", "logits_low")
    )
    masks, guide_masks, classes = gold["mask_unlabeled"], gold["mask_labeled"], gold["classes"]
    result: dict[str, Tensor] = {}

    prototype = f["masked_average_pool"](labeled, guide_masks, classes)
    own = f["masked_average_pool"](unlabeled, masks, classes)
    similarity = f["prototype_similarity"](unlabeled, prototype)
    back = f["prototype_similarity"](labeled, own)
    result["prototype_labeled"], result["prototype_unlabeled"] = prototype[:, 0], own[:, 0]
    result["cisc_map"] = oracles.upsample(similarity, (masks.shape[1], masks.shape[2]), False)[:, 0]
    consistency = f["map_consistency"](similarity, masks, classes) + f["map_consistency"](
        back, guide_masks, classes
    )
    result["consistency_loss"] = consistency
    grads = torch.autograd.grad(consistency, (unlabeled, labeled))
    result["grad_feat_unlabeled"], result["grad_feat_labeled"] = grads

    ohem: dict[str, Any] = {}
    if "ohem_threshold" in gold:
        ohem = {"ohem_threshold": float(gold["ohem_threshold"]), "ohem_min_kept": int(gold["ohem_min_kept"])}
    rectified = f["rectified_cross_entropy"](logits, masks, similarity.detach(), classes, **ohem)
    result["rectified_loss"] = rectified
    (result["grad_logits_low"],) = torch.autograd.grad(rectified, logits)
    plain = f["rectified_cross_entropy"](logits, masks, reduction="valid_mean", **ohem)
    result["ce_loss"] = plain
    (result["grad_logits_low_ce"],) = torch.autograd.grad(plain, logits)
    return {key: value.detach() for key, value in result.items()}


def _dense(
    f: dict[str, Callable[..., Any]], gold: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every key of a dense golden."""
    query, guide, logits = (gold[key].to(dtype).requires_grad_() for key in ("query", "guide", "logits_low"))
    classes, labels = gold["classes"], gold["query_labels"]
    settings: dict[str, Any] = {"k": int(gold["k"]), "temperature": float(gold["temperature"])}
    cross = f["cross_similarity"]
    result: dict[str, Tensor] = {}
    for reduction in REDUCTIONS:
        value, index = cross(
            query, guide, gold["guide_labels"], classes, reduction=reduction, return_index=True, **settings
        )
        result[reduction], result["max_index"] = value, index
        turn = torch.arange(value.numel(), dtype=torch.float64).cos().view_as(value).to(value)
        grads = torch.autograd.grad((value * turn).sum(), (query, guide))
        result[f"{reduction}_grad_query"], result[f"{reduction}_grad_guide"] = grads
        own, own_index = cross(
            query,
            guide,
            gold["guide_labels"],
            query_labels=labels,
            reduction=reduction,
            return_index=True,
            **settings,
        )
        result[f"own_{reduction}"], result["own_max_index"] = own, own_index
    maps = result["max"].detach().clamp(0, 1)
    zeros = torch.zeros_like(logits)
    # With equal logits every pixel's cross-entropy is log K: what is left is the weight.
    weights = f["rectified_cross_entropy"](zeros, labels, maps, classes, reduction="none")
    result["multi_weight"] = weights / torch.tensor(logits.shape[1], dtype=dtype).log()
    loss = f["rectified_cross_entropy"](logits, labels, maps, classes)
    result["multi_rectified_loss"] = loss
    (result["multi_grad_logits_low"],) = torch.autograd.grad(loss, logits)
    return {key: value.detach() for key, value in result.items()}


def _results(name: str, f: dict[str, Callable[..., Any]], gold: dict[str, Tensor], dtype: torch.dtype) -> Any:
    result = (_losses if name in LOSSES else _dense)(f, gold, dtype)
    assert result.keys() == gold.keys() - INPUTS
    return result


def _magnitude(key: str, gold: dict[str, Tensor]) -> Tensor:
    """Size of what is rounded; 1 for cosines."""
    if "grad" in key or key.endswith("loss") or key.startswith("prototype"):
        return gold[key].abs().max()
    return torch.ones((), dtype=torch.float64)


def _only_where_counted(key: str, value: Tensor, gold: dict[str, Tensor]) -> Tensor:
    """An ignored pixel's weight cannot be seen through the loss."""
    return torch.where(gold["query_labels"] == 255, 0, value) if key == "multi_weight" else value


@pytest.mark.parametrize("name", LOSSES + DENSE)
def test_float64(name: str, golden: Load) -> None:
    gold = golden(name)
    for key, value in _results(name, _ours(None), gold, torch.float64).items():
        want = _only_where_counted(key, gold[key], gold)
        if value.is_floating_point():
            assert value.dtype == torch.float64
            assert_close(value, want, RELATIVE, what=key)
        else:
            assert_equal(value, want, what=key)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", registry.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", LOSSES + DENSE)
def test_float32(name: str, impl: str, device: str, golden: Load) -> None:
    if not any(impl in _able(operator, device) for operator in registry.OPERATORS):
        pytest.skip(f"no operator can run {impl} on {device}")
    gold = golden(name)
    rounded = {key: value.float() if value.is_floating_point() else value for key, value in gold.items()}
    # The truth for float32 inputs: the stored numbers belong to the unrounded ones.
    truth = _results(name, _ours("reference"), rounded, torch.float64)
    got = _results(
        name, _ours(impl, device), {key: value.to(device) for key, value in rounded.items()}, torch.float32
    )
    naive = _results(name, oracles.ORACLES, rounded, torch.float32)
    for key, value in got.items():
        if value.is_floating_point():
            assert_rounding(value, truth[key], naive[key], _magnitude(key, truth), what=key)
        else:
            assert_equal(value.cpu(), gold[key], what=key)
