"""The modules do what the functions of their settings do, and hold nothing else."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cisc_ext import nn as losses
from cisc_ext.ops.registry import OPERATORS, Operator

# Module, the operator it wraps, settings other than the defaults.
MODULES: dict[str, tuple[Callable[..., torch.nn.Module], str, dict[str, Any]]] = {
    "pool": (losses.MaskedAveragePool, "masked_average_pool", {"eps": 2.0}),
    "prototype": (losses.PrototypeSimilarity, "prototype_similarity", {"eps": 4.0}),
    "cross": (losses.CrossSimilarity, "cross_similarity", {"reduction": "topk", "k": 2}),
    "softmax": (losses.CrossSimilarity, "cross_similarity", {"reduction": "softmax", "temperature": 0.5}),
    "map": (losses.MapConsistencyLoss, "map_consistency", {"ignore_index": 1}),
    "rectified": (losses.RectifiedCrossEntropyLoss, "rectified_cross_entropy", {"reduction": "sum"}),
}


def tensors(operator: Operator) -> dict[str, Tensor]:
    """The tensors of the operator's first sample, without its settings."""
    inputs = {
        key: value for key, value in next(operator.samples()).inputs.items() if isinstance(value, Tensor)
    }
    return {
        key: value.clone().requires_grad_(key in operator.differentiable) for key, value in inputs.items()
    }


@pytest.mark.parametrize("name", MODULES)
def test_equals_the_function(name: str) -> None:
    build, op, settings = MODULES[name]
    operator = OPERATORS[op]
    inputs = tensors(operator)
    sources = [inputs[key] for key in operator.differentiable]
    for chosen in (settings, {}):
        result, expected = build(**chosen)(**inputs), operator.function(**inputs, **chosen)
        assert torch.equal(result, expected)
        gradients = [torch.autograd.grad(value.sum(), sources) for value in (result, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not torch.equal(build(**settings)(**inputs), build()(**inputs)), (
        "the settings must reach the operator"
    )


@pytest.mark.parametrize("name", MODULES)
def test_has_no_state_and_pickles(name: str) -> None:
    build, _, settings = MODULES[name]
    module = build(**settings)
    assert not module.state_dict() and not list(module.parameters())
    assert repr(pickle.loads(pickle.dumps(module))) == repr(module)
    for key, value in settings.items():
        assert f"{key}={value!r}" in repr(module)


def test_impl_and_index() -> None:
    inputs = tensors(OPERATORS["cross_similarity"])
    similarity, index = losses.CrossSimilarity(return_index=True, impl="reference")(**inputs)
    assert index.shape == similarity.shape and index.dtype == torch.int64
    with pytest.raises(ValueError, match="impl must be"):
        losses.CrossSimilarity(impl="fast")(**inputs)


def test_every_wrapper_has_its_operators_settings() -> None:
    """A setting added to an operator must be added to its module, with the same default."""
    for build, op, _ in MODULES.values():
        defaults = OPERATORS[op].function.__kwdefaults__ or {}
        assert build().settings == {key: value for key, value in defaults.items() if key != "query_labels"}


@pytest.mark.parametrize("name", ["map", "rectified"])
def test_compiles_whole(name: str) -> None:
    build, op, settings = MODULES[name]
    module, inputs = build(**settings), tensors(OPERATORS[op])
    source = inputs[OPERATORS[op].differentiable[0]]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    result, expected = compiled(**inputs), module(**inputs)
    assert torch.equal(result, expected)
    (gradient,), (wanted,) = (torch.autograd.grad(value, source) for value in (result, expected))
    assert torch.equal(gradient, wanted)
