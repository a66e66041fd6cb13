"""The 32x32 networks of the research toolboxes, key-compatible with the checkpoints they write.

Inputs are float [N, 3, 32, 32], already normalised; outputs are logits [N, num_classes].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from models.cifar.mobilenet import MobileNetV2
from models.cifar.preact import PreActResNet18, WideResNet
from models.cifar.resnet import CifarResNet, resnet18, thin_resnet
from models.cifar.vgg import VGG16BN

_DEPTHS = (20, 32, 44, 56)
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(thin_resnet, depth) for depth in _DEPTHS},
    **{f"resnet{depth}_projection": partial(thin_resnet, depth, projection=True) for depth in _DEPTHS},
    "resnet18_cifar": resnet18,
    "preact_resnet18": PreActResNet18,
    "vgg16_bn_cifar": VGG16BN,
    "mobilenet_v2_cifar": MobileNetV2,
    "wide_resnet16_1": partial(WideResNet, 16, 1),
    "wide_resnet28_10": partial(WideResNet, 28, 10),
}
"""Name -> build(num_classes), with random weights."""

__all__ = ["NETWORKS", "VGG16BN", "CifarResNet", "MobileNetV2", "PreActResNet18", "WideResNet", "resnet18", "thin_resnet"]
