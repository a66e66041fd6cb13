"""What the fused score is measured with lies where the held-back images lie."""

from __future__ import annotations

import torch

from models.score import Scale, log_confidence, measure_scale
from tests.untrained import PIXELS, untrained_guard


def test_scales_are_those_of_the_held_back_images() -> None:
    guard, held_back = untrained_guard(), PIXELS[64:]
    assert guard.scales is not None
    with torch.inference_mode():
        inputs = guard.preprocessing.normalise(held_back)
        logits, known = guard.suspect(inputs), guard.evidence(inputs)
        log_m, log_not_m = log_confidence(logits, logits.argmax(1))
        log_y, log_not_y = log_confidence(guard.auxiliary(inputs.to(next(guard.auxiliary.parameters()).dtype)), logits.argmax(1))
        distances = [measure_scale(d(features, known.prediction)) for d, features in zip(guard.distances, known.features, strict=True)]

    def alike(found: Scale | None, wanted: Scale) -> None:
        assert found is not None
        torch.testing.assert_close(tuple(vars(found).values()), tuple(vars(wanted).values()), rtol=1e-3, atol=1e-3)

    alike(guard.scales.expert, measure_scale(known.expert))
    alike(guard.scales.auxiliary, measure_scale(log_not_y - log_y))
    alike(guard.scales.shortfall, measure_scale(log_m - log_not_m + log_not_y - log_y))
    for found, wanted in zip(guard.scales.distances, distances, strict=True):
        alike(found, wanted)
