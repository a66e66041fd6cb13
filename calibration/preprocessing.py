"""Find the preprocessing that a suspect was trained with, from labelled clean images.

Three kinds of evidence are added up, in nats: the likelihood of the labels, the agreement with the statistics in batch norms (norm_statistics.py), and
how usual a preprocessing is. The labels tell apart what differs much, the norms also what classifies equally well; without batch norms, neighbouring
normalisations stay undecided, and that is said. The search goes from coarse to fine, and looks at a few images before it looks at many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from calibration.labels import assignment, at_chance, decidedness, held_out
from calibration.norm_statistics import Agreement, Deviations, NormStatistics, agreements, views, zoom
from models.preprocessing import Preprocessing
from models.trunk import operations

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
RATIOS = (1.0, 0.95, 0.9, 0.875)  # side of the crop over the shorter side
LARGE = 160  # side from which on a crop of 0.875 is the usual one
INTERPOLATIONS: tuple[Literal["bilinear"], Literal["bicubic"]] = ("bilinear", "bicubic")

GLANCE, LOOK = 64, 256  # images of the first stages and of the last one
REACH, FINALISTS = 20.0, 12  # nats behind the best at a glance, and how many of those go on
ROUNDS = 3  # of varying the geometry and then the normalisation
# Where a whole search, some FORWARDS, costs more operations than AFFORDED, it looks at fewer images and fewer finalists; but not at fewer than these.
FORWARDS, AFFORDED = 4000, {"cpu": 2e12, "cuda": 1e15}
LEAST_GLANCE, LEAST_LOOK, LEAST_FINALISTS = 8, 48, 3
CLEAR = 3.0  # nats, and twice the standard error of the labels' part: what it takes to call a candidate the better one
DOUBT = 0.02  # share of labels that may be wrong: bounds what a single image can say
KEPT = 100_000_000  # pixels of decoded images that are kept
# Log priors, in nats: of reversed channels, of another data set's statistics (at most), of the clean set's own (which fit the sample better than the
# truth does), of geometries other than the usual one, and of crops that few use.
REVERSED, UNUSUAL, MISPLACED, UNKNOWN, OTHER_SIZE, OTHER_SHAPE, SELDOM = -0.5, -1.5, -4.0, -8.0, -3.0, -1.0, -2.0


@dataclass(frozen=True)
class Candidate:
    """A preprocessing and what speaks for it.

    accuracy, log_likelihood: of the labels, the latter a mean over images in nats. normalisation: its name. norms: evidence from batch norms, in nats,
    0 for the best finalist; None without batch norms. augmentation: the one that explains those best. usual: log prior. evidence: the sum over all
    images, in nats, 0 for the best finalist.
    """

    preprocessing: Preprocessing
    accuracy: float
    log_likelihood: float
    normalisation: str
    norms: float | None
    augmentation: str | None
    usual: float
    evidence: float


@dataclass(frozen=True)
class Finding:
    """The finalists: first the one that is taken, then the others by their evidence.

    clear: the evidence sets the first apart from the second. notes: what a reader should know, in plain sentences. images: how many were looked at,
    the first of `rows`. forwards: what it cost, in images through the whole network. relabelled: candidates were compared under another class order,
    since the labels do not fit any in the given one. logits: float32 [images, C] on the CPU, of the first candidate.
    """

    candidates: tuple[Candidate, ...]
    clear: bool
    notes: tuple[str, ...]
    images: int
    forwards: int
    relabelled: bool
    logits: Tensor = field(repr=False, compare=False)

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


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


def find_preprocessing(
    suspect: nn.Module,
    image: Callable[[int], Image.Image],
    rows: Sequence[int],
    labels: Tensor,
    sizes: Sequence[int],
    device: torch.device,
    claimed: Preprocessing | None = None,
) -> Finding:
    """Compare what is usual on the first 256 images of `rows`, which are in random order, or fewer where the suspect is costly.

    image(row): the decoded RGB image. labels: int64 [len(rows)], in the order of `rows`. sizes: sides of the square input that the suspect takes, the
    usual one first. claimed: what somebody says that the preprocessing is; it is taken unless the evidence is clearly against it. Deterministic.
    """
    share = _affordable(suspect, sizes[0], device)
    look = max(LEAST_LOOK, round(LOOK * share))
    return _Search(suspect, _Images(image, rows[:look]), labels[:look].cpu(), device, sizes, share).find(claimed)


def _affordable(suspect: nn.Module, size: int, device: torch.device) -> float:
    """The share of images, and as many of finalists, that makes the search affordable: the square root, since one multiplies the other."""
    cost = FORWARDS * operations(suspect, torch.zeros(1, 3, size, size, device=device))
    return math.sqrt(min(1.0, AFFORDED.get(device.type, AFFORDED["cpu"]) / max(1, cost)))


@dataclass(frozen=True)
class _Named:
    """A candidate before it is judged. usual: log prior."""

    preprocessing: Preprocessing
    name: str
    usual: float

    def __str__(self) -> str:
        p = self.preprocessing
        how = "" if p.resize == p.size and p.interpolation == "bilinear" and p.aspect == "keep" else f" from {p.resize}, {p.interpolation}, aspect {p.aspect}"
        return f"{self.name} at {p.size} pixels{how}"


class _Images:
    """The images to look at, decoded once where they are small, and as pixels of one geometry at a time."""

    def __init__(self, image: Callable[[int], Image.Image], rows: Sequence[int]) -> None:
        self._image, self._rows = image, rows
        self._kept: dict[int, Image.Image] = {}
        self._room = KEPT
        self._geometry, self._pixels = Preprocessing(), list[Tensor]()
        self._crops: dict[Preprocessing, Tensor] = {}
        self.sides = [self[place].size for place in range(min(len(rows), 20))]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Image.Image:
        if place in self._kept:
            return self._kept[place]
        image = self._image(self._rows[place])
        if (size := image.width * image.height) <= self._room:
            self._kept[place] = image
            self._room -= size
        return image

    def pixels(self, geometry: Preprocessing, start: int, stop: int) -> Tensor:
        """uint8 [stop - start, 3, size, size]."""
        if geometry != self._geometry:
            self._geometry, self._pixels = geometry, []
        self._pixels += [geometry.pixels(self[place]) for place in range(len(self._pixels), stop)]
        return torch.stack(self._pixels[start:stop])

    def crops(self, geometry: Preprocessing) -> Tensor:
        """All images as random resized crops to the size and with the interpolation of this geometry, uint8 [N, 3, size, size]."""
        square = replace(geometry, resize=geometry.size, aspect="stretch")
        if square not in self._crops:
            self._crops[square] = torch.stack([square.pixels(zoom(self[place], seed=place)) for place in range(len(self))])
        return self._crops[square]


class _Search:
    """What was computed so far. `targets` is what the suspect should answer: the labels, perhaps reordered; None where they tell nothing."""

    def __init__(self, suspect: nn.Module, images: _Images, labels: Tensor, device: torch.device, sizes: Sequence[int], share: float) -> None:
        self.suspect, self.images, self.labels, self.device, self.sizes = suspect, images, labels, device, sizes
        self.targets: Tensor | None = labels
        self.relabelled, self.forwards = False, 0
        self.glance, self.most = max(LEAST_GLANCE, round(GLANCE * share)), max(LEAST_FINALISTS, round(FINALISTS * share))
        self.answers: dict[Preprocessing, Tensor] = {}  # float32 [n, C] on the CPU, of the first n images
        self.finalists: dict[_Named, Deviations] = {}
        geometry = self._geometries(sizes[0])[0]
        pixels = images.pixels(geometry, 0, len(images))
        values = pixels.double() / 255  # [N, 3, H, W]
        means, std = values.mean((2, 3)), values.std((0, 2, 3)).clamp_min(0.01)
        self.known = normalisations(means.mean(0), std, torch.cov(means.T) / len(means))
        self.norms = NormStatistics(suspect, geometry.normalise(pixels[:1].to(device)))

    def find(self, claimed: Preprocessing | None) -> Finding:
        likely = self._likely_sizes()
        geometry = self._geometries(likely[0])[0]
        self._judge(self._promising([self._named(geometry, name) for name in self.known]))
        if self.targets is self.labels:
            self._reorder(self._ranked()[0])  # a few classes may be in another order
        for _ in range(ROUNDS):
            best = self._ranked()[0]
            self._judge(self._promising([self._named(geometry, best.name) for size in likely for geometry in self._geometries(size)]))
            ranked = self._ranked()
            names = list(dict.fromkeys(named.name for named in ranked))
            self._judge([self._named(_geometry(ranked[0].preprocessing), name) for name in names[: 1 + self.most // 3]])
            if self._ranked()[0] is best:
                break
        if claimed is not None and claimed.size in self.sizes:
            known = (name for name, (p, _) in self.known.items() if _at(p, claimed) == claimed)
            self._judge([_Named(claimed, next(known, "claimed"), 0.0)])
        return self._conclude(claimed)

    # Candidates

    def _geometries(self, size: int) -> list[Preprocessing]:
        """Ways to make a square of this side, the usual one first; only one where all images have it already."""
        if all(side == (size, size) for side in self.images.sides):
            return [Preprocessing(size, size)]
        resizes = [math.floor(size / ratio) for ratio in (reversed(RATIOS) if size >= LARGE else RATIOS)]  # floor: timm's
        stretched = INTERPOLATIONS if any(width != height for width, height in self.images.sides) else ()
        kept = [Preprocessing(size, resize, how) for resize in resizes for how in INTERPOLATIONS]
        return kept + [Preprocessing(size, size, how, aspect="stretch") for how in stretched]

    def _named(self, geometry: Preprocessing, name: str) -> _Named:
        preprocessing, usual = self.known[name]
        first = self._geometries(geometry.size)[0]
        usual += OTHER_SIZE * (geometry.size != self.sizes[0]) + OTHER_SHAPE * ((geometry.resize, geometry.aspect) != (first.resize, first.aspect))
        usual += SELDOM * (geometry.resize not in (geometry.size, math.floor(geometry.size / 0.875)))
        return _Named(_at(preprocessing, geometry), name, usual)

    def _likely_sizes(self) -> list[int]:
        """The best one or two. All that are smaller than the usual one are tried, since they are cheap; larger ones while they are better.

        Settles the targets on the way: where no candidate fits the labels, one may fit them in another order.
        """

        def at(size: int, names: Sequence[str] = COARSE) -> list[_Named]:
            return [self._named(self._geometries(size)[0], name) for name in names]

        usual = self.sizes[0]
        most = max(2 * usual, 1.25 * float(np.median([min(side) for side in self.images.sides])))
        tried = [named for size in self.sizes if size <= usual for named in at(size)]
        if not self._fits(tried):
            tried += at(usual, [name for name in self.known if name not in COARSE])
        for size in sorted(size for size in self.sizes if usual < size <= most):
            best, fits = max(tried, key=self._glance), self._fits(tried)
            if fits and best.preprocessing.size < max(named.preprocessing.size for named in tried):
                break
            tried += at(size, (best.name,) if fits else COARSE)
        if not self._fits(tried):
            decided = sorted(tried, key=lambda named: decidedness(self._logits(named, self.glance)))[-self.most :]
            self._reorder(max(decided, key=lambda named: _agreement(self._logits(named, LOOK), held_out(self._logits(named, LOOK), self.labels))))
            if not self.relabelled:
                self.targets = None
        return list(dict.fromkeys(named.preprocessing.size for named in self._promising(tried)))[:2]

    def _fits(self, tried: Sequence[_Named]) -> bool:
        best = max(tried, key=self._glance)
        return any(not at_chance(self._accuracy(best, n), self.labels, min(n, len(self.images))) for n in (self.glance, LOOK))

    def _reorder(self, named: _Named) -> None:
        """Take what the labels mean under this candidate for the target."""
        found = assignment(self._logits(named, LOOK), self.labels)
        if found is not None:
            self.targets, self.relabelled = found[self.labels], True

    # Evidence

    @torch.inference_mode()
    def _logits(self, named: _Named, n: int) -> Tensor:
        """float32 [n, C]: the suspect's answers to the first n images, or to all where there are fewer."""
        p, n = named.preprocessing, min(n, len(self.images))
        done = self.answers.get(p, torch.empty(0))
        if len(done) < n:
            pixels = self.images.pixels(_geometry(p), len(done), n).to(self.device)
            answers = [self.suspect(p.normalise(part)).float().cpu() for part in pixels.split(_batch(p.size))]
            self.answers[p] = torch.cat([done, *answers] if len(done) else answers)
            self.forwards += len(pixels)
        return self.answers[p][:n]

    def _accuracy(self, named: _Named, n: int = LOOK) -> float:
        return _agreement(self._logits(named, n), self.labels[:n])

    def _likelihoods(self, named: _Named, n: int = LOOK) -> Tensor:
        """float64 [n]: the log probability of each target, where a few may be wrong; without targets, how far each answer is from the mean answer."""
        p = self._logits(named, n).double().softmax(1)
        if self.targets is None:
            spread: Tensor = (p * p.mean(0).clamp_min(1e-300).log()).sum(1).neg() - torch.special.entr(p).sum(1)
            return spread
        return ((1 - DOUBT) * p.gather(1, self.targets[: len(p), None])[:, 0] + DOUBT / p.shape[1]).log()

    def _glance(self, named: _Named) -> float:
        return float(self._likelihoods(named, self.glance).sum()) + named.usual

    def _promising(self, tried: Sequence[_Named]) -> list[_Named]:
        """Those that are worth more images, at least two if there are two, best first."""
        ranked = sorted(tried, key=self._glance, reverse=True)[: self.most]
        return ranked[:2] + [named for named in ranked[2:] if self._glance(named) >= self._glance(ranked[0]) - REACH]

    def _judge(self, new: Sequence[_Named]) -> None:
        """Make these finalists."""
        for named in sorted(new, key=lambda named: str(_geometry(named.preprocessing))):  # the pixels of a geometry are made once
            if named not in self.finalists:
                p, geometry = named.preprocessing, _geometry(named.preprocessing)
                self._logits(named, LOOK)
                pixels = self.images.pixels(geometry, 0, len(self.images)).to(self.device)
                seen = views(p, pixels, self.images.crops(geometry).to(self.device)) if self.norms else {"none": pixels[:0]}
                self.finalists[named] = {name: self.norms.deviations(view, _batch(p.size)) for name, view in seen.items()}

    def _evidence(self) -> dict[_Named, tuple[float, Agreement]]:
        agreed = zip(self.finalists, agreements(list(self.finalists.values())), strict=True)
        return {named: (float(self._likelihoods(named).sum()) + agreement.evidence + named.usual, agreement) for named, agreement in agreed}

    def _ranked(self) -> list[_Named]:
        """The finalists, best first."""
        evidence = self._evidence()
        return sorted(evidence, key=lambda named: -evidence[named][0])

    def _clearly_better(self, one: _Named, other: _Named) -> bool:
        evidence, difference = self._evidence(), self._likelihoods(one) - self._likelihoods(other)
        margin = max(CLEAR, 2 * float(difference.std()) * math.sqrt(len(difference)))
        return self.targets is not None and one is not other and evidence[one][0] - evidence[other][0] >= margin

    def _conclude(self, claimed: Preprocessing | None) -> Finding:
        ranked, notes = self._ranked(), list[str]()
        tied = [named for named in ranked if named.name == ranked[0].name and not self._clearly_better(ranked[0], named)]
        usual = max(tied, key=lambda named: named.usual)
        ranked = [usual, *(named for named in ranked if named is not usual)]  # of geometries that the images do not tell apart, the usual one
        said = next((named for named in ranked if named.preprocessing == claimed), None)
        if said is not None and said is not ranked[0]:
            if self._clearly_better(ranked[0], said):
                notes.append(f"The preprocessing that is claimed ({said}) is not taken: the clean images speak clearly for {ranked[0]}.")
            else:
                notes.append(f"The preprocessing that is claimed ({said}) is taken, although {ranked[0]} fits the clean images slightly better.")
                ranked = [said, *(named for named in ranked if named is not said)]
        elif claimed is not None and said is None:
            notes.append(f"The preprocessing that is claimed was not tried: the suspect does not take {claimed.size} pixels.")
        first, second = ranked[:2]
        clear = self._clearly_better(first, second)
        if not clear and said is not first:
            alike = _agreement(self._logits(first, LOOK), self._logits(second, LOOK).argmax(1))
            notes.append(f"{second} explains the clean images about as well as {first}; the suspect answers alike to {alike:.0%} of them.")
        if first.name.startswith(OWN):
            notes.append("No known normalisation fits the suspect; the mean and standard deviation of the clean images themselves are taken.")
        if self.relabelled:
            notes.append("The labels do not fit the suspect's outputs in the given class order; candidates were compared under a better one.")
        if self.targets is None:
            notes.append("The suspect gets no more clean images right than chance under any candidate; they were compared without the labels.")
        evidence = self._evidence()
        top = max(agreement.evidence for _, agreement in evidence.values()), max(total for total, _ in evidence.values())
        candidates = [
            Candidate(
                preprocessing=named.preprocessing,
                normalisation=named.name,
                accuracy=self._accuracy(named),
                log_likelihood=float(self._likelihoods(named).mean()),
                norms=evidence[named][1].evidence - top[0] if self.norms else None,
                augmentation=evidence[named][1].augmentation if self.norms else None,
                usual=named.usual,
                evidence=evidence[named][0] - top[1],
            )
            for named in ranked
        ]
        return Finding(tuple(candidates), clear, tuple(notes), len(self.images), self.forwards, self.relabelled, self._logits(first, LOOK))


def _geometry(p: Preprocessing) -> Preprocessing:
    return _at(Preprocessing(), p)


def _at(p: Preprocessing, geometry: Preprocessing) -> Preprocessing:
    return replace(p, size=geometry.size, resize=geometry.resize, interpolation=geometry.interpolation, aspect=geometry.aspect)


def _agreement(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def _batch(size: int) -> int:
    """Images at a time: what the first layers of a large network make of them must fit into memory."""
    return max(8, min(128, 2**22 // size**2))
