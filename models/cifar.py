"""The 32x32 networks of the research toolboxes, key-compatible with the checkpoints they write.

He et al. 2016, "Deep Residual Learning for Image Recognition": section 4.2 for the thin networks of depth 6n+2 (16, 32, 64
channels, parameter-free shortcuts), section 4.1 for ResNet-18, here with the 3x3 stem that every CIFAR toolbox gives it.
Inputs are float [N, 3, H, W], already normalised; outputs are logits [N, num_classes].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Shortcut = Literal["pad", "project"]


class PadShortcut(nn.Module):
    """Option A of He et al.: every second pixel, and zero channels around the old ones. Has no parameters."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.before = (channels_out - channels_in) // 2
        self.after = channels_out - channels_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))  # [N, C, H, W] -> [N, C', H/2, W/2]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: [N, C, H, W] -> [N, C', H/stride, W/stride]."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            if shortcut == "pad":
                self.shortcut = PadShortcut(channels_in, channels_out)
            else:
                self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """A residual network with a 3x3 stem; its keys are `conv1 bn1 layer1.. linear`, as the toolboxes have them."""

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], shortcut: Shortcut, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        self.stages = len(widths)
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            strides = [1 if stage == 1 else 2, *[1] * (count - 1)]
            layer = nn.Sequential()
            for stride in strides:
                layer.append(BasicBlock(channels, width, stride, shortcut))
                channels = width
            self.add_module(f"layer{stage}", layer)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            # On the meta device there is nothing to draw, and torch would import for seconds to find that out.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # [N, C, H, W]
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # [N, C, H', W'] -> [N, C]
        logits: Tensor = self.linear(x)  # [N, num_classes]
        return logits


def thin_resnet(depth: int, num_classes: int) -> CifarResNet:
    """ResNet of depth 6n+2 with 16, 32 and 64 channels (ResNet-20, -32, -44, -56, -110)."""
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ValueError(f"depth must be 6n+2, not {depth}")
    return CifarResNet((16, 32, 64), (n, n, n), "pad", num_classes)


def resnet18(num_classes: int) -> CifarResNet:
    """ResNet-18 with a 3x3 stem and no first pooling."""
    return CifarResNet((64, 128, 256, 512), (2, 2, 2, 2), "project", num_classes)
