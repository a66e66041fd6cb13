"""What makes a calibration's figures untrustworthy. One function a reason; each cites a section of docs/checks.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from calibration.canary import Planted
from calibration.clean_set.container import cleaned, listed
from calibration.labels import Concentration
from models.checkpoint import Checkpoint
from models.threshold import MOST_FPR, Threshold, conformal_threshold, log_choose

LEAST_RANK = 3  # of the threshold among validation scores
CHANCE = 0.01  # of a warning where there is nothing to warn of
OFTEN = 0.25  # share of images whose labels are contradicted
MOSTLY = 0.8  # share of errors among the rejected images
SEVERAL = 3  # classes: a suspect that confuses one or two with another has no backdoor for that
WEAK = 0.25  # of the way from chance to no error


@dataclass(frozen=True)
class Caution:
    """One reason for doubt: `code` names a section of docs/checks.md."""

    code: str
    detail: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def suspect_near_chance(predicted: Tensor, labels: Tensor, num_classes: int) -> Caution | None:
    """What a suspect that hardly knows the task says of an image tells little; nor can experts forget, or an auxiliary keep, what it does not know.

    predicted, labels: of validation images, int64 [n] each. Chance is the suspect's very answers, dealt out at random (Cohen's kappa), so that it knows the
    task, too, that tells a few rare classes from a frequent one.
    """
    right = (predicted == labels).double().mean().item()
    said, true = (each.bincount(minlength=num_classes).double() / len(labels) for each in (predicted, labels))
    usual = float(said @ true)
    if right >= usual + WEAK * (1 - usual):
        return None
    return Caution(
        "suspect-near-chance", f"The suspect gets {right:.1%} of the validation images right; its answers, dealt out at random, would get {usual:.1%}."
    )


def expert_still_accurate(accuracies: Sequence[float], suspect: float, stop: float | None) -> Caution | None:
    """An expert that still knows the task agrees with the suspect on clean images too, and separates nothing.

    stop: the held-back accuracy at which training was to end, where it was; validation images may tell of a little more.
    """
    if max(accuracies) > max(0.5 * suspect, 0.0 if stop is None else stop + 0.1):
        return Caution("expert-still-accurate", f"A backdoor expert still gets {max(accuracies):.1%} of the validation images right.")
    return None


def auxiliary_lost_accuracy(auxiliary: float, suspect: float) -> Caution | None:
    """An auxiliary that lost the task disagrees with the suspect on clean images too."""
    if auxiliary < 0.6 * suspect:
        return Caution("auxiliary-lost-accuracy", f"The auxiliary model gets {auxiliary:.1%} right, the suspect {suspect:.1%}.")
    return None


def wide_interval(threshold: Threshold) -> Caution | None:
    """With few validation images the realised rate may be well away from the target."""
    low, high = threshold.interval
    if threshold.rank < LEAST_RANK:
        return Caution("wide-interval", f"With {threshold.n} validation images the false-rejection rate may be anywhere from {low:.2%} to {high:.2%}.")
    return None


def repeated_images(scenes: int, n: int) -> Caution | None:
    """Images that nearly repeat one another are judged alike, and tell less of the next one than the promise takes them to."""
    if scenes < 0.9 * n:
        return Caution("repeated-images", f"The {n} validation images show {scenes} different scenes; the promise counts every image as one of its own.")
    return None


def unvalidated_classes(validation: Tensor, others: Tensor, names: Sequence[str]) -> Caution | None:
    """Classes of which no image sets the threshold, though there are some in the other parts. Labels, int64 [n] each."""
    if missing := _missing(validation, others, names):
        return Caution("unvalidated-classes", f"{missing} have no validation images. The promise says nothing of them.")
    return None


def untrained_classes(fit: Tensor, others: Tensor, names: Sequence[str]) -> Caution | None:
    """Classes of which no image trains, though there are some in the other parts. Labels, int64 [n] each."""
    if missing := _missing(fit, others, names):
        return Caution("untrained-classes", f"{missing} have no images that train. What the guard knows of them it knows from other classes.")
    return None


def _missing(part: Tensor, others: Tensor, names: Sequence[str]) -> str:
    here, there = (torch.bincount(each, minlength=len(names)) for each in (part, others))
    missing = torch.nonzero((here == 0) & (there > 0)).flatten().tolist()
    return f"{len(missing)} of {len(names)} classes ({listed([names[label] for label in missing])})" if missing else ""


def degenerate_scores(distinct: int, n: int) -> Caution | None:
    """Scores that tie cannot be cut at a chosen rate."""
    if distinct < 0.9 * n:
        return Caution("degenerate-scores", f"Only {distinct} of {n} validation scores differ from one another.")
    return None


def uneven_rejections(rejected: Tensor, labels: Tensor, names: Sequence[str]) -> Caution | None:
    """The promise is one over all classes: where false rejections gather in one of them, its images fare worse. rejected: bool [n], labels: int64 [n].

    Told of the class in which chance would least have put so many (hypergeometric), where that is less likely than CHANCE over as many classes as there are.
    Of a class with three validation images or four that takes nearly all of them.
    """
    n, all_rejected = len(labels), int(rejected.sum())
    images, of_class = (torch.bincount(each, minlength=len(names)).tolist() for each in (labels, labels[rejected]))

    chances = ((_chance(of_class[label], all_rejected, images[label], n), label) for label in range(len(names)) if of_class[label])
    least, worst = min(chances, default=(1.0, 0))
    if least * len(names) >= CHANCE:
        return None
    return Caution(
        "uneven-rejections",
        f"Of {images[worst]} validation images of class {names[worst]!r} {of_class[worst]} are rejected, of all {n} images {all_rejected}: "
        "that class is not promised the rate that all classes together are.",
    )


def own_errors(scores: Tensor, right: Tensor, threshold: Threshold) -> Caution | None:
    """Where the target is taken up by what the suspect gets wrong, triggered images that look like its errors pass.

    scores: float64 [n], right: whether the suspect is, bool [n]. Told where most of the rejected images are errors, more than chance would put there; with the
    target at which, of the images that it gets right, as large a share would be rejected as is now of all, where there is one that can be asked for.
    """
    rejected = threshold.rejects(scores)
    count, wrong, kept = int(rejected.sum()), int((rejected & ~right).sum()), int(right.sum())
    if wrong < MOSTLY * count or _chance(wrong, count, threshold.n - kept, threshold.n) >= CHANCE:
        return None
    detail = f"Of {count} rejected validation images the suspect gets {wrong} wrong itself: its errors take up the target of {threshold.target_fpr:.2%}."
    beyond = conformal_threshold(scores[right], threshold.target_fpr)  # reached: with so few right, chance would have put errors there
    ample = math.ceil(10_000 * (int(beyond.rejects(scores).sum()) + 1) / (threshold.n + 1)) / 10_000  # as it is written, in hundredths of a percent
    if threshold.target_fpr < ample <= MOST_FPR:
        detail += f" With one of {ample:.2%}, {threshold.target_fpr:.2%} of the images that it gets right would be rejected."
    return Caution("own-errors", detail)


def contaminated(found: Sequence[Concentration], images: int, kind: str, names: Sequence[str]) -> list[Caution]:
    """Classes that the suspect is sure to see in images of others; kind: which images were looked at."""
    cautions = []
    for each in found:
        of = f"{each.labels} other classes" if each.labels > 1 else "one other class"
        seen = f"{each.count} of {images} {kind} images, of {of}, are surely {cleaned(names[each.predicted])} to the suspect. Look at them: "
        if each.labels >= min(SEVERAL, len(names) - 1):
            cautions.append(Caution("contamination", f"{seen}triggers in the {kind} set would show so."))
        else:
            cautions.append(Caution("confused-classes", f"{seen}their labels may be wrong, or the suspect confuses these classes."))
    return cautions


def contradicted(count: int, images: int) -> Caution | None:
    """Labels that the suspect is sure are others: it, or they, are wrong."""
    if count > OFTEN * images:
        return Caution("contradicted-labels", f"Of {images} clean images the suspect is sure that {count} are of another class than their label says.")
    return None


def _chance(hit: int, drawn: int, inside: int, n: int) -> float:
    """That of so many drawn out of n at least `hit` are among the `inside` (hypergeometric)."""
    all_ways = log_choose(n, drawn)
    ways = (log_choose(inside, k) + log_choose(n - inside, drawn - k) for k in range(max(hit, drawn - n + inside), min(inside, drawn) + 1))
    return sum(math.exp(each - all_ways) for each in ways)


def low_power(canaries: Sequence[Planted]) -> Caution | None:
    """A guard that misses most of what the calibration planted itself may miss as much of what an attacker trained."""
    powers = {each.kind: each.power for each in canaries if each.power is not None}
    if powers and sum(powers.values()) < 0.5 * len(powers):
        kinds = ", ".join(f"{kind} {power:.0%}" for kind, power in powers.items())
        return Caution("low-power", f"Of the backdoors planted in a copy of the suspect the guard catches less than half, averaged over their kinds: {kinds}.")
    return None


def no_canary_took(canaries: Sequence[Planted], of_copy: dict[str, float] | None) -> Caution | None:
    """Nothing chose the settings then, and nothing tells of power. of_copy: what `Searched` says of it."""
    if of_copy is None or any(each.took for each in canaries):
        return None
    why = "; ".join(
        f"{reason} ({', '.join(each.kind for each in canaries if each.why_not == reason)})" for reason in dict.fromkeys(each.why_not for each in canaries)
    )
    right = f"The copy gets {of_copy['accuracy']:.0%} of the held-back images right, the suspect {of_copy['suspect_accuracy']:.0%}"
    return Caution("no-canary-took", f"None of {len(canaries)} backdoors planted in a copy of the suspect tells anything: {why}. {right}.")


def sampled(left_out: int, used: int) -> Caution | None:
    """What does not fit into memory takes no part; the promise is one about images like those that do."""
    if left_out:
        return Caution("sampled", f"Of {used + left_out:,} images {used:,} were used, drawn at random class by class: all would not fit into memory.")
    return None


def no_cut(happened: bool) -> Caution | None:
    """Without a shared trunk each expert is a whole network: three times the cost of the suspect, and no feature distance in the score."""
    if happened:
        return Caution("no-cut", "The network cannot be cut into trunk and tail: its experts are whole copies, and the score is the published one.")
    return None


def outputs_probabilities(outputs: Tensor) -> Caution | None:
    """A network of the operator's own may end in a softmax; the softmax of that is flat, whatever the image. outputs: [N, C], for any images."""
    if bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-3).all()):
        return Caution("outputs-probabilities", "The network gives probabilities, not logits: it ends in a softmax. Leave that out of its code.")
    return None


def checkpoint(read: Checkpoint) -> list[Caution]:
    """What in a checkpoint no honest training script writes."""
    if read.named:
        names = ", ".join(read.named[:5])
        return [Caution("names-code", f"The pickle in the checkpoint names code that weights have no use for ({names}). It was not run.")]
    return []
