"""The preprocessings that checkpoints in the wild were trained with, and how usual each is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from models.preprocessing import Preprocessing

Triple = tuple[float, float, float]
NORMALISATIONS: dict[str, tuple[Triple, Triple]] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # timm's "inception"
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# Statistics of one data set, which seldom go with another one.
DATA_SETS: dict[str, tuple[Triple, Triple]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar10-image": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)),  # the mean of each image's standard deviation
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "gtsrb": ((0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629)),
    "gtsrb-full": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "clip": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "tiny-imagenet-pixel": ((0.4802, 0.4481, 0.3975), (0.277, 0.2691, 0.2821)),
}
RARER = ("gtsrb-full", "tiny-imagenet-pixel")  # of two figures for one data set, too close to each other to be told apart
OWN = "the clean set's own"
COARSE = ("none", "half", "imagenet", "byte", "byte-mean bgr")
RATIOS: Sequence[float] = (1.0, 0.95, 0.9, 0.875)  # side of the crop over the shorter side
LARGE = 160  # side from which on a crop of 0.875 is the usual one
INTERPOLATIONS: tuple[Literal["bilinear"], Literal["bicubic"]] = ("bilinear", "bicubic")

# Log priors, in nats: of reversed channels, of another data set's statistics (at most), of the clean set's own (which fit the sample better than the
# truth does), of geometries other than the usual one, and of crops that few use.
REVERSED, UNUSUAL, MISPLACED, UNKNOWN, OTHER_SIZE, OTHER_SHAPE, SELDOM = -0.5, -1.5, -4.0, -8.0, -3.0, -1.0, -2.0
CUSTOM = 1.0  # and of the normalisation that the architecture is commonly used with


def normalisations(mean: Tensor, std: Tensor, noise: Tensor) -> dict[str, tuple[Preprocessing, float]]:
    """What checkpoints in the wild were trained with, in both channel orders: name -> (preprocessing, log prior).

    mean, std: float64 [3], of the clean images' pixels in [0, 1]; noise: [3, 3], the covariance of that mean.
    """
    rgb = {name: (Preprocessing(mean=m, std=s), 0.0) for name, (m, s) in NORMALISATIONS.items()}
    precision = torch.linalg.inv(noise + 0.005**2 * torch.eye(3, dtype=torch.float64))
    for name, (m, s) in DATA_SETS.items():
        off = torch.tensor(m, dtype=torch.float64) - mean
        rgb[name] = (Preprocessing(mean=m, std=s), max(MISPLACED, -float(off @ precision @ off) / 4) + UNUSUAL * (name in RARER))
    rgb["byte"] = (Preprocessing(scale="byte"), 0.0)
    rgb["byte-mean"] = (Preprocessing(scale="byte", mean=(123.68, 116.779, 103.939)), 0.0)  # in reversed order Caffe's
    own = [(round(float(v[0]), 3), round(float(v[1]), 3), round(float(v[2]), 3)) for v in (mean, std)]
    rgb[OWN] = (Preprocessing(mean=own[0], std=own[1]), UNKNOWN)
    bgr = {f"{name} bgr": (replace(p, channels="bgr", mean=p.mean[::-1], std=p.std[::-1]), prior + REVERSED) for name, (p, prior) in rgb.items()}
    return {**rgb, **bgr}


@dataclass(frozen=True)
class Named:
    """A candidate before it is judged. usual: log prior."""

    preprocessing: Preprocessing
    name: str
    usual: float

    def __str__(self) -> str:
        p = self.preprocessing
        how = "" if p.resize == p.size and p.interpolation == "bilinear" and p.aspect == "keep" else f" from {p.resize}, {p.interpolation}, aspect {p.aspect}"
        return f"{self.name} at {p.size} pixels{how}"


class Candidates:
    """All that a search may try. `usual` is what the suspect's architecture is commonly used with, None where that is not known."""

    def __init__(self, sizes: Sequence[int], sides: Sequence[tuple[int, int]], usual: Preprocessing | None) -> None:
        """sizes: sides of the square input that the suspect takes, the usual one first; sides: (width, height) of some of the clean images."""
        self.sizes, self.sides, self.usual = sizes, sides, usual
        self.known: dict[str, tuple[Preprocessing, float]] = {}

    def learn(self, pixels: Tensor) -> None:
        """Make the normalisations known, with the statistics of these clean images: uint8 [N, 3, H, W]."""
        values = pixels.double() / 255
        means, std = values.mean((2, 3)), values.std((0, 2, 3)).clamp_min(0.01)
        self.known = normalisations(means.mean(0), std, torch.cov(means.T) / len(means))
        if self.usual is not None and self._name(self.usual) is None:
            self.known["the architecture's own"] = (self.usual, 0.0)

    def geometries(self, size: int) -> list[Preprocessing]:
        """Ways to make a square of this side, the usual one first."""
        whole = all(side == (size, size) for side in self.sides)  # nothing needs to be done
        ratios = RATIOS if size < LARGE or whole else RATIOS[::-1]
        if size < LARGE and all(max(side) <= size for side in self.sides):
            # Nothing is cut away of what is enlarged; but labels would often speak for it: what a network knows it likes a little larger than it was shown
            # it (Touvron et al. 2019, "Fixing the train-test resolution discrepancy").
            ratios = RATIOS[:1]
        resizes = [math.floor(size / ratio) for ratio in ratios]  # floor: timm's
        stretched = INTERPOLATIONS if any(width != height for width, height in self.sides) else ()
        kept = [Preprocessing(size, resize, how) for resize in resizes for how in INTERPOLATIONS if not (whole and resize == size and how == "bicubic")]
        found = kept + [Preprocessing(size, size, how, aspect="stretch") for how in stretched]
        if not whole and self.usual is not None and self.usual.size == size:
            found.insert(0, geometry(self.usual))
        return list(dict.fromkeys(found))

    def named(self, shape: Preprocessing, name: str) -> Named:
        """The known normalisation of this name behind the geometry of `shape`."""
        preprocessing, prior = self.known[name]
        first = self.geometries(shape.size)[0]
        prior += OTHER_SIZE * (shape.size != self.sizes[0]) + OTHER_SHAPE * ((shape.resize, shape.aspect) != (first.resize, first.aspect))
        prior += SELDOM * (shape.resize not in (shape.size, math.floor(shape.size / 0.875), first.resize))
        prior += CUSTOM * (self.usual is not None and _normalisation(self.usual) == _normalisation(preprocessing))
        return Named(at(preprocessing, shape), name, prior)

    def claimed(self, claim: Preprocessing) -> Named:
        return Named(claim, self._name(claim) or "claimed", 0.0)

    def customary(self) -> Named:
        """What to take where nothing is known of the suspect but its architecture: its usual one, or that of the data set most like the clean images."""
        if self.usual is not None:
            return self.named(geometry(self.usual), self._name(self.usual) or "none")
        name = max(DATA_SETS, key=lambda name: self.known[name][1])
        return self.named(self.geometries(self.sizes[0])[0], name if self.known[name][1] > MISPLACED / 2 else "none")

    def _name(self, preprocessing: Preprocessing) -> str | None:
        return next((name for name, (known, _) in self.known.items() if _normalisation(known) == _normalisation(preprocessing)), None)


def geometry(preprocessing: Preprocessing) -> Preprocessing:
    """The same size, resize, interpolation and aspect, without a normalisation."""
    return at(Preprocessing(), preprocessing)


def at(preprocessing: Preprocessing, shape: Preprocessing) -> Preprocessing:
    """This normalisation behind the geometry of `shape`."""
    return replace(preprocessing, size=shape.size, resize=shape.resize, interpolation=shape.interpolation, aspect=shape.aspect)


def _normalisation(preprocessing: Preprocessing) -> tuple[object, ...]:
    """To compare by: libraries write the same figures with more or fewer digits."""
    return preprocessing.channels, preprocessing.scale, *(round(value, 3) for value in (*preprocessing.mean, *preprocessing.std))
