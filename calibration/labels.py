"""Do the labels of the clean set mean what the suspect's outputs mean? A reordering is suggested, never taken.

The best one-to-one assignment of labels to outputs always fits the images it was found on, the more so with many classes and few images: its accuracy is
therefore measured on images that it was not estimated from, one half of each class at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import CleanSetMislabelled, SuspectModelUseless
from models.threshold import log_choose

SIGNIFICANT = 4.0  # standard errors: several candidates and many assignments are tried
AGREEMENT = 0.2  # Cohen's kappa: of what predictions without any relation to the labels would get wrong, the share that is right
DECISIVE = 0.4  # of the greatest mutual information that there can be between images and predictions


@dataclass(frozen=True)
class Reordering:
    """The order of class names under which the labels fit the suspect's outputs.

    names: index = output. moved: the names whose place differs from the given order. accuracy: with this order, on images that it was not estimated
    from; given: with the order as it was given.
    """

    names: tuple[str, ...]
    moved: tuple[str, ...]
    accuracy: float
    given: float


@dataclass(frozen=True)
class Contradiction:
    """An image (`row` of those that were looked at) of which the suspect is sure that it is of another class than its label."""

    row: int
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True)
class Concentration:
    """A class that contradictions concentrate on: as a trigger in the clean set, or one mislabelled folder, would make them."""

    predicted: int
    count: int
    labels: int  # how many different labels these images carry


@dataclass(frozen=True)
class Contamination:
    """Hints of poisoned or mislabelled clean images, most confident first."""

    contradictions: tuple[Contradiction, ...]
    concentrations: tuple[Concentration, ...]


def check_labels(logits: Tensor, labels: Tensor, names: Sequence[str]) -> Reordering | None:
    """Look whether the labels fit the outputs: logits float [N, C], labels int64 [N], names [C] in the order of the labels.

    Returns an order that fits much better, of all classes or of a few; None where the given one is right. Raises CleanSetMislabelled where the suspect
    is decided and no order fits, and SuspectModelUseless where it is not even decided.
    """
    found = reorder(logits, labels, names)
    if found is not None or speaks_of(logits, labels):
        return found
    right = f"{_accuracy(logits, labels):.1%} of {len(labels)} clean images"
    shown = f"The suspect gets {right} right under the best preprocessing found, and no other class order does better"
    if decidedness(logits) >= DECISIVE:
        raise CleanSetMislabelled(f"{shown}, although it is sure of what it sees: the labels are mixed up among the images, or name another task's classes.")
    raise SuspectModelUseless(f"{shown}: the clean set is not from its task, the architecture is not the one it was trained in, or it is not trained.")


def at_chance(accuracy: float, labels: Tensor, n: int | None = None) -> bool:
    """Not clearly better than always naming the largest class; n: of how many images the accuracy is, if not of all."""
    largest = labels.bincount().max().item() / len(labels)
    noise = math.sqrt(largest * (1 - largest) / (n or len(labels)))
    return accuracy < min(max(largest + SIGNIFICANT * noise, 1.5 * largest), (1 + largest) / 2)


def speaks_of(logits: Tensor, labels: Tensor) -> bool:
    """Whether the outputs, float [N, C], tell these labels, int64 [N], better than by naming the largest class, or at least have a clear relation to them.

    With two classes, or one that is much larger than the others, the accuracy alone cannot tell a weak suspect from none.
    """
    prediction, n = logits.argmax(1), len(labels)
    accuracy = (prediction == labels).double().mean().item()
    if not at_chance(accuracy, labels):
        return True
    said, true = (each.bincount(minlength=logits.shape[1]).double() / n for each in (prediction, labels))  # [C]
    usual = float(said @ true)  # accuracy, on average, if the predictions were dealt out at random; its variance is that of permutations
    variance = (usual - float(said @ true.square()) - float(true @ said.square()) + usual**2) / max(1, n - 1)
    return accuracy - usual > max(AGREEMENT * (1 - usual), SIGNIFICANT * math.sqrt(max(0.0, variance)))


def decidedness(logits: Tensor) -> float:
    """Mutual information of image and prediction over its greatest value, log C: 1 for sure and diverse predictions, 0 for vague or constant ones."""
    p = logits.double().softmax(1)
    return float((torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()) / math.log(p.shape[1]))


def reorder(logits: Tensor, labels: Tensor, names: Sequence[str]) -> Reordering | None:
    """The order that fits significantly better than the given one, if there is one; the arguments are those of `check_labels`."""
    found = assignment(logits, labels)
    if found is None:
        return None
    outputs = held_out(logits, labels).where(found[labels] != labels, labels)
    order = tuple(names[label] for label in found.argsort().tolist())
    moved = tuple(name for name, new in zip(names, order, strict=True) if name != new)
    return Reordering(order, moved, (logits.argmax(1) == outputs).float().mean().item(), _accuracy(logits, labels))


def assignment(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Which output each label means, int64 [C], where the images say significantly that it is not always its own."""
    prediction = logits.argmax(1)
    if not _better(prediction == held_out(logits, labels), prediction == labels):
        return None
    found = _assign(logits, labels)
    for cycle in _cycles(found.tolist()):
        inside = torch.isin(labels, torch.tensor(cycle))
        if not _better((prediction == found[labels])[inside], (prediction == labels)[inside], errors=1.0):
            found[cycle] = torch.tensor(cycle)  # classes that are merely confused with each other
    return found if (found != torch.arange(len(found))).any() else None


def held_out(logits: Tensor, labels: Tensor) -> Tensor:
    """For each image the output that its label is assigned by the other half of the images, int64 [N]."""
    order = labels.argsort(stable=True)
    half = torch.empty(len(labels), dtype=torch.bool)
    half[order] = torch.arange(len(labels)) % 2 == 0  # alternately within each class
    outputs = labels.clone()
    for part in (half, ~half):
        outputs[part] = _assign(logits[~part], labels[~part])[labels[part]]
    return outputs


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def contamination(sure: Tensor, predicted: Tensor, labels: Tensor, num_classes: int, confidence: float = 0.9) -> Contamination:
    """Images that the suspect contradicts with at least this confidence; sure: its own, float [N], for the class that it predicts, int64 [N] as the labels."""
    rows = torch.nonzero((predicted != labels) & (sure >= confidence)).flatten()
    rows = rows[sure[rows].argsort(descending=True, stable=True)]
    found = tuple(Contradiction(row, int(labels[row]), int(predicted[row]), float(sure[row])) for row in rows.tolist())
    usual = predicted.bincount(minlength=num_classes) / len(labels)
    concentrations = []
    for target in predicted[rows].unique().tolist():
        of_target = rows[predicted[rows] == target]
        chance = max(float(usual[target]), 2 / num_classes)
        if _tail(len(of_target), len(rows), chance) < 1e-3 / num_classes:
            concentrations.append(Concentration(target, len(of_target), len(labels[of_target].unique())))
    return Contamination(found, tuple(sorted(concentrations, key=lambda found: -found.count)))


def _assign(logits: Tensor, labels: Tensor) -> Tensor:
    """The one-to-one assignment that explains most: label -> output, int64 [C]. Labels without images stay in place where that is free."""
    from scipy.optimize import linear_sum_assignment  # imports for a while

    classes = logits.shape[1]
    confusion = torch.zeros(classes, classes, dtype=torch.float64).index_add_(0, labels, logits.double().softmax(1))
    confusion += 1e-6 * torch.eye(classes)
    return torch.from_numpy(linear_sum_assignment(confusion.numpy(), maximize=True)[1])


def _better(new: Tensor, old: Tensor, errors: float = SIGNIFICANT) -> bool:
    """McNemar's test on the images that only one of two orders gets right."""
    won, lost = int((new & ~old).sum()), int((old & ~new).sum())
    return won - lost > errors * math.sqrt(won + lost)


def _cycles(permutation: Sequence[int]) -> list[list[int]]:
    """The cycles of at least two elements."""
    left, found = set(range(len(permutation))), []
    while left:
        cycle = [min(left)]
        while permutation[cycle[-1]] != cycle[0]:
            cycle.append(permutation[cycle[-1]])
        left -= set(cycle)
        found.append(cycle)
    return [cycle for cycle in found if len(cycle) > 1]


def _tail(count: int, n: int, share: float) -> float:
    """The probability of at least `count` of n where each has this share."""
    if share >= 1:
        return 1.0
    hit, miss = math.log(share), math.log1p(-share)
    return sum(math.exp(log_choose(n, k) + k * hit + (n - k) * miss) for k in range(count, n + 1))
