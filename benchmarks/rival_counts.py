"""Least work and memory of the rivals, and parts of a range."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases import Case


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


def all_pairs_flops(case: Case) -> int:
    if case.operator.name != "cross_similarity":
        return case.operator.cost(case.inputs, case.passes).flops
    query, guide = case.inputs["query"], case.inputs["guide"]
    pairs = query.shape[0] * query.shape[2:].numel() * guide.shape[2:].numel()
    return 2 * query.shape[1] * pairs * (1 if case.passes == "forward" else 2)


def chunked_flops(case: Case) -> int:
    reduction = case.inputs.get("reduction")
    if reduction == "mean" or (case.passes == "backward" and reduction in ("max", "topk")):
        return case.operator.cost(case.inputs, case.passes).flops
    return all_pairs_flops(case)


def needed_flops(case: Case) -> int:
    return case.operator.cost(case.inputs, case.passes).flops


def ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, step):
        yield start, min(start + step, count)
