"""The parts of benchmarks.sweeps: what each measures, and what it is to reach."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import cases, measure, pixel_cases, rivals
from benchmarks.cases import Call, CannotRunError, Case, Result, implementation_call
from benchmarks.similarity import LabelPair

Row = dict[str, Any]
Make = Callable[[], Call]

MAX_TFLOPS, SOFTMAX_TFLOPS, TOPK_TFLOPS = 700.0, 620.0, 500.0
SHARE_OF_PRODUCTS = 0.88
MORE_MIB = 64.0
"""Memory beyond packed operands."""
SCREENED_TFLOPS = 1100.0
TIMES_OWN = 3.0
TIMES_LINEAR = 1.1
SHARE_SMALL = 0.6
TIMES_RIVAL = {"max": 1.15, "softmax": 1.3, "topk": 1.3}
DTYPES = ("float16", "bfloat16")
RATES = {"max": MAX_TFLOPS, "softmax": SOFTMAX_TFLOPS, "topk": TOPK_TFLOPS}
_ERROR, _ROUNDED_ERROR, _RIVAL_ERROR = 1e-5, 2e-4, 5e-3
"""Of a cosine: where nothing is rounded, of unit vectors rounded to 16 bits, and of a rival that normalises
in 16 bits and multiplies those."""
_RIVAL_LIMIT_S = 1.0
"""Longest run of a rival; it is left out where it takes longer."""
_ALL_PAIRS = ("naive", "compile")
"""Rivals that hold all pairs of pixels at once."""
_PLAIN = ("chunked",)
"""Timed as it is: some of its results are less exact in 16 bits than is asked of the others."""
_START_S = {"flex_attention": 30.0}
"""Seconds that compiling a rival may take."""
_TRIED = "?"
"""No variant's name; the library then lists those that it has."""


@dataclass(frozen=True)
class Sizes:
    """Rows and columns of features, and the side of the matrices."""

    full: tuple[int, int]
    linear: tuple[tuple[int, int], ...]
    small: tuple[tuple[int, int], ...]
    batch: int
    backward: tuple[tuple[int, int], ...]
    products: int


FULL = Sizes(
    full=(256, 512),
    linear=((64, 64), (128, 128), (256, 256)),
    small=((81, 81), (181, 181)),
    batch=16,
    backward=((128, 128), (256, 256)),
    products=8192,
)
QUICK = Sizes(
    full=(8, 16), linear=((4, 4), (8, 8)), small=((5, 5),), batch=2, backward=((4, 4), (6, 6)), products=64
)


class LeftOutError(Exception):
    """A part has nothing to measure here; the message is the reason."""


@dataclass(frozen=True)
class Bench:
    device: str
    quick: bool
    sizes: Sizes
    labels: Sequence[LabelPair] = ()
    """Of real scenes; without any, regions are made."""
    until: float = math.inf
    """When time is over, by `time.monotonic`; rivals are then left out but for PyTorch in chunks."""

    def dense(self, low: tuple[int, int] | None = None, dtype: str = "float16", **more: Any) -> Case:
        """With the index, as max has it in any case."""
        precision: torch.dtype = getattr(torch, dtype)
        case = pixel_cases.dense_case(low or self.sizes.full, precision, self.device, **more)
        return case.with_inputs(return_index=True) if case.inputs["reduction"] == "max" else case

    def replay(self, make: Make) -> Callable[[], Any]:
        """What is timed of the call that `make` gives."""
        return measure.captured(make) if self.device == "cuda" else make()

    def times(self, calls: Sequence[Callable[[], Any]]) -> list[list[float]]:
        return measure.times_in_turn(calls, device=self.device, quick=self.quick)


@dataclass(frozen=True)
class Ready:
    """A call that has been checked, as it is timed; `wrong` says in what its result is off."""

    dtype: str
    reduction: str
    shape: dict[str, int]
    operations: int
    call: Callable[[], Any]
    error: float | None = None
    wrong: str | None = None


@dataclass(frozen=True)
class Claim:
    """A target, and what was reached."""

    target: str
    reached: str
    met: bool


def at_least(value: float, limit: float, of: str) -> Claim:
    return Claim(f">= {limit:g} {of}", f"{value:.4g} {of}", value >= limit)


def at_most(value: float, limit: float, of: str) -> Claim:
    return Claim(f"<= {limit:g} {of}", f"{value:.4g} {of}", value <= limit)


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def tflops(one: Ready, times: Sequence[float]) -> float:
    return one.operations / (1e9 * statistics.median(times))


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Of medians."""
    return statistics.median(times) / statistics.median(others)


def row(
    bench: Bench,
    part: str,
    what: str,
    one: Ready,
    times: Sequence[float],
    claims: Sequence[Claim] = (),
    **more: Any,
) -> Row:
    """A row; a wrong result meets no target, and --quick judges nothing else."""
    judged: Row = {
        "target": "; ".join(claim.target for claim in claims if claim.target),
        "reached": "; ".join(claim.reached for claim in claims),
        "met": all(claim.met for claim in claims) if claims and not bench.quick else None,
    }
    if one.wrong:
        judged |= {"reached": one.wrong, "met": False}
    return {
        **{"part": part, "what": what, "reduction": one.reduction, "dtype": one.dtype, "shape": one.shape},
        "time_ms": _significant(statistics.median(times)),
        "time_min_ms": _significant(min(times)),
        "runs": len(times),
        "tflops": _significant(tflops(one, times)),
        "error": None if one.error is None else float(f"{one.error:.2g}"),
        **more,
        **judged,
    }


def _wrong(error: float, limit: float) -> str | None:
    return None if error <= limit else f"wrong: {error:.1e} off float64, {limit:g} is allowed"


def _same(call: Call) -> Call:
    return call


def ready(
    bench: Bench, case: Case, wrap: Callable[[Call], Call] = _same, limit: float = _ERROR, impl: str = "cpp"
) -> Ready:
    """The forward pass of a case; `wrap` sets what the call is to meet."""
    error = pixel_cases.error(case, wrap(implementation_call(case, impl))())
    call = bench.replay(lambda: wrap(implementation_call(case, impl)))
    operations = pixel_cases.operations(case)
    return Ready(
        *(case.dtype_name, case.inputs["reduction"], case.workload.shape, operations, call),
        error=error,
        wrong=_wrong(error, limit),
    )


def under(**values: str) -> Callable[[Call], Call]:
    """A call with these environment variables, which the library reads each time."""

    def wrap(call: Call) -> Call:
        def within() -> Result:
            with measure.environment(**values):
                return call()

        return within

    return wrap


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def at_precision(name: str) -> Callable[[Call], Call]:
    """A call with this precision of float32's products."""

    def wrap(call: Call) -> Call:
        def within() -> Result:
            with _precision(name):
                return call()

        return within

    return wrap


def matrices(bench: Bench, dtype: str) -> Ready:
    """The product of two matrices."""
    size = bench.sizes.products
    a, b = torch.randn(2, size, size, device=bench.device).to(getattr(torch, dtype)).unbind()
    out = torch.empty_like(a)

    def call() -> Result:
        return (torch.mm(a, b, out=out),)

    call()
    shape = {"N": size, "M": size, "C": size}
    return Ready(dtype, "", shape, 2 * size**3, bench.replay(lambda: call))


def extra_mib(bench: Bench, case: Case) -> float | None:
    """Memory of a call beyond inputs and outputs; only on a GPU, where it is counted by torch."""
    if bench.device != "cuda":
        return None
    return measure.peak_extra_mib(implementation_call(case, "cpp"), device="cuda")


def memory_limit_mib(case: Case) -> float:
    """Both sides in 16 bits, and 64 MiB."""
    sides = sum(case.inputs[name].numel() for name in ("query", "guide"))
    return 2 * sides / 2**20 + MORE_MIB


def products(bench: Bench) -> Iterator[Row]:
    found = [matrices(bench, dtype) for dtype in DTYPES]
    for one, times in zip(found, bench.times([one.call for one in found]), strict=True):
        yield row(bench, "products", f"torch.mm, {bench.sizes.products} cubed", one, times)


def dense(bench: Bench) -> Iterator[Row]:
    mms = {dtype: matrices(bench, dtype) for dtype in DTYPES}
    subjects = [bench.dense(dtype=dtype, reduction=reduction) for dtype in DTYPES for reduction in RATES]
    found = [ready(bench, case) for case in subjects]
    times = bench.times([one.call for one in (*mms.values(), *found)])
    of_mms = dict(zip(DTYPES, times, strict=False))
    for case, one, of_one in zip(subjects, found, times[len(mms) :], strict=True):
        of_products = tflops(mms[one.dtype], of_mms[one.dtype])
        rate = tflops(one, of_one)
        claims = [at_least(rate, RATES[one.reduction], "TFLOP/s")]
        if one.reduction == "max":
            claims.append(at_least(rate / of_products, SHARE_OF_PRODUCTS, "of products"))
        extra = extra_mib(bench, case)
        if extra is not None:
            claims.append(at_most(extra, memory_limit_mib(case), "MiB"))
        more = {"products_tflops": _significant(of_products), "extra_mib": extra}
        yield row(bench, "dense", one.reduction, one, of_one, claims, **more)


def highest(bench: Bench) -> Iterator[Row]:
    case = bench.dense(dtype="float32")
    limits = {"highest": _ERROR, "high": _ROUNDED_ERROR}
    found = [ready(bench, case, at_precision(name), limit) for name, limit in limits.items()]
    for name, one, times in zip(limits, found, bench.times([one.call for one in found]), strict=True):
        yield row(bench, "highest", f'max, precision "{name}"', one, times)


def variant_names(case: Case) -> list[str]:
    """The forms that the library has beside the usual ones, as it lists them; each begins with its
    reduction."""
    try:
        under(CISC_CROSS_VARIANT=_TRIED)(implementation_call(case, "cpp"))()
    except (RuntimeError, ValueError) as error:
        listed = re.search(r"CISC_CROSS_VARIANT must be one of ([\w, ]+), got", str(error))
        if listed is None:
            raise
        return listed[1].split(", ")
    return []


def variants(bench: Bench) -> Iterator[Row]:
    names = variant_names(bench.dense())
    if not names:
        raise LeftOutError("the sweep that runs here has no other forms")
    for reduction in RATES:
        case = bench.dense(reduction=reduction)
        of_this = [name for name in names if name.partition("_")[0] == reduction]
        found = [ready(bench, case)]
        found += [ready(bench, case, under(CISC_CROSS_VARIANT=name)) for name in of_this]
        times = bench.times([one.call for one in found])
        for name, one, of_one in zip([f"{reduction}, usual", *of_this], found, times, strict=True):
            yield row(bench, "variants", name, one, of_one, ratio=_significant(ratio(of_one, times[0])))


def screened(bench: Bench) -> Iterator[Row]:
    case = bench.dense()
    screen = under(CISC_CROSS_SCREEN="1")
    plain, one = ready(bench, case), ready(bench, case, screen)
    call = implementation_call(case, "cpp")
    alike = all(torch.equal(a, b) for a, b in zip(call(), screen(call)(), strict=True))
    if not alike:
        one = replace(one, wrong="wrong: not the result of the max that is not screened")
    of_plain, times = bench.times([plain.call, one.call])
    faster = ratio(of_plain, times)
    claims = [
        at_least(tflops(one, times), SCREENED_TFLOPS, "TFLOP/s in effect"),
        Claim("> 1 x dense", f"{faster:.4g} x dense", faster > 1),
    ]
    yield row(bench, "screened", "max, screened in int8", one, times, claims, ratio=_significant(faster))


def own(bench: Bench) -> Iterator[Row]:
    case = bench.dense()
    height, width = (4 * side for side in bench.sizes.full)
    made = tuple(pixel_cases.street_labels(height, width, seed) for seed in (43, 47))
    pairs = list(bench.labels) or [(made[0], made[1])]
    subjects = [pixel_cases.own_case(case, *pair) for pair in pairs]
    each = [ready(bench, subject) for subject in subjects]

    def all_pairs() -> None:
        for one in each:
            one.call()

    whole = ready(bench, case)
    of_dense, times = bench.times([whole.call, all_pairs])
    needed = sum(one.operator.cost(one.inputs, "forward").flops for one in subjects)
    compared = len(each) * whole.operations
    one = replace(
        each[0],
        operations=needed,
        call=all_pairs,
        error=max(one.error or 0.0 for one in each),
        wrong=next((one.wrong for one in each if one.wrong), None),
    )
    faster = len(each) / ratio(times, of_dense)
    more = {
        "ratio": _significant(faster),
        "pairs_of_maps": len(each),
        "share_of_pairs": _significant(needed / compared),
    }
    what = f"max, own labels of {'street scenes' if bench.labels else 'regions'}"
    yield row(bench, "own", what, one, times, [at_least(faster, TIMES_OWN, "x dense")], **more)


def linear(bench: Bench) -> Iterator[Row]:
    found = [ready(bench, bench.dense(low)) for low in (*bench.sizes.linear, bench.sizes.full)]
    times = bench.times([one.call for one in found])
    whole = statistics.median(times[-1]) / found[-1].operations
    for one, of_one in zip(found, times, strict=True):
        of_pair = statistics.median(of_one) / one.operations / whole
        claims = [] if one is found[-1] else [at_most(of_pair, TIMES_LINEAR, "x the time for a pair")]
        more = {"ratio": _significant(of_pair)}
        yield row(bench, "linear", f"max, {one.shape['N']} pixels", one, of_one, claims, **more)


def small(bench: Bench) -> Iterator[Row]:
    whole = ready(bench, bench.dense())
    found = [ready(bench, bench.dense(low, batch=bench.sizes.batch)) for low in bench.sizes.small]
    of_whole, *times = bench.times([whole.call, *(one.call for one in found)])
    for low, one, of_one in zip(bench.sizes.small, found, times, strict=True):
        share = tflops(one, of_one) / tflops(whole, of_whole)
        claims = [at_least(share, SHARE_SMALL, "of the full size's rate")]
        what = f"max, {low[0]} x {low[1]}, batch {bench.sizes.batch}"
        yield row(bench, "small", what, one, of_one, claims, ratio=_significant(share))


def backward(bench: Bench) -> Iterator[Row]:
    for number, low in enumerate(bench.sizes.backward):
        for reduction in ("softmax", "max", "topk"):
            case = replace(bench.dense(low, reduction=reduction), passes="backward")
            value, *gradients = pixel_cases.with_gradients(case, "cpp")()
            error = pixel_cases.error(case, (value,))
            wrong = _wrong(error, _ERROR)
            if number == 0:  # the larger size's reference takes seconds
                reference = pixel_cases.reference_gradients(case)[1:]
                wrong = wrong or cases.off(case, tuple(gradients), reference)
            operations = pixel_cases.operations(case) * (5 if reduction == "softmax" else 1)
            replay = bench.replay(lambda c=case: pixel_cases.with_gradients(c, "cpp"))  # type: ignore[misc]
            shape = case.workload.shape
            one = Ready(case.dtype_name, reduction, shape, operations, replay, error, wrong)
            (times,) = bench.times([one.call])
            what = f"{reduction} with gradients, {low[0] * low[1]} pixels"
            yield row(bench, "backward", what, one, times)


@dataclass(frozen=True)
class Rival:
    """That runs, and its chunk, if it has any."""

    name: str
    call: Call
    error: float
    chunk: int


def _admitted(bench: Bench, case: Case, make: Callable[[], tuple[Call, int]], name: str) -> Rival:
    """A rival with a result that is right and comes in time; `CannotRunError` otherwise."""
    try:
        call, chunk = make()
        result = call()
        begin = time.monotonic()
        call()
        if bench.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - begin
    except CannotRunError:
        raise
    except Exception as error:  # of any package: it is no finding about ours
        reason = (str(error).splitlines() or [""])[0][:160]
        raise CannotRunError(f"{type(error).__name__}: {reason}") from error
    off = pixel_cases.error(case.with_inputs(return_index=False), result)
    if off > _RIVAL_ERROR and name not in _PLAIN:
        raise CannotRunError(f"{off:.1e} off float64, {_RIVAL_ERROR:g} is allowed")
    if seconds > _RIVAL_LIMIT_S and name not in _PLAIN:
        raise CannotRunError(f"a run takes {seconds:.1f} s; the limit is {_RIVAL_LIMIT_S:g} s")
    return Rival(name, call, off, chunk)


def _triton(case: Case) -> tuple[Call, int]:
    if reasons := case.operator.obstacles("triton", case.device, case.dtype):
        raise CannotRunError("; ".join(reasons))
    return implementation_call(case, "triton"), 0


def _made(case: Case, rival: rivals.Rival) -> tuple[Call, int]:
    if rival.name in _ALL_PAIRS:
        raise CannotRunError("holds all pairs of pixels at once")
    rival.make(case, False, rival.chunks[0])  # refuses at once what it does not do
    chunk = rivals.best_chunk(case, rival)
    return rival.make(case, False, chunk), chunk


def admitted(bench: Bench, case: Case) -> tuple[list[Rival], dict[str, str]]:
    """The rivals that run here, and the reasons of the others."""
    makes: dict[str, Callable[[], tuple[Call, int]]] = {"triton": lambda: _triton(case)}
    for rival in rivals.RIVALS[pixel_cases.OP]:
        makes[rival.name] = lambda r=rival: _made(case, r)  # type: ignore[misc]
    found: list[Rival] = []
    left_out: dict[str, str] = {}
    for name, make in makes.items():
        try:
            if name not in _PLAIN and time.monotonic() + _START_S.get(name, 0.0) > bench.until:
                raise CannotRunError("no time left to try it")
            found.append(_admitted(bench, case, make, name))
        except CannotRunError as error:
            left_out[name] = str(error)
    return found, left_out


def against_rivals(bench: Bench) -> Iterator[Row]:
    for reduction, limit in TIMES_RIVAL.items():
        case = bench.dense(reduction=reduction)
        call = implementation_call(case, "cpp")
        error = pixel_cases.error(case, call())
        shape = case.workload.shape
        one = Ready(
            *("float16", reduction, shape, pixel_cases.operations(case), call, error, _wrong(error, _ERROR))
        )
        others, left_out = admitted(bench, case)
        if not others:
            raise RuntimeError(f"no rival ran: {left_out}")
        times, *of_others = bench.times([call, *(other.call for other in others)])
        best, of_best = min(zip(others, of_others, strict=True), key=lambda pair: statistics.median(pair[1]))
        faster = ratio(of_best, times)
        rival_ms = {
            other.name: statistics.median(of_other) for other, of_other in zip(others, of_others, strict=True)
        }
        claims = [at_least(faster, limit, "x the best rival"), Claim("", f"best {best.name}", True)]
        if best.name == "triton" and len(rival_ms) > 1:  # the package's own
            foreign = min((name for name in rival_ms if name != "triton"), key=lambda name: rival_ms[name])
            times_as_fast = rival_ms[foreign] / statistics.median(times)
            claims.append(Claim("", f"{times_as_fast:.4g} x {foreign}, best of the others", True))
        more = {
            "ratio": _significant(faster),
            "rival": best.name,
            "rival_ms": {name: _significant(ms) for name, ms in rival_ms.items()},
            "rival_chunk": {other.name: other.chunk for other in others if other.chunk},
            "rival_error": {other.name: float(f"{other.error:.2g}") for other in others},
            "rivals_left_out": left_out,
        }
        yield row(bench, "rivals", reduction, one, times, claims, **more)
        del others, of_others, best
        if bench.device == "cuda":
            torch.cuda.empty_cache()


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "products": products,
    "dense": dense,
    "highest": highest,
    "variants": variants,
    "screened": screened,
    "own": own,
    "linear": linear,
    "small": small,
    "backward": backward,
    "rivals": against_rivals,
}
"""In this order: rivals, whose failures are not ours, come last."""
