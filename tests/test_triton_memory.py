"""What the host code of the Triton operators holds beyond inputs and outputs, with every launch taken aside.

Tensors are counted, not what torch's sorts take inside; test_ops_memory.py and a GPU see all of it, at
other sizes.
"""

from __future__ import annotations

import dataclasses
import importlib
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from memory_probe import MIB, SIZES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cisc_ext.ops import _implementations, _triton
from cisc_ext.ops.registry import OPERATORS

if _implementations.HERE.triton:
    pytest.skip(_implementations.HERE.triton, allow_module_level=True)

EXTRA_BYTES = 64 * MIB
PACKED_BYTES = 256 * MIB
"""Of the packed operands of the pairs in flight, where one pair has less."""


def _bytes(result: Any) -> dict[int, int]:
    """Storages of tensors and their sizes."""
    storages = (one.untyped_storage() for one in tree_leaves(result) if isinstance(one, Tensor))
    return {storage._cdata: storage.nbytes() for storage in storages}


class Held(TorchDispatchMode):
    """Bytes of the tensors that were made and are alive, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = _bytes((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in given | self.alive:
                storage = one.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def _extra_bytes(name: str, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The most that is held without the results, of forward and of backward."""
    extra: dict[str, int] = {}
    module = importlib.import_module(f"cisc_ext.ops.{name}_triton")

    def watch(function: str) -> Callable[..., Any]:
        body = getattr(module, function)

        def watched(*arguments: Any) -> Any:
            with Held() as held:
                result = body(*arguments)
                extra[function] = held.peak - sum(_bytes(result).values())
            return result

        return watched

    for function in ("forward", "backward"):
        if hasattr(module, function):
            monkeypatch.setattr(module, function, watch(function))
    monkeypatch.setattr(_triton, "pretended", (9, 0))
    monkeypatch.setattr(_triton, "launcher", lambda *_: None)
    monkeypatch.setattr(
        _implementations, "HERE", dataclasses.replace(_implementations.HERE, interpreted=True)
    )
    operator = OPERATORS[name]
    leaves = {
        key: value.requires_grad_() if key in operator.differentiable else value
        for key, value in inputs.items()
    }
    result = operator.function(**leaves, impl="triton")
    value = result[0] if isinstance(result, tuple) else result
    if operator.differentiable:
        value.backward(torch.ones_like(value))
    return extra


def _cross(
    reduction: str,
    images: int,
    channels: int,
    size: tuple[int, int],
    slots: int = 1,
    *,
    own: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    labels_dtype: torch.dtype = torch.uint8,
    k: int = 8,
) -> dict[str, Any]:
    image = torch.zeros(1, channels, *size, dtype=dtype).expand(images, -1, -1, -1)
    labels = torch.randint(0, slots, (1, *size)).to(labels_dtype).expand(images, -1, -1)
    mode = {"query_labels": labels} if own else {"classes": torch.arange(slots).expand(images, -1)}
    return {
        "query": image,
        "guide": image.clone(),
        "guide_labels": labels,
        **mode,
        "reduction": reduction,
        "k": k,
    }


WIDE: dict[str, Any] = {"own": True, "labels_dtype": torch.int64}
CROSS: dict[str, tuple[Any, ...]] = {
    **{f"{r}-large": (r, 1, 256, (256, 512)) for r in ("max", "topk", "softmax", "mean")},
    "max-81_classes": ("max", 1, 64, (256, 512), 81),
    "softmax-81_classes": ("softmax", 1, 64, (256, 512), 81),
    "topk-19_classes": ("topk", 1, 64, (256, 256), 19),
    "mean-81_classes": ("mean", 16, 256, (128, 128), 81),
    "max-few_channels": ("max", 64, 16, (128, 128)),
}
OWN: dict[str, tuple[Any, ...]] = {
    "max-own": ("max", 64, 16, (128, 128), 4),
    "mean-own": ("mean", 1, 256, (256, 512), 19),
    "softmax-own": ("softmax", 16, 64, (128, 256), 19),
}
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{key: partial(_cross, *case) for key, case in CROSS.items()},
    **{key: partial(_cross, *case, **WIDE) for key, case in OWN.items()},
    "max-highest": partial(_cross, "max", 4, 256, (256, 256), dtype=torch.float32),
}


@pytest.mark.parametrize("case", CASES)
def test_cross_similarity(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = CASES[case]()
    images, channels = inputs["query"].shape[:2]
    wide = 2 if inputs["query"].dtype == torch.float32 else 1
    pair = 2 * channels * wide * (inputs["query"][0, 0].numel() + inputs["guide"][0, 0].numel())
    allowed = max(pair, min(images * pair, PACKED_BYTES)) + EXTRA_BYTES
    extra = _extra_bytes("cross_similarity", inputs, monkeypatch)
    assert set(extra) == {"forward", "backward"}
    assert max(extra.values()) <= allowed, {key: size / MIB for key, size in extra.items()}


@pytest.mark.parametrize("case", [key for key, (name, _) in SIZES.items() if name != "cross_similarity"])
def test_others(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, make = SIZES[case]
    extra = _extra_bytes(name, make(), monkeypatch)
    assert "forward" in extra
    assert max(extra.values()) <= EXTRA_BYTES, {key: size / MIB for key, size in extra.items()}


def test_what_is_held_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 2 C (N + M) bytes is packed for each pair."""
    inputs = _cross("max", 1, 256, (64, 64))
    extra = _extra_bytes("cross_similarity", inputs, monkeypatch)
    assert extra["forward"] >= 2 * 256 * 2 * 64 * 64
    assert extra["forward"] <= 2 * 256 * 2 * 64 * 64 + 2 * MIB
