"""Random views of training images, made batch by batch on the tensors; every draw comes from the generator that is passed in."""

from __future__ import annotations

import torch
from torch import Tensor


def crop_flip(images: Tensor, generator: torch.Generator, pad: int = 4, mirror: bool = True) -> Tensor:
    """Mirror half of the images, unless `mirror` is False, and shift each by up to `pad` pixels over a black border.

    images: uint8 or float [N, C, H, W] on any device; generator: on the CPU, so that a seed gives the same views on every device.
    Returns the same shape and dtype.
    """
    n, _, height, width = images.shape
    flip = (torch.rand(n, generator=generator) < 0.5 * mirror).to(images.device)
    dy, dx = (torch.randint(0, 2 * pad + 1, (n, 1), generator=generator).to(images.device) for _ in range(2))
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))  # [N, C, H + 2 pad, W + 2 pad]
    rows = dy + torch.arange(height, device=images.device)  # [N, H]
    cols = torch.arange(width, device=images.device).expand(n, width)
    cols = dx + torch.where(flip[:, None], cols.flip(1), cols)  # [N, W]
    item = torch.arange(n, device=images.device)[:, None, None]
    return padded[item, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)  # [N, H, W, C] -> [N, C, H, W]


def resized_crop_flip(images: Tensor, generator: torch.Generator, least: float = 0.08) -> Tensor:
    """Zoom each image into a random box of `least` to all of its area and a side ratio of 3/4 to 4/3, and mirror half (ImageNet's usual view).

    uint8 [N, C, H, W]; returns the same shape and dtype.
    """
    n = len(images)
    area = torch.empty(n).uniform_(least, 1, generator=generator)
    ratio = torch.empty(n).uniform_(-0.2877, 0.2877, generator=generator).exp()  # log(4/3) = 0.2877
    scale = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # [N, 2]: width and height of the box
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - scale)
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    boxes = torch.zeros(n, 2, 3)
    boxes[:, 0, 0], boxes[:, 1, 1], boxes[:, :, 2] = scale[:, 0] * mirror, scale[:, 1], shift
    grid = torch.nn.functional.affine_grid(boxes.to(images.device), list(images.shape), align_corners=False)  # [N, H, W, 2]
    views = torch.nn.functional.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    return views.round().clamp(0, 255).to(images.dtype)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """The view that suits the size: shifts and mirrors for small images, resized crops for those of 96 pixels and more."""
    size = images.shape[-1]
    return crop_flip(images, generator, pad=size // 8) if size < 96 else resized_crop_flip(images, generator)
