"""The rivals of the operators give the same results; what a call costs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from benchmarks import cases, gpu_rivals, rivals
from cisc_ext.ops.registry import OPERATORS

SMALL = {
    **{(op, "image_128x256"): OPERATORS[op] for op in OPERATORS if op != "cross_similarity"},
    ("cross_similarity", "n1024_dense_max"): OPERATORS["cross_similarity"],
}


@pytest.mark.parametrize(("op", "workload"), SMALL)
def test_rivals_give_the_operators_result(op: str, workload: str) -> None:
    for passes in next(one.passes for one in OPERATORS[op].workloads() if one.name == workload):
        case = cases.make_case(op, workload, "float32", passes, "cpu")
        expected = cases.implementation_call(case, "reference")()
        for rival in rivals.RIVALS[op]:
            if rival.name not in ("compile", "keops", "faiss"):
                try:
                    result = rival.make(case, False, rival.chunks[0])()
                except cases.CannotRunError:
                    continue
                assert cases.disagreement(result, expected) < cases.TOLERANCE[torch.float32], rival.name


@pytest.mark.parametrize("mode", ["dense", "labels", "own"])
@pytest.mark.parametrize("reduction", ["max", "topk", "softmax", "mean"])
def test_rivals_of_cross_similarity(mode: str, reduction: str) -> None:
    low = {"query": torch.randn(2, 16, 8, 8), "guide": torch.randn(2, 16, 9, 7)}
    labels = torch.randint(0, 1 if mode == "dense" else 3, (2, 36, 28), dtype=torch.uint8)
    own = {"query_labels": torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)}
    of_mode = own if mode == "own" else {"classes": torch.zeros(2, 1, dtype=torch.int64)}
    inputs = {**low, "guide_labels": labels, "reduction": reduction, "k": 3, **of_mode}
    one = next(w for w in OPERATORS["cross_similarity"].workloads() if w.mode == mode)
    ran = set()
    for passes in ("forward", "backward"):
        case = cases.Case(OPERATORS["cross_similarity"], one, torch.float32, passes, inputs)
        expected = cases.implementation_call(case, "reference")()
        for rival in rivals.RIVALS["cross_similarity"]:
            if rival.name not in ("compile", "keops", "faiss"):
                try:
                    call = rival.make(case, False, 16)
                    result, whole = call(), rival.make(case, True, 16)()
                except cases.CannotRunError:
                    continue
                ran.add((rival.name, passes))
                assert cases.disagreement(result, expected) < 1e-5, (rival.name, passes)
                if passes == "backward":
                    assert cases.disagreement(whole[-2:], expected) < 1e-5, (rival.name, passes)
    assert {("naive", "forward"), ("naive", "backward"), ("chunked", "forward")} <= ran
    assert (("softmax", "forward") in ran) == (reduction == "softmax")


FAKES = {
    "flashlib": SimpleNamespace(
        flash_knn=lambda x, c, k: torch.cdist(x, c).square().topk(k, largest=False),
    ),
    "torch.nn.attention.flex_attention": SimpleNamespace(flex_attention=F.scaled_dot_product_attention),
    "liger_kernel.transformers.functional": SimpleNamespace(liger_cross_entropy=F.cross_entropy),
    "cut_cross_entropy": SimpleNamespace(
        linear_cross_entropy=lambda e, c, targets, reduction: F.cross_entropy(
            e @ c.t(), targets, reduction=reduction
        ),
    ),
}


@pytest.mark.parametrize(
    ("op", "name", "reduction"),
    [
        ("cross_similarity", "flashlib", "max"),
        ("cross_similarity", "flashlib", "topk"),
        ("cross_similarity", "flex_attention", "softmax"),
        ("rectified_cross_entropy", "liger", "mean"),
        ("rectified_cross_entropy", "cut_cross_entropy", "mean"),
    ],
)
def test_rivals_on_a_gpu_ask_for_the_right_thing(
    op: str, name: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their packages replaced by plain expressions of the same meaning."""
    workload = f"n4096_labels_{reduction}" if op == "cross_similarity" else "image_128x256"
    dtype = "bfloat16" if name == "cut_cross_entropy" else "float32"
    case = cases.make_case(op, workload, dtype, "forward", "cpu")
    rival = rivals.named(case, name)
    with pytest.raises(cases.CannotRunError, match="runs on a GPU only"):
        rival.make(case, False, 0)
    monkeypatch.setattr(gpu_rivals, "_on_a_gpu", lambda case, who: None)
    monkeypatch.setattr(gpu_rivals, "module", lambda name, package: FAKES[name])
    monkeypatch.setattr(torch, "compile", lambda function: function)
    result = rival.make(case, False, 0)()
    expected = cases.implementation_call(case, "reference")()
    assert cases.disagreement(result, expected) < cases.TOLERANCE[case.dtype]
