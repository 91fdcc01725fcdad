"""cross_similarity by each of its implementations: ties, signs, what is not finite, sizes beside those of
blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzzdraw import IGNORED, Case, Draw
from fuzzjudge import RULES
from fuzzpairs import TEMPERATURES, settle
from numerics import assert_close, assert_equal
from opcases import DEVICES, SIMULATED, reference, run, runs_of, skip_unless_able
from torch import Tensor

from cisc_ext import ops
from cisc_ext.ops._cross_reference import REDUCTIONS
from cisc_ext.ops.registry import Implementation, Operator

NAN, INF = float("nan"), float("inf")
BOTH = ("query", "guide")
DEFAULTS: dict[str, Any] = {
    "reduction": "max",
    "k": 8,
    "temperature": 0.07,
    "ignore_index": 255,
    "return_index": True,
    "eps": 1e-8,
}
QUERY_BORDERS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
GUIDE_BORDERS = (1, 5, 6, 7, 11, 12, 13, 23, 24, 25, 35, 36, 37)
LOW = (torch.float32, torch.bfloat16, torch.float16)

implementations = pytest.mark.parametrize(("operator", "implementation"), runs_of("cross_similarity"))
devices = pytest.mark.parametrize("device", DEVICES)
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def _row(vectors: Tensor) -> Tensor:
    """Vectors [n,C] as an image of one row, [1,C,1,n]."""
    return vectors.t()[None, :, None]


def _all_zero(pixels: int, batch: int = 1) -> Tensor:
    return torch.zeros(batch, 1, pixels, dtype=torch.uint8)


def _one_class(query: Tensor, guide: Tensor) -> dict[str, Any]:
    """Arguments in which each query pixel is compared with all of the guide."""
    batch, pixels = guide.shape[0], guide.shape[2] * guide.shape[3]
    return {
        "query": query,
        "guide": guide,
        "guide_labels": _all_zero(pixels, batch).view(batch, *guide.shape[2:]),
        "classes": torch.zeros(batch, 1, dtype=torch.int64),
    }


def _results(
    implementation: Implementation, inputs: dict[str, Any], device: str, needed: tuple[str, ...] = BOTH
) -> dict[str, Tensor]:
    """output0, output1 (the index) and gradients, on the CPU."""
    placed = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    call = DEFAULTS | placed | {"impl": implementation.name}
    return {key: value.cpu() for key, value in run(ops.cross_similarity, call, needed).items()}


def _judged(
    implementation: Implementation, inputs: dict[str, Any], device: str, needed: tuple[str, ...] = BOTH
) -> dict[str, Tensor]:
    """The same, judged by the rule of the fuzzer: values, index, gradients."""
    got = _results(implementation, inputs, device, needed)
    RULES["cross_similarity"](Case(0, "cross_similarity", "value", "", DEFAULTS | inputs), got)
    return got


def _leaves(inputs: dict[str, Any], device: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Both images on the device, with gradients, and the other arguments."""
    placed = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    return [placed.pop(name).requires_grad_() for name in BOTH], placed


def _settled(inputs: dict[str, Any]) -> dict[str, Any]:
    """With winners of "topk" that no rounding decides."""
    inputs = DEFAULTS | inputs
    if inputs["reduction"] == "topk":
        inputs["query"] = inputs["query"].clone()
        settle(Draw(0), inputs)
    return inputs


@devices
@implementations
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("channels", [1, 3, 64, 65])
def test_first_of_equal_pixels(
    operator: Operator, implementation: Implementation, channels: int, dtype: torch.dtype, device: str
) -> None:
    """A hundred of them behind some others: the lowest index wins, and only it gets a gradient."""
    vector = torch.randn(channels)
    query = vector + 0.3 * torch.randn(35, channels)
    query[query @ vector <= 0] = vector
    query[3] = -vector
    for ahead in (0, 1, 5, 6, 11, 12, 13, 37):
        guide = torch.cat([-vector.expand(ahead, -1), vector.expand(100, -1)])
        inputs = _one_class(_row(query).to(dtype), _row(guide).to(dtype))
        skip_unless_able(operator, implementation, inputs, device)
        got = _judged(implementation, inputs, device)
        want = torch.full((35,), ahead)
        want[3] = 0
        assert_equal(got["output1"].flatten(), want, what=f"index behind {ahead}")
        rows = got["grad_guide"].flatten(2).abs().sum(1)[0].nonzero().flatten().tolist()
        assert set(rows) <= {0, ahead}
        # Every third pixel is of the class, and the others are as good.
        third = torch.arange(ahead + 100) % 3 == 2
        got = _judged(
            implementation, inputs | {"guide_labels": third[None, None].int(), "classes": _ones()}, device
        )
        members = third.nonzero().flatten().tolist()
        assert int(got["output1"][0, 0, 0, 0]) == next(j for j in members if j >= ahead)
        assert int(got["output1"][0, 0, 0, 3]) == members[0]


def _ones(slots: int = 1) -> Tensor:
    return torch.ones(1, slots, dtype=torch.int64)


@devices
@implementations
@pytest.mark.parametrize("k", [1, 2, 8, 12, 13, 40])
def test_topk_takes_the_first_of_equal_pixels(
    operator: Operator, implementation: Implementation, k: int, device: str
) -> None:
    """Two kinds of pixels in turn: of the better ones the first k, then the first of the others."""
    better = torch.arange(61) % 3 == 1  # 20 of them
    guide = torch.where(better[:, None], torch.tensor([0.6, 0.8, 0.3]), torch.tensor([-0.2, 0.7, 0.1]))
    query = torch.tensor([0.8, 0.6, 0.1]).expand(17, -1) * torch.arange(1, 18)[:, None]
    inputs = _one_class(_row(query), _row(guide)) | {"reduction": "topk", "k": k}
    skip_unless_able(operator, implementation, inputs, device)
    got = _judged(implementation, inputs, device)
    touched = got["grad_guide"].flatten(2).abs().sum(1)[0].nonzero().flatten().tolist()
    order = [*better.nonzero().flatten().tolist(), *(~better).nonzero().flatten().tolist()]
    assert touched == sorted(order[:k])


@devices
@implementations
@pytest.mark.parametrize("channels", [2, 3, 33, 300])
@pytest.mark.parametrize("gap", [1e-5, 1e-7, 0.0])
def test_near_ties(
    operator: Operator, implementation: Implementation, gap: float, channels: int, device: str
) -> None:
    """Cosines apart by more than rounding are told apart wherever they stand; of others any may win."""
    generator = torch.Generator().manual_seed(channels)
    turn = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64)).Q
    for count in (2, 6, 7, 13, 40):
        for best in sorted({0, 1, count // 2, count - 1}):
            cosine = torch.full((count,), 0.6, dtype=torch.float64)
            cosine -= gap * (1 + torch.arange(count))
            cosine[best] = 0.6
            plane = torch.stack([cosine, (1 - cosine**2).sqrt()], 1)
            guide = (plane @ turn[:2]).float() * (1 + torch.arange(count))[:, None]
            query = turn[:1].float().expand(9, -1)
            inputs = _one_class(_row(query), _row(guide))
            skip_unless_able(operator, implementation, inputs, device)
            got = _judged(implementation, inputs, device)
            if gap == 1e-5:
                assert got["output1"].unique().tolist() == [best]


@devices
@implementations
@reductions
@pytest.mark.parametrize("dtype", LOW)
def test_best_cosine_below_zero(
    operator: Operator, implementation: Implementation, dtype: torch.dtype, reduction: str, device: str
) -> None:
    """Nothing that fills up a block, and no 0 to begin with, may win against it."""
    for n, m in ((1, 1), (3, 5), (9, 7), (33, 13), (40, 25)):
        query, guide = torch.rand(2, 5, 3, n) + 0.1, -torch.rand(2, 5, 2, m) - 0.1
        labels = torch.randint(0, 2, (2, 2, m))
        inputs = {"query": query.to(dtype), "guide": guide.to(dtype), "reduction": reduction, "k": 3}
        inputs |= {"guide_labels": labels, "classes": torch.tensor([[0, 1], [1, 0]])}
        skip_unless_able(operator, implementation, inputs, device)
        got = _judged(implementation, _settled(inputs), device)
        found = got["output1"] >= 0
        assert bool((got["output0"][found] < -0.05).all()) and not bool(got["output0"][~found].any())


@devices
@implementations
@reductions
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_zero_vectors(
    operator: Operator, implementation: Implementation, eps: float, reduction: str, device: str
) -> None:
    """Cosine 0 and gradient 0 with all; the first of them is the best where all others are below 0."""
    query, guide = torch.rand(1, 3, 2, 19) + 1, -torch.rand(1, 3, 3, 9) - 1
    short = 0.25 if eps > 0.25 else 0.0  # of this norm, or 0
    query[..., 0, [2, 17]], guide[0, :, 1, 4], guide[0, :, 2] = 0, 0, short / 2
    query[:, 0, 1, 3] = short
    query[:, 1:, 1, 3] = 0
    guide[0, 1:, 2, 5:] = 0
    inputs = _one_class(query, guide) | {"reduction": reduction, "k": 2, "eps": eps}
    skip_unless_able(operator, implementation, inputs, device)
    got = _judged(implementation, _settled(inputs), device)
    zero = torch.zeros(2, 19, dtype=torch.bool)
    zero[0, [2, 17]] = zero[1, 3] = True
    index, value = got["output1"][0, 0], got["output0"][0, 0]
    assert index[zero].unique().tolist() == [0] and index[~zero].unique().tolist() == [9 + 4]
    assert not bool(value[zero].any())
    if reduction == "max":
        assert not bool(value.any())
    for name, where in (("query", zero), ("guide", (slice(2, 3)))):
        assert not bool(got[f"grad_{name}"][0][:, where].any()), name
    assert not bool(got["grad_guide"][0, :, 1, 4].any())


@devices
@implementations
@reductions
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_guide_pixel_that_is_not_finite(
    operator: Operator, implementation: Implementation, value: float, reduction: str, device: str
) -> None:
    """Its class is NaN with its index; the results and the gradients of other classes keep every bit."""
    query, guide = torch.randn(2, 7, 3, 13), torch.randn(2, 7, 4, 11)
    labels = torch.arange(44).view(1, 4, 11).expand(2, -1, -1) % 3
    inputs = {"query": query, "guide": guide, "guide_labels": labels, "reduction": reduction, "k": 3}
    classes = {"classes": torch.tensor([[0, 1, 2, 9, 1]] * 2)}
    skip_unless_able(operator, implementation, inputs | classes, device)
    first, second = 2 * 11 + 6, 3 * 11 + 1  # both of class 1
    assert labels[0].flatten()[[first, second]].tolist() == [1, 1]
    spoilt = guide.clone()
    spoilt[0, 4].view(-1)[[second, first]] = value
    spoilt[0, 2].view(-1)[second] = NAN
    clean = _judged(implementation, _settled(inputs | classes), device)
    settled = _settled(inputs | classes)["query"]
    got = _judged(implementation, inputs | classes | {"guide": spoilt, "query": settled}, device)
    want = {name: result.clone() for name, result in clean.items()}
    want["output0"][0, [1, 4]], want["output1"][0, [1, 4]] = NAN, first
    for name in ("output0", "output1"):
        assert_equal(got[name], want[name], what=name)
    others = labels[0] != 1
    assert_equal(got["grad_guide"][0][:, others], clean["grad_guide"][0][:, others], what="of other classes")
    for name in ("grad_query", "grad_guide"):
        assert_equal(got[name][1], clean[name][1], what=f"{name} of the other image")
    assert bool(got["grad_query"][0].isnan().all())

    own = {"query_labels": torch.arange(39).view(1, 3, 13).expand(2, -1, -1) % 4}
    inputs = _settled(inputs | own)
    clean = _judged(implementation, inputs, device)
    got = _judged(implementation, inputs | {"guide": spoilt}, device)
    untouched = own["query_labels"][0] != 1
    for name in ("output0", "output1", "grad_query"):
        assert_equal(
            got[name][0][:, untouched], clean[name][0][:, untouched], what=f"{name} in own-label mode"
        )
    assert bool(got["output0"][0, 0, ~untouched].isnan().all())
    assert got["output1"][0, 0, ~untouched].unique().tolist() == [first]


@devices
@implementations
@reductions
def test_first_of_guide_pixels_that_are_not_finite(
    operator: Operator, implementation: Implementation, reduction: str, device: str
) -> None:
    """Far apart, behind better ones and in front of them; the other class has its own."""
    query, guide = torch.randn(1, 3, 1, 10), torch.randn(1, 3, 1, 2500)
    labels = torch.arange(2500).view(1, 1, 2500) % 2
    inputs = _one_class(query, guide) | {"guide_labels": labels, "classes": torch.tensor([[0, 1]])}
    inputs |= {"reduction": reduction, "k": 2}
    skip_unless_able(operator, implementation, inputs, device)
    for value in (NAN, INF):
        spoilt = guide.clone()
        spoilt[0, 1, 0, [700, 702, 1900, 301, 2499]] = value
        got = _judged(implementation, inputs | {"guide": spoilt}, device)
        assert bool(got["output0"].isnan().all())
        assert got["output1"].flatten(2).unique(dim=2).flatten().tolist() == [700, 301]


@devices
@implementations
@reductions
@pytest.mark.parametrize("value", [NAN, -INF])
def test_one_query_pixel_that_is_not_finite(
    operator: Operator, implementation: Implementation, value: float, reduction: str, device: str
) -> None:
    """It alone is NaN, with the first pixel of each class; where a class has none, 0 and -1."""
    query, guide = torch.randn(1, 6, 1, 37), torch.randn(1, 6, 5, 5)
    labels = torch.arange(25).view(1, 5, 5) % 3
    inputs = _one_class(query, guide) | {"guide_labels": labels + 1, "classes": torch.tensor([[2, 7, 3, -1]])}
    inputs = _settled(inputs | {"reduction": reduction, "k": 2})
    skip_unless_able(operator, implementation, inputs, device)
    want = _judged(implementation, inputs, device)
    query = inputs["query"].clone()
    query[0, 5, 0, 33] = value
    got = _judged(implementation, inputs | {"query": query}, device)
    want["output0"][0, [0, 2], 0, 33] = NAN
    want["output1"][0, :, 0, 33] = torch.tensor([1, -1, 2, -1])
    for name in ("output0", "output1"):
        assert_equal(got[name], want[name], what=name)
    assert bool(got["grad_query"][0, :, 0, 33].isnan().all())
    assert bool(got["grad_query"][0, :, 0, :33].isfinite().all())
    assert_equal(
        got["grad_guide"][0][:, labels[0] == 0], want["grad_guide"][0][:, labels[0] == 0], what="no class"
    )


@devices
@implementations
@pytest.mark.parametrize("k", [2, 3, 8, 9, 100, 2**63 - 1])
def test_more_winners_than_pixels(
    operator: Operator, implementation: Implementation, k: int, device: str
) -> None:
    """Classes of 1, 3, 8 and 30 pixels: where there are no more than k, the mean of all."""
    sizes = (1, 3, 8, 30)
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[torch.randperm(42)].view(1, 6, 7)
    query, guide = torch.randn(1, 5, 3, 11), torch.randn(1, 5, 6, 7)
    inputs = _one_class(query, guide) | {"guide_labels": labels, "classes": torch.tensor([[0, 1, 2, 3]])}
    inputs = _settled(inputs | {"reduction": "topk", "k": k})
    skip_unless_able(operator, implementation, inputs, device)
    got = _judged(implementation, inputs, device)
    mean = _results(implementation, inputs | {"reduction": "mean"}, device)
    for slot, size in enumerate(sizes):
        if size <= k:
            assert_close(got["output0"][:, slot], mean["output0"][:, slot], 2e-6, what=f"{size} pixels")
    if k >= max(sizes):
        for name in ("grad_query", "grad_guide"):
            assert_close(got[name], mean[name], 4e-6, what=name)


@devices
@implementations
@reductions
def test_no_pixel_of_the_class(
    operator: Operator, implementation: Implementation, reduction: str, device: str
) -> None:
    """All 0, index -1, gradients 0: no such label, class -1, ignored query pixels, and labels that would be
    equal if cut to fewer bits."""
    query, guide = torch.randn(1, 3, 5, 7), torch.randn(1, 3, 4, 9)
    skip_unless_able(operator, implementation, {"query": query, "guide": guide}, device)
    byte, wide = torch.full((1, 4, 9), 7, dtype=torch.uint8), torch.full((1, 4, 9), 2**40 + 7)
    queries = torch.full((1, 5, 7), 7)
    calls: list[dict[str, Any]] = [
        {"guide_labels": byte, "classes": torch.tensor([[3, -1, 7 + 256, 7 + 2**32]])},
        {"guide_labels": wide, "classes": torch.tensor([[7, -1]], dtype=torch.int32)},
        {"guide_labels": torch.full((1, 4, 9), -1), "classes": torch.tensor([[-1, 255]])},
        {"guide_labels": byte, "query_labels": queries.byte(), "ignore_index": 7},
        {"guide_labels": byte, "query_labels": queries + 256},
        {"guide_labels": byte.int(), "query_labels": queries + 2**32},
        {"guide_labels": wide, "query_labels": queries.int()},
        {"guide_labels": wide, "query_labels": queries + 2**40, "ignore_index": 2**40 + 7},
        {"guide_labels": byte, "query_labels": queries.byte() + 1, "ignore_index": -1},
    ]
    for call in calls:
        got = _results(
            implementation, {"query": query, "guide": guide, "reduction": reduction, **call}, device
        )
        for name, result in got.items():
            none = -1 if name == "output1" else 0
            assert_equal(result, torch.full_like(result, none), what=f"{name} of {call}")


@devices
@implementations
@reductions
def test_labels_of_any_value(
    operator: Operator, implementation: Implementation, reduction: str, device: str
) -> None:
    """In own-label mode all but `ignore_index` match, negative ones too; guide pixels may carry that."""
    values = torch.tensor([0, 1, 255, 256, -1, -2, 2**31 - 1, -(2**31), 2**40, -(2**63), 2**63 - 1])
    query, guide = torch.randn(1, 4, 6, 9), torch.randn(1, 4, 7, 8)
    inputs: dict[str, Any] = {"query": query, "guide": guide, "reduction": reduction, "k": 2}
    for ignore_index in dict.fromkeys(IGNORED):
        for dtype in (torch.uint8, torch.int32, torch.int64):
            limits = torch.iinfo(dtype)
            few = values[(values >= limits.min) & (values <= limits.max)].to(dtype)
            inputs |= {
                "guide_labels": few[torch.randint(0, len(few), (1, 5, 13))],
                "query_labels": few[torch.randint(0, len(few), (1, 11, 9))],
                "ignore_index": ignore_index,
            }
            skip_unless_able(operator, implementation, inputs, device)
            _judged(implementation, _settled(inputs), device)


@devices
@implementations
@reductions
@pytest.mark.parametrize("own", [False, True])
def test_sizes_about_those_of_blocks(
    operator: Operator, implementation: Implementation, own: bool, reduction: str, device: str
) -> None:
    """Of query and guide, and with them the number of channels."""
    generator = torch.Generator().manual_seed(17)
    for i, n in enumerate(QUERY_BORDERS):
        for j, m in enumerate(GUIDE_BORDERS):
            channels, dtype = 1 + (3 * i + j) % 9, LOW[(i + j) % 3]
            query = torch.randn(1, channels, 1, n, generator=generator).to(dtype)
            guide = torch.randn(1, channels, m, 1, generator=generator).to(dtype)
            inputs = _one_class(query, guide) | {"reduction": reduction, "k": 3}
            if own:
                inputs["query_labels"] = torch.randint(0, 3, (1, 1, n), generator=generator)
                inputs["guide_labels"] = torch.randint(0, 3, (1, m, 1), generator=generator)
                del inputs["classes"]
            skip_unless_able(operator, implementation, inputs, device)
            _judged(implementation, _settled(inputs), device)


@devices
@implementations
@reductions
@pytest.mark.parametrize("shapes", [((1, 1), (61, 83)), ((71, 59), (1, 1)), ((1, 3), (1, 5000))], ids=str)
def test_one_against_many(
    operator: Operator,
    implementation: Implementation,
    shapes: tuple[tuple[int, int], tuple[int, int]],
    reduction: str,
    device: str,
) -> None:
    query, guide = (torch.randn(1, 9, *shape) for shape in shapes)
    inputs = _one_class(query, guide) | {"reduction": reduction}
    skip_unless_able(operator, implementation, inputs, device)
    got = _judged(implementation, _settled(inputs), device)
    own = {"classes": None, "query_labels": torch.zeros(1, *shapes[0], dtype=torch.uint8)}
    settled = _settled(inputs)
    for name, value in _judged(implementation, settled | own, device).items():
        if not name.startswith("grad"):
            assert_close(value, got[name], 0 if name == "output1" else 1e-6, what=f"{name} in own-label mode")


@devices
@implementations
@reductions
@pytest.mark.parametrize("own", [False, True])
def test_many_equal_terms(
    operator: Operator, implementation: Implementation, own: bool, reduction: str, device: str
) -> None:
    """Whose rounding errors do not cancel: a sum of one after the other would lose several digits."""
    query, guide = torch.randn(1, 5, 1, 3), torch.randn(1, 5, 1, 1).repeat(1, 1, 1, 20000)
    guide[..., 7] = -guide[..., 7]
    inputs = _one_class(query, guide) | {"reduction": reduction, "k": 9}
    if own:
        inputs |= {"classes": None, "query_labels": torch.zeros(1, 1, 3, dtype=torch.uint8)}
    skip_unless_able(operator, implementation, inputs, device)
    _judged(implementation, _settled(inputs), device)


@devices
@implementations
@reductions
@pytest.mark.parametrize("own", [False, True])
def test_no_channels(
    operator: Operator, implementation: Implementation, own: bool, reduction: str, device: str
) -> None:
    """All cosines are 0: the first pixel of the class is the best."""
    inputs = _one_class(torch.zeros(1, 0, 2, 5), torch.zeros(1, 0, 3, 4)) | {"reduction": reduction}
    inputs |= {"guide_labels": torch.arange(12).view(1, 3, 4) % 3, "classes": torch.tensor([[2, 9]])}
    if own:
        inputs |= {"classes": None, "query_labels": torch.full((1, 2, 5), 2)}
    skip_unless_able(operator, implementation, inputs, device)
    got = _results(implementation, inputs, device)
    assert not bool(got["output0"].any())
    assert got["output1"][:, 0].unique().tolist() == [2] and bool((got["output1"][:, 1:] == -1).all())
    assert got["grad_query"].shape == (1, 0, 2, 5) and got["grad_guide"].shape == (1, 0, 3, 4)


@devices
@implementations
@reductions
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
)
def test_odd_numbers_of_channels(
    operator: Operator,
    implementation: Implementation,
    dtypes: tuple[torch.dtype, torch.dtype],
    reduction: str,
    device: str,
) -> None:
    """bfloat16 goes in pairs of channels: what fills up the last one counts nothing."""
    for channels in (1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 63, 65, 127, 129):
        query, guide = torch.randn(2, channels, 3, 9), torch.randn(2, channels, 2, 7)
        query[:, -1] += 2  # most of it in the last channel
        guide[:, -1] -= 1
        inputs = _one_class(query.to(dtypes[0]), guide.to(dtypes[1])) | {"reduction": reduction, "k": 3}
        skip_unless_able(operator, implementation, inputs, device)
        _judged(implementation, _settled(inputs), device)


@devices
@implementations
@reductions
def test_repeated_classes(
    operator: Operator, implementation: Implementation, reduction: str, device: str
) -> None:
    """Equal maps, and gradients that add up."""
    query, guide = torch.randn(1, 6, 4, 9), torch.randn(1, 6, 5, 5)
    labels = torch.randint(0, 3, (1, 5, 5))
    inputs = _one_class(query, guide) | {"guide_labels": labels, "reduction": reduction, "k": 3}
    inputs = _settled(inputs | {"classes": torch.tensor([[1, 0]])})
    skip_unless_able(operator, implementation, inputs, device)
    repeated = inputs | {"classes": torch.tensor([[1, 1, -1, 0, 1, 0]])}
    got = _judged(implementation, repeated, device)
    # A matrix product with several means may sum each of them in another order.
    relative = 2 * torch.finfo(torch.float32).eps if reduction == "mean" else 0.0
    for slot, like in ((1, 0), (4, 0), (5, 3)):
        assert_close(
            got["output0"][:, slot], got["output0"][:, like], relative, what=f"similarity of slot {slot}"
        )
        assert_equal(got["output1"][:, slot], got["output1"][:, like], what=f"index of slot {slot}")

    def grads(call: dict[str, Any], grad: Tensor) -> list[Tensor]:
        leaves = [call[name].clone().to(device).requires_grad_() for name in BOTH]
        rest = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in call.items()
            if name not in BOTH
        }
        output, _ = ops.cross_similarity(*leaves, **rest, impl=implementation.name)
        return [one.cpu() for one in torch.autograd.grad(output, leaves, grad.to(device))]

    grad = torch.randn(1, 6, 4, 9)
    summed = torch.stack([grad[:, [0, 1, 4]].sum(1), grad[:, [3, 5]].sum(1)], 1)
    for name, one, other in zip(BOTH, grads(repeated, grad), grads(inputs, summed), strict=True):
        assert_close(one, other, 4e-6, what=f"gradient to the {name}")


@devices
@implementations
@reductions
def test_layouts_and_expanded_gradients(
    operator: Operator, implementation: Implementation, reduction: str, device: str
) -> None:
    """Channels last, transposed, sliced, and one image for all, with a gradient of stride 0, are the same."""
    query, guide = torch.randn(2, 5, 6, 9), torch.randn(2, 5, 7, 4)
    labels, classes = torch.randint(0, 2, (2, 7, 4)), torch.tensor([[0, 1, 1], [1, 5, -1]])
    features = {"query": query, "guide": guide, "guide_labels": labels, "classes": classes}
    inputs = _settled(features | {"reduction": reduction, "k": 3}) | {"impl": implementation.name}
    skip_unless_able(operator, implementation, inputs, device)

    def results(call: dict[str, Any], whole: bool) -> list[Tensor]:
        placed = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()
        }
        leaves = [placed[name].detach().requires_grad_() for name in BOTH]
        output, index = ops.cross_similarity(**placed | dict(zip(BOTH, leaves, strict=True)))
        ones = torch.ones_like(output)
        grad = ones if whole else torch.ones((), device=device).expand(output.shape)
        return [output, index, *torch.autograd.grad(output, leaves, grad)]

    def compare(got: list[Tensor], want: list[Tensor], what: str) -> None:
        for name, one, other in zip(("value", "index", *BOTH), got, want, strict=True):
            assert_close(one, other.expand_as(one), 0 if name == "index" else 1e-6, what=f"{name}, {what}")

    def channels_last(value: Tensor) -> Tensor:
        return value.contiguous(memory_format=torch.channels_last)

    def transposed(value: Tensor) -> Tensor:
        return value.mT.contiguous().mT

    def sliced(value: Tensor) -> Tensor:
        wide = torch.full((*value.shape[:3], 2 * value.shape[3] + 1), NAN)
        wide[..., 1::2] = value
        return wide[..., 1::2]

    want = results(inputs, True)
    layouts: tuple[Callable[[Tensor], Tensor], ...] = (torch.clone, channels_last, transposed, sliced)
    for lay_out in layouts:
        laid_out = {name: lay_out(inputs[name]) for name in BOTH}
        compare(results(inputs | laid_out, False), want, lay_out.__name__)
    first = {name: value[:1] for name, value in inputs.items() if isinstance(value, Tensor)}
    spread = {name: value.expand(3, *value.shape[1:]) for name, value in first.items()}
    compare(results(inputs | spread, False), results(inputs | first, True), "one image")


@devices
@implementations
@reductions
@pytest.mark.parametrize("needed", BOTH)
def test_one_gradient_alone(
    operator: Operator, implementation: Implementation, needed: str, reduction: str, device: str
) -> None:
    query, guide = torch.randn(2, 5, 6, 9), torch.randn(2, 5, 7, 4)
    labels, classes = torch.randint(0, 2, (2, 7, 4)), torch.tensor([[0, 1, 1], [1, 5, -1]])
    features = {"query": query, "guide": guide, "guide_labels": labels, "classes": classes}
    inputs = _settled(features | {"reduction": reduction, "k": 3})
    skip_unless_able(operator, implementation, inputs, device)
    got = _judged(implementation, inputs, device, (needed,))
    assert set(got) == {"output0", "output1", f"grad_{needed}"}


@devices
@implementations
@pytest.mark.parametrize("temperature", sorted({*TEMPERATURES, 1e-3, 1e4}))
def test_temperatures(
    operator: Operator, implementation: Implementation, temperature: float, device: str
) -> None:
    """Far from overflow at any, and at a low one between nearly equal cosines."""
    for dtype in LOW:
        query, guide = torch.randn(1, 12, 5, 7), torch.randn(1, 12, 9, 6)
        guide[..., :3] = query[..., :3].mean((2, 3), keepdim=True) + 0.01 * torch.randn(1, 12, 9, 3)
        query[..., 4] = guide[..., :5, 0]
        inputs = _one_class(query.to(dtype), guide.to(dtype))
        inputs |= {"guide_labels": torch.randint(0, 2, (1, 9, 6)), "classes": torch.tensor([[0, 1]])}
        skip_unless_able(operator, implementation, inputs, device)
        got = _judged(implementation, inputs | {"reduction": "softmax", "temperature": temperature}, device)
        most = _results(implementation, inputs, device)["output0"]
        mean = _results(implementation, inputs | {"reduction": "mean"}, device)["output0"]
        assert bool((got["output0"] <= most + 1e-6).all() and (got["output0"] >= mean - 1e-6).all())


@devices
@implementations
@pytest.mark.parametrize("reduction", ["max", "topk", "softmax"])
def test_more_pairs_than_32_bits_count(
    operator: Operator, implementation: Implementation, reduction: str, device: str
) -> None:
    """Four directions: all guide pixels but three lie in the first. All is known in closed form."""
    if implementation.name == "reference":
        pytest.skip("the reference takes minutes for 2 ** 31 pairs")
    if SIMULATED:
        pytest.skip("the CUDA kernels take an hour for 2 ** 31 pairs on the CPU")
    n, m = 2**16, 2**15 + 1
    places = torch.tensor([0, m // 2, m // 3, m - 1])
    which = torch.arange(n) % 4
    angle = (torch.rand(n, dtype=torch.float64) - 0.5) * math.pi / 3  # from the direction, 30 degrees at most

    def at(direction: Tensor) -> Tensor:
        return torch.stack([direction.cos(), direction.sin()], -1)

    guide = torch.zeros(m, dtype=torch.float64)
    guide[places] = torch.arange(4, dtype=torch.float64) * math.pi / 2
    query = which * math.pi / 2 + angle
    inputs = _one_class(_row(at(query)).float().reshape(1, 2, n, 1), _row(at(guide)).float())
    inputs |= {"reduction": reduction, "k": 1, "temperature": 0.005}
    skip_unless_able(operator, implementation, inputs, device)
    leaves, rest = _leaves(DEFAULTS | inputs, device)
    value, index = ops.cross_similarity(*leaves, **rest, impl=implementation.name)
    value.sum().backward()
    assert_equal(index.flatten().cpu(), places[which], what="index")
    assert_close(value.flatten().cpu().double(), angle.cos(), 1e-6, what="value")
    # Towards the best pixel, at a right angle to the vector itself; in "softmax" its like have equal shares.
    back = -angle.sin()[:, None] * at(query + math.pi / 2)
    got, others = (leaf.grad.double().cpu().flatten(2)[0].t() for leaf in leaves if leaf.grad is not None)
    # A probability is as exact as its exponent, cosine / temperature.
    lost = 1e-6 * (1 + 1 / inputs["temperature"]) if reduction == "softmax" else 1e-5
    assert_close(got, back, lost, what="gradient to the query")
    total = torch.zeros(4, dtype=torch.float64).index_add(0, which, angle.sin())
    want = torch.zeros(m, 2, dtype=torch.float64)
    want[places] = total[:, None] * at(torch.arange(4) * math.pi / 2 + math.pi / 2)
    if reduction == "softmax":
        alike = torch.ones(m, dtype=torch.bool)
        alike[places[1:]] = False
        want[alike] = want[0] / int(alike.sum())
    assert_close(others, want, 10 * lost, what="gradient to the guide")


@devices
@implementations
@pytest.mark.parametrize("temperature", [1e-8, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_temperatures(
    operator: Operator, implementation: Implementation, temperature: float, dtype: torch.dtype, device: str
) -> None:
    """The best pixel takes all: what forward and both gradients make of a cosine must be the same bits."""
    query, guide = torch.randn(1, 64, 5, 80).to(dtype), torch.randn(1, 64, 7, 41).to(dtype)
    inputs = _one_class(query, guide) | {"reduction": "softmax", "temperature": temperature}
    skip_unless_able(operator, implementation, inputs, device)
    got = _results(implementation, DEFAULTS | inputs, device)
    for name, want in reference(operator, DEFAULTS | inputs).items():
        if want.is_floating_point():
            assert_close(got[name], want, 4 * torch.finfo(got[name].dtype).eps, what=name)


@devices
@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_fills_a_block_overflows_nowhere(
    operator: Operator, implementation: Implementation, dtype: torch.dtype, device: str
) -> None:
    """13 guide pixels fill no block. Of those behind them the lift, -cosine / temperature, is infinite."""
    query, guide = torch.rand(1, 4, 1, 9).to(dtype), -torch.rand(1, 4, 1, 13).to(dtype)
    inputs = DEFAULTS | _one_class(query, guide) | {"reduction": "softmax", "temperature": 1.2e-38}
    skip_unless_able(operator, implementation, inputs, device)
    leaves, rest = _leaves(inputs, device)
    output, _ = ops.cross_similarity(*leaves, **rest, impl=implementation.name)
    for name, grad in zip(
        BOTH, torch.autograd.grad(output, leaves, 10 * torch.ones_like(output)), strict=True
    ):
        assert bool(grad.isfinite().all()), name
