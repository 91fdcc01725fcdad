"""Networks: `build_model` gives one with fresh weights; `SegOutput` is what every one returns."""

from __future__ import annotations

from cisc_ext.models.backbones import BACKBONES, build_backbone
from cisc_ext.models.heads import DeepLabV2, DeepLabV3Plus, PSPNet, SegmentationModel, SegOutput

__all__ = ["BACKBONES", "MODELS", "SegOutput", "SegmentationModel", "build_model", "head_lr_multiplier"]

CLASSES: dict[str, type[DeepLabV3Plus | DeepLabV2 | PSPNet]] = {
    "deeplabv3plus": DeepLabV3Plus,
    "deeplabv2": DeepLabV2,
    "pspnet": PSPNet,
}
MODELS = tuple(CLASSES)


def build_model(
    model: str, backbone: str, num_classes: int, *, output_stride: int | None = None
) -> SegmentationModel:
    """A network of `MODELS` over a backbone of `BACKBONES`, with fresh weights.

    model, backbone  names
    num_classes      K, at least 1
    output_stride    image pixels per pixel of the backbone's last map, 8, 16 or 32; by default 8, and 16 for
                     Xception-65

    Its forward maps images [B,3,H,W] to `SegOutput(logits [B,K,h,w], features [B,C,h,w])`, both at feature
    resolution (stride 4 for DeepLabV3+, else the output stride). `.backbone` holds the backbone's parameters.

    Raises `ValueError` for an unknown name, number of classes or output stride.
    """
    network = find(model)
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    return network(build_backbone(backbone, output_stride), num_classes)


def head_lr_multiplier(model: str) -> float:
    """How many times the backbone's learning rate the head of that network trains at."""
    return find(model).head_lr_multiplier


def find(model: str) -> type[DeepLabV3Plus | DeepLabV2 | PSPNet]:
    """The class of that name."""
    if model not in CLASSES:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    return CLASSES[model]
