"""Calls of the operators drawn at random, each a pure function of its seed.

A case whose result hangs on a rounding (a probability beside the threshold of hard pixels, a map beside 0 or
1, a norm beside eps) is moved away from there before it is run: tolerances stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fuzzdraw import (
    FEATURE_KINDS,
    IGNORED,
    INF,
    NAN,
    SINGLE,
    Case,
    Draw,
    apart_from,
    convert,
    draw_classes,
    draw_features,
    draw_labels,
    fits,
    lay_out,
    spoil,
)
from fuzzpairs import cross_similarity, wrong_pairs
from torch import Tensor

from benchmarks import naive

NEAR = 8 * SINGLE
"""Of the magnitude of what is rounded: closer to a border than this, two right results may differ."""


def dyadic(n: int, m: int, align_corners: bool) -> bool:
    """All weights that bring n pixels to m are multiples of 1/16: single precision holds them exactly."""
    if n == m or n == 1 or (m == 1 and align_corners):
        return True
    small, large = (n - 1, m - 1) if align_corners else (n, m)
    return any(small * 2**k == large for k in range(4))


def _masked_average_pool(draw: Draw) -> Case:
    kind = draw.one(*FEATURE_KINDS)
    channels = 0 if draw.chance(0.02) else draw.one(1, 2, 3, 5, 16, draw.size())
    batch, h, w, height, width = draw.grids(False, channels)
    upper = draw.one(1, 2, 5, 21, 300)
    inputs = {
        "features": convert(draw, draw_features(draw, kind, batch, channels, h, w)),
        "labels": draw_labels(draw, (batch, height, width), upper, None, odd=True),
        "classes": draw_classes(draw, batch, draw.slots(), upper, limited=False),
        "eps": draw.one(5e-4, 5e-4, 1e-8, 0.5, 1, 1000.0),
    }
    return Case(0, "masked_average_pool", "value", kind, inputs, finite=kind != "not finite")


def _prototype_similarity(draw: Draw) -> Case:
    kind = draw.one(*FEATURE_KINDS)
    channels = 0 if draw.chance(0.02) else draw.one(1, 2, 3, 5, 16, 64, draw.size(), 256)
    batch, h, w, _, _ = draw.grids(False, channels)
    if draw.chance(0.03):
        h, w = draw.one((0, w), (h, 0))
    slots = draw.slots()
    query, prototypes = (
        convert(draw, draw_features(draw, kind, *shape, huge=1e15))
        for shape in ((batch, channels, h, w), (batch, slots, channels))
    )
    if kind == "tiny":  # squares of less than this vanish in single precision
        query, prototypes = (
            torch.where(value.double().norm(dim=dim, keepdim=True) < 1e-9, 0, value)
            for value, dim in ((query, 1), (prototypes, 2))
        )
    for value, dim in ((query, 1), (prototypes, 2)):
        if draw.chance(0.2) and value.numel():
            value.movedim(dim, -1)[draw.uniform(*value.movedim(dim, -1).shape[:-1]) < 0.3] = 0
    eps = draw.one(1e-8, 1e-8, 1e-8, 1e-3, 0.5, 1, 10.0)
    norms = torch.cat([query.double().norm(dim=1).flatten(), prototypes.double().norm(dim=2).flatten()])
    while not apart_from(norms, eps):
        eps *= 1.01
    inputs = {"query": query, "prototypes": prototypes, "eps": eps}
    return Case(0, "prototype_similarity", "value", kind, inputs, finite=kind != "not finite")


MAP_KINDS = ("uniform",) * 3 + ("around", "around", "quarters", "quarters", "constant", "tiny", "not finite")


def _maps(draw: Draw, kind: str, *shape: int) -> Tensor:
    if kind == "around":
        return draw.normal(*shape) * draw.one(0.2, 0.5, 3.0) + 0.4
    if kind == "quarters":
        return draw.integers(-2, 7, *shape) / 4
    if kind == "constant":
        return torch.full(shape, draw.one(0.0, 0.25, 1.0, -1.0, 2.0))
    if kind == "tiny":
        return draw.uniform(*shape) * draw.one(1e-3, 1e-6, 1e-12, 1e-30)
    value = draw.uniform(*shape)
    return spoil(draw, value, (NAN, NAN, INF, -INF)) if kind == "not finite" else value


def _map_consistency(draw: Draw) -> Case:
    kind = draw.one(*MAP_KINDS)
    slots = draw.slots()
    batch, h, w, height, width = draw.grids(False, slots)
    upper = draw.one(1, 2, 5, 21, 300)
    ignore_index = draw.one(*IGNORED)
    similarity = convert(draw, _maps(draw, kind, batch, slots, h, w))
    labels = draw_labels(draw, (batch, height, width), upper, ignore_index, odd=True)
    classes = draw_classes(draw, batch, slots, upper, limited=False)
    exact = dyadic(h, height, False) and dyadic(w, width, False) and kind in ("quarters", "constant")
    exact = exact or (h, w) == (height, width)
    if not exact and similarity.numel() and labels.numel():
        labels, ignore_index = _without_borders(similarity, labels, classes, ignore_index)
    inputs = {"similarity": similarity, "labels": labels, "classes": classes, "ignore_index": ignore_index}
    return Case(0, "map_consistency", "value", kind, inputs, exact=exact, finite=kind != "not finite")


def _without_borders(
    similarity: Tensor, labels: Tensor, classes: Tensor, ignore_index: int
) -> tuple[Tensor, int]:
    """Ignore the pixels at which an upsampled map may fall on either side of 0 or 1."""
    size = (labels.shape[1], labels.shape[2])
    p = naive.upsample(similarity.double(), size, False)
    rounded = NEAR * naive.upsample(similarity.double().abs(), size, False)
    near = ((p.abs() <= rounded) & (rounded > 0)) | ((1 - p).abs() <= NEAR + rounded)
    near = (near & (classes >= 0)[..., None, None]).any(1)
    if not bool(near.any()):
        return labels, ignore_index
    if not fits(ignore_index, labels.dtype):
        ignore_index = 255
    return torch.where(near, ignore_index, labels.long()).to(labels.dtype), ignore_index


LOGIT_KINDS = ("normal",) * 6 + ("integers", "integers", "constant", "large", "huge", "tiny", "not finite")


def _logits(draw: Draw, kind: str, *shape: int, values: tuple[float, ...] = (NAN, INF, -INF)) -> Tensor:
    if kind == "large":
        return draw.normal(*shape) * 60
    if kind == "not finite":
        return spoil(draw, draw.normal(*shape), values)
    return draw_features(draw, kind, *shape)


def _rectified_cross_entropy(draw: Draw) -> Case:
    kind = draw.one(*LOGIT_KINDS)
    num_classes = draw.num_classes(300)
    batch, h, w, height, width = draw.grids(True, max(1, num_classes // 4))
    ignore_index = draw.one(*IGNORED)
    with_maps = draw.one("none", "classes", "classes", "own")
    # Infinite losses times weights that round to 0 or not: NaN alone there.
    values = (NAN, INF, -INF) if with_maps == "none" else (NAN,)
    logits = convert(draw, _logits(draw, kind, batch, num_classes, h, w, values=values))
    labels = draw_labels(draw, (batch, height, width), num_classes, ignore_index, odd=False)
    inputs: dict[str, Any] = {"logits": logits, "labels": labels, "ignore_index": ignore_index}
    if with_maps != "none":
        slots = draw.slots() if with_maps == "classes" else 1
        map_kind = draw.one(*MAP_KINDS[:-1])
        shape = (h, w) if draw.chance(0.5) else (draw.size(), draw.size())
        inputs["similarity"] = convert(draw, _maps(draw, map_kind, batch, slots, *shape))
        if with_maps == "classes":
            inputs["classes"] = draw_classes(draw, batch, slots, num_classes, limited=True)
    if draw.chance(0.7):
        inputs["reduction"] = draw.one("mean", "valid_mean", "sum", "none", "none")
    exact = dyadic(h, height, True) and dyadic(w, width, True) and kind in ("integers", "constant")
    exact = exact or (h, w) == (height, width)
    finite = kind != "not finite"
    case = Case(0, "rectified_cross_entropy", "value", kind, inputs, exact=exact, finite=finite)
    if draw.chance(0.35) and finite and logits.numel() and labels.numel():
        _hard_pixels(draw, case)
    return case


def _hard_pixels(draw: Draw, case: Case) -> None:
    """Choose `ohem_threshold` and `ohem_min_kept` such that no rounding decides which pixels are kept.

    Probabilities of single precision are known to `near` in their logarithms; equal logits tie exactly.
    """
    logits, labels = case.inputs["logits"].double(), case.inputs["labels"].long()
    up = naive.upsample(logits, (labels.shape[1], labels.shape[2]), True)
    valid = labels != case.inputs["ignore_index"]
    log = up.log_softmax(1).gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    near = 64 * SINGLE * (1 + 2 * float(logits.abs().max()) + torch.tensor(logits.shape[1]).log().item())
    ordered = log[valid].sort().values
    count = len(ordered)

    def apart(limit: float) -> bool:
        return not bool(((ordered - limit).abs() < near).any()) and limit > -60

    threshold = draw.one(0.0, 0.05, 0.3, 0.7, 0.99, 2.0, draw.random.random())
    if threshold == 0.0:
        if bool((ordered < -60).any()):
            threshold = 2.0
    elif threshold <= 1 and not apart(torch.tensor(threshold).double().log().item()):
        # Between two probabilities that are well apart, else above all.
        gaps = ((ordered[1:] - ordered[:-1] > 4 * near) & (ordered[:-1] > -60)).nonzero().flatten().tolist()
        place = draw.one(*gaps) if gaps else None
        threshold = 2.0 if place is None else float(((ordered[place] + ordered[place + 1]) / 2).exp())
    # The min_kept-th smallest keeps itself and what ties with it; the next one must be well above. Of three
    # classes and more, the same logits in another order may give another sum of their exponentials.
    tie = 1e-9
    ties = case.exact and (logits.shape[1] <= 2 or case.what == "constant")
    ranks = [
        k for k in {1, 2, count // 3, count // 2, count - 1, draw.between(0, max(count, 1))} if 0 < k < count
    ]
    settled = [k for k in ranks if _settled(ordered, k, 4 * near, tie if ties else None)]
    min_kept = draw.one(0, count, count + 1, 100000, *settled, *settled, *settled)
    case.inputs |= {"ohem_threshold": threshold, "ohem_min_kept": min_kept}
    if count < min_kept:
        case.kept = valid
        return
    limit = -INF if threshold == 0.0 else torch.tensor(threshold).double().log().item()
    if min_kept > 0 and float(ordered[min_kept - 1]) + near > limit:
        limit = float(ordered[min_kept - 1]) + 2 * tie
        if min_kept == count:
            limit = INF
    case.kept = valid & (log <= limit)


def _settled(ordered: Tensor, k: int, near: float, tie: float | None) -> bool:
    """The next probability is well above the k-th smallest; or it ties, and no other is close to them."""
    if float(ordered[k]) < -80:  # single precision has no such probability but 0
        return False
    if float(ordered[k] - ordered[k - 1]) > near:
        return True
    distance = (ordered - ordered[k - 1]).abs()
    return tie is not None and not bool(((distance > tie) & (distance < near)).any())


def _predict(draw: Draw) -> Case:
    kind = draw.one(*LOGIT_KINDS)
    num_classes = draw.num_classes(256)
    batch, h, w, height, width = draw.grids(True, max(1, num_classes // 4))
    ignore_index = draw.one(*IGNORED)
    inputs: dict[str, Any] = {
        "logits": convert(draw, _logits(draw, kind, batch, num_classes, h, w)),
        "size": draw.one((height, width), torch.Size((height, width)), [height, width]),
        "ignore_index": ignore_index,
    }
    if draw.chance(0.7):
        inputs["labels"] = draw_labels(draw, (batch, height, width), num_classes, ignore_index, odd=False)
    exact = dyadic(h, height, True) and dyadic(w, width, True) and kind in ("integers", "constant")
    exact = exact or (h, w) == (height, width)
    return Case(0, "predict", "value", kind, inputs, exact=exact, finite=kind != "not finite")


VALUES: dict[str, Callable[[Draw], Case]] = {
    "masked_average_pool": _masked_average_pool,
    "prototype_similarity": _prototype_similarity,
    "cross_similarity": cross_similarity,
    "map_consistency": _map_consistency,
    "rectified_cross_entropy": _rectified_cross_entropy,
    "predict": _predict,
}


def _tensors(inputs: dict[str, Any]) -> list[str]:
    return [name for name, value in inputs.items() if isinstance(value, Tensor)]


def _wrong_tensor(draw: Draw, inputs: dict[str, Any]) -> tuple[str, Any, type[Exception]]:
    """A tensor of another rank, dtype, device or batch, or none at all."""
    names = _tensors(inputs)
    name = draw.one(*names)
    value = inputs[name]
    kind = draw.one("rank", "rank", "dtype", "type", "device", "batch")
    if kind == "rank":
        return name, value[None] if draw.chance(0.5) or len(value) == 0 else value[0], ValueError
    if kind == "type":
        return name, draw.one(3, "x", [[1]], value.numpy() if value.dtype != torch.bfloat16 else 3), TypeError
    if kind == "dtype":
        if value.is_floating_point():
            return name, value.to(draw.one(torch.int64, torch.complex64, torch.uint8)), TypeError
        wrong = [torch.float32, torch.bool, torch.int16, *([torch.uint8] if name == "classes" else [])]
        return name, value.to(draw.one(*wrong)), TypeError
    if kind == "device" and name != names[0]:
        return name, value.to("meta"), ValueError
    if len(names) == 1:
        return name, value[..., None], ValueError
    return (
        name,
        torch.cat([value, value[:1] if len(value) else value.new_zeros(1, *value.shape[1:])]),
        ValueError,
    )


def _set(draw: Draw, value: Tensor, wrong: int) -> Tensor:
    """One element replaced; int64 where the number needs it."""
    value = value.clone() if fits(wrong, value.dtype) else value.long()
    value[draw.place(value)] = wrong
    return value


_INT_WRONG = ((2.5, TypeError), (None, TypeError), ("255", TypeError), (True, TypeError))
_NUMBER_WRONG = (
    ("1", TypeError),
    (None, TypeError),
    (False, TypeError),
    (NAN, ValueError),
    (-1.0, ValueError),
)
_SCALARS: dict[str, tuple[tuple[Any, type[Exception]], ...]] = {
    "eps": (*_NUMBER_WRONG, (0, ValueError), (-INF, ValueError)),
    "ignore_index": _INT_WRONG,
    "reduction": (("min", ValueError), ("", ValueError), (None, ValueError), (3, ValueError)),
    "k": ((0, ValueError), (-1, ValueError), (2**63, ValueError), (8.0, TypeError), *_INT_WRONG[1:]),
    "temperature": (*_NUMBER_WRONG, (0, ValueError), (1e-39, ValueError), (-INF, ValueError)),
    "ohem_threshold": (("0.7", TypeError), (True, TypeError), (NAN, ValueError), (-0.1, ValueError)),
    "ohem_min_kept": ((-1, ValueError), (1.0, TypeError), (None, TypeError), (-(2**63), ValueError)),
    "size": (
        (9, TypeError),
        (None, TypeError),
        ((9,), ValueError),
        ((1, 2, 3), ValueError),
        ((2.0, 3), TypeError),
        ((3, True), TypeError),
        ((-1, 3), ValueError),
    ),
    "impl": (("cuda", ValueError), ("", ValueError), (3, ValueError)),
}
_TAKES = {
    "masked_average_pool": ("eps",),
    "prototype_similarity": ("eps",),
    "cross_similarity": ("reduction", "k", "temperature", "ignore_index", "eps"),
    "map_consistency": ("ignore_index",),
    "rectified_cross_entropy": ("ignore_index", "reduction", "ohem_threshold", "ohem_min_kept"),
    "predict": ("ignore_index", "size"),
}


def _wrong_values(draw: Draw, operator: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Right in type, wrong in what the numbers or sizes say; empty where this call has no such thing."""
    choices: list[dict[str, Any]] = []
    classes, labels = inputs.get("classes"), inputs.get("labels")
    features = next(iter(inputs.values()))
    if classes is not None and classes.numel():
        below = draw.one(-2, -3, -(2**31), -(2**63))
        choices.append({"classes": _set(draw, classes, below)})
        if operator not in ("masked_average_pool", "cross_similarity"):
            choices.append({"classes": torch.cat([classes, classes[:, :1]], 1)})
    if operator in ("rectified_cross_entropy", "predict"):
        limit, ignored = features.shape[1], inputs["ignore_index"]
        if classes is not None and classes.numel() and operator == "rectified_cross_entropy":
            choices.append({"classes": _set(draw, classes, draw.one(limit, limit + 255, 2**31 - 1, 2**62))})
        if labels is not None and labels.numel():
            wrong = draw.one(
                limit, limit + 255, limit + 256, -1, -256, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)
            )
            if wrong != ignored:
                choices += [{"labels": _set(draw, labels, wrong)}] * 2
        choices.append({next(iter(inputs)): features[:, :0]})
    if operator == "rectified_cross_entropy":
        choices.append({"reduction": draw.one("max", "topk")})
    if operator == "cross_similarity":
        choices += wrong_pairs(draw, inputs)
    elif operator != "prototype_similarity":
        choices.append({next(iter(inputs)): draw.one(features[..., :0], features[:, :, :0])})
    if inputs.get("similarity") is not None and operator == "rectified_cross_entropy":
        maps = inputs["similarity"]
        choices += [{"similarity": torch.cat([maps, maps, maps.new_zeros(len(maps), 1, *maps.shape[2:])], 1)}]
        choices += [{"similarity": maps[..., :0]}, {"similarity": None}] if classes is not None else []
    if operator == "predict" and labels is not None:
        choices.append({"size": (inputs["size"][0] + 1, inputs["size"][1])})
    if operator == "predict":
        choices.append({"logits": features.new_zeros(1, 257, 2, 2)})
    if operator == "prototype_similarity":
        prototypes = inputs["prototypes"]
        choices.append(
            {"prototypes": torch.cat([prototypes, prototypes.new_zeros(*prototypes.shape[:2], 1)], 2)}
        )
    return draw.one(*choices) if choices else {}


def _spoil_arguments(draw: Draw, case: Case) -> Case:
    """The same call with one argument wrong."""
    changed: dict[str, Any] = {}
    error: type[Exception] = ValueError
    kind = draw.one("tensor", "tensor", "scalar", "values", "values", "double")
    if kind == "values":
        changed = _wrong_values(draw, case.operator, case.inputs)
    elif kind == "double":
        name = next(iter(case.inputs))
        changed = {name: case.inputs[name].double(), "impl": "cpp"}
    elif kind == "scalar":
        name = draw.one(*_TAKES[case.operator], "impl")
        value, error = draw.one(*_SCALARS[name])
        changed = {name: value}
    if not changed:
        name, value, error = _wrong_tensor(draw, case.inputs)
        changed = {name: value}
    what = ", ".join(changed)
    return Case(case.seed, case.operator, "bad argument", what, case.inputs | changed, error=error)


def make(seed: int, operators: tuple[str, ...]) -> Case:
    """The case of a seed: its operator is one of `operators`."""
    draw = Draw(seed)
    case = VALUES[draw.one(*operators)](draw)
    case.seed = seed
    kind = draw.random.random()
    case.threads = draw.one(1, 1, 1, 1, 1, 2, 3)
    if kind < 0.7:
        for name in _tensors(case.inputs):
            case.inputs[name] = lay_out(draw, case.inputs[name])
        return case
    if kind < 0.85:
        return _spoil_arguments(draw, case)
    case.kind = "raw"
    return case
