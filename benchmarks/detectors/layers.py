"""What the suspect computes on the way: the results of its blocks, for a detector that looks inside."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.detectors.interface import NotApplicable, Observed
from models import trunk

MOST_LAYERS, GRID = 12, 4


class Layers:
    """A network cut behind each of its blocks, or behind MOST_LAYERS of them."""

    def __init__(self, suspect: Observed, example: Tensor) -> None:
        """example: uint8 [1, 3, H, W]. Raises NotApplicable for a network that cannot be cut so."""
        self.suspect = suspect
        inputs = suspect.preprocessing.normalise(example)
        try:
            cuts = trunk.cuts(suspect.network, inputs)
        except trunk.CannotCut as problem:
            raise NotApplicable(str(problem)) from problem
        # Of neighbours with nothing multiplied between them, the last: behind the norm and the activation.
        names = list({round(cut.tail_share, 9): cut.name for cut in cuts if cut.tail_share < 1}.values())
        chosen = [names[round(place)] for place in torch.linspace(0, len(names) - 1, min(MOST_LAYERS, len(names))).tolist()]
        self.parts: list[nn.Module] = list(trunk.split(suspect.network, *dict.fromkeys(chosen)))

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
        """For each batch of uint8 pixels: what each block gives, and the predictions, int64 [n].

        In float32 on every device: ranks among neighbours came out differently in bfloat16, by 0.025 of AUROC.
        """
        for part in pixels.split(256):
            found, value = [], self.suspect.preprocessing.normalise(part)
            for piece in self.parts[:-1]:
                value = piece(value)
                found.append(value)
            yield found, self.parts[-1](value).argmax(1)


def vectors(value: Tensor) -> Tensor:
    """One vector an image, float32 [N, D]: maps are averaged over a grid of 4x4 fields, token sequences over tokens."""
    value = value.float()
    if value.ndim == 4:
        value = F.adaptive_avg_pool2d(value, min(GRID, value.shape[-1]))
    elif value.ndim == 3:
        value = value.mean(1)
    return value.flatten(1)
