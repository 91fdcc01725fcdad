"""Runs a drawn case and judges it: values by the rule of numerics.py, wrong arguments by their error."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fuzzcases import NEAR
from fuzzdraw import Case
from fuzzpairs import EXACT_GAP, Cosines, cosines
from numerics import assert_close, assert_equal, assert_rounding
from opcases import as_dtype, cotangent, is_empty, reference, run, run_operator
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import naive
from benchmarks.published import IGNORE_INDEX
from cisc_ext.ops import _bilinear
from cisc_ext.ops.registry import OPERATORS

Results = dict[str, Tensor]


def judge(case: Case, impl: str) -> None:
    """Raise `AssertionError`, or whatever the operator raises against expectation."""
    {"value": _judge_values, "bad argument": _judge_error, "raw": _call_raw}[case.kind](case, impl)


def describe(inputs: dict[str, Any]) -> str:
    """Arguments with dtype, shape, strides and offset."""
    words = []
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            offset = f" from {value.storage_offset()}" if value.storage_offset() else ""
            words.append(f"{name}: {dtype} {tuple(value.shape)} strides {value.stride()}{offset}")
        else:
            words.append(f"{name}={value!r}")
    return "; ".join(words)


def _judge_values(case: Case, impl: str) -> None:
    operator = OPERATORS[case.operator]
    torch.set_num_threads(case.threads)
    got = run_operator(operator, case.inputs, impl)
    again = run_operator(operator, case.inputs | case.more, impl)
    with torch.no_grad():
        quiet = operator.function(**case.inputs, impl=impl)
    torch.set_num_threads(1)
    for name, value in got.items():
        assert_equal(again[name], value, what=f"{name} of a second run")
    first = quiet[0] if isinstance(quiet, tuple) else quiet
    assert_equal(first, got["output0"], what="output without gradient")
    for name, value in got.items():
        if name.startswith("grad_"):
            assert value.dtype == case.inputs[name.removeprefix("grad_")].dtype, name
    empty = ("logits", "labels") if case.operator == "rectified_cross_entropy" else case.inputs.keys()
    if is_empty({name: case.inputs[name] for name in empty}):
        for name, value in reference(operator, case.inputs).items():
            assert_close(got[name], value, 0, what=name)
    else:
        RULES[case.operator](case, again)


def _clean(inputs: dict[str, Any]) -> dict[str, Any]:
    """Without what is not finite: no finite result may depend on it."""
    return {
        name: value.nan_to_num(0, 0, 0) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _compare(got: Results, want: Results, plain: Results, magnitudes: Results) -> None:
    """The rule of numerics.py, `magnitudes` being the sizes of all that is rounded on the way.

    Where the result is beyond what its dtype holds, it must be beyond, or the largest.
    """
    for name, value in got.items():
        truth, limits = want[name], torch.finfo(value.dtype)
        beyond = truth.isfinite() & (truth.abs() > 0.99 * limits.max)
        size = magnitudes[name].expand_as(truth) + limits.smallest_normal  # its rounding: the least subnormal
        if bool(beyond.any()):
            assert bool((value[beyond].double() * truth[beyond].sign() >= 0.98 * limits.max).all()), (
                f"{name}: overflow"
            )
            value, truth, size = (torch.where(beyond, 0, part) for part in (value, truth, size))
        assert_rounding(value, truth, plain[name].to(value.dtype), size, what=name)


def _adjoint(weights: Tensor, h: int, w: int, align_corners: bool) -> Tensor:
    """What [B,S,H,W] sends back through upsampling to [B,S,h,w]."""
    source = torch.zeros(*weights.shape[:2], h, w, dtype=weights.dtype, requires_grad=True)
    naive.upsample(source, (weights.shape[2], weights.shape[3]), align_corners).backward(weights)
    assert source.grad is not None
    return source.grad


def _pool(case: Case, got: Results) -> None:
    operator = OPERATORS[case.operator]
    inputs = _clean(case.inputs)
    exact = as_dtype(inputs, torch.float64)
    leaf = exact["features"].abs().requires_grad_()
    output = naive.masked_average_pool(**exact | {"features": leaf})
    output.backward(cotangent(output).abs())
    assert leaf.grad is not None
    plain = run(naive.masked_average_pool, as_dtype(inputs, torch.float32), operator.differentiable)
    magnitudes = {"output0": output.detach(), "grad_features": leaf.grad}
    _compare(got, reference(operator, case.inputs), plain, magnitudes)


def _prototypes(case: Case, got: Results) -> None:
    operator = OPERATORS[case.operator]
    inputs = _clean(case.inputs)
    plain = run(naive.prototype_similarity, as_dtype(inputs, torch.float32), operator.differentiable)
    exact = as_dtype(inputs, torch.float64)
    query, prototypes, eps = exact["query"].flatten(2).abs(), exact["prototypes"].abs(), exact["eps"]

    def inverse(value: Tensor, dim: int) -> Tensor:
        norm = torch.linalg.vector_norm(value, dim=dim, keepdim=True)
        return torch.where(norm < eps, 0.0, 1 / norm)

    over_query, over_prototypes = inverse(query, 1), inverse(prototypes, 2)
    query, prototypes = query * over_query, prototypes * over_prototypes
    cosine = prototypes @ query  # [B,S,n]
    grad = cotangent(got["output0"]).double().flatten(2).abs()
    to_query = prototypes.mT @ grad + (grad * cosine).sum(1, keepdim=True) * query
    to_prototypes = grad @ query.mT + (grad * cosine).sum(2, keepdim=True) * prototypes
    magnitudes = {
        "output0": cosine.view_as(got["output0"]),
        "grad_query": (to_query * over_query).view(inputs["query"].shape),
        "grad_prototypes": to_prototypes * over_prototypes,
    }
    _compare(got, reference(operator, case.inputs), plain, magnitudes)


def _cross(case: Case, got: Results) -> None:
    """Of "max" and "topk", the gradient follows the winners: those chosen, and those that are certain."""
    inputs = _clean(case.inputs)
    pairs = cosines(inputs)
    dirty = as_dtype(case.inputs, torch.float64)
    tensors = [dirty.get(name) for name in ("query", "guide", "guide_labels", "classes", "query_labels")]
    settings = [dirty[name] for name in ("reduction", "k", "temperature", "ignore_index", "eps")]
    kernels = torch.ops.cisc_ext
    similarity, index, saved = kernels.cross_similarity_reference(*tensors, *settings, True)
    if "output1" in got:
        _judge_index(got["output1"], index, similarity.isnan(), pairs)
    winners: Tensor | None = {"max": got.get("output1"), "topk": saved}.get(inputs["reduction"])
    if inputs["reduction"] == "max":
        assert winners is not None
        best, index, winners = index, winners, winners[..., None]
    grad = cotangent(got["output0"])
    grads = kernels.cross_similarity_reference_backward(
        grad.double(), similarity, index, saved, *tensors, *settings, True, True
    )
    want = {"output0": similarity, "grad_query": grads[0], "grad_guide": grads[1]}
    plain = run(naive.cross_similarity, as_dtype(inputs, torch.float32), ("query", "guide"))
    if winners is not None:
        single = {name: inputs[name].float() for name in ("query", "guide")} | {"eps": inputs["eps"]}
        plain |= {
            name: value
            for name, value in run(partial(_mean_of, winners), single, ("query", "guide")).items()
            if name.startswith("grad_")
        }
    sizes = _cross_sizes(inputs, pairs, winners, grad.double().abs().flatten(2))
    if inputs["reduction"] == "max":  # of two that are equal within rounding, either may be rounded the more
        place = best.clamp(min=0).flatten(2)[..., None]
        rounded = pairs.size[:, None].expand(-1, place.shape[1], -1, -1).gather(3, place).view_as(best)
        sizes["output0"] = torch.maximum(sizes["output0"], torch.where(best >= 0, rounded, 0))
    _compare({name: got[name] for name in want if name in got}, want, plain, sizes)


def _mean_of(winners: Tensor, query: Tensor, guide: Tensor, eps: float) -> Tensor:
    """Mean cosine with the guide pixels `winners` [B,S,h,w,k], of which -1 is none."""
    units, others = naive.unit(query, 1, eps).flatten(2), naive.unit(guide, 1, eps).flatten(2)
    found = winners >= 0
    place = winners.clamp(min=0).flatten(1)[:, None].expand(-1, units.shape[1], -1)
    best = others.gather(2, place).unflatten(2, winners.flatten(2, 3).shape[1:])  # [B,C,S,n,k]
    cosine = (units[:, :, None, :, None] * best).sum(1).view(winners.shape)
    return torch.where(found, cosine, 0).sum(-1) / found.sum(-1).clamp(min=1)


def _judge_index(got: Tensor, want: Tensor, spoilt: Tensor, pairs: Cosines) -> None:
    """The lowest of those tied exactly; of those that are equal within rounding, any.

    `want` is the reference's: it must be met where there is no guide pixel, or a cosine that is NaN.
    """
    chosen = got.flatten(2)[..., None]  # [B,S,n,1]
    shape = (*chosen.shape[:3], pairs.value.shape[2])
    pixel = torch.arange(shape[3])
    member = pairs.member.expand(shape)
    certain = (want < 0) | spoilt
    assert got.dtype == torch.int64 and got.shape == want.shape
    assert_equal(torch.where(certain, got, 0), torch.where(certain, want, 0), what="index of none, or of NaN")
    known = ~certain.flatten(2)
    inside = (chosen >= 0) & (chosen < shape[3])
    chosen = torch.where(inside, chosen, 0)
    value, limit, exact = (part[:, None].expand(shape) for part in (pairs.value, pairs.limit, pairs.exact))
    same = pairs.same[:, None, None].expand(shape)
    mine = value.gather(3, chosen)
    best = value.masked_fill(~member, -torch.inf).max(-1, keepdim=True)
    far = best.values - mine > limit.gather(3, chosen) + limit.gather(3, best.indices)
    lower = member & (pixel < chosen)
    repeated = lower & (same == same.gather(3, chosen))
    better = (value > mine + EXACT_GAP) & member | (value > mine - EXACT_GAP) & lower
    beaten = better & exact & exact.gather(3, chosen)
    for what, wrong in (
        ("no pixel of the class", ~inside | ~member.gather(3, chosen)),
        ("a cosine below the best", far),
        ("not the first of equal pixels", repeated.any(-1, keepdim=True)),
        ("not the first or best where nothing is rounded", beaten.any(-1, keepdim=True)),
    ):
        wrong = wrong[..., 0] & known
        if bool(wrong.any()):
            place = tuple(int(i) for i in wrong.nonzero()[0])
            raise AssertionError(
                f"index {int(got.flatten(2)[place])} at {place} ({int(wrong.sum())} of {wrong.numel()}): "
                f"{what}; expected {int(want.flatten(2)[place])}, cosines {float(mine[place])!r} and "
                f"{float(best.values[place])!r}"
            )


def _cross_sizes(inputs: dict[str, Any], pairs: Cosines, winners: Tensor | None, grad: Tensor) -> Results:
    """Sizes of what cross_similarity rounds: of each pair's share in the result and in the gradients, given
    |grad| [B,S,n]."""
    value, size, member = pairs.value[:, None], pairs.size[:, None], pairs.member
    count = member.sum(-1, keepdim=True)
    if winners is not None:
        shape = (*grad.shape, value.shape[3] + 1)
        chosen = winners.flatten(2, 3)
        count = (chosen >= 0).sum(-1, keepdim=True)
        # One more place takes what is none.
        places = torch.where(chosen < 0, shape[3] - 1, chosen)
        member = torch.zeros(shape, dtype=torch.bool).scatter_(3, places, True)[..., :-1]
    weight = torch.where(member, 1 / count.clamp(min=1), 0.0).double()  # [B,S,n,m] or [B,S,1,m]
    slope = weight
    similarity = (weight * size).sum(-1)
    if inputs["reduction"] == "softmax":
        exponent = (value / inputs["temperature"]).masked_fill(~member, -torch.inf)
        log = exponent - exponent.logsumexp(-1, keepdim=True).nan_to_num(0, 0, 0)
        weight = log.exp()
        mean = torch.where(member, weight * value, 0).sum(-1, keepdim=True)
        # A probability's logarithm is rounded, and so is the cosine in it, divided by the temperature.
        rounded = 1 + torch.where(member, -log, 0) + size / inputs["temperature"]
        gap = (value - mean).abs()
        similarity = (weight * (size + gap * rounded)).sum(-1)
        mean_size = (weight * size).sum(-1, keepdim=True)
        slope = weight * (
            (1 + gap / inputs["temperature"]) * rounded + (size + mean_size) / inputs["temperature"]
        )
    total = (grad[..., None] * slope).sum(1)  # [B,n,m]
    sizes = {"output0": similarity.expand_as(grad).unflatten(2, inputs["query"].shape[2:])}
    sides = {"query": total, "guide": total.mT}
    units = {name: naive.unit(inputs[name].double().abs().flatten(2), 1, inputs["eps"]) for name in sides}
    for (name, weights), other in zip(sides.items(), ("guide", "query"), strict=True):
        back = units[other] @ weights.mT
        norm = torch.linalg.vector_norm(inputs[name].double().flatten(2), dim=1, keepdim=True)
        through = back + (back * units[name]).sum(1, keepdim=True) * units[name]
        sizes[f"grad_{name}"] = torch.where(norm < inputs["eps"], 0.0, through / norm).view(
            inputs[name].shape
        )
    return sizes


def _naive_consistency(similarity: Tensor, labels: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """The naive expression with the rule for gradients outside the open interval, in which torch differs."""
    up = naive.upsample(similarity, (labels.shape[1], labels.shape[2]), False)
    p = torch.where((up > 0) & (up < 1), up, up.detach()).clamp(0, 1)
    loss = torch.nn.functional.binary_cross_entropy(p, naive.one_hot(labels, classes).to(p), reduction="none")
    valid = (classes >= 0)[..., None, None]
    pixel = torch.where(valid, loss, 0).sum(1) / valid.sum(1).clamp(min=1)
    kept = labels.long() != ignore_index
    return torch.where(kept, pixel, 0).sum() / kept.sum().clamp(min=1)


def consistency_sizes(
    similarity: Tensor, labels: Tensor, classes: Tensor, ignore_index: int = IGNORE_INDEX
) -> Results:
    """Sizes of what map_consistency rounds on the way to the loss and to each element of its gradient, from
    float64 maps."""
    size = (labels.shape[1], labels.shape[2])
    up, rounded = naive.upsample(similarity, size, False), naive.upsample(similarity.abs(), size, False)
    positive = naive.one_hot(labels, classes)
    probability = torch.where(positive, up, 1 - up)
    kept = (labels.long() != ignore_index)[:, None]
    valid = (classes >= 0)[..., None, None]
    share = (kept & valid) / valid.sum(1, keepdim=True).clamp(min=1) / kept.sum().clamp(min=1)  # [B,S,H,W]
    inside = (up > 0) & (up < 1)
    # A rounding of the map, relative to the probability, is one of the log, and again one of the slope.
    relative = torch.where(inside, (rounded + ~positive) / probability, 0)
    log = -probability.clamp(0, 1).log().clamp(min=-100)
    slope = torch.where(inside, share / probability * (1 + relative), 0)
    return {
        "output0": (share * (log + relative)).sum(),
        "grad_similarity": _adjoint(slope, similarity.shape[2], similarity.shape[3], False),
    }


def _consistency(case: Case, got: Results) -> None:
    operator = OPERATORS[case.operator]
    inputs = _clean(case.inputs)
    plain = run(_naive_consistency, as_dtype(inputs, torch.float32), operator.differentiable)
    sizes = consistency_sizes(**as_dtype(inputs, torch.float64))
    _compare(got, reference(operator, case.inputs), plain, sizes)


def _cross_entropy(case: Case, got: Results) -> None:
    operator = OPERATORS[case.operator]
    dirty = dict(case.inputs)
    if case.kept is not None:
        # What hard pixels drop counts as ignored.
        dirty["labels"] = torch.where(case.kept, dirty["labels"].long(), dirty["ignore_index"])
        del dirty["ohem_threshold"], dirty["ohem_min_kept"]
    else:
        dirty.pop("ohem_threshold", None)
    if is_empty({"similarity": dirty.get("similarity")}):  # no maps, weight 1
        del dirty["similarity"], dirty["classes"]
    inputs = _clean(dirty)
    plain = run(naive.rectified_cross_entropy, as_dtype(inputs, torch.float32), operator.differentiable)
    exact = as_dtype(inputs, torch.float64)
    logits, labels, maps, classes = (exact.get(key) for key in ("logits", "labels", "similarity", "classes"))
    assert logits is not None and labels is not None
    size = (labels.shape[1], labels.shape[2])
    kept = labels.long() != exact["ignore_index"]
    own = torch.where(kept, labels.long(), 0)[:, None]
    up = naive.upsample(logits, size, True)
    largest = naive.upsample(logits.abs(), size, True).amax(1)
    weight = torch.as_tensor(naive.weight(labels, maps, classes), dtype=torch.float64)
    weight_size = weight
    if maps is not None:
        rounded = naive.upsample(maps.abs(), size, False).clamp(max=1e30)
        if classes is not None:
            valid = (classes >= 0)[..., None, None]
            gap_size = torch.where(valid, 1 + rounded, 0).sum(1) / valid.sum(1).clamp(min=1)
            weight_size = 1 + gap_size
        else:
            weight_size = rounded[:, 0]
    probability = up.softmax(1)
    target = torch.zeros_like(up).scatter_(1, own, 1)
    loss = -up.log_softmax(1).gather(1, own)[:, 0]
    pixel = torch.where(
        kept, weight * (2 * largest + torch.tensor(up.shape[1]).log()) + weight_size * loss, 0
    )
    slope = (probability + target) * (weight * (1 + 2 * largest))[:, None]
    slope = torch.where(
        kept[:, None], slope + (probability - target).abs() * weight_size.expand_as(loss)[:, None], 0
    )
    reduction = exact.get("reduction", "mean")
    divisor = {"mean": labels.numel(), "valid_mean": max(int(kept.sum()), 1)}.get(reduction, 1)
    if reduction == "none":
        slope = slope * cotangent(got["output0"]).double().abs()[:, None]
    else:
        pixel = pixel.sum()
    magnitudes = {
        "output0": pixel / divisor,
        "grad_logits": _adjoint(slope / divisor, logits.shape[2], logits.shape[3], True),
    }
    _compare(got, reference(operator, dirty), plain, magnitudes)


def _predict(case: Case, got: Results) -> None:
    """The class is the reference's, or one whose logit is as large within rounding; the counts fit it."""
    logits, (height, width) = case.inputs["logits"].double(), case.inputs["size"]
    up = _bilinear.upsample_rows(logits, (height, width), True, 0, height, torch.float64)
    classes = got["output0"]
    assert classes.dtype == torch.uint8
    want = up.argmax(1)
    near = 0.0 if case.exact else NEAR * float(logits.nan_to_num(0, 0, 0).abs().max())
    best, taken = (
        up.gather(1, index[:, None].long()) for index in (want, classes.clamp(max=up.shape[1] - 1))
    )
    close = (best - taken <= near) & best.isfinite() & (near > 0)
    wrong = (classes != want) & ~close[:, 0]
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"class {int(classes[place])} at {place}, expected {int(want[place])}: logits "
            f"{float(taken[:, 0][place])!r} and {float(best[:, 0][place])!r}"
        )
    labels = case.inputs.get("labels")
    assert ("output1" in got) == (labels is not None)
    if labels is not None:
        counted = labels.long() != case.inputs["ignore_index"]
        pair = labels.long()[counted] * up.shape[1] + classes.long()[counted]
        confusion = torch.bincount(pair, minlength=up.shape[1] ** 2).view(up.shape[1], up.shape[1])
        assert_equal(got["output1"], confusion, what="confusion")


RULES: dict[str, Callable[[Case, Results], None]] = {
    "masked_average_pool": _pool,
    "prototype_similarity": _prototypes,
    "cross_similarity": _cross,
    "map_consistency": _consistency,
    "rectified_cross_entropy": _cross_entropy,
    "predict": _predict,
}


def _judge_error(case: Case, impl: str) -> None:
    operator = OPERATORS[case.operator]
    inputs = {"impl": impl} | case.inputs
    if case.seed % 2:
        for name in operator.differentiable:
            value = inputs[name]
            if isinstance(value, Tensor) and value.is_floating_point():
                inputs[name] = value.detach().requires_grad_()
    try:
        operator.function(**inputs)
    except Exception as error:
        assert type(error) is case.error, f"{type(error).__name__} instead of {case.error}: {error}"
        assert str(error).startswith(f"{case.operator}: ") and "\n" not in str(error), f"message: {error}"
        return
    raise AssertionError(f"no error with wrong {case.what}")


class _Recorder(TorchDispatchMode):
    """Keeps the calls of this package's compiled operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cisc_ext" and func._schema.name not in OPDEFS:
            self.calls.append((func, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


_DTYPES = 3 * [torch.float32, torch.bfloat16, torch.float16] + [torch.uint8, torch.int32, torch.int64]
_DTYPES += [torch.float64, torch.bool, torch.int16, torch.complex64, torch.int8]
_INTS = (-1, 0, 1, 2, 7, 64, 2**31, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63))
_NUMBERS = (float("nan"), float("inf"), -1.0, 0.0, 5e-324)


def _call_raw(case: Case, impl: str) -> None:
    """The operators below the public function, with arguments that do not fit: only C++ checks are left.

    They may refuse or compute; what they must not is read or write elsewhere, which a sanitizer notices.
    """
    if impl != "cpp":
        return
    with _Recorder() as recorder:
        run_operator(OPERATORS[case.operator], case.inputs, impl)
    assert recorder.calls, "no compiled operator was called"
    draw = random.Random(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    for func, given in recorder.calls:
        for _ in range(3):
            arguments = list(given)
            for place in draw.sample(range(len(arguments)), draw.choice((1, 1, 2, 3))):
                arguments[place] = _odd(draw, generator, arguments[place], given)
            case.what = f"{func}({describe({str(i): a for i, a in enumerate(arguments)})})"
            with contextlib.suppress(Exception):
                func(*arguments)


def _odd(draw: random.Random, generator: torch.Generator, value: Any, given: tuple[Any, ...]) -> Any:
    """Something else in place of an argument."""
    if isinstance(value, Tensor):
        return _odd_tensor(draw, generator, value, [one for one in given if isinstance(one, Tensor)])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((*_INTS, value + 1, value - 1))
    if isinstance(value, float):
        return draw.choice((*_NUMBERS, 1e308))
    if isinstance(value, str):
        return draw.choice(
            ("", "mean", "none", "sum", "valid_mean", "max", "topk", "softmax", "\x00", "x" * 1000)
        )
    if isinstance(value, torch.dtype):
        return draw.choice(_DTYPES)
    return draw.choice((None, 0.5, 3, draw.choice([one for one in given if isinstance(one, Tensor)])))


def _odd_tensor(
    draw: random.Random, generator: torch.Generator, value: Tensor, others: list[Tensor]
) -> Tensor | None:
    """Of another shape, rank, dtype or device, with other values, another argument, or none."""
    kind = draw.choice(
        ("shape", "shape", "shape", "rank", "dtype", "values", "values", "other", "empty", "meta", "none")
    )
    if kind == "none":
        return None
    if kind == "rank":
        return value[0] if value.dim() and len(value) and draw.random() < 0.5 else value[None]
    if kind == "dtype":
        return value.to(draw.choice(_DTYPES))
    if kind == "other":
        return draw.choice(others)
    if kind == "empty":
        return value.new_empty(0)
    if kind == "meta":
        return value.to("meta")
    if kind == "shape":
        shape = [
            n if draw.random() < 0.5 else draw.choice((0, 1, n + 1, max(n - 1, 0), 2 * n, 40))
            for n in value.shape
        ]
        shape = shape if torch.Size(shape).numel() < 10**6 else list(value.shape)
        return value.new_zeros(shape)
    if value.is_floating_point():
        return torch.full_like(value, draw.choice(_NUMBERS))
    limits = torch.iinfo(value.dtype)
    strange = [
        n for n in (-1, -2, 0, 1, 255, 256, 65536, limits.min, limits.max) if limits.min <= n <= limits.max
    ]
    chosen = torch.tensor(strange, dtype=value.dtype)[
        torch.randint(len(strange), value.shape, generator=generator)
    ]
    return torch.where(
        torch.rand(value.shape, generator=generator) < draw.choice((0.01, 0.3, 1.0)), chosen, value
    )
