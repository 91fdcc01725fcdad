"""Checkpoints: a network's weights with what is needed to build it again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cisc_ext.files import atomic_write
from cisc_ext.models import SegmentationModel, build_model
from cisc_ext.models.pretrained import load_weights, read_checkpoint


@dataclass(frozen=True)
class NetworkSpec:
    """What a network is: enough to build it and to read images for it."""

    model: str
    backbone: str
    num_classes: int
    output_stride: int | None = None
    dataset: str | None = None
    load_size: tuple[int, int] | None = None
    crop_size: int | None = None

    def build(self) -> SegmentationModel:
        """The network with fresh weights."""
        return build_model(self.model, self.backbone, self.num_classes, output_stride=self.output_stride)


def save_network(path: Path, network: SegmentationModel, spec: NetworkSpec) -> None:
    """Write weights and spec, loadable with `torch.load(weights_only=True)`."""
    save({"model": network.state_dict(), "spec": dataclasses.asdict(spec)}, path)


def save(value: Any, path: Path) -> None:
    """`torch.save`, atomically."""
    atomic_write(path, lambda stream: torch.save(value, stream))


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote; `FileNotFoundError` or `ValueError` name a file that is no checkpoint."""
    value = read_checkpoint(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a checkpoint (holds a {type(value).__name__})")
    return value


def read_spec(path: Path) -> NetworkSpec | None:
    """The spec in a checkpoint; None in one that was written elsewhere."""
    saved = load(path).get("spec")
    if saved is None:
        return None
    size = saved.get("load_size")
    return NetworkSpec(**{**saved, "load_size": None if size is None else tuple(size)})


def load_network(path: Path, spec: NetworkSpec) -> SegmentationModel:
    """The network of `spec` with the weights of a file, which may be written elsewhere."""
    network = spec.build()
    if load_weights(network, path) != "model":
        raise ValueError(f"{path}: holds a backbone only, not a {spec.model}")
    return network
