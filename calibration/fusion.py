"""Measure on clean images what the fused score needs: distances, the scale of each measurement, the gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from calibration.finetune import LabelledPixels
from models.distance import fit_distance
from models.guard import Fusion, Guard, Scales, cheap_surprise, fed
from models.lowering import lowered
from models.score import log_confidence, measure_scale, shortfall


def lower(guard: Guard, device: torch.device) -> Guard:
    """The same guard with experts and auxiliary as `device` serves them; before `fuse`, so that all is measured on these."""
    experts, auxiliary = [lowered(expert, device) for expert in guard.experts], lowered(guard.auxiliary, device)
    return Guard(guard.suspect, experts, auxiliary, guard.preprocessing, cuts=guard.cuts, c=guard.c)


@torch.inference_mode()
def fuse(guard: Guard, fit: LabelledPixels, held_back: LabelledPixels, num_classes: int, asked: float) -> Guard:
    """The same guard with the fused score: its distances fitted to clean images with true labels, its scales measured on `held_back`.

    The scales come from images that trained nothing, so that no kind of evidence looks better than it will be. asked: the share of clean images that
    reach the gate.
    """

    device = fit.labels.device

    def inputs(part: LabelledPixels) -> Iterator[Tensor]:
        return (guard.preprocessing.normalise(pixels) for pixels in part.pixels.split(256))

    of_fit = zip(*(guard.evidence(batch).features for batch in inputs(fit)), strict=True)  # place by place
    distances = [fit_distance(torch.cat(features), fit.labels, num_classes).to(device) for features in of_fit]
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
    fusion = Fusion(distances, replace(scales, gate=cheap.quantile(1 - asked).item()))
    return Guard(guard.suspect, list(guard.experts), guard.auxiliary, guard.preprocessing, cuts=guard.cuts, fusion=fusion, c=guard.c)
