"""Residual networks of He et al. 2016, "Deep Residual Learning for Image Recognition", with a 3x3 stem.

Section 4.2 for the thin networks of depth 6n+2 (16, 32, 64 channels), section 4.1 for ResNet-18.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Shortcut = Literal["pad", "project"]


def stage(block: Callable[[int, int, int], nn.Module], channels_in: int, channels_out: int, count: int, stride: int) -> nn.Sequential:
    """`count` blocks, each made by `block(channels_in, channels_out, stride)`; the first changes channels and resolution."""
    return nn.Sequential(block(channels_in, channels_out, stride), *(block(channels_out, channels_out, 1) for _ in range(count - 1)))


class PadShortcut(nn.Module):
    """Option A of He et al.: every second pixel, and zero channels around the old ones. Has no parameters."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.before = (channels_out - channels_in) // 2
        self.after = channels_out - channels_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))  # [N, C, H, W] -> [N, C', H/2, W/2]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is called `name`: [N, C, H, W] -> [N, C', H/stride, W/stride]."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, shortcut: Shortcut, name: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.name = name
        path: nn.Module = nn.Sequential()
        if stride != 1 or channels_in != channels_out:
            if shortcut == "pad":
                path = PadShortcut(channels_in, channels_out)
            else:
                path = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))
        self.add_module(name, path)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.get_submodule(self.name)(x))


class CifarResNet(nn.Module):
    """A residual network with a 3x3 stem. Its keys are `conv1 bn1 layer1..` and a head, which toolboxes call `linear` or `fc`."""

    def __init__(
        self, widths: Sequence[int], blocks: Sequence[int], shortcut: Shortcut, num_classes: int, names: tuple[str, str] = ("shortcut", "linear")
    ) -> None:
        super().__init__()
        shortcut_name, self.head = names
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        block = partial(BasicBlock, shortcut=shortcut, name=shortcut_name)
        channels = widths[0]
        self.stages = len(widths)
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            self.add_module(f"layer{number}", stage(block, channels, width, count, 1 if number == 1 else 2))
            channels = width
        self.add_module(self.head, nn.Linear(channels, num_classes))
        for module in self.modules():
            # On the meta device there is nothing to draw, and torch would import for seconds to find that out.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))  # [N, C, H, W]
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # [N, C, H', W'] -> [N, C]
        logits: Tensor = self.get_submodule(self.head)(x)  # [N, num_classes]
        return logits


def thin_resnet(depth: int, num_classes: int, *, projection: bool = False) -> CifarResNet:
    """ResNet of depth 6n+2 with 16, 32 and 64 channels (ResNet-20, -32, -44, -56, -110).

    Shortcuts are parameter-free (keys `layer.. linear`); with `projection` they are 1x1 convolutions (keys `layer..downsample fc`, as in
    chenyaofo's pytorch-cifar-models). Raises ValueError for another depth.
    """
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ValueError(f"depth must be 6n+2, not {depth}")
    if projection:
        return CifarResNet((16, 32, 64), (n, n, n), "project", num_classes, ("downsample", "fc"))
    return CifarResNet((16, 32, 64), (n, n, n), "pad", num_classes)


def resnet18(num_classes: int) -> CifarResNet:
    """ResNet-18 with a 3x3 stem and no first pooling, as kuangliu's pytorch-cifar and backdoor-toolbox have it."""
    return CifarResNet((64, 128, 256, 512), (2, 2, 2, 2), "project", num_classes)
