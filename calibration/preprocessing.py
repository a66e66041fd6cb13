"""Find the preprocessing that a suspect was trained with: the one under which it gets the clean set right.

Neighbouring normalisations give nearly the same accuracy; candidates that accuracy cannot tell apart are told apart by the likelihood of the labels,
which is much less noisy. (The statistics in batch norms were tried and are misleading: training pads images, and so shrinks what the norms saw.)
A first round on few images leaves the best for a second round on more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from models.preprocessing import Preprocessing

Triple = tuple[float, float, float]
NORMALISATIONS: dict[str, tuple[Triple, Triple]] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar10-batch": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "gtsrb": ((0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629)),
    "clip": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
}
FIRST_ROUND, SECOND_ROUND, FINALISTS = 100, 500, 4


@dataclass(frozen=True)
class Candidate:
    """A preprocessing and how well the suspect does under it."""

    preprocessing: Preprocessing
    accuracy: float
    log_likelihood: float  # mean of log softmax at the true label


@dataclass(frozen=True)
class Finding:
    """The candidates of the last round, best first."""

    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


def candidates(size: int, resized: bool) -> list[Preprocessing]:
    """What checkpoints in the wild were trained with; geometry varies only where images must be resized at all."""
    geometries = [(size, "bilinear")]
    if resized:
        shorter = (size,) if size < 96 else (size, round(size / 0.875))
        geometries = [(resize, how) for resize in shorter for how in ("bilinear", "bicubic")]
    found = []
    for (resize, how), (mean, std), channels in itertools.product(geometries, NORMALISATIONS.values(), ("rgb", "bgr")):
        place = (mean, std) if channels == "rgb" else (mean[::-1], std[::-1])
        found.append(Preprocessing(size, resize, how, channels, "unit", *place))  # type: ignore[arg-type]
    for resize, how in geometries:
        found.append(Preprocessing(size, resize, how, "rgb", "byte"))  # type: ignore[arg-type]
        found.append(Preprocessing(size, resize, how, "bgr", "byte", (103.939, 116.779, 123.68)))  # type: ignore[arg-type]  # Caffe's
    return found


def find_preprocessing(
    suspect: nn.Module, image: Callable[[int], Image.Image], rows: Sequence[int], labels: Tensor, size: int, device: torch.device
) -> Finding:
    """Compare all candidates on the images `rows` (labels int64 [len(rows)], in that order); `image(row)` is the decoded RGB image."""
    resized = any(image(row).size != (size, size) for row in rows[:20])
    left = candidates(size, resized)
    results: list[Candidate] = []
    for count, keep in ((FIRST_ROUND, FINALISTS), (SECOND_ROUND, FINALISTS)):
        pixels: dict[Preprocessing, Tensor] = {}  # by geometry alone: normalisations share their pixels
        results = []
        for candidate in left:
            geometry = replace(candidate, channels="rgb", scale="unit", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
            if geometry not in pixels:
                pixels[geometry] = torch.stack([geometry.pixels(image(row)) for row in rows[:count]]).to(device)
            results.append(_evaluate(suspect, candidate, pixels[geometry], labels[:count].to(device)))
        results = _ranked(results, min(count, len(rows)))
        left = [result.preprocessing for result in results[:keep]]
        if len(rows) <= count:
            break
    return Finding(tuple(results[:FINALISTS]))


def _ranked(results: list[Candidate], n: int) -> list[Candidate]:
    """Best first: those within two standard errors of the best accuracy by likelihood, then the others by accuracy."""
    best = max(result.accuracy for result in results)
    margin = 2 * math.sqrt(max(best * (1 - best), 1 / n) / n)

    def order(result: Candidate) -> tuple[bool, float]:
        tied = result.accuracy >= best - margin
        return tied, result.log_likelihood if tied else result.accuracy

    return sorted(results, key=order, reverse=True)


@torch.inference_mode()
def _evaluate(suspect: nn.Module, preprocessing: Preprocessing, pixels: Tensor, labels: Tensor) -> Candidate:
    logits = torch.cat([suspect(preprocessing.normalise(part)) for part in pixels.split(128)])
    right = (logits.argmax(1) == labels).float().mean().item()
    return Candidate(preprocessing, right, -F.cross_entropy(logits.double(), labels).item())
