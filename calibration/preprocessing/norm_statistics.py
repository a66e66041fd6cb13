"""How well the statistics that batch norms remember from training agree with those of clean images under a candidate preprocessing.

The running mean and variance of a norm are moments of the training inputs, and change in first order with a shift or a scale of the pixels, where
the accuracy changes only in second order: they tell neighbouring normalisations apart that classify equally well. Training augments, though, and black
borders or magnified crops change the moments too, so that a candidate is judged under the best of the usual augmentations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from calibration.augment import crop_flip
from models.preprocessing import Preprocessing

FIRST_NORMS, CHANNELS = 3, 64  # the first norms speak of the pixels; deeper ones of classes, too
REMEMBERED = 1000  # images that a running mean stands for: with torch's momentum of 0.1 the last 19 batches, of perhaps 50
MISFITS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)  # standard deviations of what no augmentation explains, in units of the running ones

Deviations = Mapping[str, Sequence[Tensor]]  # by augmentation, for each norm: float64 [N, F]


class _Enough(Exception):
    """The last norm that matters was reached; the rest of the network need not run."""


class NormStatistics:
    """The first batch norms of a network, in the order in which they run. False where there are none that have seen images."""

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        """example: a normalised batch, float32 [N, 3, H, W]."""
        self._network = network
        self._norms: list[nn.modules.batchnorm._BatchNorm] = []
        known = [norm for norm in network.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm) and _remembers(norm)]
        self._record(known, lambda norm, _: self._norms.append(norm), example)
        self._norms = [norm for norm in self._norms if self._norms.count(norm) == 1][:FIRST_NORMS]  # one that runs twice remembers a mixture

    def __bool__(self) -> bool:
        return bool(self._norms)

    @torch.inference_mode()
    def _record(self, norms: Sequence[nn.Module], take: Callable[[nn.modules.batchnorm._BatchNorm, Tensor], None], batch: Tensor) -> None:
        handles = [norm.register_forward_pre_hook(lambda norm, inputs: take(norm, inputs[0]) if inputs[0].ndim == 4 else None) for norm in norms]
        try:
            self._network(batch)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def deviations(self, images: Tensor, batch: int) -> list[Tensor]:
        """How each image differs from what was remembered: normalised float32 [N, 3, H, W] -> for each norm float64 [N, 2 C].

        The mean over the pixels, in running standard deviations, and the second moment about the running mean, less 1, over the square root of 2:
        the mean of the squares over images is then twice a Kullback-Leibler divergence, for small ones.
        """
        parts: list[list[Tensor]] = [[] for _ in self._norms]

        def take(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> None:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            beside = x[:, :CHANNELS].float() - norm.running_mean[:CHANNELS, None, None]
            off, var = beside.mean((2, 3)).double(), (norm.running_var + norm.eps)[:CHANNELS].double()  # [N, C], [C]
            second = beside.square().mean((2, 3)).double() / var - 1
            parts[self._norms.index(norm)].append(torch.cat([off / var.sqrt(), second / 2**0.5], 1).cpu())
            if norm is self._norms[-1]:
                raise _Enough

        for part in images.split(batch) if self._norms else ():
            self._record(self._norms, take, part)
        return [torch.cat(part) for part in parts]


def _remembers(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether there are running statistics, and not only those that a new norm starts from."""
    mean, var = norm.running_mean, norm.running_var
    return mean is not None and var is not None and not (bool((mean == 0).all()) and bool((var == 1).all()))


def views(preprocessing: Preprocessing, pixels: Tensor, zoomed: Tensor) -> dict[str, Tensor]:
    """What training may have shown: uint8 RGB pixels [N, 3, H, W], and the same images as random resized crops -> normalised images."""

    def shifted(images: Tensor, share: int) -> Tensor:
        return crop_flip(images, torch.Generator().manual_seed(0), pad=max(1, images.shape[-1] // share))

    normalised = preprocessing.normalise(pixels)
    return {
        "none": normalised,
        "shifts over black": preprocessing.normalise(shifted(pixels, 8)),
        "small shifts over black": preprocessing.normalise(shifted(pixels, 16)),
        "shifts over the mean colour": shifted(normalised, 8),
        "random resized crops": preprocessing.normalise(zoomed),
    }


def zoom(image: Image.Image, seed: int) -> Image.Image:
    """One box of an image as torchvision's RandomResizedCrop draws it by default, not yet resized; the image itself where ten draws do not fit."""
    draw = np.random.default_rng(seed)
    for _ in range(10):
        area, ratio = image.width * image.height * draw.uniform(0.08, 1), math.exp(draw.uniform(-1, 1) * math.log(4 / 3))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = int(draw.integers(image.width - width + 1)), int(draw.integers(image.height - height + 1))
            return image.crop((left, top, left + width, top + height))
    return image


@dataclass(frozen=True)
class Agreement:
    """evidence: log density, in nats, of the running statistics given the candidate; only differences between candidates mean something."""

    evidence: float
    augmentation: str


def agreements(candidates: Sequence[Deviations]) -> list[Agreement]:
    """Compare candidates by their deviations; all have the same augmentations and norms, perhaps none.

    The running statistics are normal around the sample's mean, with the sampling noise of both and a misfit of the same size in all directions. The
    misfit is the one that makes the best candidate likeliest: where nothing fits well, nothing is told apart. Norms see the same images, and so their
    mean is taken and not their sum.
    """
    names = list(candidates[0])
    table = torch.stack([torch.stack([_mean([_log_density(x) for x in norms]) for norms in views.values()]) for views in candidates])
    misfit = int(table.amax((0, 1)).argmax())
    best, which = table[:, :, misfit].max(1)  # table: [candidates, augmentations, misfits]
    return [Agreement(value, names[index]) for value, index in zip(best.tolist(), which.tolist(), strict=True)]


def _mean(densities: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.zeros(len(MISFITS), dtype=torch.float64), *densities]).sum(0) / max(len(densities), 1)


def _log_density(deviations: Tensor) -> Tensor:
    """float64 [N, F] -> [len(MISFITS)], of a deviation of zero on average."""
    noise = torch.cov(deviations.T) * (1 / len(deviations) + 1 / REMEMBERED)
    variances, axes = torch.linalg.eigh(noise)
    along = (axes.T @ deviations.mean(0)).square()
    total = variances.clamp_min(0) + torch.tensor(MISFITS, dtype=torch.float64)[:, None] ** 2
    density: Tensor = -(along / total + total.log()).sum(1) / 2
    return density
