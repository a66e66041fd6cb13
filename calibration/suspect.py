"""From an untrusted checkpoint to a suspect that is understood: which network it is, how it sees images, and whether the labels speak of its classes."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration import checks
from calibration.checks import Caution
from calibration.clean_set import CleanSet
from calibration.clean_set.container import listed
from calibration.labels import Contamination, Contradiction, Reordering, check_labels, contamination, speaks_of
from calibration.preprocessing import Candidate, Finding, find_preprocessing
from calibration.split import Rows
from models import architectures
from models.architectures import Architecture, Match
from models.architectures.huggingface import rename
from models.checkpoint import Checkpoint, load_weights, read_checkpoint
from models.errors import CheckpointMismatch, CleanSetLabels, CleanSetMislabelled, ConfigInvalid, Problem, SuspectModelUseless
from models.guard import answer
from models.parallel import training_threads
from models.preprocessing import Preprocessing

MOST_CONTRADICTIONS = 20  # that are named
GLANCE = 128  # images on which networks are told apart
USUAL_SIZES = (32, 64, 96, 128, 160, 224, 256, 288, 299, 320, 384)


@dataclass(frozen=True)
class Suspect:
    """A checkpoint as the network that it fits."""

    checkpoint: Checkpoint
    match: Match
    network: nn.Module
    others: tuple[Match, ...] = ()  # what the weights fit as well, and what computes something else from them
    notes: tuple[str, ...] = ()
    size: int = 0  # pixels a side of an image that the network takes: its usual ones, where it does

    @property
    def architecture(self) -> Architecture:
        return self.match.fit.architecture

    @property
    def num_classes(self) -> int:
        assert self.match.fit.num_classes is not None  # `identify` gives exact fits only
        return self.match.fit.num_classes

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the outputs, where a file beside the weights states as many as there are outputs."""
        sidecar = self.checkpoint.sidecar
        return sidecar.classes if sidecar is not None and sidecar.classes is not None and len(sidecar.classes) == self.num_classes else None


@dataclass(frozen=True)
class Understood:
    """A suspect whose preprocessing was found on clean images.

    reordering: another class order that the labels fit much better. unusable: why labels and outputs have nothing to do with each other in any order.
    """

    suspect: Suspect
    finding: Finding
    rows: Rows  # the images that it was found on: finding.logits are theirs
    reordering: Reordering | None = None
    unusable: Problem | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        return self.finding.best.preprocessing


def read_suspect(path: Path, architecture: str | None, num_classes: int | None, device: torch.device) -> Suspect:
    """The suspect, on the device. `architecture` and `num_classes` are what the user says of it. Raises a CheckpointProblem.

    On a CPU this process computes with as many threads as the network is worth from now on.
    """
    checkpoint = read_checkpoint(path)
    claimed, notes = _claimed(checkpoint)
    match, *others = architectures.identify(_weights(checkpoint), architecture, claimed)
    if claimed is not None and match.fit.architecture.name != claimed.name:
        notes.append(f"config.json names {claimed.name}, which does not fit the weights.")
    suspect = Suspect(checkpoint, match, _network(match, checkpoint, device), tuple(others), tuple(notes))
    _check_class_count(suspect, num_classes)
    suspect = replace(suspect, size=_answered_size(suspect, device))
    if device.type == "cpu":
        torch.set_num_threads(training_threads(suspect.network, suspect.size))
    return suspect


def _network(match: Match, checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    return architectures.instantiate(match.fit.architecture, match.fit.num_classes or 0, _weights(checkpoint)).to(device)


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights under the names of the network's state dict, which are not those of the file where transformers wrote it."""
    weights = load_weights(checkpoint)
    return rename(weights) if checkpoint.sidecar is not None and checkpoint.sidecar.kind == "transformers" else weights


def _claimed(checkpoint: Checkpoint) -> tuple[Architecture | None, list[str]]:
    sidecar, notes = checkpoint.sidecar, list[str]()
    if sidecar is None:
        return None, notes
    try:
        claimed = architectures.get(sidecar.architecture, sidecar.options)
        claimed.shapes  # noqa: B018  # builds it, which is when options are found not to fit
        return claimed, notes
    except ConfigInvalid as problem:
        notes.append(f"The architecture that config.json names cannot be used. {problem.detail}")
    return None, notes


@torch.inference_mode()
def _answered_size(suspect: Suspect, device: torch.device) -> int:
    """Pixels a side of an image that the network answers. Raises CheckpointMismatch where it is with anything but logits: one of the operator's own may."""
    name, size = suspect.architecture.name, suspect.architecture.size
    try:
        given = suspect.network(torch.zeros(1, 3, size, size, device=device))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a foreign network raises
        for other in USUAL_SIZES:
            if _takes(suspect, other):
                return other
        raise CheckpointMismatch(f"The network {name} takes no image of {size}x{size} pixels, nor of any usual size: {type(error).__name__}.") from error
    if not isinstance(given, Tensor) or given.shape != (1, suspect.num_classes):
        what = f"a tensor of shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise CheckpointMismatch(f"The network {name} answers an image with {what}, where logits of shape [1, {suspect.num_classes}] are needed.")
    return size


def _check_class_count(suspect: Suspect, num_classes: int | None) -> None:
    sidecar = suspect.checkpoint.sidecar
    for who, count in (("num_classes says", num_classes), ("config.json says", None if sidecar is None else sidecar.num_classes)):
        if count is not None and count != suspect.num_classes:
            raise CheckpointMismatch(f"{who} {count} classes, and the head of the checkpoint has {suspect.num_classes}.")


def named_classes(given: Sequence[str] | None, suspect: Suspect, clean: CleanSet) -> Sequence[str] | None:
    """Class names in the order of the outputs: those given, or the checkpoint's own where the clean set uses them."""
    if given is None and suspect.classes is not None and set(clean.names) <= set(suspect.classes):
        return suspect.classes
    return given


def understand(suspect: Suspect, clean: CleanSet, rows: Rows, device: torch.device, seed: int) -> Understood:
    """Find the preprocessing on the images `rows` of a clean set, and with it which of the networks that fit the suspect really is."""
    order = np.random.default_rng(seed).permutation(rows)
    labels = torch.from_numpy(clean.labels[order])
    finding = _find(suspect, clean, order, labels, device)
    best = Understood(suspect, finding, order[: finding.images])
    for match in suspect.others:
        other = _as_other(suspect, match, device)
        if _accuracy(other, best.preprocessing, clean, order[:GLANCE]) > _accuracy(best.suspect, best.preprocessing, clean, order[:GLANCE]):
            finding = _find(other, clean, order, labels, device)
            best = max(best, Understood(other, finding, order[: finding.images]), key=lambda understood: understood.finding.best.accuracy)
    others = tuple(match for match in (suspect.match, *suspect.others) if match is not best.suspect.match)
    best = replace(best, suspect=replace(best.suspect, others=others))
    try:
        return replace(best, reordering=check_labels(best.finding.logits, labels[: best.finding.images], clean.names))
    except (CleanSetMislabelled, SuspectModelUseless) as problem:
        return replace(best, unusable=problem)


def _as_other(suspect: Suspect, match: Match, device: torch.device) -> Suspect:
    """The same checkpoint as another network that its weights fit, with the size that is usual for that one."""
    return replace(suspect, match=match, network=_network(match, suspect.checkpoint, device), size=match.fit.architecture.size)


def _find(suspect: Suspect, clean: CleanSet, order: Rows, labels: Tensor, device: torch.device) -> Finding:
    """What is claimed beside the weights is taken where the labels do not speak against it; no other sizes are tried then."""

    def find(sizes: Sequence[int]) -> Finding:
        return find_preprocessing(suspect.network, clean.image, order.tolist(), labels, sizes, device, claimed, suspect.architecture.preprocessing)

    sidecar = suspect.checkpoint.sidecar
    claimed = None if sidecar is None else sidecar.preprocessing
    if claimed is None or not _takes(suspect, claimed.size):
        return find(_sizes(suspect, None))
    found = find([claimed.size])
    n, best = found.images, max(candidate.accuracy for candidate in found.candidates)
    said = next(candidate for candidate in found.candidates if candidate.preprocessing == claimed)
    if speaks_of(found.logits, labels[:n]) and said.accuracy >= best - 2 * np.sqrt(max(best * (1 - best), 1 / n) / n):
        return _believing(found, said, suspect, clean, order[:n])
    wider = find(_sizes(suspect, claimed))
    # Where the labels tell nothing, the claim is all there is.
    return _believing(found, said, suspect, clean, order[:n]) if not speaks_of(wider.logits, labels[: wider.images]) else wider


def _believing(found: Finding, said: Candidate, suspect: Suspect, clean: CleanSet, rows: Rows) -> Finding:
    """The same finding with what is claimed in the first place."""
    if found.best is said:
        return found
    others = tuple(candidate for candidate in found.candidates if candidate is not said)
    note = (
        f"The preprocessing that config.json claims is taken: it gets {said.accuracy:.1%} of the clean images right, the best other {found.best.accuracy:.1%}."
    )
    return replace(found, candidates=(said, *others), notes=(note,), logits=_logits(suspect, said.preprocessing, clean, rows))


@torch.inference_mode()
def _logits(suspect: Suspect, preprocessing: Preprocessing, clean: CleanSet, rows: Rows) -> Tensor:
    """float32 [N, C] on the CPU, of the images `rows`."""
    device = next(suspect.network.parameters()).device
    parts = [torch.stack([preprocessing.pixels(clean.image(int(row))) for row in part]) for part in np.array_split(rows, max(1, len(rows) // 32))]
    return torch.cat([suspect.network(preprocessing.normalise(pixels.to(device))).float().cpu() for pixels in parts])


def _accuracy(suspect: Suspect, preprocessing: Preprocessing, clean: CleanSet, rows: Rows) -> float:
    return float(np.mean(_logits(suspect, preprocessing, clean, rows).argmax(1).numpy() == clean.labels[rows]))


def _sizes(suspect: Suspect, claimed: Preprocessing | None) -> list[int]:
    """Sides of the input that the network takes, the likeliest first: what is stated, the architecture's usual one, then those in use."""
    stated = suspect.checkpoint.hints.get("img_size")
    first = [size for size in (claimed and claimed.size, stated, suspect.size) if isinstance(size, int) and 8 <= size <= 1024]
    return [size for size in dict.fromkeys((*first, *USUAL_SIZES)) if size == suspect.size or _takes(suspect, size)]


@torch.inference_mode()
def _takes(suspect: Suspect, size: int) -> bool:
    shadow = copy.deepcopy(suspect.network).to("meta")  # shapes alone: costs no arithmetic
    try:
        shadow(torch.empty(1, 3, size, size, device="meta"))
    except Exception:  # noqa: BLE001  # libraries say so in many ways
        return False
    return True


def doubts(suspect: Suspect) -> list[Caution]:
    """What to doubt about what a checkpoint is said to be."""
    cautions = checks.checkpoint(suspect.checkpoint)
    if suspect.others:
        names = ", ".join(match.fit.architecture.name for match in suspect.others)
        cautions.append(Caution("several-architectures", f"The weights also fit {names}, which compute something else from them; taken was the best."))
    return cautions


def doubts_on_images(understood: Understood, clean: CleanSet) -> list[Caution]:
    """The same, and what clean images show to be doubtful about suspect and labels."""
    cautions = doubts(understood.suspect)
    if (outputs := checks.outputs_probabilities(understood.finding.logits)) is not None:
        cautions.append(outputs)
    if (problem := understood.unusable) is not None:
        cautions.append(Caution(problem.code.replace("_", "-"), problem.detail))
    if (order := understood.reordering) is not None:
        cautions.append(Caution("class-order", _suggestion(order)))
    found, images = contradictions(understood, clean), len(understood.rows)
    if (caution := checks.contradicted(len(found.contradictions), images)) is not None:
        cautions.append(caution)
    return [*cautions, *checks.contaminated(found.concentrations, images, "clean", clean.names)]


def contradictions(understood: Understood, clean: CleanSet) -> Contamination:
    """Images of which the suspect is sure that they are of another class than their label; their rows are those of the clean set."""
    logits = understood.finding.logits
    found = contamination(*answer(logits), torch.from_numpy(clean.labels[understood.rows]), logits.shape[1])
    return replace(found, contradictions=tuple(replace(each, row=int(understood.rows[each.row])) for each in found.contradictions))


def by_name(found: Sequence[Contradiction], images: CleanSet) -> list[dict[str, Any]]:
    """The first of these, as JSON; their rows are those of `images`."""
    return [
        {"image": images.name(each.row), "label": images.names[each.label], "predicted": images.names[each.predicted], "confidence": each.confidence}
        for each in found[:MOST_CONTRADICTIONS]
    ]


def refuse_disorder(understood: Understood) -> None:
    """Raises CleanSetMislabelled, SuspectModelUseless, or CleanSetLabels where only another class order fits: that is for the user to confirm."""
    if understood.unusable is not None:
        raise understood.unusable
    order = understood.reordering
    if order is not None and order.given < 0.5 * order.accuracy:
        raise CleanSetLabels(_suggestion(order))


def _suggestion(order: Reordering) -> str:
    row = io.StringIO()  # as they are, to be given back
    csv.writer(row, lineterminator="").writerow("".join(each if each.isprintable() else "?" for each in name) for name in order.names)
    few = f" The classes that differ: {listed(order.moved)}." if len(order.moved) < len(order.names) else ""
    return (
        f"The labels seem to be in this other order: the suspect gets {order.accuracy:.1%} of the clean images right with it, and {order.given:.1%} with the "
        f"order given.{few} If that is so, confirm it by passing the classes in the order of the suspect's outputs: {row.getvalue()}."
    )
