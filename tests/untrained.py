"""A guard whose networks were never trained, for tests of how it computes."""

from __future__ import annotations

from functools import partial

import torch

from calibration.finetune import LabelledPixels
from calibration.fusion import fit_distances, fuse
from models import architectures
from models.guard import Cuts, Guard
from models.preprocessing import Preprocessing
from models.trunk import choose_cut, places, tail_copy

PIXELS = torch.randint(0, 256, (96, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def untrained_guard() -> Guard:
    """A third of PIXELS reach its gate."""
    torch.manual_seed(0)
    suspect, auxiliary = (architectures.get("resnet20").build(10).eval() for _ in range(2))
    example = torch.zeros(1, 3, 32, 32)
    cuts = Cuts(choose_cut(suspect, example, 0.1).name, tuple(place.name for place in places(suspect, example, (0.1, 0.2))))
    experts = [tail_copy(suspect, cuts.experts) for _ in range(3)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    plain = Guard(suspect, experts, auxiliary, Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)), cuts=cuts)
    clean = LabelledPixels(PIXELS[:64], torch.arange(64) % 10)
    return fuse(plain, fit_distances(plain, clean, 10), LabelledPixels(PIXELS[64:], torch.arange(32) % 10), asked=1 / 3)


def untrained_published_guard() -> Guard:
    """Of whole networks, with the published score; for half of PIXELS the auxiliary alone says that they will be accepted."""
    torch.manual_seed(0)
    suspect, expert, auxiliary = (architectures.get("resnet20").build(10).eval() for _ in range(3))
    made = partial(Guard, suspect, [expert], auxiliary, Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
    return made(c=made().judge(PIXELS).auxiliary.median().item())
