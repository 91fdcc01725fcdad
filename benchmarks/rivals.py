"""What the operators are measured against, one function each: it makes the call that runs a case's pass.

All of them start from the operator's arguments and normalise, bring labels and the like within the call, as
the operators do. Buffers are allocated when the call is made. Where a rival cannot run a case it raises
`CannotRunError` with the reason.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import naive, published
from benchmarks.cases import Call, CannotRunError, Case, Result, call_of, cotangent, narrowed
from benchmarks.machine import ROOT
from benchmarks.measure import SLOW_S

CROSS_CHUNKS = (128, 256, 512, 1024, 2048)  # query pixels
ROW_CHUNKS = (16, 64, 256)  # rows of labels
PIXEL_CHUNKS = (512, 2048, 8192)  # query pixels
_WIDER_ON_A_GPU = 8  # times these
LIMIT_S = 5.0
"""Longest run of a rival; it is left out where it takes longer."""
_KEOPS_ROWS = 128  # query pixels that a run is judged by
_keops_rates: dict[str, float] = {}  # seconds a pair of pixels, by reduction
_HIDDEN = -1e4
"""A cosine that softmax sees as none at all, and that times 0 is 0."""

Hidden = Callable[[int, int], Tensor]  # mask of the guide pixels that rows a..e of the query may not see
Kernel = Callable[[Tensor, Tensor, Hidden | None], Tensor]  # query [n,C], guide [m,C], mask -> [n]


@dataclass(frozen=True)
class Rival:
    """`make(case, whole, chunk)` gives the call; `flops` and `bytes` are its least for a case."""

    name: str
    make: Callable[[Case, bool, int], Call]
    chunks: tuple[int, ...] = (0,)
    flops: Callable[[Case], int] = lambda case: 0
    bytes: Callable[[Case], int] = lambda case: 0


def named(case: Case, name: str) -> Rival:
    """The rival of that name."""
    (rival,) = (one for one in RIVALS[case.operator.name] if one.name == name)
    return rival


def best_chunk(case: Case, rival: Rival) -> int:
    """The chunk that is fastest, on a part of the query where one can be taken."""
    if len(rival.chunks) == 1:
        return rival.chunks[0]
    seconds: dict[int, float] = {}
    chunks = [chunk * (_WIDER_ON_A_GPU if case.device == "cuda" else 1) for chunk in rival.chunks]
    few = narrowed(case, max(chunks)) or case
    for chunk in chunks:
        call = rival.make(few, False, chunk)
        first = timed_s(call)
        seconds[chunk] = first if first > SLOW_S else min(first, timed_s(call))
    return min(seconds, key=lambda chunk: seconds[chunk])


def naive_bytes(case: Case) -> int:
    """What the naive expression holds at once, at least: affinities, or features, maps, logits at full
    size."""
    x, op, forward = case.inputs, case.operator.name, case.passes == "forward"
    size, label_pixels = case.dtype.itemsize, x["labels"].numel() if "labels" in x else 0
    if op == "cross_similarity":
        query, guide = x["query"], x["guide"]
        pairs = query.shape[0] * query.shape[2:].numel() * guide.shape[2:].numel()
        return (2 if forward else 3) * pairs * size
    if op == "masked_average_pool":
        return x["features"].shape[1] * label_pixels * size
    if op == "prototype_similarity":
        return (1 if forward else 2) * int(x["query"].nbytes)
    if op == "map_consistency":
        return (2 if forward else 4) * x["similarity"].shape[1] * label_pixels * size
    return (1 if op == "predict" else 2 if forward else 3) * x["logits"].shape[1] * label_pixels * size


def _all_pairs_flops(case: Case) -> int:
    if case.operator.name != "cross_similarity":
        return case.operator.cost(case.inputs, case.passes).flops
    query, guide = case.inputs["query"], case.inputs["guide"]
    pairs = query.shape[0] * query.shape[2:].numel() * guide.shape[2:].numel()
    return 2 * query.shape[1] * pairs * (1 if case.passes == "forward" else 2)


def _chunked_flops(case: Case) -> int:
    reduction = case.inputs.get("reduction")
    if reduction == "mean" or (case.passes == "backward" and reduction in ("max", "topk")):
        return case.operator.cost(case.inputs, case.passes).flops
    return _all_pairs_flops(case)


def _needed_flops(case: Case) -> int:
    return case.operator.cost(case.inputs, case.passes).flops


def _naive(case: Case, whole: bool, chunk: int) -> Call:
    return call_of(naive.ORACLES[case.operator.name], case, whole=whole)


def _compiled(case: Case, whole: bool, chunk: int) -> Call:
    """The naive expression through torch.compile."""
    if case.device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise CannotRunError("torch.compile needs a C++ compiler, found none")
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # so that the graph can run backward again
    function = torch.compile(naive.ORACLES[case.operator.name], dynamic=False)
    try:
        call = call_of(function, case, whole=whole)
        call()
    except CannotRunError:
        raise
    except Exception as error:
        raise CannotRunError(f"torch.compile fails: {_first_line(error)}") from error
    return call


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


# Pixels against pixels.


def _against(
    kernel: Kernel,
    gather: bool,
    query: Tensor,
    guide: Tensor,
    guide_labels: Tensor,
    classes: Tensor | None = None,
    *,
    query_labels: Tensor | None = None,
    ignore_index: int = 255,
    **_: Any,
) -> Tensor:
    """`cross_similarity` by way of a kernel for matrices: with `gather` the guide pixels of a class are
    gathered first, otherwise all are compared and those of other classes hidden."""
    maps = []
    h, w = query.shape[2:]
    for b in range(query.shape[0]):
        q, g = (F.normalize(x[b].flatten(1), dim=0).t() for x in (query, guide))
        label = naive.nearest(guide_labels[b : b + 1], (guide.shape[2], guide.shape[3])).flatten()
        slots = []
        if classes is not None:
            for target in classes[b]:
                member = label == target
                if bool(member.all()):
                    slots.append(kernel(q, g, None))
                elif not bool(member.any()):
                    slots.append(torch.zeros(len(q), dtype=q.dtype, device=q.device))
                elif gather:
                    slots.append(kernel(q, g[member], None))
                else:
                    slots.append(kernel(q, g, partial(_not_member, ~member)))
        else:
            assert query_labels is not None
            own = naive.nearest(query_labels[b : b + 1], (h, w)).flatten()
            if gather:
                slots.append(_own_gathered(kernel, q, g, own, label, ignore_index))
            else:
                slots.append(kernel(q, g, partial(_not_own, own, label)))
        maps.append(torch.stack(slots).unflatten(1, (h, w)))
    return torch.stack(maps)


def _not_member(other: Tensor, start: int, stop: int) -> Tensor:
    return other[None]


def _not_own(own: Tensor, label: Tensor, start: int, stop: int) -> Tensor:
    return own[start:stop, None] != label


def _own_gathered(
    kernel: Kernel, q: Tensor, g: Tensor, own: Tensor, label: Tensor, ignore_index: int
) -> Tensor:
    value = torch.zeros(len(q), dtype=q.dtype, device=q.device)
    for target in own.unique().tolist():
        rows, columns = (own == target).nonzero()[:, 0], (label == target).nonzero()[:, 0]
        if target != ignore_index and len(columns):
            value = value.index_copy(0, rows, kernel(q[rows], g[columns], None).to(value.dtype))
    return value


class _Chunks:
    """A kernel that holds the affinities of `chunk` rows at a time, in place in buffers made once."""

    def __init__(self, case: Case, chunk: int) -> None:
        self.settings = {key: case.inputs.get(key, value) for key, value in _DEFAULTS.items()}
        self.chunk = chunk
        pixels = chunk * case.inputs["guide"].shape[2:].numel()
        copies = 2 if self.settings["reduction"] == "softmax" else 1
        self.buffers = [
            torch.empty(pixels, dtype=case.dtype, device=case.inputs["query"].device) for _ in range(copies)
        ]

    def __call__(self, q: Tensor, g: Tensor, hidden: Hidden | None) -> Tensor:
        if self.settings["reduction"] == "mean":
            if hidden is not None:
                raise CannotRunError("the mean needs its class gathered")
            return q @ g.mean(0)
        if torch.is_grad_enabled() and q.requires_grad:
            parts = [
                checkpoint(self.of_rows, q[a:e], g, hidden, a, e, use_reentrant=False)
                for a, e in _ranges(len(q), self.chunk)
            ]
            return torch.cat(parts)
        value = torch.empty(len(q), dtype=q.dtype, device=q.device)
        for a, e in _ranges(len(q), self.chunk):
            scores, *more = (x[: (e - a) * len(g)].view(e - a, len(g)) for x in self.buffers)
            torch.mm(q[a:e], g.t(), out=scores)
            value[a:e] = self.reduce(scores, hidden, a, e, *more)
        return value

    def reduce(self, scores: Tensor, hidden: Hidden | None, a: int, e: int, *more: Tensor) -> Tensor:
        softmax = self.settings["reduction"] == "softmax"
        if hidden is not None:
            scores.masked_fill_(hidden(a, e), _HIDDEN if softmax else -torch.inf)
        if softmax:
            return self.weighted(scores, more[0])
        if self.settings["reduction"] == "topk":
            return scores.topk(min(self.settings["k"], scores.shape[1]), 1, sorted=False).values.mean(1)
        return scores.amax(1)

    def weighted(self, scores: Tensor, weight: Tensor) -> Tensor:
        """Softmax-weighted mean; `weight` is written to. Cosines are at most 1: no maximum is needed."""
        torch.sub(scores, 1, out=weight).div_(self.settings["temperature"]).exp_()
        total = weight.sum(1)
        return weight.mul_(scores).sum(1).div_(total)

    def of_rows(self, q: Tensor, g: Tensor, hidden: Hidden | None, a: int, e: int) -> Tensor:
        """The same for softmax with a gradient."""
        scores = q @ g.t()
        if hidden is not None:
            scores = scores.masked_fill(hidden(a, e), _HIDDEN)
        return (scores / self.settings["temperature"]).softmax(1).mul(scores).sum(1)


class _SoftmaxChunks(_Chunks):
    """Through `torch.softmax`, which takes off the maximum first, as it must be at any temperature."""

    def weighted(self, scores: Tensor, weight: Tensor) -> Tensor:
        torch.div(scores, self.settings["temperature"], out=weight)
        return torch.softmax(weight, 1, out=weight).mul_(scores).sum(1)


def _softmax_chunked(case: Case, whole: bool, chunk: int) -> Call:
    _forward_only(case, "softmax")
    return call_of(partial(_against, _SoftmaxChunks(case, chunk), False), case, whole=whole)


_DEFAULTS: dict[str, Any] = {"reduction": "max", "k": 8, "temperature": 0.07}


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _cross_chunked(gather: bool, case: Case, whole: bool, chunk: int) -> Call:
    if gather and case.workload.mode == "dense":
        raise CannotRunError("there is no class to gather: all guide pixels count")
    reduction = case.inputs.get("reduction", "max")
    gather = gather or reduction == "mean"
    function = partial(_against, _Chunks(case, chunk), gather)
    if case.passes == "backward" and reduction in ("max", "topk"):
        return _from_winners(case, function, whole)
    return call_of(function, case, whole=whole)


def _from_winners(case: Case, function: Callable[..., Tensor], whole: bool) -> Call:
    """Backward through the winners alone, which forward is taken to have kept."""
    if case.inputs.get("classes") is not None and case.inputs["classes"].shape[1] != 1:
        raise CannotRunError("written for one class")
    index = winners(case)  # [B,N,k]

    def value(query: Tensor, guide: Tensor, **_: Any) -> Tensor:
        q, g = (F.normalize(x.flatten(2), dim=1).transpose(1, 2) for x in (query, guide))
        maps = [
            (q[b][:, None] * g[b][index[b].flatten()].view(*index[b].shape, -1)).sum(2).mean(1)
            for b in range(len(q))
        ]
        return torch.stack(maps)[:, None].unflatten(2, tuple(query.shape[2:]))

    call = call_of(value, case, whole=whole)
    if not whole:
        return call

    def with_forward() -> Result:
        with torch.no_grad():
            function(**case.inputs)
        return call()

    return with_forward


def winners(case: Case) -> Tensor:
    """Index of the best guide pixels of each query pixel, [B,N,k]."""
    return _winners(tuple(case.inputs.items()))


@lru_cache(maxsize=1)  # the next chunk has the very same tensors
@torch.no_grad()
def _winners(items: tuple[tuple[str, Any], ...]) -> Tensor:
    inputs = dict(items)
    count = inputs.get("k", 8) if inputs.get("reduction") == "topk" else 1
    found: list[Tensor] = []

    def kernel(q: Tensor, g: Tensor, hidden: Hidden | None) -> Tensor:
        for a, e in _ranges(len(q), 512):
            scores = q[a:e] @ g.t()
            if hidden is not None:
                scores.masked_fill_(hidden(a, e), -torch.inf)
            found.append(scores.topk(count, 1).indices)
        return torch.zeros(len(q), dtype=q.dtype, device=q.device)

    _against(kernel, False, **inputs)
    return torch.cat(found).view(inputs["query"].shape[0], -1, count)


def _attention(case: Case, whole: bool, chunk: int) -> Call:
    """Scaled dot-product attention with the guide's unit vectors as values: its output times the query's."""
    if case.inputs.get("reduction") != "softmax":
        raise CannotRunError("attention is a softmax")
    temperature = case.inputs.get("temperature", 0.07)

    def kernel(q: Tensor, g: Tensor, hidden: Hidden | None) -> Tensor:
        mean = F.scaled_dot_product_attention(
            q[None, None], g[None, None], g[None, None], scale=1 / temperature
        )
        return (q * mean[0, 0]).sum(1)

    return call_of(partial(_against, kernel, True), case, whole=whole)


def _forward_only(case: Case, *reductions: str) -> str:
    reduction: str = case.inputs.get("reduction", "max")
    if case.passes != "forward":
        raise CannotRunError("has no backward pass")
    if reduction not in reductions:
        raise CannotRunError(f"does not do {reduction!r}")
    return reduction


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotRunError(f"{package} is not installed: pip install '.[bench]'") from error


def _faiss(case: Case, whole: bool, chunk: int) -> Call:
    """Exact search for inner products, the class gathered first."""
    reduction = _forward_only(case, "max", "topk")
    if case.dtype != torch.float32 or case.device != "cpu":
        raise CannotRunError("faiss-cpu searches float32 on the CPU")
    faiss = _module("faiss", "faiss-cpu")
    count = case.inputs.get("k", 8) if reduction == "topk" else 1

    def kernel(q: Tensor, g: Tensor, hidden: Hidden | None) -> Tensor:
        faiss.omp_set_num_threads(torch.get_num_threads())
        operands = (x.contiguous().numpy() for x in (q, g))
        value, _ = faiss.knn(*operands, count, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(value).mean(1)

    return call_of(partial(_against, kernel, True), case)


def _keops(case: Case, whole: bool, chunk: int) -> Call:
    """Lazy tensors, the class gathered first; tried on a few query pixels before."""
    reduction = _forward_only(case, "max", "topk", "softmax")
    if case.dtype != torch.float32:
        raise CannotRunError("KeOps computes in float32 here")
    lazy = _module("pykeops.torch", "pykeops").LazyTensor
    count, temperature = case.inputs.get("k", 8), case.inputs.get("temperature", 0.07)

    def kernel(q: Tensor, g: Tensor, hidden: Hidden | None) -> Tensor:
        cosine = lazy(q.contiguous()[:, None]) | lazy(g.contiguous()[None])
        if reduction == "max":
            return cosine.max(dim=1)[:, 0]
        if reduction == "topk":
            return (-cosine).Kmin(count, dim=1).neg().mean(1)
        return (cosine / temperature).sumsoftmaxweight(cosine, dim=1)[:, 0]

    function = partial(_against, kernel, True)
    query, labels = case.inputs["query"], case.inputs.get("query_labels")
    rows = max(1, _KEOPS_ROWS // query.shape[3])
    few: dict[str, Any] = {"query": query[:, :, :rows]}
    if labels is not None:
        few["query_labels"] = labels[:, : rows * labels.shape[1] // query.shape[2]]
    pairs = query.shape[2:].numel() * case.inputs["guide"].shape[2:].numel()
    part = query.shape[0] * pairs * rows / query.shape[2]
    if reduction not in _keops_rates:
        trial = call_of(function, case.with_inputs(**few))
        trial()
        needed = _needed_flops(case) / _all_pairs_flops(case)
        _keops_rates[reduction] = timed_s(trial) / (part * needed)
    estimate = _keops_rates[reduction] * pairs * query.shape[0] * _needed_flops(case) / _all_pairs_flops(case)
    if estimate > LIMIT_S:
        raise CannotRunError(
            f"a run would take about {estimate:.0f} s, judged by its rate on a few rows; the limit is"
            f" {LIMIT_S:g} s"
        )
    return call_of(function, case)


def timed_s(call: Call) -> float:
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@lru_cache(maxsize=1)
def _brgemm_library() -> ctypes.CDLL:
    """ATen's block GEMM is there for C++ only: a small library, compiled when first asked for."""
    source = Path(__file__).with_name("brgemm.cpp")
    torch_folder = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "g++")
    words = [
        *(compiler, "-O3", "-march=native", "-fopenmp", "-std=c++20", "-shared", "-fPIC"),
        *(f"-I{torch_folder / 'include'}", str(source)),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    key = hashlib.sha256((torch.__version__ + source.read_text() + str(words)).encode()).hexdigest()[:16]
    library = ROOT / "build" / "benchmarks" / f"brgemm-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}.part")
        try:
            done = subprocess.run([*words, "-o", str(part)], capture_output=True, text=True, check=False)
        except OSError as error:
            raise CannotRunError(f"brgemm needs a C++ compiler: {error}") from error
        if done.returncode:
            raise CannotRunError(f"brgemm does not compile: {(done.stderr.splitlines() or [''])[0][:160]}")
        part.replace(library)
    return ctypes.CDLL(str(library))


def _brgemm(case: Case, whole: bool, chunk: int) -> Call:
    """Blocks of `chunk` guide pixels by ATen's brgemm, and their row maximum; the class gathered first."""
    _forward_only(case, "max")
    if case.device != "cpu":
        raise CannotRunError("brgemm is for the CPU")
    if case.dtype not in (torch.float32, torch.bfloat16):
        raise CannotRunError("written for float32 and bfloat16")
    function = _brgemm_library()[f"row_max_{case.dtype_name}"]
    function.restype = ctypes.c_int

    def kernel(q: Tensor, g: Tensor, hidden: Hidden | None) -> Tensor:
        columns = g.t().contiguous()  # [C,m], as brgemm wants it
        rows, value = q.contiguous(), torch.empty(len(q))
        numbers = [ctypes.c_int64(n) for n in (len(q), len(g), q.shape[1], chunk, torch.get_num_threads())]
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (rows, columns, value)]
        if function(*numbers, *pointers):
            raise CannotRunError("pairs of channels are packed, and their number is odd")
        return value

    return call_of(partial(_against, kernel, True), case)


# Logits, maps and features at label resolution, some rows at a time.


class _Axes:
    """Upsampling axis by axis, of which each chunk of rows takes its part: by two products with matrices, or
    with the columns interpolated."""

    def __init__(self, x: Tensor, size: tuple[int, int], align_corners: bool, products: bool) -> None:
        self.width, self.align_corners, self.products = size[1], align_corners, products
        self.rows, self.columns = (
            F.interpolate(
                torch.eye(n, dtype=torch.float32)[None], m, mode="linear", align_corners=align_corners
            )[0].to(x)
            for n, m in zip(x.shape[-2:], size, strict=True)
        )  # [h,H], [w,W]

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The source rows that rows start..stop are made of."""
        used = self.rows[:, start:stop].ne(0).any(1).nonzero()[:, 0]
        return int(used[0]), int(used[-1]) + 1

    def up(self, part: Tensor, span: tuple[int, int], start: int, stop: int) -> Tensor:
        """[C,r,w] to [C,rows,W]."""
        part = part.to(self.columns)
        if self.products:
            wide = part @ self.columns
        else:
            size = (part.shape[1], self.width)
            wide = F.interpolate(part[None], size, mode="bilinear", align_corners=self.align_corners)[0]
        return self.rows[span[0] : span[1], start:stop].t() @ wide


def _by_rows(products: bool, case: Case, whole: bool, chunk: int) -> Call:
    """The naive expression on `chunk` rows of labels at a time, forward and at once backward."""
    name, inputs = case.operator.name, case.inputs
    if inputs.get("ohem_threshold") is not None:
        raise CannotRunError("OHEM needs the probabilities of all pixels at once")
    source_name = case.operator.features[0]
    source, labels, classes = inputs[source_name], inputs["labels"], inputs.get("classes")
    height, width = labels.shape[1:]
    # In bfloat16 maps would round to 1, where the loss is at its floor and its gradient is not.
    like = source.float() if name == "map_consistency" else source
    axes = _Axes(like, (height, width), name == "rectified_cross_entropy", products)
    maps = inputs.get("similarity") if name == "rectified_cross_entropy" else None
    map_axes = None if maps is None else _Axes(maps, (height, width), False, products)
    ignored = inputs.get("ignore_index", published.IGNORE_INDEX)
    per_pixel = inputs.get("reduction") == "none"
    start_from = cotangent(labels.float()) if per_pixel else None
    pool_grad = None
    if name == "masked_average_pool" and classes is not None:
        pool_grad = cotangent(torch.empty(*classes.shape, source.shape[1], device=source.device)).to(source)
    differentiated = case.passes != "forward" or whole

    def pixels(up: Tensor, b: int, a: int, e: int) -> Tensor:
        truth = labels[b : b + 1, a:e]
        of_image = None if classes is None else classes[b : b + 1]
        if name == "map_consistency":
            assert of_image is not None
            return naive.map_pixels(up[None], truth, of_image, ignored)[0]
        loss = F.cross_entropy(up[None], truth.long(), ignore_index=ignored, reduction="none")
        if maps is not None and map_axes is not None:
            span = map_axes.span(a, e)
            s = map_axes.up(maps[b, :, slice(*span)], span, a, e)[None]
            loss = loss * naive.weight_of(s, truth, of_image)
        return loss[0]

    def pooled(up: Tensor, b: int, a: int, e: int) -> Tensor:
        assert classes is not None
        mask = naive.one_hot(labels[b : b + 1, a:e], classes[b : b + 1])[0].to(up.dtype)
        return mask.flatten(1) @ up.flatten(1).t()  # [S,C]

    def run() -> Result:
        grad = torch.zeros_like(source) if differentiated else None
        total: Tensor = torch.zeros((), device=source.device)
        full = torch.empty(labels.shape, device=source.device) if per_pixel else None
        if name == "masked_average_pool":
            assert classes is not None
            area = naive.one_hot(labels, classes).sum((2, 3))[..., None] + 5e-4
            full = torch.zeros(*classes.shape, source.shape[1], device=source.device)
        for b in range(len(source)):
            for a, e in _ranges(height, chunk):
                span = axes.span(a, e)
                part = source[b, :, slice(*span)]
                if differentiated:
                    part = part.detach().requires_grad_()
                up = axes.up(part, span, a, e)
                if name == "masked_average_pool":
                    value = pooled(up, b, a, e)
                    assert full is not None
                    full[b] += value.detach()
                    if pool_grad is not None:
                        value = (value * (pool_grad[b] / area[b])).sum()
                else:
                    value = pixels(up, b, a, e)
                    if full is not None:
                        full[b, a:e] = value.detach()
                    if start_from is not None:
                        value = value * start_from[b, a:e]
                    value = value.sum()
                    total = total + value.detach()
                if grad is not None:
                    grad[b, :, slice(*span)] += torch.autograd.grad(value, part)[0]
        if name == "masked_average_pool":
            assert full is not None
            full = full / area
        if full is not None:
            if case.passes == "forward":
                return (full,)
            assert grad is not None
            return (full, grad) if whole else (grad,)
        count = labels.numel() if name == "rectified_cross_entropy" else labels.ne(ignored).sum().clamp(min=1)
        return (total / count,) if grad is None else (total / count, grad / count)

    def forward() -> Result:
        with torch.no_grad():
            return run()

    return run if differentiated else forward


def _predict_by_rows(products: bool, case: Case, whole: bool, chunk: int) -> Call:
    logits, labels = case.inputs["logits"], case.inputs["labels"]
    (height, width), classes = case.inputs["size"], logits.shape[1]
    axes = _Axes(logits, (height, width), True, products)
    ignored = case.inputs.get("ignore_index", published.IGNORE_INDEX)

    @torch.no_grad()
    def run() -> Result:
        best = torch.empty(labels.shape, dtype=torch.uint8, device=logits.device)
        confusion = torch.zeros(classes**2, dtype=torch.int64, device=logits.device)
        for b in range(len(logits)):
            for a, e in _ranges(height, chunk):
                span = axes.span(a, e)
                found = axes.up(logits[b, :, slice(*span)], span, a, e).argmax(0)
                best[b, a:e] = found
                truth = labels[b, a:e].long()
                pair = (truth * classes + found)[truth != ignored]
                confusion += torch.bincount(pair, minlength=classes**2)
        return best, confusion.view(classes, classes)

    return run


def _prototypes_by_pixels(case: Case, whole: bool, chunk: int) -> Call:
    query, prototypes = case.inputs["query"], case.inputs["prototypes"]
    start_from = cotangent(torch.empty(*prototypes.shape[:2], query.shape[2:].numel()).to(query))
    differentiated = case.passes != "forward" or whole

    def run() -> Result:
        shape = (*prototypes.shape[:2], query.shape[2:].numel())
        result = torch.empty(shape, dtype=query.dtype, device=query.device)
        grads = (torch.empty_like(query), torch.empty_like(prototypes)) if differentiated else None
        for b in range(len(query)):
            classes = prototypes[b]
            if differentiated:
                classes = classes.detach().requires_grad_()
            unit = F.normalize(classes, dim=1)
            grad_unit = torch.zeros_like(unit)
            for a, e in _ranges(shape[2], chunk):
                part = query[b].flatten(1)[:, a:e]
                against = unit
                if differentiated:
                    part, against = part.detach().requires_grad_(), unit.detach().requires_grad_()
                value = against @ F.normalize(part, dim=0)
                result[b, :, a:e] = value.detach()
                if grads is not None:
                    g_part, g_unit = torch.autograd.grad(value, (part, against), start_from[b, :, a:e])
                    grads[0][b].flatten(1)[:, a:e] = g_part
                    grad_unit += g_unit
            if grads is not None:
                (grads[1][b],) = torch.autograd.grad(unit, classes, grad_unit)
        output = result.unflatten(2, tuple(query.shape[2:]))
        if grads is None:
            return (output,)
        return (output, *grads) if whole else grads

    def forward() -> Result:
        with torch.no_grad():
            return run()

    return run if differentiated else forward


# The published arithmetic.


def _published(case: Case, whole: bool, chunk: int) -> Call:
    def pool(features: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        return published.prototype(features, labels, classes)[:, None]

    def similarity(query: Tensor, prototypes: Tensor) -> Tensor:
        return F.cosine_similarity(query, prototypes[:, 0, :, None, None], dim=1)[:, None]

    def consistency(similarity: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        up = F.interpolate(similarity, labels.shape[-2:], mode="bilinear", align_corners=False)
        return published.map_loss(up, labels, classes)

    def rectified(logits: Tensor, labels: Tensor, similarity: Tensor, classes: Tensor) -> Tensor:
        up = F.interpolate(similarity, labels.shape[-2:], mode="bilinear", align_corners=False)
        return published.rectified(logits, labels, up, classes)

    x = case.inputs
    slots = x["prototypes"].shape[1] if "prototypes" in x else x["classes"].shape[1] if "classes" in x else 0
    if slots != 1:
        raise CannotRunError("the published arithmetic compares exactly one class")
    if x.get("reduction", "mean") != "mean" or "ohem_threshold" in x:
        raise CannotRunError("the published loss is the mean over all pixels")
    functions: dict[str, Callable[..., Tensor]] = {
        "masked_average_pool": pool,
        "prototype_similarity": similarity,
        "map_consistency": consistency,
        "rectified_cross_entropy": rectified,
    }
    return call_of(functions[case.operator.name], case, whole=whole)


def _by_either(make: Callable[[bool, Case, bool, int], Call], *more: Rival) -> tuple[Rival, ...]:
    """Rows in chunks, upsampled either way: which is faster depends on dtype and size."""
    products = Rival("chunked_products", partial(make, True), ROW_CHUNKS, flops=_chunked_flops)
    return _plain(partial(make, False), ROW_CHUNKS, products, *more)


def _plain(
    chunked: Callable[[Case, bool, int], Call], chunks: tuple[int, ...], *more: Rival
) -> tuple[Rival, ...]:
    return (
        Rival("naive", _naive, flops=_all_pairs_flops, bytes=naive_bytes),
        Rival("chunked", chunked, chunks, flops=_chunked_flops),
        Rival("compile", _compiled, flops=_all_pairs_flops, bytes=naive_bytes),
        *more,
    )


_PUBLISHED = Rival("published", _published, flops=_all_pairs_flops, bytes=naive_bytes)
RIVALS: dict[str, tuple[Rival, ...]] = {
    "cross_similarity": _plain(
        partial(_cross_chunked, False),
        CROSS_CHUNKS,
        Rival("gathered", partial(_cross_chunked, True), CROSS_CHUNKS, flops=_needed_flops),
        Rival("softmax", _softmax_chunked, CROSS_CHUNKS, flops=_chunked_flops),
        Rival("attention", _attention, flops=_needed_flops),
        Rival("faiss", _faiss, flops=_needed_flops),
        Rival("keops", _keops, flops=_needed_flops),
        Rival("brgemm", _brgemm, (128, 512), flops=_needed_flops),
    ),
    "masked_average_pool": _by_either(_by_rows, _PUBLISHED),
    "prototype_similarity": _plain(_prototypes_by_pixels, PIXEL_CHUNKS, _PUBLISHED),
    "map_consistency": _by_either(_by_rows, _PUBLISHED),
    "rectified_cross_entropy": _by_either(_by_rows, _PUBLISHED),
    "predict": _by_either(_predict_by_rows),
}
