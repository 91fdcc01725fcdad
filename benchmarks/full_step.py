"""A training step at full size against the published one: DeepLabV3+ with ResNet-101, crops of 721, batch 8.

`benchmarks.step` runs it on a GPU. On the same network in the same precision it compares the
similarity-and-loss part of a re-training step with the published arithmetic, from the network's outputs to
the gradients of the logits, and whole steps of the supervised stage and of the re-training. Then our recipe
(bfloat16 autocast, channels-last) stands against the published settings (float32, contiguous). A batch is
that many pairs; where it does not fit the memory, half of it is taken, for all variants alike.

What is to be reached: the part in a tenth of the time and a twentieth of the memory, and at most 5 % of our
step; the recipe with three times the images a second.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import published, variants
from benchmarks.variants import Result
from cisc_ext import method
from cisc_ext.config import MethodConfig, OptimConfig
from cisc_ext.engine import build_optimizer
from cisc_ext.models import SegmentationModel, SegOutput, build_model
from cisc_ext.ops._workloads import regions

TIMES_PART, MEMORY_PART, SHARE_OF_STEP, TIMES_RECIPE = 10.0, 1 / 20, 0.05, 3.0
_CONFIG = MethodConfig()


@dataclass(frozen=True)
class Size:
    """Of a run."""

    model: str
    backbone: str
    crop: int
    batch: int
    num_classes: int
    output_stride: int


FULL = Size("deeplabv3plus", "resnet101", 721, 8, 19, 8)
TINY = Size("deeplabv3plus", "resnet18", 65, 2, 5, 16)


@dataclass(frozen=True)
class Batch:
    labeled: Tensor  # [B,3,H,W]
    unlabeled: Tensor  # [B,3,H,W]
    guide: Tensor  # [B,3,H,W], of the unlabeled one; in the supervised stage of the labeled one
    labels: Tensor  # [B,H,W] uint8
    pseudo_labels: Tensor  # [B,H,W] uint8
    guide_labels: Tensor  # [B,H,W] uint8
    classes: Tensor  # [B,1] int64, shared by each pair

    def channels_last(self) -> Batch:
        names = ("labeled", "unlabeled", "guide")
        last = torch.channels_last
        return replace(self, **{name: getattr(self, name).contiguous(memory_format=last) for name in names})


@dataclass(frozen=True)
class Networks:
    student: SegmentationModel
    teacher: SegmentationModel
    optimizer: torch.optim.Optimizer


def make_batch(size: Size, device: str) -> Batch:
    """Noise as images; labels in regions with class 0 in each, some ignored."""
    generator = torch.Generator().manual_seed(size.crop)
    shape = (size.batch, 3, size.crop, size.crop)

    def images() -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def labels() -> Tensor:
        return regions(size.batch, size.crop, size.crop, size.num_classes, generator).to(device)

    classes = torch.zeros(size.batch, 1, dtype=torch.int64, device=device)
    return Batch(images(), images(), images(), labels(), labels(), labels(), classes)


def make_networks(size: Size, device: str, channels_last: bool) -> Networks:
    torch.manual_seed(size.crop)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def make() -> SegmentationModel:
        network = build_model(size.model, size.backbone, size.num_classes, output_stride=size.output_stride)
        return network.to(device, memory_format=layout)  # type: ignore[call-overload]

    student, teacher = make().train(), make().eval().requires_grad_(False)
    return Networks(student, teacher, build_optimizer(student, size.model, OptimConfig()))


def _halves(output: SegOutput) -> tuple[SegOutput, SegOutput]:
    half = len(output.logits) // 2
    first = SegOutput(output.logits[:half], output.features[:half])
    return first, SegOutput(output.logits[half:], output.features[half:])


Pair = tuple[SegOutput, SegOutput]


def similarity_and_losses(x: Batch, seen: Pair, known: SegOutput, pseudo: SegOutput) -> Tensor:
    """Of the re-training, from what the teacher has `seen`: the unlabeled images and their guides."""
    with torch.no_grad():
        similarity = method.cisc_map(
            *(seen[0].features, x.pseudo_labels, seen[1].features, x.guide_labels, x.classes),
            known.logits.shape[1],
            _CONFIG,
        )
    loss = method.labeled_loss(known, x.labels, _CONFIG)
    return loss + method.rectified_loss(pseudo, x.pseudo_labels, similarity, x.classes)


def _plain_loss(output: SegOutput, labels: Tensor) -> Tensor:
    up = F.interpolate(output.logits, labels.shape[-2:], mode="bilinear", align_corners=True)
    return F.cross_entropy(up, labels.long(), ignore_index=published.IGNORE_INDEX)


def similarity_and_losses_published(x: Batch, seen: Pair, known: SegOutput, pseudo: SegOutput) -> Tensor:
    with torch.no_grad():
        proto = published.prototype(seen[1].features, x.guide_labels, x.classes)
        similarity = published.cisc_map(seen[0].features, proto, x.pseudo_labels.shape[-2:])
    loss = _plain_loss(known, x.labels)
    return loss + published.rectified(pseudo.logits, x.pseudo_labels, similarity, x.classes)


def pair_losses(x: Batch, first: SegOutput, second: SegOutput) -> Tensor:
    """Of the supervised stage."""
    losses = method.pair_losses(first, x.labels, second, x.guide_labels, x.classes, _CONFIG)
    return torch.stack(list(losses.values())).sum()


def pair_losses_published(x: Batch, first: SegOutput, second: SegOutput) -> Tensor:
    loss = _plain_loss(first, x.labels) + _plain_loss(second, x.guide_labels)
    return loss + published.consistency(first.features, second.features, x.labels, x.guide_labels, x.classes)


RETRAINING = {"published": similarity_and_losses_published, "auto": similarity_and_losses}
SUPERVISED = {"published": pair_losses_published, "auto": pair_losses}


def _forward(network: SegmentationModel, first: Tensor, second: Tensor, low: bool) -> Pair:
    with torch.autocast(first.device.type, torch.bfloat16, enabled=low):
        output: SegOutput = network(torch.cat([first, second]))
    return _halves(output)


def _update(networks: Networks, loss: Tensor) -> Result:
    loss.backward()
    networks.optimizer.step()
    networks.optimizer.zero_grad(set_to_none=True)
    return (loss.detach(),)


def retraining_step(x: Batch, networks: Networks, losses: Callable[..., Tensor], low: bool) -> Result:
    with torch.no_grad():
        seen = _forward(networks.teacher, x.unlabeled, x.guide, low)
    return _update(networks, losses(x, seen, *_forward(networks.student, x.labeled, x.unlabeled, low)))


def supervised_step(x: Batch, networks: Networks, losses: Callable[..., Tensor], low: bool) -> Result:
    return _update(networks, losses(x, *_forward(networks.student, x.labeled, x.guide, low)))


def part(x: Batch, seen: Pair, student: Pair, losses: Callable[..., Tensor]) -> Result:
    """Similarity and losses alone, and the gradients of the logits."""
    leaves = [output.logits.detach().requires_grad_() for output in student]
    loss = losses(
        x, seen, *(SegOutput(leaf, one.features) for leaf, one in zip(leaves, student, strict=True))
    )
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@contextmanager
def _freed(device: str) -> Any:
    """What is let go within is given back."""
    try:
        yield
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def outputs(x: Batch, networks: Networks) -> tuple[Pair, Pair]:
    """What the teacher has seen, and the student, without a graph."""
    with torch.no_grad():
        return (
            _forward(networks.teacher, x.unlabeled, x.guide, False),
            _forward(networks.student, x.labeled, x.unlabeled, False),
        )


def parts(x: Batch, seen: Pair, student: Pair) -> dict[str, Callable[[], Result]]:
    """Similarity and losses of the re-training alone, by each variant."""
    return {name: partial(part, x, seen, student, losses) for name, losses in RETRAINING.items()}


def measured(size: Size, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """All rows at one batch size."""
    x = make_batch(size, device)
    networks = make_networks(size, device, channels_last=False)
    seen, student = outputs(x, networks)
    of_part = parts(x, seen, student)
    variants.agree("similarity and losses", of_part)
    of_pairs = {name: partial(_pair_part, x, student, losses) for name, losses in SUPERVISED.items()}
    variants.agree("losses of pairs", of_pairs)

    def rows(name: str, settings: str, calls: variants.Calls, images: int) -> Iterator[dict[str, Any]]:
        head = {"step": name, "crop": size.crop, "batch": size.batch, "settings": settings}
        for variant, found in variants.timed(calls, device, repeats, images).items():
            yield {**head, "variant": variant, **found}

    yield from rows("similarity and losses", "same", of_part, size.batch)
    del of_part, of_pairs, seen, student
    stages = (
        ("re-training", retraining_step, RETRAINING),
        ("supervised", supervised_step, SUPERVISED),
    )
    for name, step, losses in stages:
        calls = {variant: partial(step, x, networks, one, False) for variant, one in losses.items()}
        yield from rows(name, "same", calls, 2 * size.batch)
    last, ours = x.channels_last(), make_networks(size, device, channels_last=True)
    for name, step, losses in stages:
        calls = {
            "published": partial(step, x, networks, losses["published"], False),
            "recipe": partial(step, last, ours, losses["auto"], True),
        }
        yield from rows(name, "own", calls, 2 * size.batch)


def _pair_part(x: Batch, student: Pair, losses: Callable[..., Tensor]) -> Result:
    """The supervised stage's losses, and the gradients of logits and features."""
    leaves = [
        SegOutput(one.logits.detach().requires_grad_(), one.features.detach().requires_grad_())
        for one in student
    ]
    loss = losses(x, *leaves)
    wanted = [tensor for one in leaves for tensor in (one.logits, one.features)]
    return loss.detach(), *torch.autograd.grad(loss, wanted)


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, and what was."""
    by = {(row["step"], row["settings"], row["variant"]): row for row in rows}
    own_part = by["similarity and losses", "same", "auto"]
    share = own_part["time_ms"] / by["re-training", "same", "auto"]["time_ms"]
    found: list[tuple[str, str, float | None, bool | None]] = [
        ("part: times faster", f">= {TIMES_PART:g}", own_part["speedup"], own_part["speedup"] >= TIMES_PART),
        ("part: share of our step", f"<= {SHARE_OF_STEP:g}", round(share, 4), share <= SHARE_OF_STEP),
    ]
    memory = own_part["memory_ratio"]
    met = None if memory is None else memory <= MEMORY_PART
    found.append(("part: extra memory, of the published", f"<= {MEMORY_PART:g}", memory, met))
    for stage in ("re-training", "supervised"):
        times = by[stage, "own", "recipe"]["speedup"]
        what = f"{stage}: images a second, times the published"
        found.append((what, f">= {TIMES_RECIPE:g}", times, times >= TIMES_RECIPE))
        found.append(
            (f"{stage}: same settings, times faster", "", by[stage, "same", "auto"]["speedup"], None)
        )
    return [dict(zip(("what", "target", "reached", "met"), one, strict=True)) for one in found]


def run(size: Size, device: str, repeats: int, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Rows and what they come to, at the largest batch that fits: `size.batch`, its half, and so on. `save`
    gets what there is after every row."""
    facts = {
        "network": f"{size.model} {size.backbone}, output stride {size.output_stride}",
        "wanted_batch": size.batch,
        "tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
        },
        "own_settings": "bfloat16 autocast, channels-last; published: float32, contiguous",
    }
    too_large: list[int] = []
    rows: list[dict[str, Any]] = []
    found = {**facts, "too_large_batches": too_large, "rows": rows}
    batch = size.batch
    while True:
        with _freed(device):
            try:
                for row in measured(replace(size, batch=batch), device, repeats):
                    rows.append(row)
                    save(found)
                break
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                too_large.append(batch)
                rows.clear()
        batch //= 2
    return {**found, "targets": judged(rows)}
