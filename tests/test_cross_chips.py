"""cross_similarity on tensor cores: sizes of several tiles, parts of the guide and images, on each chip's
kernels, simulated, or on the GPU that is there; the variants that a GPU is to choose among."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fuzzdraw import Case, Draw
from fuzzjudge import RULES
from fuzzpairs import settle
from memory_trace import traced
from opcases import CUDA_MARKS, SIMULATED, run
from torch import Tensor

from cisc_ext import ops
from cisc_ext.ops._cross_reference import REDUCTIONS

CHIPS = [
    pytest.param(
        "cpu", chip, id=f"simulated-{chip}", marks=pytest.mark.skipif(not SIMULATED, reason="not simulated")
    )
    for chip in (80, 90)
]
CHIPS.append(pytest.param("cuda", 0, id="cuda", marks=CUDA_MARKS))
DEFAULTS: dict[str, Any] = {
    "k": 8,
    "temperature": 0.07,
    "ignore_index": 255,
    "return_index": True,
    "eps": 1e-8,
}
VARIANTS = (
    *("max_bits", "max_alone", "max_no_turns", "max_long", "max_held"),
    *("softmax_alone", "softmax_no_turns", "softmax_long", "topk_alone", "topk_no_turns", "topk_short"),
)

on_chips = pytest.mark.parametrize(("device", "chip"), CHIPS)


@pytest.fixture(autouse=True)
def _of_chip(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if chip := request.node.callspec.params.get("chip"):
        monkeypatch.setenv("CISC_SIMT_CHIP", str(chip))


def images(
    size: tuple[int, int, int, int, int, int], classes: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    """Both images, batch x channels x h x w and h' x w', labels in regions, of which some are ignored."""
    batch, channels, h, w, guide_h, guide_w = size
    generator = torch.Generator().manual_seed(seed)

    def labels(height: int, width: int) -> Tensor:
        coarse = torch.randint(0, classes, (batch, 3, 4), generator=generator)
        fine = coarse.repeat_interleave(-(-height // 3), 1).repeat_interleave(-(-width // 4), 2)
        fine = fine[:, :height, :width].contiguous()
        return torch.where(torch.rand(fine.shape, generator=generator) < 0.05, 255, fine).to(torch.uint8)

    return DEFAULTS | {
        "query": torch.randn(batch, channels, h, w, generator=generator).to(dtype),
        "guide": torch.randn(batch, channels, guide_h, guide_w, generator=generator).to(dtype),
        "guide_labels": labels(guide_h, guide_w),
        "query_labels": labels(h, w),
    }


def judge(inputs: dict[str, Any], device: str, needed: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Results of the compiled kernels, judged by the rule of the fuzzer."""
    if inputs["reduction"] == "topk":
        inputs["query"] = inputs["query"].clone()
        settle(Draw(0), inputs)
    placed = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    got = {
        key: value.cpu()
        for key, value in run(ops.cross_similarity, {**placed, "impl": "cpp"}, needed).items()
    }
    RULES["cross_similarity"](Case(0, "cross_similarity", "value", "", inputs), got)
    return got


@on_chips
@pytest.mark.parametrize("reduction", REDUCTIONS[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_classes_of_several_images(device: str, chip: int, dtype: torch.dtype, reduction: str) -> None:
    """Ranges that end within tiles, one that is empty, and one that is wanted twice."""
    inputs = images((2, 72, 23, 31, 19, 45), 3, dtype) | {"reduction": reduction}
    del inputs["query_labels"]
    inputs["classes"] = torch.tensor([[0, 2, -1, 7], [1, 1, 2, 255]])
    judge(inputs, device)


@on_chips
@pytest.mark.parametrize("reduction", REDUCTIONS[:3])
@pytest.mark.parametrize("labels", [torch.uint8, torch.int64])
def test_own_labels(device: str, chip: int, labels: torch.dtype, reduction: str) -> None:
    """Groups of query rows with several classes; of wide labels some share a bin."""
    inputs = images((2, 40, 29, 37, 31, 23), 5, torch.bfloat16, seed=1) | {
        "reduction": reduction,
        "classes": None,
    }
    for name in ("query_labels", "guide_labels"):
        inputs[name] = inputs[name].to(labels)
        if labels == torch.int64:
            inputs[name][inputs[name] == 3] = -7
            inputs[name][inputs[name] == 4] = 1000
    judge(inputs, device)


@on_chips
@pytest.mark.parametrize("reduction", REDUCTIONS[:3])
@pytest.mark.parametrize("members", [1, 7, 8, 63, 64, 65, 127, 128, 129, 255, 256, 257, 383])
def test_tails(device: str, chip: int, members: int, reduction: str) -> None:
    """Ranges that fill their last tile, lack one column or begin one; what lies behind is better."""
    inputs = images((1, 16, 3, 7, 1, members + 70), 1, torch.bfloat16, seed=7) | {"reduction": reduction}
    del inputs["query_labels"]
    inputs["query"] = inputs["query"].abs() + 0.1
    inputs["guide"] = inputs["guide"].abs() + 0.1
    inputs["guide"][..., :members] *= -1
    inputs["guide_labels"] = (torch.arange(members + 70) >= members).to(torch.uint8)[None, None]
    inputs["classes"] = torch.tensor([[0, 1]])
    judge(inputs, device)


@on_chips
@pytest.mark.parametrize("pixels", [1, 7, 8, 62, 63, 64, 65, 127, 128, 129])
def test_tails_of_gradients(device: str, chip: int, pixels: int) -> None:
    """The same for what gradients meet: of the guide a class, of the query all of its image; behind them the
    other class and the next image, which are better."""
    inputs = images((2, 16, 1, pixels, 1, pixels + 70), 1, torch.bfloat16, seed=8) | {"reduction": "softmax"}
    del inputs["query_labels"]
    inputs["query"] = inputs["query"].abs() + 0.1
    inputs["guide"] = inputs["guide"].abs() + 0.1
    inputs["guide"][..., :pixels] *= -1
    inputs["guide_labels"] = (torch.arange(pixels + 70) >= pixels).to(torch.uint8).expand(2, 1, -1)
    inputs["classes"] = torch.zeros(2, 1, dtype=torch.int64)
    judge(inputs, device, ("query", "guide"))


@on_chips
@pytest.mark.parametrize("reduction", REDUCTIONS[:3])
def test_parts_of_a_guide(device: str, chip: int, reduction: str) -> None:
    """One group of query rows against a guide that several blocks share."""
    inputs = images((1, 64, 9, 11, 64, 96), 1, torch.float16, seed=2) | {"reduction": reduction}
    del inputs["query_labels"]
    inputs["classes"] = torch.zeros(1, 1, dtype=torch.int64)
    judge(inputs, device)


@on_chips
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("channels", [256, 700])
@pytest.mark.parametrize("reduction", REDUCTIONS[:3])
def test_long_rows(device: str, chip: int, channels: int, precision: str, reduction: str) -> None:
    """Rows that stay in shared memory, and such as come in pieces; two numbers for one, and rounded
    ones, whose results are judged by float16's precision."""
    inputs = images((1, channels, 13, 11, 17, 19), 1, torch.float32, seed=3) | {"reduction": reduction}
    del inputs["query_labels"]
    inputs["classes"] = torch.zeros(1, 1, dtype=torch.int64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        if precision == "highest":
            judge(inputs, device)
            return
        placed = {
            key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()
        }
        got, _ = ops.cross_similarity(**placed, impl="cpp")
    finally:
        torch.set_float32_matmul_precision(before)
    want, _ = ops.cross_similarity(**inputs, impl="reference")
    assert (got.cpu() - want).abs().max() < 2.0**-11


@on_chips
@pytest.mark.parametrize("k", [1, 9, 40])
def test_more_winners_than_a_sweep_finds(device: str, chip: int, k: int) -> None:
    inputs = images((1, 16, 9, 13, 21, 27), 2, torch.float32, seed=4) | {"reduction": "topk", "k": k}
    del inputs["query_labels"]
    inputs["classes"] = torch.tensor([[0, 1]])
    judge(inputs, device)


@on_chips
@pytest.mark.parametrize("k", [3, 8, 13, 40, 64, 65, 200])
def test_winners_ascend(device: str, chip: int, k: int) -> None:
    """The winners that are kept for backward: the best ones, by their index, -1 behind them."""
    inputs = images((1, 16, 9, 13, 21, 27), 4, torch.float32, seed=4)
    classes = torch.tensor([[0, 1, 2, 3, 7]])
    tensors = [inputs[name].to(device) for name in ("query", "guide", "guide_labels")]
    _, _, saved = torch.ops.cisc_ext.cross_similarity(
        *tensors, classes.to(device), None, "topk", k, 0.07, 255, 1e-8, False, True
    )
    query, guide = (
        torch.nn.functional.normalize(inputs[name].double().flatten(2)[0], dim=0)
        for name in ("query", "guide")
    )
    labels = inputs["guide_labels"].flatten()
    for slot, wanted in enumerate(classes[0]):
        pixels = (labels == wanted).nonzero()[:, 0]
        count = min(k, len(pixels))
        best = (query.T @ guide[:, pixels]).topk(count).indices
        got = saved[0, slot].flatten(0, 1).cpu()
        assert (got[:, count:] == -1).all()
        assert torch.equal(got[:, :count], pixels[best].sort().values)


@on_chips
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_vectors_and_what_is_not_finite(device: str, chip: int, dtype: torch.dtype) -> None:
    """The lowest index of equal ones, in tiles far apart; NaN and inf count as more than all."""
    inputs = images((1, 48, 12, 17, 30, 31), 2, dtype, seed=5) | {"reduction": "max"}
    del inputs["query_labels"]
    inputs["classes"] = torch.tensor([[0, 1]])
    guide = inputs["guide"].flatten(2)
    guide[..., 1::3] = guide[..., :1]
    inputs["query"][..., :5] = guide[..., :1, None]
    inputs["query"][0, :, 3, 4] = 0
    judge(inputs, device)
    guide[0, 7, 611] = torch.nan
    guide[0, 7, 822] = torch.inf
    inputs["query"][0, 1, 7, 7] = -torch.inf
    judge(inputs, device)


@pytest.mark.parametrize(("device", "chip"), CHIPS[1:])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(device: str, chip: int, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the variants are of compute capability 9.0")
    monkeypatch.setenv("CISC_CROSS_VARIANT", variant)
    inputs = images((1, 250, 17, 19, 23, 29), 2, torch.float16, seed=6)
    del inputs["query_labels"]
    inputs["classes"] = torch.tensor([[1, 0]])
    judge(inputs | {"reduction": variant.partition("_")[0]}, device)


@pytest.mark.parametrize(("device", "chip"), CHIPS[1:])
def test_unknown_variant(device: str, chip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the variants are of compute capability 9.0")
    monkeypatch.setenv("CISC_CROSS_VARIANT", "fastest")
    inputs = images((1, 8, 2, 2, 2, 2), 1, torch.float16) | {"reduction": "max", "classes": None}
    placed = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    with pytest.raises(
        (ValueError, RuntimeError), match="CISC_CROSS_VARIANT must be one of max_bits, "
    ) as error:
        ops.cross_similarity(**placed, impl="cpp")
    for variant in VARIANTS:
        assert variant in str(error.value)


def _traced(inputs: dict[str, Any], return_index: bool, rounded: bool = False) -> tuple[list[int], int]:
    """What a call allocates beyond its results, and how much these take."""
    tensors = [inputs.get(name) for name in ("query", "guide", "guide_labels", "classes", "query_labels")]
    more = (inputs["reduction"], inputs["k"], 0.07, 255, 1e-8, rounded, return_index)
    given, taken = traced(lambda: torch.ops.cisc_ext.cross_similarity(*tensors, *more))
    results = [one.nbytes for one in given if one.nbytes > 0]
    assert taken[: len(results)] == results
    return taken[len(results) :], sum(results)


SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    "small": (2, 72, 9, 11, 13, 7),
    "parts": (1, 8, 13, 20, 25, 44),
    "no guide": (2, 5, 3, 4, 0, 6),
    "no channels": (1, 0, 3, 4, 5, 6),
    "no query": (1, 5, 0, 4, 5, 6),
    "no images": (0, 5, 3, 4, 5, 6),
}


@pytest.mark.skipif(not SIMULATED, reason="not simulated: test_gpu.py measures")
@pytest.mark.parametrize("chip", [75, 80, 90])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reduction", REDUCTIONS[:3])
def test_simulated_workspace_is_as_planned(chip: int, size: str, reduction: str) -> None:
    """To the byte, whatever is asked for; nothing where there is nothing to compare."""
    build = pytest.importorskip("cisc_ext._build")
    for own, slots, dtype, k in (
        *((False, 2, "float16", 8), (False, 0, "float16", 8), (False, 1, "bfloat16", 40)),
        *((True, 1, "float32", 8), (False, 1, "float32", 40)),
        *((False, 2, "float16", 64), (True, 1, "float32", 65)),
    ):
        inputs = images(SIZES[size], 3, getattr(torch, dtype)) | {"reduction": reduction, "k": k}
        batch = SIZES[size][0]
        if not own:
            del inputs["query_labels"]
            inputs["classes"] = torch.zeros(batch, slots, dtype=torch.int64)
        shapes = {name: inputs[name].shape for name in ("query", "guide", "classes") if name in inputs}
        for rounded in (False, True):
            for return_index in (False, True):
                asked = {"reduction": reduction, "k": k, "return_index": return_index, "rounded": rounded}
                plan = build.plan(
                    "cross_similarity", shapes, dtype, {90: "sm_90a"}.get(chip, f"sm_{chip}"), **asked
                )
                taken, results = _traced(inputs, return_index, rounded)
                assert sum(one for one in taken if one > 0) == plan["workspace_bytes"], (slots, dtype, asked)
                features = sum(inputs[name].nbytes for name in BOTH)
                labels = sum(
                    inputs[name].nbytes for name in ("guide_labels", "query_labels") if name in inputs
                )
                moved = features + labels + results if results else 0
                assert plan["bytes"] == moved, (slots, dtype, asked)


@pytest.mark.skipif(not SIMULATED, reason="not simulated")
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_rows_are_given_back(chip: int, reduction: str) -> None:
    """Before what reads none of them, the plain kernel and the means, has its own memory."""
    inputs = images((1, 512, 9, 11, 13, 7), 3, torch.float16) | {"reduction": reduction}
    del inputs["query_labels"]
    inputs["guide_labels"] = inputs["guide_labels"].long()
    inputs["classes"] = torch.zeros(1, 1, dtype=torch.int64)
    taken, _ = _traced(inputs, return_index=True)
    packed = 2 * 512 * (9 * 11 + 13 * 7)
    assert taken.count(packed) == taken.count(-packed) == 1
    last = max(place for place, one in enumerate(taken) if one > 0)
    assert last > taken.index(-packed) and sum(taken[: last + 1]) < packed


BOTH = ("query", "guide")


@on_chips
@pytest.mark.parametrize("channels", [7, 72, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_classes(device: str, chip: int, dtype: torch.dtype, channels: int) -> None:
    """Several tiles of both images; an empty class, one that is wanted twice, one of no pixel's label."""
    inputs = images((2, channels, 13, 17, 19, 15), 3, dtype, seed=7) | {"reduction": "softmax"}
    del inputs["query_labels"]
    inputs["classes"] = torch.tensor([[0, 2, -1, 7], [1, 1, 255, 300]])
    judge(inputs, device, BOTH)


@on_chips
@pytest.mark.parametrize("labels", [torch.uint8, torch.int32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_own_labels(device: str, chip: int, dtype: torch.dtype, labels: torch.dtype) -> None:
    """Held rows of several classes, and pixels that are ignored, some of which are not finite."""
    inputs = images((2, 40, 19, 17, 21, 13), 5, dtype, seed=8) | {"reduction": "softmax", "classes": None}
    for name in ("query_labels", "guide_labels"):
        inputs[name] = inputs[name].to(labels)
    judge(inputs, device, BOTH)
    inputs["query"][0, 3, inputs["query_labels"][0] == 255] = torch.nan
    judge(inputs, device, BOTH)


@on_chips
@pytest.mark.parametrize("own", [False, True])
def test_gradients_where_labels_are_no_bytes(device: str, chip: int, own: bool) -> None:
    """Only images that compare such are met by the plain kernel: the other's gradients have the bits that
    labels of bytes give."""
    inputs = images((2, 72, 13, 17, 19, 15), 4, torch.bfloat16, seed=12) | {"reduction": "softmax"}
    inputs["classes"] = None
    if not own:
        del inputs["query_labels"]
        inputs["classes"] = torch.tensor([[0, 2, 1], [1, 3, -1]])
    labels = [name for name in ("query_labels", "guide_labels") if name in inputs]
    of_bytes = judge(inputs, device, BOTH)
    wide = inputs | {name: inputs[name].to(torch.int64) for name in labels}
    of_words = judge(wide, device, BOTH)
    for name, value in of_bytes.items():
        assert torch.equal(value, of_words[name])
    for name in labels:
        first = wide[name][0]
        wide[name][0] = torch.where(first == 2, 1000, torch.where(first == 3, -3, first))
    if not own:
        wide["classes"] = torch.tensor([[0, 1000, 1], [1, 3, -1]])
    of_others = judge(wide, device, BOTH)
    for name, value in of_bytes.items():
        assert torch.equal(value[1], of_others[name][1])


@on_chips
@pytest.mark.parametrize("channels", [256, 320, 600])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)]
)
def test_gradients_of_long_rows(
    device: str, chip: int, dtypes: tuple[torch.dtype, torch.dtype], channels: int
) -> None:
    """Several slices of channels; rows that stay in shared memory, and such as come in pieces."""
    inputs = images((1, channels, 11, 13, 9, 16), 2, torch.float32, seed=9) | {"reduction": "softmax"}
    del inputs["query_labels"]
    inputs["query"], inputs["guide"] = inputs["query"].to(dtypes[0]), inputs["guide"].to(dtypes[1])
    inputs["classes"] = torch.tensor([[1, 0]])
    judge(inputs, device, BOTH)


@on_chips
@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 0.02, 100, 1e25, 3.4e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_temperatures(device: str, chip: int, dtype: torch.dtype, temperature: float) -> None:
    """Weights that one cosine takes, and such as are all alike; vectors of many lengths."""
    inputs = images((1, 33, 12, 12, 14, 14), 1, dtype, seed=10) | {"reduction": "softmax"}
    del inputs["query_labels"]
    inputs["classes"] = torch.zeros(1, 1, dtype=torch.int64)
    lengths = 2.0 ** torch.arange(-6, 6).to(dtype)
    inputs["query"] = inputs["query"] * lengths
    inputs["guide"][..., :12] *= lengths
    inputs["temperature"] = temperature
    judge(inputs, device, BOTH)


@on_chips
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_beside_what_is_not_finite(device: str, chip: int, dtype: torch.dtype) -> None:
    """NaN stays with the pixels that are compared with it; zero-length vectors have no gradient."""
    inputs = images((1, 70, 12, 11, 13, 17), 2, dtype, seed=11) | {"reduction": "softmax"}
    inputs["query"][0, :, 5, 3] = 0
    inputs["guide"][0, :, 7, 7] = 0
    inputs["guide"][0, 69, 4, 4] = torch.inf
    inputs["query"][0, 1, 9, 9] = torch.nan
    judge(inputs | {"classes": None}, device, BOTH)
    del inputs["query_labels"]
    judge(inputs | {"classes": torch.tensor([[1, 0, 1]])}, device, BOTH)


@on_chips
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_beside_vectors_without_length(
    device: str, chip: int, dtype: torch.dtype, members: int, own: bool
) -> None:
    """In classes so small that one pixel has much of the weight."""
    inputs = images((2, 32, 3, 3, 1, members + 4), 1, dtype, seed=13) | {"reduction": "softmax"}
    inputs["query"][0, :, 1, 1] = 0
    inputs["guide"][1, :, 0, 0] = 0
    inputs["guide_labels"] = (torch.arange(members + 4) >= members).to(torch.uint8).expand(2, 1, -1)
    inputs["query_labels"] = torch.zeros(2, 3, 3, dtype=torch.uint8)
    inputs["classes"] = None
    if not own:
        del inputs["query_labels"]
        inputs["classes"] = torch.zeros(2, 1, dtype=torch.int64)
    judge(inputs, device, BOTH)


def gradients(inputs: dict[str, Any], incoming: Tensor, impl: str, device: str) -> dict[str, Tensor]:
    """Of both images, by an incoming gradient, in float64."""
    placed = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    leaves = {name: placed[name].clone().requires_grad_() for name in BOTH}
    value = ops.cross_similarity(**{**placed, **leaves, "return_index": False}, impl=impl)
    found = torch.autograd.grad(value, list(leaves.values()), incoming.to(value))
    return {name: grad.double().cpu() for name, grad in zip(BOTH, found, strict=True)}


@on_chips
@pytest.mark.parametrize("reduction", REDUCTIONS[:3])
@pytest.mark.parametrize("empty", BOTH)
def test_gradients_of_empty_images(device: str, chip: int, empty: str, reduction: str) -> None:
    inputs = images((2, 12, 3, 4, 5, 4), 2, torch.bfloat16, seed=14) | {"reduction": reduction}
    del inputs["query_labels"]
    inputs["classes"] = torch.tensor([[0, 1], [1, 1]])
    inputs[empty] = inputs[empty][:, :, :0]
    got = gradients(inputs, torch.ones(2, 2, *inputs["query"].shape[2:]), "cpp", device)
    assert all(got[name].shape == inputs[name].shape and not got[name].any() for name in BOTH)


@on_chips
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_unlike_sizes(device: str, chip: int, dtype: torch.dtype, own: bool) -> None:
    """Of a class whose incoming gradients are far below another's, and where what is compared with nothing
    has larger ones than all."""
    inputs = images((1, 24, 16, 17, 24, 41), 1, dtype, seed=15) | {"reduction": "softmax", "temperature": 1}
    inputs["guide_labels"] = (torch.arange(24 * 41).view(1, 24, 41) >= 384).to(torch.uint8)
    small, large = 1.0, 2.0**16
    incoming = torch.randn(1, 1, 16, 17, generator=torch.Generator().manual_seed(16))
    if own:
        rows = torch.arange(16)[:, None].expand(16, 17)
        inputs["query_labels"] = torch.where(rows < 7, 0, torch.where(rows < 14, 1, 255)).to(torch.uint8)[
            None
        ]
        incoming = incoming * torch.where(rows < 7, small, torch.where(rows < 14, large, 1e13))
        inputs["classes"] = None
    else:
        del inputs["query_labels"]
        inputs["classes"] = torch.tensor([[0, -1, 1, 5]])
        incoming = incoming * torch.tensor([small, 1e13, large, 1e13])[None, :, None, None]
    got = gradients(inputs, incoming, "cpp", device)
    wide = inputs | {name: inputs[name].double() for name in BOTH}
    want = gradients(wide, incoming.double(), "reference", "cpu")
    of_class = {"guide": inputs["guide_labels"][0]}
    if own:
        of_class["query"] = inputs["query_labels"][0]
    limit = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name in BOTH:
        for label in (0, 1):
            those = (slice(None), of_class[name] == label) if name in of_class else ...
            off = (got[name][0][those] - want[name][0][those]).abs().max()
            assert off <= limit * want[name][0][those].abs().max()
