"""Backbones: ResNet-18/34/50/101 and aligned Xception-65, dilated to a wanted output stride.

Weights carry the names of the public ImageNet checkpoints, so those load as they are. A dilated network
computes, at every n-th pixel, exactly what its undilated form computes: strides are removed and convolutions
behind them are spread by the same factor.

Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; Chen et al., "Encoder-Decoder
with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018 (Xception-65, output stride).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

OUTPUT_STRIDES = (8, 16, 32)


class Backbone(nn.Module):
    """An image [B,3,H,W] to its maps (c1 [B,C1,H/4,W/4], c4 [B,C4,H/s,W/s]), sizes rounded up.

    `channels` is (C1, C4), `output_stride` is s, and with `classifier_prefix` begin the keys of the ImageNet
    classifier that a public checkpoint has on top.
    """

    classifier_prefix: ClassVar[str]
    channels: tuple[int, int]
    output_stride: int

    def initialize(self) -> None:
        """Fresh weights: Kaiming's normal (fan-out; fan-in for depthwise convolutions), norms at 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module.groups > 1:
                    nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                else:
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)


class Dilator:
    """Turns the strides of consecutive stages into dilation once `output_stride` is reached."""

    def __init__(self, output_stride: int, stride: int) -> None:
        self.output_stride = output_stride
        self.stride = stride
        self.dilation = 1

    def stage(self, stride: int) -> tuple[int, int, int]:
        """For a stage with `stride`: (stride left, dilation up to and in it, dilation behind it)."""
        before = self.dilation
        if self.stride * stride > self.output_stride:
            self.dilation *= stride
            return 1, before, self.dilation
        self.stride *= stride
        return stride, before, before


def conv(
    inputs: int, outputs: int, size: int, *, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A convolution without bias, padded so that stride 1 keeps the size."""
    padding = dilation * (size // 2)
    return nn.Conv2d(inputs, outputs, size, stride, padding, dilation, groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and the identity; `dilations` are those of the first and of the second."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride=stride, dilation=dilations[0])
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, dilation=dilations[1])
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B,inputs,h,w] to [B,width,h/stride,w/stride]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y = y + (x if self.downsample is None else self.downsample(x))
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and the identity; the 3 x 3 has the stride and `dilations[0]`."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride=stride, dilation=dilations[0])
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B,inputs,h,w] to [B,4*width,h/stride,w/stride]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y = y + (x if self.downsample is None else self.downsample(x))
        return F.relu(y, inplace=True)


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The 1 x 1 convolution beside a block that changes width or size; None where the identity fits."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs))


class ResNet(Backbone):
    """ResNet of `block`s, `depths` of them in its four layers. Names as in the ImageNet checkpoints."""

    classifier_prefix = "fc."

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: tuple[int, int, int, int], output_stride: int
    ) -> None:
        super().__init__()
        self.channels = (64 * block.expansion, 512 * block.expansion)
        self.output_stride = output_stride
        self.conv1 = conv(3, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        dilator = Dilator(output_stride, stride=4)
        inputs = 64
        layers = []
        for index, depth in enumerate(depths):
            width = 64 << index
            stride, before, behind = dilator.stage(1 if index == 0 else 2)
            blocks: list[nn.Module] = [block(inputs, width, stride, (before, behind))]
            inputs = width * block.expansion
            blocks += [block(inputs, width, 1, (behind, behind)) for _ in range(depth - 1)]
            layers.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.initialize()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B,3,H,W] to (c1, c4), the maps of the first and of the last layer."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        c1 = self.layer1(x)
        return c1, self.layer4(self.layer3(self.layer2(c1)))


def xception_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with the epsilon of the published Xception-65."""
    return nn.BatchNorm2d(channels, eps=1e-3)


class ConvNorm(nn.Module):
    """A convolution and its batch norm."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, size, stride=stride)
        self.bn = xception_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B,inputs,h,w] to [B,outputs,h/stride,w/stride]."""
        return self.bn(self.conv(x))


class SeparableConv(nn.Module):
    """A 3 x 3 depthwise and a 1 x 1 convolution, each with its norm and, if `relu`, rectified."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int, relu: bool) -> None:
        super().__init__()
        self.conv_dw = conv(inputs, inputs, 3, stride=stride, dilation=dilation, groups=inputs)
        self.bn_dw = xception_norm(inputs)
        self.conv_pw = conv(inputs, outputs, 1)
        self.bn_pw = xception_norm(outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[B,inputs,h,w] to [B,outputs,h/stride,w/stride]."""
        x = self.bn_dw(self.conv_dw(x))
        if self.relu:
            x = F.relu(x, inplace=True)
        x = self.bn_pw(self.conv_pw(x))
        return F.relu(x, inplace=True) if self.relu else x


class XceptionBlock(nn.Module):
    """Three separable convolutions, the last with the stride.

    With `residual` each is rectified in front and the (projected) input is added; without, each is rectified
    inside.
    """

    def __init__(
        self, inputs: int, outputs: tuple[int, int, int], stride: int, dilation: int, *, residual: bool = True
    ) -> None:
        super().__init__()
        self.residual = residual
        project = residual and (stride != 1 or inputs != outputs[-1])
        self.shortcut = ConvNorm(inputs, outputs[-1], 1, stride) if project else None
        widths = (inputs, *outputs)
        self.stack = nn.ModuleDict(
            {
                f"conv{i + 1}": SeparableConv(
                    widths[i], widths[i + 1], stride if i == 2 else 1, dilation, relu=not residual
                )
                for i in range(3)
            }
        )

    def inner(self, x: Tensor) -> Tensor:
        """[B,inputs,h,w] to what enters the third convolution, [B,outputs[1],h,w]."""
        if not self.residual:
            return self.stack["conv2"](self.stack["conv1"](x))
        y = F.relu(self.stack["conv1"](F.relu(x)), inplace=True)
        return F.relu(self.stack["conv2"](y), inplace=True)

    def outer(self, x: Tensor, inner: Tensor) -> Tensor:
        """The block's output, [B,outputs[2],h/stride,w/stride], from its input and `inner`."""
        y = self.stack["conv3"](inner)
        if not self.residual:
            return y
        return y + (x if self.shortcut is None else self.shortcut(x))

    def forward(self, x: Tensor) -> Tensor:
        """[B,inputs,h,w] to [B,outputs[2],h/stride,w/stride]."""
        return self.outer(x, self.inner(x))


class Xception65(Backbone):
    """Aligned Xception-65. Names as in the ImageNet checkpoint of PyTorch Image Models (`xception65`).

    c1 is what enters the strided convolution of the second block, rectified: 256 channels at stride 4.
    """

    classifier_prefix = "head."

    def __init__(self, output_stride: int) -> None:
        super().__init__()
        self.channels = (256, 2048)
        self.output_stride = output_stride
        self.stem = nn.ModuleList([ConvNorm(3, 32, 3, stride=2), ConvNorm(32, 64, 3, stride=1)])
        dilator = Dilator(output_stride, stride=2)

        def block(
            inputs: int, outputs: tuple[int, int, int], stride: int, residual: bool = True
        ) -> XceptionBlock:
            stride_left, dilation, _ = dilator.stage(stride)
            return XceptionBlock(inputs, outputs, stride_left, dilation, residual=residual)

        self.blocks = nn.ModuleList(
            [
                block(64, (128, 128, 128), 2),
                block(128, (256, 256, 256), 2),
                block(256, (728, 728, 728), 2),
                *(block(728, (728, 728, 728), 1) for _ in range(16)),
                block(728, (728, 1024, 1024), 2),
                block(1024, (1536, 1536, 2048), 1, residual=False),
            ]
        )
        self.initialize()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B,3,H,W] to (c1, c4), the maps inside the second and behind the last block."""
        x = images
        for layer in self.stem:
            x = F.relu(layer(x), inplace=True)
        x = self.blocks[0](x)
        second = cast(XceptionBlock, self.blocks[1])
        c1 = second.inner(x)
        x = second.outer(x, c1)
        for layer in self.blocks[2:]:
            x = layer(x)
        return c1, x


BUILDERS: dict[str, tuple[Callable[[int], Backbone], int]] = {
    "resnet18": (partial(ResNet, BasicBlock, (2, 2, 2, 2)), 8),
    "resnet34": (partial(ResNet, BasicBlock, (3, 4, 6, 3)), 8),
    "resnet50": (partial(ResNet, Bottleneck, (3, 4, 6, 3)), 8),
    "resnet101": (partial(ResNet, Bottleneck, (3, 4, 23, 3)), 8),
    "xception65": (Xception65, 16),
}
BACKBONES = tuple(BUILDERS)


def build_backbone(name: str, output_stride: int | None = None) -> Backbone:
    """The backbone of that name, freshly initialised; by default at output stride 8, Xception-65 at 16.

    Raises `ValueError` for another name or an output stride other than 8, 16 and 32.
    """
    if name not in BUILDERS:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {name!r}")
    build, default = BUILDERS[name]
    stride = default if output_stride is None else output_stride
    if stride not in OUTPUT_STRIDES:
        raise ValueError(
            f"output_stride: expected one of {', '.join(map(str, OUTPUT_STRIDES))}, got {stride!r}"
        )
    return build(stride)
