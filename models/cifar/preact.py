"""Residual networks that normalise before they convolve.

He et al. 2016, "Identity Mappings in Deep Residual Networks", as kuangliu's pytorch-cifar and BackdoorBench have it; Zagoruyko and Komodakis 2016,
"Wide Residual Networks", as xternalz, NAD and backdoor-toolbox have it. Their block is the same but for the key of its projection.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from models.cifar.resnet import stage


class PreActBlock(nn.Module):
    """Norm, ReLU and a 3x3 convolution, twice, around a shortcut: [N, C, H, W] -> [N, C', H/stride, W/stride].

    Where channels change the shortcut is a 1x1 convolution, whose key is `projection`, of the first norm's output; elsewhere it is the input itself.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, projection: Literal["shortcut.0", "convShortcut"]) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.projection = projection if channels_in != channels_out else None
        if self.projection:
            convolution = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            name, nested, _ = projection.partition(".")
            self.add_module(name, nn.Sequential(convolution) if nested else convolution)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = self.get_submodule(self.projection)(y) if self.projection else x
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        total: Tensor = y + shortcut
        return total


class PreActResNet18(nn.Module):
    """Keys `conv1 layer1..4 linear`. Nothing normalises the last block's sum: it is pooled as it is."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        block = partial(PreActBlock, projection="shortcut.0")
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.layer1 = stage(block, 64, 64, 2, 1)
        self.layer2 = stage(block, 64, 128, 2, 2)
        self.layer3 = stage(block, 128, 256, 2, 2)
        self.layer4 = stage(block, 256, 512, 2, 2)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))  # [N, 512, H/8, W/8]
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))  # [N, num_classes]
        return logits


class WideResNet(nn.Module):
    """WRN of depth 6n+4, `width` times 16, 32 and 64 channels; keys `conv1 block1..3.layer bn1 fc`. Raises ValueError for another depth.

    Dropout inside the blocks, which the toolboxes leave at 0 and which has no key, is left out.
    """

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        n, rest = divmod(depth - 4, 6)
        if rest or n < 1:
            raise ValueError(f"depth must be 6n+4, not {depth}")
        block = partial(PreActBlock, projection="convShortcut")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = nn.Sequential(OrderedDict(layer=stage(block, 16, 16 * width, n, 1)))
        self.block2 = nn.Sequential(OrderedDict(layer=stage(block, 16 * width, 32 * width, n, 2)))
        self.block3 = nn.Sequential(OrderedDict(layer=stage(block, 32 * width, 64 * width, n, 2)))
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.relu(self.bn1(x))  # [N, 64 width, H/4, W/4]
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # [N, num_classes]
        return logits
