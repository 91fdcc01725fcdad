"""Running networks: the training step, prediction over views, evaluation and pseudo labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cisc_ext import ops
from cisc_ext.config import OptimConfig
from cisc_ext.data.datasets import DatasetSpec, pseudo_path, save_label
from cisc_ext.data.pairs import EvalSample
from cisc_ext.models import SegmentationModel, SegOutput, head_lr_multiplier

Losses = dict[str, Tensor]
AnyBatch = TypeVar("AnyBatch")

GROUP_PIXELS = 2**19
"""Pixels of images that are evaluated together; images of one size only."""
FLUSH_STEPS = 10
"""Optimizer steps between two reads of the losses, the only synchronisation of the training loop."""


@dataclass(frozen=True)
class Runtime:
    """Device and precision, decided once; `reasons` says why in lines to print."""

    device: torch.device
    autocast: torch.dtype | None
    reasons: tuple[str, ...]

    @property
    def precision(self) -> str:
        """Of the network's forward pass."""
        return str(self.autocast or torch.float32).removeprefix("torch.")

    def cast(self) -> AbstractContextManager[Any]:
        """The context of a network's forward pass."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def move(self, network: SegmentationModel) -> SegmentationModel:
        """The network on the device, its weights channels-last."""
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def images(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] on the device, channels-last."""
        return images.to(self.device, non_blocking=True, memory_format=torch.channels_last)


def decide_runtime(device: str, precision: str) -> Runtime:
    """Choose device and precision: `device` auto, cpu, cuda or cuda:N; `precision` auto, float32 or
    bfloat16."""
    if device == "auto":
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reason = "CUDA is available" if chosen.type == "cuda" else "no CUDA device"
    else:
        try:
            chosen = torch.device(device)
        except RuntimeError:
            raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}") from None
        if chosen.type not in ("cpu", "cuda"):
            raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}")
        if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: {torch.cuda.device_count()} CUDA devices are available")
        reason = "asked for"
    if precision == "auto":
        fast = _has_bfloat16(chosen)
        autocast = torch.bfloat16 if fast else None
        why = f"the {chosen.type} {'multiplies' if fast else 'does not multiply'} bfloat16 in hardware"
    else:
        autocast, why = (torch.bfloat16 if precision == "bfloat16" else None), "asked for"
    name = "float32" if autocast is None else "bfloat16 autocast, weights and losses float32"
    return Runtime(chosen, autocast, (f"device: {chosen} ({reason})", f"precision: {name} ({why})"))


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def build_optimizer(network: SegmentationModel, model: str, config: OptimConfig) -> torch.optim.SGD:
    """SGD with the head's parameters at a multiple of the backbone's learning rate."""
    multiplier = head_lr_multiplier(model) if config.head_lr_multiplier is None else config.head_lr_multiplier
    backbone = list(network.backbone.parameters())
    inside = set(map(id, backbone))
    head = [p for p in network.parameters() if id(p) not in inside]
    groups = [
        {"params": backbone, "lr": config.lr, "initial_lr": config.lr},
        {"params": head, "lr": config.lr * multiplier, "initial_lr": config.lr * multiplier},
    ]
    return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, power: float) -> float:
    """Polynomial decay: initial_lr * (1 - step / steps) ** power; gives the backbone's."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (1 - step / steps) ** power
    return float(optimizer.param_groups[0]["lr"])


def train_steps(
    network: SegmentationModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[AnyBatch],
    objective: Callable[[SegmentationModel, AnyBatch], Losses],
    *,
    first: int,
    last: int,
    steps: int,
    power: float,
    progress: tqdm[Any],
    log: Callable[[list[dict[str, float]]], None],
) -> None:
    """Steps `first` to `last` - 1 of a training of `steps`; `log` gets the losses of each, by name, with
    "loss" their sum.

    Stops with `FloatingPointError` where the loss is not finite.
    """
    network.train()
    pending: list[tuple[int, float, list[str], Tensor]] = []
    for step, batch in zip(range(first, last), batches, strict=False):
        lr = set_learning_rate(optimizer, step, steps, power)
        # ---- one training step: no synchronisation inside ----
        losses = objective(network, batch)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # -------------------------------------------------------
        pending.append(
            (step, lr, list(losses), torch.stack([total.detach(), *(v.detach() for v in losses.values())]))
        )
        progress.update()
        if len(pending) == FLUSH_STEPS or step + 1 == last:
            records = _read_losses(pending)
            pending.clear()
            finite = list(itertools.takewhile(lambda r: all(map(math.isfinite, r.values())), records))
            log(finite)
            if len(finite) < len(records):
                shown = ", ".join(f"{k} {v:g}" for k, v in records[len(finite)].items())
                raise FloatingPointError(
                    f"{progress.desc}: the loss is not finite ({shown}); try a lower --lr"
                )
            progress.set_postfix({k: f"{v:.3f}" for k, v in records[-1].items() if k not in ("step", "lr")})


def _read_losses(pending: list[tuple[int, float, list[str], Tensor]]) -> list[dict[str, float]]:
    values = torch.stack([row for *_, row in pending]).tolist()  # the device is synchronised here
    return [
        {"step": step, "lr": lr, **dict(zip(["loss", *names], row, strict=True))}
        for (step, lr, names, _), row in zip(pending, values, strict=True)
    ]


@torch.inference_mode()
def view_probabilities(
    network: SegmentationModel,
    images: Tensor,  # [B,3,H,W], on the device
    runtime: Runtime,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:  # [B,K,h,w]
    """Class probabilities averaged over scaled and mirrored views, at the finest view's feature resolution.

    One forward pass per view. A single view gives its logits, whose order of classes is the same.
    """
    if tuple(scales) == (1.0,) and not flip:
        with runtime.cast():
            return network(images).logits.float()
    total: Tensor | None = None
    for scale in sorted(scales, reverse=True):
        size = [max(1, round(side * scale)) for side in images.shape[2:]]
        view = images if scale == 1.0 else F.interpolate(images, size, mode="bilinear", align_corners=True)
        for mirrored in (False, True) if flip else (False,):
            with runtime.cast():
                logits = network(view.flip(-1) if mirrored else view).logits
            probabilities = logits.float().softmax(1)
            if mirrored:
                probabilities = probabilities.flip(-1)
            if total is None:
                total = torch.zeros_like(probabilities)
            if probabilities.shape != total.shape:
                probabilities = F.interpolate(
                    probabilities, total.shape[2:], mode="bilinear", align_corners=True
                )
            total += probabilities
    assert total is not None
    return total / (len(scales) * (1 + flip))


@torch.inference_mode()
def window_probabilities(
    network: SegmentationModel,
    images: Tensor,  # [B,3,H,W]
    runtime: Runtime,
    window: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:  # [B,K,H,W]
    """Class probabilities averaged over windows of `window` pixels that overlap by a third, at full
    resolution."""
    height, width = images.shape[2:]
    total: Tensor | None = None
    seen = torch.zeros(height, width, device=images.device)
    for top in _window_starts(height, window):
        for left in _window_starts(width, window):
            rows, columns = slice(top, min(top + window, height)), slice(left, min(left + window, width))
            part = images[:, :, rows, columns]
            probabilities = view_probabilities(network, part, runtime, scales, flip)
            if tuple(scales) == (1.0,) and not flip:
                probabilities = probabilities.softmax(1)
            up = F.interpolate(probabilities, part.shape[2:], mode="bilinear", align_corners=True)
            if total is None:
                total = torch.zeros(len(images), up.shape[1], height, width, device=images.device)
            total[:, :, rows, columns] += up
            seen[rows, columns] += 1
    assert total is not None
    return total / seen


def _window_starts(size: int, window: int) -> list[int]:
    if size <= window:
        return [0]
    stride = max(1, math.ceil(window * 2 / 3))
    count = math.ceil((size - window) / stride) + 1
    return [min(i * stride, size - window) for i in range(count)]


@dataclass(frozen=True)
class Views:
    """How an image is looked at: `window` 0 is the whole image."""

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: int = 0

    def __call__(self, network: SegmentationModel, images: Tensor, runtime: Runtime) -> Tensor:
        """Scores [B,K,h,w] whose largest is the predicted class."""
        if self.window:
            return window_probabilities(network, images, runtime, self.window, self.scales, self.flip)
        return view_probabilities(network, images, runtime, self.scales, self.flip)


def groups(samples: Iterable[EvalSample]) -> Iterator[list[EvalSample]]:
    """Consecutive samples of one size, together at most `GROUP_PIXELS` unless one alone has more."""
    group: list[EvalSample] = []
    for sample in samples:
        size = sample.image.shape
        full = (len(group) + 1) * size[-1] * size[-2] > GROUP_PIXELS
        if group and (
            full or group[0].image.shape != size or (group[0].labels is None) != (sample.labels is None)
        ):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def predictions(
    network: SegmentationModel,
    samples: Iterable[EvalSample],
    runtime: Runtime,
    views: Views,
    ignore_index: int,
) -> Iterator[tuple[list[EvalSample], Tensor, Tensor | None]]:
    """Groups of samples with their predicted classes [B,H,W] uint8, and where there are labels their
    confusion matrix [K,K]; both on the device."""
    network.eval()
    for group in groups(samples):
        images = runtime.images(torch.stack([s.image for s in group]))
        labels = None
        if group[0].labels is not None:
            labels = torch.stack([s.labels for s in group if s.labels is not None]).to(runtime.device)
        scores = views(network, images, runtime)
        yield group, *ops.predict(scores, images.shape[2:], labels, ignore_index=ignore_index)


def evaluate(
    network: SegmentationModel,
    samples: Iterable[EvalSample],
    count: int,
    runtime: Runtime,
    spec: DatasetSpec,
    views: Views | None = None,
    save_masks: Path | None = None,
    title: str = "evaluation",
) -> Tensor:  # [K,K] int64, on the CPU
    """Confusion matrix over `count` samples, rows = truth; with `save_masks` also writes the predicted
    classes, as palette PNGs under the images' relative paths."""
    total = torch.zeros(spec.num_classes, spec.num_classes, dtype=torch.int64, device=runtime.device)
    views = Views() if views is None else views
    with tqdm(total=count, desc=title, unit="image", leave=False) as progress:
        for group, classes, confusion in predictions(network, samples, runtime, views, spec.ignore_index):
            if confusion is not None:
                total += confusion
            if save_masks is not None:
                for sample, predicted in zip(group, classes.cpu().numpy(), strict=True):
                    save_label(spec, pseudo_path(save_masks, sample.name), predicted)
            progress.update(len(group))
    return total.cpu()


@torch.inference_mode()
def features_of(network: nn.Module, image: Tensor, runtime: Runtime) -> SegOutput:
    """Logits and features of one whole image [3,H,W]."""
    network.eval()
    with runtime.cast():
        output: SegOutput = network(runtime.images(image[None]))
    return output
