"""Segmentation networks: DeepLabV3+, DeepLabV2 and PSPNet over any backbone.

Every one maps images [B,3,H,W] to `SegOutput(logits, features)`, both at feature resolution: logits at label
resolution are never made here, the losses and `predict` upsample inside their kernels. Weights carry the
names of the published ST++ and CISC-R models.

Sources: Chen et al., ECCV 2018 (DeepLabV3+) and TPAMI 2018 (DeepLabV2); Zhao et al., CVPR 2017 (PSPNet).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cisc_ext.models.backbones import Backbone


class SegOutput(NamedTuple):
    """What every network returns."""

    logits: Tensor  # [B,K,h,w]
    features: Tensor  # [B,C,h,w]: what the classifier sees


class SegmentationModel(nn.Module, ABC):
    """Holds `backbone`, checks the images and leaves the rest to `segment`."""

    head_lr_multiplier = 10.0

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> SegOutput:
        """Images [B,3,H,W], normalised, to logits [B,K,h,w] and features [B,C,h,w]."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected shape [B,3,H,W], got {list(images.shape)}")
        return self.segment(images)

    @abstractmethod
    def segment(self, images: Tensor) -> SegOutput:
        """`forward` behind the check."""


def conv_norm_relu(inputs: int, outputs: int, size: int, *, dilation: int = 1) -> list[nn.Module]:
    """A convolution that keeps the map's size, its batch norm and a ReLU."""
    padding = dilation * (size // 2)
    return [
        nn.Conv2d(inputs, outputs, size, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def upsample(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, corners aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def check_batch(images: int, norm: nn.Module) -> None:
    """Refuse a single image in training: pooled, it has one value per channel, which a batch norm cannot use.

    Norms of other types than the plain one, which share their statistics between processes, are let pass.
    """
    if norm.training and type(norm) is nn.BatchNorm2d and images == 1:
        raise ValueError(
            "batch size: expected at least 2 images in training (global pooling leaves one value per channel)"
            ", got 1: use a larger batch, a synchronised batch norm over several processes, or eval()"
        )


def dilations(rates: tuple[int, ...], output_stride: int) -> tuple[int, ...]:
    """`rates` at output stride 8, scaled so that they span the same part of the image at another stride."""
    return tuple(rate * 8 // output_stride for rate in rates)


class ImagePooling(nn.Module):
    """The mean over the whole map, projected, at every pixel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.gap = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm_relu(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B,inputs,h,w] to [B,outputs,h,w]."""
        check_batch(x.shape[0], self.gap[2])
        return self.gap(x).expand(-1, -1, *x.shape[-2:])


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling: 1 x 1, three dilated 3 x 3 and the image's mean, projected together."""

    def __init__(self, inputs: int, outputs: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = nn.Sequential(*conv_norm_relu(inputs, outputs, 1))
        self.b1 = nn.Sequential(*conv_norm_relu(inputs, outputs, 3, dilation=rates[0]))
        self.b2 = nn.Sequential(*conv_norm_relu(inputs, outputs, 3, dilation=rates[1]))
        self.b3 = nn.Sequential(*conv_norm_relu(inputs, outputs, 3, dilation=rates[2]))
        self.b4 = ImagePooling(inputs, outputs)
        self.project = nn.Sequential(*conv_norm_relu(5 * outputs, outputs, 1), nn.Dropout2d(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[B,inputs,h,w] to [B,outputs,h,w]."""
        return self.project(torch.cat([self.b0(x), self.b1(x), self.b2(x), self.b3(x), self.b4(x)], dim=1))


class DeepLabV3Plus(SegmentationModel):
    """DeepLabV3+; features [B,256,H/4,W/4] are the decoder's output in front of the classifier.

    The pyramid is an eighth as wide as the backbone's last map (256 for 2048); its rates are 12, 24, 36 at
    output stride 8 and half of that at 16.
    """

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone)
        low, high = backbone.channels
        self.head = AtrousPyramid(high, high // 8, dilations((12, 24, 36), backbone.output_stride))
        self.reduce = nn.Sequential(*conv_norm_relu(low, 48, 1))
        self.fuse = nn.Sequential(
            *conv_norm_relu(high // 8 + 48, 256, 3), *conv_norm_relu(256, 256, 3), nn.Dropout(0.1)
        )
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def segment(self, images: Tensor) -> SegOutput:
        """[B,3,H,W] to logits [B,K,H/4,W/4] and features [B,256,H/4,W/4]."""
        c1, c4 = self.backbone(images)
        context = upsample(self.head(c4), c1.shape[-2:])
        features = self.fuse(torch.cat([self.reduce(c1), context], dim=1))
        return SegOutput(self.classifier(features), features)


class DeepLabV2(SegmentationModel):
    """DeepLabV2: four dilated classifiers, summed; features are the backbone's last map.

    The rates are 6, 12, 18, 24 at output stride 8 and half of that at 16.
    """

    head_lr_multiplier = 1.0

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone)
        channels = backbone.channels[1]
        self.classifier = nn.ModuleList()
        for rate in dilations((6, 12, 18, 24), backbone.output_stride):
            layer = nn.Conv2d(channels, num_classes, 3, padding=rate, dilation=rate)
            nn.init.normal_(layer.weight, std=0.01)
            self.classifier.append(layer)

    def segment(self, images: Tensor) -> SegOutput:
        """[B,3,H,W] to logits [B,K,h,w] and features [B,C,h,w] at the backbone's output stride."""
        _, features = self.backbone(images)
        logits = self.classifier[0](features)
        for layer in self.classifier[1:]:
            logits = logits + layer(features)
        return SegOutput(logits, features)


class PyramidPooling(nn.Module):
    """The map and its means over 1, 2 x 2, 3 x 3 and 6 x 6 cells, each projected to a quarter as wide."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*conv_norm_relu(inputs, inputs // 4, 1))
        self.conv2 = nn.Sequential(*conv_norm_relu(inputs, inputs // 4, 1))
        self.conv3 = nn.Sequential(*conv_norm_relu(inputs, inputs // 4, 1))
        self.conv4 = nn.Sequential(*conv_norm_relu(inputs, inputs // 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] to [B,2C,h,w]."""
        check_batch(x.shape[0], self.conv1[1])
        levels = ((self.conv1, 1), (self.conv2, 2), (self.conv3, 3), (self.conv4, 6))
        pooled = [upsample(layer(F.adaptive_avg_pool2d(x, cells)), x.shape[-2:]) for layer, cells in levels]
        return torch.cat([x, *pooled], dim=1)


class PSPHead(nn.Module):
    """Pyramid pooling, a 3 x 3 convolution and the classifier, as one sequence `conv5`."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        width = inputs // 4
        self.conv5 = nn.Sequential(
            PyramidPooling(inputs),
            *conv_norm_relu(2 * inputs, width, 3),
            nn.Dropout(0.1),
            nn.Conv2d(width, num_classes, 1),
        )

    def forward(self, x: Tensor) -> SegOutput:
        """[B,C,h,w] to logits [B,K,h,w] and features [B,C/4,h,w]."""
        features = self.conv5[:-1](x)
        return SegOutput(self.conv5[-1](features), features)


class PSPNet(SegmentationModel):
    """PSPNet; features are the input of the last 1 x 1 convolution, a quarter of the backbone's width."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone)
        self.head = PSPHead(backbone.channels[1], num_classes)

    def segment(self, images: Tensor) -> SegOutput:
        """[B,3,H,W] to logits [B,K,h,w] and features [B,C/4,h,w] at the backbone's output stride."""
        return self.head(self.backbone(images)[1])
