"""VGG-16 with batch norm (Simonyan and Zisserman 2015, "Very Deep Convolutional Networks", configuration D) with a head for 32x32 inputs.

As backdoor-toolbox has it: the keys are torchvision's, the head is 512 wide, and each of its dropouts stands before a layer.
"""

from __future__ import annotations

from torch import Tensor, nn

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions; each block halves the resolution


class VGG16BN(nn.Module):
    """Takes [N, 3, 32, 32] and no other size: five halvings leave one pixel, which the head reads."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for width, count in _BLOCKS:
            for _ in range(count):
                self.features.extend((nn.Conv2d(channels, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()))
                channels = width
            self.features.append(nn.MaxPool2d(2))
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(512, 512), nn.ReLU()),
            *(nn.Dropout(), nn.Linear(512, 512), nn.ReLU()),
            nn.Linear(512, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))  # [N, 3, 32, 32] -> [N, 512] -> [N, num_classes]
        return logits
