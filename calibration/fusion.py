"""Measure on clean images what the fused score needs: distances, the scale of each measurement, the gate."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from calibration.finetune import LabelledPixels
from models.distance import Distance, fit_distance
from models.guard import Fusion, Guard, Scales, cheap_surprise, fed
from models.lowering import lowered
from models.score import log_confidence, measure_scale, shortfall


def equipped(guard: Guard, experts: Sequence[nn.Module], auxiliary: nn.Module, fusion: Fusion | None = None) -> Guard:
    """The same guard with others of these; the suspect and its folded parts, which take time and memory to make, are those of the guard."""
    made = copy.deepcopy(guard, {id(module): module for module in guard.children()})
    made.experts, made.auxiliary = nn.ModuleList(experts), auxiliary
    made.distances = nn.ModuleList([] if fusion is None else fusion.distances)
    made.scales = None if fusion is None else fusion.scales
    return made.eval().requires_grad_(False)


def lower(guard: Guard, device: torch.device) -> Guard:
    """The same guard with experts and auxiliary as `device` serves them; before `fuse`, so that all is measured on these."""
    return equipped(guard, [lowered(expert, device) for expert in guard.experts], lowered(guard.auxiliary, device))


@torch.inference_mode()
def fit_distances(guard: Guard, fit: LabelledPixels, num_classes: int) -> list[Distance]:
    """Of the suspect's features at each place, from clean images with true labels. Experts and auxiliary have no part in it."""
    flows = (guard.flow(guard.preprocessing.normalise(pixels))[1:-1] for pixels in fit.pixels.split(256))
    return [fit_distance(torch.cat(features), fit.labels, num_classes).to(fit.labels.device) for features in zip(*flows, strict=True)]


@torch.inference_mode()
def fuse(guard: Guard, distances: Sequence[Distance], held_back: LabelledPixels, asked: float) -> Guard:
    """The same guard with the fused score: distances that were fitted for its suspect, and scales measured on `held_back`.

    The scales come from images that trained nothing, so that no kind of evidence looks better than it will be. asked: the share of clean images that
    reach the gate.
    """

    def inputs(part: LabelledPixels) -> Iterator[Tensor]:
        return (guard.preprocessing.normalise(pixels) for pixels in part.pixels.split(256))

    found = [replace(guard.evidence(batch), shared=torch.empty(0)) for batch in inputs(held_back)]  # of all images at once that may be gigabytes
    of_held_back = zip(*([d(features, each.prediction) for d, features in zip(distances, each.features, strict=True)] for each in found), strict=True)
    against = [log_confidence(fed(guard.auxiliary, batch), each.prediction) for each, batch in zip(found, inputs(held_back), strict=True)]
    scales = Scales(
        expert=measure_scale(torch.cat([each.expert for each in found])),
        distances=tuple(measure_scale(torch.cat(values)) for values in of_held_back),
        auxiliary=measure_scale(torch.cat([log_not_y - log_y for log_y, log_not_y in against])),
        shortfall=measure_scale(torch.cat([shortfall(each.logits, each.prediction, *y) for each, y in zip(found, against, strict=True)])),
        gate=0.0,
    )
    cheap = torch.cat([cheap_surprise(each, distances, scales) for each in found])
    return equipped(guard, list(guard.experts), guard.auxiliary, Fusion(distances, replace(scales, gate=cheap.quantile(1 - asked).item())))
