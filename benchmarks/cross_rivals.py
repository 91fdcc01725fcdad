"""What `cross_similarity` is measured against: chunks of pixels, attention, and libraries."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import subprocess
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import measure, naive
from benchmarks.cases import Call, CannotRunError, Case, Result, call_of
from benchmarks.machine import ROOT
from benchmarks.measure import LIMIT_S
from benchmarks.rival_counts import all_pairs_flops, needed_flops, ranges

_KEOPS_ROWS = 128  # query pixels that a run is judged by
_keops_rates: dict[str, float] = {}  # seconds a pair of pixels, by reduction
_HIDDEN = -1e4
"""A cosine that softmax sees as none at all, and that times 0 is 0."""

Hidden = Callable[[int, int], Tensor]  # mask of the guide pixels that rows a..e of the query may not see
Kernel = Callable[[Tensor, Tensor, Hidden | None], Tensor]  # query [n,C], guide [m,C], mask -> [n]


def against(
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
                for a, e in ranges(len(q), self.chunk)
            ]
            return torch.cat(parts)
        value = torch.empty(len(q), dtype=q.dtype, device=q.device)
        for a, e in ranges(len(q), self.chunk):
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


def softmax_chunked(case: Case, whole: bool, chunk: int) -> Call:
    forward_only(case, "softmax")
    return call_of(partial(against, _SoftmaxChunks(case, chunk), False), case, whole=whole)


_DEFAULTS: dict[str, Any] = {"reduction": "max", "k": 8, "temperature": 0.07}


def cross_chunked(gather: bool, case: Case, whole: bool, chunk: int) -> Call:
    if gather and case.workload.mode == "dense":
        raise CannotRunError("there is no class to gather: all guide pixels count")
    reduction = case.inputs.get("reduction", "max")
    gather = gather or reduction == "mean"
    function = partial(against, _Chunks(case, chunk), gather)
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
        for a, e in ranges(len(q), 512):
            scores = q[a:e] @ g.t()
            if hidden is not None:
                scores.masked_fill_(hidden(a, e), -torch.inf)
            found.append(scores.topk(count, 1).indices)
        return torch.zeros(len(q), dtype=q.dtype, device=q.device)

    against(kernel, False, **inputs)
    return torch.cat(found).view(inputs["query"].shape[0], -1, count)


def attention(case: Case, whole: bool, chunk: int) -> Call:
    """Scaled dot-product attention with the guide's unit vectors as values: its output times the query's."""
    if case.inputs.get("reduction") != "softmax":
        raise CannotRunError("attention is a softmax")
    temperature = case.inputs.get("temperature", 0.07)

    def kernel(q: Tensor, g: Tensor, hidden: Hidden | None) -> Tensor:
        q, g = q.contiguous(), g.contiguous()  # as the fused kernels want them
        mean = F.scaled_dot_product_attention(
            q[None, None], g[None, None], g[None, None], scale=1 / temperature
        )
        return (q * mean[0, 0]).sum(1)

    return call_of(partial(against, kernel, True), case, whole=whole)


def forward_only(case: Case, *reductions: str) -> str:
    """The case's reduction, one of these."""
    reduction: str = case.inputs.get("reduction", "max")
    if case.passes != "forward":
        raise CannotRunError("has no backward pass")
    if reduction not in reductions:
        raise CannotRunError(f"does not do {reduction!r}")
    return reduction


def module(name: str, package: str) -> Any:
    """What a rival is in."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotRunError(f"{package} is not installed") from error


def faiss(case: Case, whole: bool, chunk: int) -> Call:
    """Exact search for inner products, the class gathered first."""
    reduction = forward_only(case, "max", "topk")
    if case.dtype != torch.float32 or case.device != "cpu":
        raise CannotRunError("faiss-cpu searches float32 on the CPU")
    faiss = module("faiss", "faiss-cpu")
    count = case.inputs.get("k", 8) if reduction == "topk" else 1

    def kernel(q: Tensor, g: Tensor, hidden: Hidden | None) -> Tensor:
        faiss.omp_set_num_threads(torch.get_num_threads())
        operands = (x.contiguous().numpy() for x in (q, g))
        value, _ = faiss.knn(*operands, count, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(value).mean(1)

    return call_of(partial(against, kernel, True), case)


def keops(case: Case, whole: bool, chunk: int) -> Call:
    """Lazy tensors, the class gathered first; tried on a few query pixels before."""
    reduction = forward_only(case, "max", "topk", "softmax")
    if case.dtype != torch.float32:
        raise CannotRunError("KeOps computes in float32 here")
    lazy = module("pykeops.torch", "pykeops").LazyTensor
    count, temperature = case.inputs.get("k", 8), case.inputs.get("temperature", 0.07)

    def kernel(q: Tensor, g: Tensor, hidden: Hidden | None) -> Tensor:
        cosine = lazy(q.contiguous()[:, None]) | lazy(g.contiguous()[None])
        if reduction == "max":
            return cosine.max(dim=1)[:, 0]
        if reduction == "topk":
            return (-cosine).Kmin(count, dim=1).neg().mean(1)
        return (cosine / temperature).sumsoftmaxweight(cosine, dim=1)[:, 0]

    function = partial(against, kernel, True)
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
        needed = needed_flops(case) / all_pairs_flops(case)
        _keops_rates[reduction] = measure.timed_s(trial) / (part * needed)
    estimate = _keops_rates[reduction] * pairs * query.shape[0] * needed_flops(case) / all_pairs_flops(case)
    if estimate > LIMIT_S:
        raise CannotRunError(
            f"a run would take about {estimate:.0f} s, judged by its rate on a few rows; the limit is"
            f" {LIMIT_S:g} s"
        )
    return call_of(function, case)


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


def brgemm(case: Case, whole: bool, chunk: int) -> Call:
    """Blocks of `chunk` guide pixels by ATen's brgemm, and their row maximum; the class gathered first."""
    forward_only(case, "max")
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

    return call_of(partial(against, kernel, True), case)
