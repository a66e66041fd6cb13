"""What a calibration works on: from the operator's files to the suspect as it was understood and the pixels of each part of the clean set."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from calibration.clean_set import CleanSet, Limits, named, open_clean_set
from calibration.config import CalibrationConfig
from calibration.finetune import Advance, LabelledPixels
from calibration.recipes import AutoRecipe, paper_recipe
from calibration.resume import fingerprint
from calibration.split import Parts, Rows, hold_back, sample, split
from calibration.suspect import Suspect, Understood, named_classes, read_suspect, refuse_disorder, understand
from models.errors import CleanSetDegenerate, FprUnreachable
from models.preprocessing import Preprocessing
from models.threshold import conformal_threshold, least_fpr, needed_for

LEAST_FIT = 30  # images that train: half of what the smallest clean set leaves for it
PROBES = 8  # images whose answers tell one network from another of the same weights
LEAST_PART = 0.4  # of the images that fit into memory; what validation has of a set that is divided here, too
PIXEL_BYTES = 2 << 30  # of all images together, as the suspect sees them: 14,000 of 224x224


@dataclass(frozen=True)
class Inputs:
    """Where the operator's files lie; without a validation set, a part of the clean set becomes it."""

    checkpoint: Path
    clean_set: Path
    validation_set: Path | None = None


@dataclass(frozen=True)
class Opened:
    """What was read: the suspect and the parts of the clean set with their labels."""

    suspect: Suspect
    clean: CleanSet
    validation: CleanSet
    parts: Parts
    warnings: tuple[str, ...]  # what was forgiven about the sets
    digests: dict[str, str | None] = field(default_factory=dict)  # SHA-256 of each file that was sent; None for a folder


@dataclass(frozen=True)
class Material:
    """What a preset works on, on the training device: the suspect as it was understood, and the parts of the clean set as it sees them."""

    understood: Understood
    fit: LabelledPixels
    held_back: LabelledPixels | None  # None where the preset looks at none
    validation: LabelledPixels
    parts: Parts  # which images these are
    device: torch.device

    def fingerprint(self, config: CalibrationConfig) -> str:
        """Of everything that training depends on; the guard's name is none of it, nor, where no canary asks for them, the validation part and the target."""
        parts = [self.fit, *([] if self.held_back is None else [self.held_back]), *([self.validation] if config.searches else [])]
        recipe = AutoRecipe() if config.preset == "auto" else paper_recipe(self.understood.suspect.architecture.short_name, self.preprocessing.size)
        asked = (config.budget, config.target_fpr) if config.searches else ()
        architecture = self.understood.suspect.architecture
        which = (architecture.name, architecture.options, self.num_classes, self.preprocessing.to_json())
        where = (self.device.type, torch.get_num_threads())  # the number of threads decides the last bits of all sums
        values = (config.preset, asked, config.seed, asdict(recipe), *which, *where)
        answers = _answers(self.network, self.preprocessing, self.fit.pixels[:PROBES])  # the same weights may be another network's
        return fingerprint(values, [answers, *self.network.state_dict().values(), *(tensor for part in parts for tensor in (part.pixels, part.labels))])

    @property
    def network(self) -> nn.Module:
        return self.understood.suspect.network

    @property
    def num_classes(self) -> int:
        return self.understood.suspect.num_classes

    @property
    def preprocessing(self) -> Preprocessing:
        return self.understood.preprocessing


def read(config: CalibrationConfig, inputs: Inputs, device: torch.device, advance: Advance = lambda _: None) -> Opened:
    """Open the operator's files and divide the clean set. Raises a Problem."""
    opened = _read(config, inputs, device, advance)
    files = {**vars(inputs), "checkpoint_config": _beside(inputs.checkpoint, opened.suspect)}
    return replace(opened, digests={name: digest(path) for name, path in files.items() if path is not None})


def _beside(checkpoint: Path, suspect: Suspect) -> Path | None:
    """The config.json that was read together with a file of weights."""
    path = checkpoint.with_name("config.json")
    return path if suspect.checkpoint.sidecar is not None and not checkpoint.is_dir() and path.is_file() else None


def digest(path: Path) -> str | None:
    """SHA-256 of a file, by which whoever sent it knows it again; None of a folder."""
    if path.is_dir():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(config: CalibrationConfig, inputs: Inputs, device: torch.device, advance: Advance) -> Opened:
    suspect = read_suspect(inputs.checkpoint, config.architecture, config.num_classes, device)
    advance(0.3)
    clean = _labelled(inputs.clean_set, config, suspect)
    advance(0.9)
    held_back = AutoRecipe.held_back if config.preset == "auto" else 0.0
    if inputs.validation_set is None:
        parts = split(clean.labels, clean.groups, config.target_fpr, held_back, config.seed)
        _refuse_too_few(parts)
        return Opened(suspect, clean, clean, parts, clean.warnings)
    with named("validation set"):
        validation = _labelled(inputs.validation_set, config, suspect)
    conformal_threshold(torch.zeros(len(validation)), config.target_fpr)  # raises now, not after minutes of training, where it is out of reach
    rows, told = _not_among(validation, clean)
    parts = Parts(*hold_back(rows, clean.labels, clean.groups, held_back, config.seed), np.arange(len(validation)))
    _refuse_too_few(parts)
    warnings = (*clean.warnings, *(f"Of the validation set: {text}" for text in validation.warnings), *told)
    return Opened(suspect, clean, validation, parts, warnings)


def prepare(config: CalibrationConfig, opened: Opened, device: torch.device) -> Material:
    """Find out how the suspect wants its images, and load all of them so."""
    understood = understand(opened.suspect, opened.clean, opened.parts.fit, device, config.seed)
    refuse_disorder(understood)
    parts = affordable(opened, understood.preprocessing.size, config.target_fpr, config.seed)
    fit, held_back = (_load(opened.clean, rows, understood.preprocessing, device) for rows in (parts.fit, parts.held_back))
    validation = _load(opened.validation, parts.validation, understood.preprocessing, device)
    return Material(understood, fit, held_back if len(held_back) else None, validation, parts, device)


def affordable(opened: Opened, size: int, target_fpr: float, seed: int) -> Parts:
    """The parts, or smaller ones of the same proportions where the pixels of all images would take more than PIXEL_BYTES.

    Neither what trains nor what validates gives images up for the other while it has less than LEAST_PART of those that fit: a validation set that is sent may
    be many times as large. Raises CleanSetDegenerate where hardly any are left to train with, FprUnreachable where those left for validation cannot promise the
    target.
    """
    most, validating = PIXEL_BYTES // (3 * size * size), len(opened.parts.validation)
    training = len(opened.parts) - validating
    if training + validating <= most:
        return opened.parts
    least = round(LEAST_PART * most)
    kept = max(min(most * training // (training + validating), most - min(validating, least)), min(training, least))
    shares = {"fit": kept / training, "held_back": kept / training, "validation": (most - kept) / validating}
    images = {"fit": opened.clean, "held_back": opened.clean, "validation": opened.validation}
    parts = Parts(**{name: sample(rows, images[name].labels, shares[name], seed) for name, rows in vars(opened.parts).items()})
    if len(parts.fit) < LEAST_FIT:
        raise CleanSetDegenerate(
            f"Of images of {size}x{size} pixels, as the suspect sees them, {len(parts):,} fit into memory, {len(parts.fit):,} of them to train with; at least "
            f"{LEAST_FIT} must be. A suspect of so large images cannot be guarded."
        )
    if len(parts.validation) < (needed := needed_for(target_fpr)):
        raise FprUnreachable(
            f"Of images of {size}x{size} pixels, as the suspect sees them, {len(parts):,} fit into memory, {len(parts.validation):,} of them for validation; "
            f"a false-rejection rate of {target_fpr:g} needs {needed:,}. Ask for {least_fpr(len(parts.validation)):g} or more."
        )
    return parts


def _labelled(path: Path, config: CalibrationConfig, suspect: Suspect) -> CleanSet:
    clean = open_clean_set(path)
    return clean.labelled_by(suspect.num_classes, named_classes(config.classes, suspect, clean))


def _refuse_too_few(parts: Parts) -> None:
    """Raises CleanSetDegenerate where groups were so large that hardly anything is left to train with."""
    if len(parts.fit) < LEAST_FIT:
        raise CleanSetDegenerate(
            f"So many images of the clean set nearly repeat one another that {len(parts.fit)} are left to train with, since no scene may train and set the "
            f"threshold, too; at least {LEAST_FIT} must be. Send images that differ more from one another."
        )


def _not_among(validation: CleanSet, clean: CleanSet) -> tuple[Rows, list[str]]:
    """Rows of the clean set that the validation set does not have, and what to say of the others: what trained the guard must not set its threshold.

    Raises CleanSetDegenerate where too few are left.
    """
    rows, least = clean.rows_not_in(validation), Limits().min_images
    count = len(clean) - len(rows)
    if len(rows) < least:
        raise CleanSetDegenerate(
            f"Of the clean set's {len(clean):,} images {count:,} are in the validation set, too, exactly or nearly, and {len(rows):,} are left; at least "
            f"{least} must be. Send other images, or no validation set: a part of the clean set then sets the threshold."
        )
    return rows, [f"{count:,} of {len(clean):,} images trained nothing, since they are in the validation set, too, exactly or nearly."] if count else []


@torch.inference_mode()
def _answers(network: nn.Module, preprocessing: Preprocessing, pixels: Tensor) -> Tensor:
    answers: Tensor = network(preprocessing.normalise(pixels))
    return answers


def _load(clean: CleanSet, rows: Rows, preprocessing: Preprocessing, device: torch.device) -> LabelledPixels:
    pixels = torch.empty((len(rows), 3, preprocessing.size, preprocessing.size), dtype=torch.uint8)  # filled in place: a list of them would be all of it twice
    for place, row in enumerate(rows):
        pixels[place] = preprocessing.pixels(clean.image(int(row)))
    return LabelledPixels(pixels.to(device), torch.from_numpy(clean.labels[rows]).to(device))
