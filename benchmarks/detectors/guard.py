"""Our guard as a detector: the very bundle that `badexpert calibrate` makes from the checkpoint's file and the clean set's, with nothing told beside."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.detectors.interface import Detector, Observed
from calibration.config import CalibrationConfig
from calibration.finetune import LabelledPixels
from calibration.material import Inputs
from calibration.pipeline import calibrate
from models import bundle, trunk
from models.guard import Guard
from models.lowering import dtype_of
from models.registry import Registry

REPEATS = {"auto": 0.03, "paper": 0.12}  # training makes more of a rounding: on BadNet `paper` came out between .80 and .90 over seeds and processors


class BadExpertGuard(Detector):
    """A calibration with one of the presets; its clean set is the other detectors' clean and validation images together.

    Without canaries: what these are worth is measured apart (benchmarks/canaries.py).
    """

    def __init__(self, preset: str) -> None:
        self.preset, self.name, self.repeats = preset, preset, REPEATS[preset]  # type: ignore[misc]
        self.guard: Guard

    def fit(self, suspect: Observed, clean: LabelledPixels, validation: LabelledPixels, seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            inputs = as_files(Path(folder), suspect.network, clean, validation)
            config = CalibrationConfig.model_validate({"name": "suspect", "preset": self.preset, "budget": "quick", "seed": seed})
            began, device = time.monotonic(), clean.pixels.device
            result = calibrate(config, inputs, Registry(Path(folder, "guards")), device)
            seconds = time.monotonic() - began
            kept = bundle.read(Path(folder, "guards", "suspect", str(result.version)), device)
        self.guard = kept.guard.to(device)
        asked = 1 - float(self.guard.judge(self._as_served(validation.pixels)).auxiliary.isnan().double().mean())
        operations = _operations(self.guard, self._as_served(clean.pixels[:1]).to(device), asked)
        self.passes = round(operations / trunk.operations(suspect.network, suspect.preprocessing.normalise(clean.pixels[:1])), 3)
        found = kept.description.preprocessing
        return {
            "calibration_seconds": round(seconds, 1),
            "preprocessing": str(found),
            "preprocessing_right": found == suspect.preprocessing,
            "c": self.guard.c,
            "asked": round(asked, 4),
        }

    def score(self, pixels: Tensor) -> Tensor:
        return self.guard.judge(self._as_served(pixels)).score

    def confidences(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """x and y, float64 [N] each."""
        judged = self.guard.judge(self._as_served(pixels), ungated=True)
        return judged.expert, judged.auxiliary

    def _as_served(self, pixels: Tensor) -> Tensor:
        """Images resized as the guard would, had they been posted: only where it found another geometry than they have."""
        found = self.guard.preprocessing
        if pixels.shape[-1] == found.size == found.resize:
            return pixels
        return torch.stack([found.pixels(Image.fromarray(image.permute(1, 2, 0).cpu().numpy())) for image in pixels])


def as_files(folder: Path, network: nn.Module, clean: LabelledPixels, validation: LabelledPixels) -> Inputs:
    """What an operator would upload."""
    inputs = Inputs(folder / "suspect.safetensors", folder / "clean.safetensors", folder / "validation.safetensors")
    save_file({name: value.contiguous().cpu() for name, value in network.state_dict().items()}, inputs.checkpoint)
    for path, part in ((inputs.clean_set, clean), (folder / "validation.safetensors", validation)):
        save_file({"images": part.pixels.permute(0, 2, 3, 1).contiguous().cpu(), "labels": part.labels.cpu()}, path)
    return inputs


def _operations(guard: Guard, pixels: Tensor, asked: float) -> float:
    """Of one clean image: the suspect, each expert on what the trunk gives, and the auxiliary for the share that is `asked` about."""
    inputs = guard.preprocessing.normalise(pixels)
    shared = guard.evidence(inputs).shared
    experts = sum(trunk.operations(expert, shared.to(dtype_of(expert))) for expert in guard.experts)
    return trunk.operations(guard.suspect, inputs) + experts + asked * trunk.operations(guard.auxiliary, inputs.to(dtype_of(guard.auxiliary)))
