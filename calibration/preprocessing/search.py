"""Find the preprocessing that a suspect was trained with, from labelled clean images.

Three kinds of evidence are added up, in nats: the likelihood of the labels, the agreement with the statistics in batch norms (norm_statistics.py), and
how usual a preprocessing is. The labels tell apart what differs much, the norms also what classifies equally well; without batch norms, neighbouring
normalisations stay undecided, and that is said. The search goes from coarse to fine, and looks at a few images before it looks at many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from calibration.labels import assignment, decidedness, held_out, speaks_of
from calibration.preprocessing.candidates import COARSE, OWN, Candidates, Named, geometry
from calibration.preprocessing.images import Images
from calibration.preprocessing.norm_statistics import Agreement, Deviations, NormStatistics, agreements, views
from models.preprocessing import Preprocessing
from models.trunk import workload

GLANCE, LOOK = 64, 256  # images of the first stages and of the last one
REACH, FINALISTS = 20.0, 12  # nats behind the best at a glance, and how many of those go on
ROUNDS = 3  # of varying the geometry and then the normalisation
# Where a whole search, some FORWARDS, costs more operations than AFFORDED, it looks at fewer images and fewer finalists; but not at fewer than these.
FORWARDS, AFFORDED = 8000, {"cpu": 4e12, "cuda": 2e15}
LEAST_GLANCE, LEAST_LOOK, LEAST_FINALISTS = 8, 48, 3
CLEAR = 3.0  # nats, and twice the standard error of the labels' part: what it takes to call a candidate the better one
DOUBT = 0.02  # share of labels that may be wrong: bounds what a single image can say
SHARPER = tuple(4.0**power for power in range(1, 8))  # what the logits of a suspect that is never sure may be multiplied by


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


def find_preprocessing(
    suspect: nn.Module,
    image: Callable[[int], Image.Image],
    rows: Sequence[int],
    labels: Tensor,
    sizes: Sequence[int],
    device: torch.device,
    claimed: Preprocessing | None = None,
    usual: Preprocessing | None = None,
) -> Finding:
    """Compare what is usual on the first 256 images of `rows`, which are in random order, or fewer where the suspect is costly.

    image(row): the decoded RGB image. labels: int64 [len(rows)], in the order of `rows`. sizes: sides of the square input that the suspect takes, the
    usual one first. claimed: what somebody says that the preprocessing is; it is taken unless the evidence is clearly against it. usual: what the
    architecture is commonly used with; it is taken where the labels tell nothing. Deterministic.
    """
    cost = workload(suspect, torch.zeros(1, 3, sizes[0], sizes[0], device=device))
    forwards = AFFORDED.get(device.type, AFFORDED["cpu"]) / max(1, cost)
    share = math.sqrt(min(1.0, forwards / FORWARDS))  # of images, and as many of finalists: one multiplies the other
    look = max(LEAST_LOOK, round(LOOK * share))
    images = Images(image, rows[:look])
    candidates = Candidates(sizes, images.sides, usual)
    return _Search(suspect, images, labels[:look].cpu(), device, candidates, share, forwards / 2).find(claimed)


class _Search:
    """What was computed so far. `targets` is what the suspect should answer: the labels, perhaps reordered; None where they tell nothing."""

    def __init__(
        self, suspect: nn.Module, images: Images, labels: Tensor, device: torch.device, candidates: Candidates, share: float, affordable: float
    ) -> None:
        """affordable: what looking for a size may cost, in images of the usual size through the whole network."""
        self.suspect, self.images, self.labels, self.device, self.candidates = suspect, images, labels, device, candidates
        self.targets: Tensor | None = labels
        self.relabelled, self.forwards, self.affordable = False, 0, affordable
        self.sharpness = 1.0
        self.glance, self.most = max(LEAST_GLANCE, round(GLANCE * share)), max(LEAST_FINALISTS, round(FINALISTS * share))
        self.answers: dict[Preprocessing, Tensor] = {}  # float32 [n, C] on the CPU, of the first n images
        self.finalists: dict[Named, Deviations] = {}
        shape = candidates.geometries(candidates.sizes[0])[0]
        pixels = images.pixels(shape, 0, len(images))
        candidates.learn(pixels)
        self.norms = NormStatistics(suspect, shape.normalise(pixels[:1].to(device)))

    def find(self, claimed: Preprocessing | None) -> Finding:
        likely = self._likely_sizes()
        if self.targets is None:
            self._judge(self._without_labels())
        else:
            self._refine(likely)
        if claimed is not None and claimed.size in self.candidates.sizes and all(named.preprocessing != claimed for named in self.finalists):
            self._judge([self.candidates.claimed(claimed)])
        return self._conclude(claimed)

    def _refine(self, likely: Sequence[int]) -> None:
        """Vary the normalisation and the geometry in turn, from the best at these sizes."""
        named, geometries = self.candidates.named, self.candidates.geometries
        self._judge(self._promising([named(geometries(likely[0])[0], name) for name in self.candidates.known]))
        if self.targets is self.labels:
            self._reorder(self._ranked()[0])  # a few classes may be in another order
        for _ in range(ROUNDS):
            best = self._ranked()[0]
            self._judge(self._promising([named(shape, best.name) for size in likely for shape in geometries(size)]))
            ranked = self._ranked()
            names = list(dict.fromkeys(each.name for each in ranked))
            self._judge([named(geometry(ranked[0].preprocessing), name) for name in names[: 1 + self.most // 3]])
            if self._ranked()[0] is best:
                break

    def _without_labels(self) -> list[Named]:
        """What is customary, and the normalisations that are most usual beside it: batch norms may still tell them apart."""
        customary = self.candidates.customary()
        others = [self.candidates.named(geometry(customary.preprocessing), name) for name in self.candidates.known]
        others = sorted((each for each in others if each.preprocessing != customary.preprocessing), key=lambda each: -each.usual)
        return [customary, *others[: self.most - 1]]

    def _likely_sizes(self) -> list[int]:
        """The best one or two. All that are smaller than the usual one are tried, since they are cheap; larger ones while they are better.

        Settles the targets on the way: where no candidate fits the labels, one may fit them in another order. So long as none fits, the cheapest are
        tried first, and only as many as can be afforded.
        """

        def at(size: int, names: Sequence[str] = COARSE) -> list[Named]:
            return [self.candidates.named(self.candidates.geometries(size)[0], name) for name in names]

        usual, sides = self.candidates.sizes[0], self.candidates.sides
        most = max(2 * usual, 1.25 * float(np.median([min(side) for side in sides])))
        tried = at(usual)
        smaller = sorted(size for size in self.candidates.sizes if size < usual)
        larger = sorted(size for size in self.candidates.sizes if usual < size <= most)
        if self._fits(tried):
            tried += [named for size in smaller for named in at(size)]
            for size in larger:
                best = max(tried, key=self._glance)
                if best.preprocessing.size < max(named.preprocessing.size for named in tried):
                    break
                tried += at(size, (best.name,))
        else:
            rest = [name for name in self.candidates.known if name not in COARSE]
            for more in (*(at(size) for size in smaller), at(usual, rest), *(at(size) for size in larger)):
                cost = sum((named.preprocessing.size / usual) ** 2 for named in more) * self.glance
                # Where a size fits, the next one up may fit better: only one that fits worse ends it.
                passed = max(tried, key=self._glance).preprocessing.size < tried[-1].preprocessing.size
                if cost > self.affordable or (self._fits(tried) and passed):
                    break
                self.affordable -= cost
                tried += more
        if self._fits(tried):
            self._sharpen(tried)
        else:
            decided = sorted(tried, key=lambda named: decidedness(self._logits(named, self.glance)))[-self.most :]
            self._reorder(max(decided, key=lambda named: _agreement(self._logits(named, LOOK), held_out(self._logits(named, LOOK), self.labels))))
            if not self.relabelled:
                self.targets = None
        return list(dict.fromkeys(named.preprocessing.size for named in self._promising(tried)))[:2]

    def _fits(self, tried: Sequence[Named]) -> bool:
        best = max(tried, key=self._glance)
        return any(speaks_of(self._logits(best, n), self.labels[:n]) for n in (self.glance, LOOK))

    def _sharpen(self, tried: Sequence[Named]) -> None:
        """A suspect that is often right and never sure says little in nats: its logits are scaled until they fit how often it is right."""

        def best(sharpness: float) -> float:
            self.sharpness = sharpness
            return max(map(self._glance, tried))

        worth = best(1.0)
        found = max(SHARPER, key=best)
        self.sharpness = found if best(found) >= worth + CLEAR else 1.0

    def _reorder(self, named: Named) -> None:
        """Take what the labels mean under this candidate for the target."""
        found = assignment(self._logits(named, LOOK), self.labels)
        if found is not None:
            self.targets, self.relabelled = found[self.labels], True

    # Evidence

    @torch.inference_mode()
    def _logits(self, named: Named, n: int) -> Tensor:
        """float32 [n, C]: the suspect's answers to the first n images, or to all where there are fewer."""
        p, n = named.preprocessing, min(n, len(self.images))
        done = self.answers.get(p, torch.empty(0))
        if len(done) < n:
            pixels = self.images.pixels(geometry(p), len(done), n).to(self.device)
            answers = [self.suspect(p.normalise(part)).float().cpu() for part in pixels.split(_batch(p.size))]
            self.answers[p] = torch.cat([done, *answers] if len(done) else answers)
            self.forwards += len(pixels)
        return self.answers[p][:n]

    def _accuracy(self, named: Named, n: int = LOOK) -> float:
        return _agreement(self._logits(named, n), self.labels[:n])

    def _likelihoods(self, named: Named, n: int = LOOK) -> Tensor:
        """float64 [n]: the log probability of each target, where a few may be wrong; zero without targets."""
        if self.targets is None:
            return torch.zeros(min(n, len(self.images)), dtype=torch.float64)
        p = (self.sharpness * self._logits(named, n).double()).softmax(1)
        return ((1 - DOUBT) * p.gather(1, self.targets[: len(p), None])[:, 0] + DOUBT / p.shape[1]).log()

    def _glance(self, named: Named) -> float:
        return float(self._likelihoods(named, self.glance).sum()) + named.usual

    def _promising(self, tried: Sequence[Named]) -> list[Named]:
        """Those that are worth more images, at least two if there are two, best first."""
        ranked = sorted(tried, key=self._glance, reverse=True)[: self.most]
        return ranked[:2] + [named for named in ranked[2:] if self._glance(named) >= self._glance(ranked[0]) - REACH]

    def _judge(self, new: Sequence[Named]) -> None:
        """Make these finalists."""
        for named in sorted(new, key=lambda named: str(geometry(named.preprocessing))):  # the pixels of a geometry are made once
            if named not in self.finalists:
                p, shape = named.preprocessing, geometry(named.preprocessing)
                self._logits(named, LOOK)
                pixels = self.images.pixels(shape, 0, len(self.images)).to(self.device)
                seen = views(p, pixels, self.images.crops(shape).to(self.device)) if self.norms else {"none": pixels[:0]}
                self.finalists[named] = {name: self.norms.deviations(view, _batch(p.size)) for name, view in seen.items()}

    def _evidence(self) -> dict[Named, tuple[float, Agreement]]:
        agreed = zip(self.finalists, agreements(list(self.finalists.values())), strict=True)
        return {named: (float(self._likelihoods(named).sum()) + agreement.evidence + named.usual, agreement) for named, agreement in agreed}

    def _ranked(self) -> list[Named]:
        """The finalists, best first."""
        evidence = self._evidence()
        return sorted(evidence, key=lambda named: -evidence[named][0])

    def _clearly_better(self, one: Named, other: Named) -> bool:
        evidence, difference = self._evidence(), self._likelihoods(one) - self._likelihoods(other)
        margin = max(CLEAR, 2 * float(difference.std()) * math.sqrt(len(difference)))
        return self.targets is not None and one is not other and evidence[one][0] - evidence[other][0] >= margin

    def _preferred(self, ranked: Sequence[Named]) -> Named:
        """Of what the evidence does not tell from the best: the normalisation that is customary for the architecture, and the usual geometry."""
        evidence, customary = self._evidence(), self.candidates.customary()
        close = [named for named in ranked if evidence[ranked[0]][0] - evidence[named][0] < CLEAR]
        if self.targets is None:
            return customary if customary in close else ranked[0]
        best = ranked[0]
        if self.candidates.usual is not None:
            best = next((named for named in close if named.name == customary.name and not self._clearly_better(best, named)), best)
        return max((named for named in ranked if named.name == best.name and not self._clearly_better(best, named)), key=lambda named: named.usual)

    def _conclude(self, claimed: Preprocessing | None) -> Finding:
        ranked, notes = self._ranked(), list[str]()
        ranked = _first(self._preferred(ranked), ranked)
        said = next((named for named in ranked if named.preprocessing == claimed), None)
        if said is not None and said is not ranked[0]:
            if self._clearly_better(ranked[0], said):
                notes.append(f"The preprocessing that is claimed ({said}) is not taken: the clean images speak clearly for {ranked[0]}.")
            else:
                notes.append(f"The preprocessing that is claimed ({said}) is taken, although {ranked[0]} fits the clean images slightly better.")
                ranked = _first(said, ranked)
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
            told = "what is usual for its architecture and its batch norms" if self.norms else "what is usual for its architecture"
            notes.append(f"The suspect gets no more clean images right than chance under any preprocessing tried; it is chosen by {told}.")
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


def _first(one: Named, ranked: Sequence[Named]) -> list[Named]:
    return [one, *(named for named in ranked if named != one)]


def _agreement(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def _batch(size: int) -> int:
    """Images at a time: what the first layers of a large network make of them must fit into memory."""
    return max(8, min(128, 2**22 // size**2))
