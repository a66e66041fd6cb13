"""From an untrusted checkpoint to a suspect that is understood: which network it is, how it sees images, and whether the labels speak of its classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from calibration import checks
from calibration.checks import Caution
from calibration.clean_set import CleanSet
from calibration.preprocessing import Finding, find_preprocessing
from calibration.split import Rows
from models import architectures
from models.architectures import Architecture, Match
from models.architectures.huggingface import rename
from models.checkpoint import Checkpoint, load_weights, read_checkpoint
from models.errors import CheckpointMismatch, ConfigInvalid, SuspectModelUseless
from models.parallel import cpu_threads
from models.preprocessing import Preprocessing

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
    """A suspect whose preprocessing was found on clean images."""

    suspect: Suspect
    finding: Finding

    @property
    def preprocessing(self) -> Preprocessing:
        return self.finding.best.preprocessing


def read_suspect(path: Path, architecture: str | None, num_classes: int | None, device: torch.device) -> Suspect:
    """The suspect, on the device. `architecture` and `num_classes` are what the user says of it. Raises a CheckpointProblem."""
    checkpoint = read_checkpoint(path)
    claimed, notes = _claimed(checkpoint)
    match, *others = architectures.identify(_weights(checkpoint), architecture, claimed)
    if claimed is not None and match.fit.architecture.name != claimed.name:
        notes.append(f"config.json names {claimed.name}, which does not fit the weights.")
    suspect = Suspect(checkpoint, match, _network(match, checkpoint, device), tuple(others), tuple(notes))
    _check_class_count(suspect, num_classes)
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(suspect.network, suspect.architecture.size))
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
    best = Understood(suspect, _find(suspect, clean, order, labels, device))
    for match in suspect.others:
        other = replace(suspect, match=match, network=_network(match, suspect.checkpoint, device))
        if _accuracy(other, best.preprocessing, clean, order[:GLANCE]) > _accuracy(best.suspect, best.preprocessing, clean, order[:GLANCE]):
            found = Understood(other, _find(other, clean, order, labels, device))
            best = max(best, found, key=lambda understood: understood.finding.best.accuracy)
    others = tuple(match for match in (suspect.match, *suspect.others) if match is not best.suspect.match)
    return replace(best, suspect=replace(best.suspect, others=others))


def _find(suspect: Suspect, clean: CleanSet, order: Rows, labels: Tensor, device: torch.device) -> Finding:
    sidecar = suspect.checkpoint.sidecar
    claimed = None if sidecar is None else sidecar.preprocessing
    return find_preprocessing(suspect.network, clean.image, order.tolist(), labels, _sizes(suspect)[0], device)


def _accuracy(suspect: Suspect, preprocessing: Preprocessing, clean: CleanSet, rows: Rows) -> float:
    device = next(suspect.network.parameters()).device
    pixels = torch.stack([preprocessing.pixels(clean.image(int(row))) for row in rows]).to(device)
    with torch.inference_mode():
        prediction = suspect.network(preprocessing.normalise(pixels)).argmax(1).cpu().numpy()
    return float(np.mean(prediction == clean.labels[rows]))


def _sizes(suspect: Suspect) -> list[int]:
    """Sides of the input that the network takes, the likeliest first: what the file states, the architecture's usual one, then those in use."""
    stated = suspect.checkpoint.hints.get("img_size")
    first = [size for size in (stated, suspect.architecture.size) if isinstance(size, int) and 8 <= size <= 1024]
    shadow = copy.deepcopy(suspect.network).to("meta")  # shapes alone: costs no arithmetic
    return [size for size in dict.fromkeys((*first, *USUAL_SIZES)) if size in first[-1:] or _takes(shadow, size)]


@torch.inference_mode()
def _takes(network: nn.Module, size: int) -> bool:
    try:
        network(torch.empty(1, 3, size, size, device="meta"))
    except Exception:  # noqa: BLE001  # libraries say so in many ways
        return False
    return True


def doubts(suspect: Suspect, told_apart: bool) -> list[Caution]:
    """What to doubt about what the suspect is said to be. told_apart: by clean images, where several networks fit."""
    cautions = checks.checkpoint(suspect.checkpoint)
    if suspect.others:
        names = ", ".join(match.fit.architecture.name for match in suspect.others)
        how = "get no more clean images right" if told_apart else "may be meant: bring a clean set, or name the right one with `architecture`"
        cautions.append(Caution("several-architectures", f"The weights also fit {names}, which compute something else from them and {how}."))
    return cautions


def refuse_unusable(understood: Understood, clean: CleanSet) -> None:
    """Raises SuspectModelUseless where the suspect does not know the task."""
    best, largest_class = understood.finding.best, float(np.bincount(clean.labels).max() / len(clean))
    if best.accuracy < 1.5 * largest_class and best.accuracy < (1 + largest_class) / 2:
        raise SuspectModelUseless(
            f"The suspect gets {best.accuracy:.1%} of the clean images right under the best preprocessing found; always naming the largest class gives "
            f"{largest_class:.1%}. Either the class order differs (give the class names in the order of the suspect's outputs as `classes`), or the clean "
            "set is not from its task, or the model is not trained."
        )
