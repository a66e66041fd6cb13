"""What a report says of accuracies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from calibration.finetune import LabelledPixels
from calibration.summary import measure_accuracies
from models.threshold import conformal_threshold
from tests.untrained import PIXELS, untrained_guard


def test_behind_the_guard_counts_what_is_right_and_accepted() -> None:
    guard = untrained_guard()
    judged = guard.judge(PIXELS)
    labels = judged.prediction.clone()
    labels[::3] = (labels[::3] + 1) % 10
    validation = LabelledPixels(PIXELS, labels)
    threshold = conformal_threshold(judged.score, 0.2)
    found = measure_accuracies(guard, cast(Any, SimpleNamespace(validation=validation)), judged, threshold)
    rejected_right = int(((labels == judged.prediction) & (judged.score < threshold.value)).sum())
    assert found["suspect"] == pytest.approx(64 / 96)
    assert 0 < rejected_right < int((judged.score < threshold.value).sum())
    assert found["guarded"] == pytest.approx((64 - rejected_right) / 96)
