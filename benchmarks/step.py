"""Time and memory of the method's two steps, against the published arithmetic.

    python -m benchmarks.step [--device cpu|cuda] [--crop 321 721] [--repeats N] [--threads N] [--json FILE]
        [--full none|tiny|full] [--full-alone]

rectify: the guide's prototypes, the query's CISC map, rectified cross-entropy; backward to the logits.
consistency: prototypes, maps and consistency losses both ways; backward to the features of both.
network: a whole step of the re-training, DeepLabV3+ with ResNet-18: the frozen teacher on an unlabeled image
and its guide, their CISC map, the student on that image and a labeled one, both losses, backward, SGD. There
the extra memory has activations and gradients as well, and a variant runs at most 3 times.

Float32; 2 pairs and 256 channels, in the network's step 1 pair and 1 labeled image. The losses and gradients
of all variants must agree before any is timed. The variants' runs are interleaved, each from a flushed cache.
Columns: time_ms, the median; time_min_ms, the least; extra_mib, the most held beyond inputs, loss and
gradients (null where the system does not count it); speedup, the median over the runs of published time / own
time; memory_ratio, own extra_mib / published.

On a GPU it then measures the step at full size, DeepLabV3+ with ResNet-101, against what is to be reached
(benchmarks/full_step.py; "full" in the result), and exits 1 where a target is missed; `--full tiny` tries
that at a small size and judges nothing, `--full-alone` measures nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import full_step, machine, published, variants
from benchmarks.cases import DisagreementError
from benchmarks.tables import aligned
from benchmarks.variants import Result
from cisc_ext.files import write_json
from cisc_ext.ops.map_consistency import map_consistency
from cisc_ext.ops.masked_average_pool import masked_average_pool
from cisc_ext.ops.prototype_similarity import prototype_similarity
from cisc_ext.ops.rectified_cross_entropy import rectified_cross_entropy
from cisc_ext.ops.registry import Call, capability, decide

BATCH = 2
CHANNELS = 256
STRIDE = 4
NUM_CLASSES = {321: 21, 721: 19}
_BLOCK = 48  # pixels of a class region's side
_IGNORED = 0.1  # share of regions


@dataclass(frozen=True)
class Inputs:
    query: Tensor  # [B,C,h,w]
    guide: Tensor  # [B,C,h,w]
    query_labels: Tensor  # [B,H,W] uint8
    guide_labels: Tensor  # [B,H,W] uint8
    classes: Tensor  # [B,1] int64, shared by query and guide
    logits: Tensor  # [B,K,h,w]


def make_inputs(crop: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    """Features as after a ReLU, labels in regions, some of them ignored, one class shared by each pair."""
    generator = torch.Generator().manual_seed(crop)
    side, regions, num_classes = -(-crop // STRIDE), -(-crop // _BLOCK) + 1, NUM_CLASSES.get(crop, 19)
    classes = torch.randint(0, num_classes, (BATCH, 1), generator=generator)

    def labels() -> Tensor:
        low = torch.randint(0, num_classes, (BATCH, regions, regions), generator=generator)
        low[torch.rand(low.shape, generator=generator) < _IGNORED] = published.IGNORE_INDEX
        low[:, : regions // 2, : regions // 2] = classes[:, :, None]
        low[:, -1, -1] = published.IGNORE_INDEX
        full = F.interpolate(low[:, None].float(), (crop, crop), mode="nearest")
        return full[:, 0].to(device, torch.uint8)

    def normal(channels: int) -> Tensor:
        return torch.randn(BATCH, channels, side, side, generator=generator).to(device, dtype)

    query, guide = normal(CHANNELS).relu_().requires_grad_(), normal(CHANNELS).relu_().requires_grad_()
    return Inputs(query, guide, labels(), labels(), classes.to(device), normal(num_classes).requires_grad_())


def rectify(x: Inputs, impl: str | None = None) -> Result:
    with torch.no_grad():
        prototypes = masked_average_pool(x.guide, x.guide_labels, x.classes, impl=impl)
        similarity = prototype_similarity(x.query, prototypes, impl=impl)
    loss = rectified_cross_entropy(x.logits, x.query_labels, similarity, x.classes, impl=impl)
    return loss.detach(), *torch.autograd.grad(loss, [x.logits])


def rectify_published(x: Inputs) -> Result:
    with torch.no_grad():
        proto = published.prototype(x.guide, x.guide_labels, x.classes)
        similarity = published.cisc_map(x.query, proto, x.query_labels.shape[-2:])
    loss = published.rectified(x.logits, x.query_labels, similarity, x.classes)
    return loss.detach(), *torch.autograd.grad(loss, [x.logits])


def consistency(x: Inputs, impl: str | None = None) -> Result:
    of_guide = masked_average_pool(x.guide, x.guide_labels, x.classes, impl=impl)
    of_query = masked_average_pool(x.query, x.query_labels, x.classes, impl=impl)
    on_query = prototype_similarity(x.query, of_guide, impl=impl)
    on_guide = prototype_similarity(x.guide, of_query, impl=impl)
    loss = map_consistency(on_query, x.query_labels, x.classes, impl=impl)
    loss = loss + map_consistency(on_guide, x.guide_labels, x.classes, impl=impl)
    return loss.detach(), *torch.autograd.grad(loss, [x.query, x.guide])


def consistency_published(x: Inputs) -> Result:
    loss = published.consistency(x.query, x.guide, x.query_labels, x.guide_labels, x.classes)
    return loss.detach(), *torch.autograd.grad(loss, [x.query, x.guide])


_NETWORK_RUNS = 3
_FULL_RUNS = 3

OPERATORS = {
    "network": ("masked_average_pool", "prototype_similarity", "rectified_cross_entropy"),
    "rectify": ("masked_average_pool", "prototype_similarity", "rectified_cross_entropy"),
    "consistency": ("masked_average_pool", "prototype_similarity", "map_consistency"),
}
VARIANTS: dict[str, dict[str, Callable[[Inputs], Result]]] = {
    "rectify": {
        "published": rectify_published,
        "reference": partial(rectify, impl="reference"),
        "auto": rectify,
    },
    "consistency": {
        "published": consistency_published,
        "reference": partial(consistency, impl="reference"),
        "auto": consistency,
    },
}


def measure_step(step: str, crop: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """One row per variant; `DisagreementError` where they disagree."""
    x = make_inputs(crop, device)
    calls = {name: partial(function, x) for name, function in VARIANTS[step].items()}
    variants.agree(f"{step} at {crop}", calls)
    sizes = {
        "features": x.query.shape[-1],
        "classes": x.logits.shape[1],
        "batch": BATCH,
        "channels": CHANNELS,
    }
    return _rows(step, crop, sizes, calls, device, repeats)


def measure_network(crop: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """The same for the whole step with a network."""
    size = full_step.Size("deeplabv3plus", "resnet18", crop, 1, NUM_CLASSES.get(crop, 19), 16)
    x = full_step.make_batch(size, device).channels_last()
    networks = full_step.make_networks(size, device, channels_last=True)
    seen, student = full_step.outputs(x, networks)
    variants.agree(f"network at {crop}", full_step.parts(x, seen, student))
    features = seen[0].features
    sizes = {
        "features": features.shape[-1],
        "classes": size.num_classes,
        "batch": size.batch,
        "channels": features.shape[1],
    }
    del seen, student, features
    calls = {
        name: partial(full_step.retraining_step, x, networks, losses, False)
        for name, losses in full_step.RETRAINING.items()
    }
    return _rows("network", crop, sizes, calls, device, min(repeats, _NETWORK_RUNS))


def _rows(
    step: str, crop: int, sizes: dict[str, int], calls: variants.Calls, device: str, repeats: int
) -> list[dict[str, Any]]:
    head = {"step": step, "crop": crop, **sizes, "dtype": "float32"}
    asked = Call(device, (torch.float32,), capability(device, None))
    rows = []
    for name, found in variants.timed(calls, device, repeats).items():
        used = {op: decide(op, name, asked)[0].name for op in OPERATORS[step]} if name != "published" else {}
        rows.append({**head, "variant": name, "implementations": used, **found})
    return rows


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=summary)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--crop", type=int, nargs="+", default=list(NUM_CLASSES), help="label side, pixels")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each variant")
    parser.add_argument("--full", choices=("none", "tiny", "full"), help="default: full on a GPU, else none")
    parser.add_argument("--full-alone", action="store_true", help="no crops: the full size alone")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="result file (default: in benchmarks/results)")
    settings = parser.parse_args(arguments)
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no NVIDIA GPU")
    if min(settings.crop) < STRIDE or settings.repeats < 1 or (settings.threads or 1) < 1:
        parser.error(f"--crop must be at least {STRIDE}, --repeats and --threads at least 1")
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = parse(arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    rows: list[dict[str, Any]] = []
    result = {**machine.facts("benchmarks.step", arguments), "device": settings.device, "rows": rows}
    path = settings.json or machine.ROOT / f"benchmarks/results/step_{settings.device}.json"
    for crop in [] if settings.full_alone else settings.crop:
        for step in (*VARIANTS, "network"):
            try:
                if step == "network":
                    rows += measure_network(crop, settings.device, settings.repeats)
                else:
                    rows += measure_step(step, crop, settings.device, settings.repeats)
            except DisagreementError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            write_json(path, result)
    print(aligned("step", rows))
    full = settings.full or ("full" if settings.device == "cuda" else "none")
    if full == "none":
        return 0
    size = full_step.FULL if full == "full" else full_step.TINY

    def save(found: dict[str, Any]) -> None:
        result["full"] = found
        write_json(path, result)

    try:
        found = full_step.run(size, settings.device, min(settings.repeats, _FULL_RUNS), save)
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    save(found)
    print(aligned("full_step", found["rows"]))
    print(aligned("full_targets", found["targets"]))
    missed = [one for one in found["targets"] if one["met"] is False and full == "full"]
    for one in missed:
        print(f"MISSED {one['what']}: {one['reached']}, target {one['target']}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
