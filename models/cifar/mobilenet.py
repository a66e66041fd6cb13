"""MobileNetV2 (Sandler et al. 2018) for 32x32 inputs, as weiaicunzai's pytorch-cifar100 and backdoor-toolbox have it."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from models.cifar.resnet import stage


class LinearBottleneck(nn.Module):
    """Widen, filter each channel by itself, narrow; every convolution has a bias: [N, C, H, W] -> [N, C', H/stride, W/stride]."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels_in * expansion
        self.residual = nn.Sequential(
            *(nn.Conv2d(channels_in, width, 1), nn.BatchNorm2d(width), nn.ReLU6()),
            *(nn.Conv2d(width, width, 3, stride, 1, groups=width), nn.BatchNorm2d(width), nn.ReLU6()),
            *(nn.Conv2d(width, channels_out, 1), nn.BatchNorm2d(channels_out)),
        )
        self.adds = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.residual(x)
        return y + x if self.adds else y


class MobileNetV2(nn.Module):
    """Keys `pre stage1..7 conv1 conv2`. The stem is a padded 1x1 convolution, so that maps are 34 pixels wide; the head is one too."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        block = partial(LinearBottleneck, expansion=6)
        self.pre = nn.Sequential(nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6())
        self.stage1 = LinearBottleneck(32, 16, 1, 1)
        self.stage2 = stage(block, 16, 24, 2, 2)
        self.stage3 = stage(block, 24, 32, 3, 2)
        self.stage4 = stage(block, 32, 64, 4, 2)
        self.stage5 = stage(block, 64, 96, 3, 1)
        self.stage6 = stage(block, 96, 160, 3, 1)
        self.stage7 = LinearBottleneck(160, 320, 1, 6)
        self.conv1 = nn.Sequential(nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6())
        self.conv2 = nn.Conv2d(1280, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.pre(x))))  # [N, 3, 32, 32] -> [N, 32, 9, 9]
        x = self.stage7(self.stage6(self.stage5(self.stage4(x))))  # [N, 320, 5, 5]
        x = F.adaptive_avg_pool2d(self.conv1(x), 1)  # [N, 1280, 1, 1]
        logits: Tensor = self.conv2(x).flatten(1)  # [N, num_classes]
        return logits
