"""A clean set that does not fit into memory is thinned out evenly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from calibration import checks
from calibration.material import PIXEL_BYTES, Opened, affordable
from calibration.split import Parts


def opened(n: int) -> Opened:
    images: Any = SimpleNamespace(labels=np.arange(n) % 10, groups=np.arange(n))
    rows = np.arange(n)
    return Opened(images, images, images, Parts(rows[: n // 2], rows[n // 2 : n * 6 // 10], rows[n * 6 // 10 :]), ())


def test_what_fits_is_left_as_it_is() -> None:
    whole = opened(50_000)
    assert affordable(whole, 32, 0) is whole.parts


def test_what_does_not_fit_keeps_its_proportions() -> None:
    whole = opened(50_000)
    parts = affordable(whole, 224, 0)
    assert 0.99 * PIXEL_BYTES < len(parts) * 3 * 224 * 224 <= PIXEL_BYTES * 1.001
    for name, rows in vars(parts).items():
        before = getattr(whole.parts, name)
        assert set(rows.tolist()) <= set(before.tolist())
        assert abs(len(rows) / len(before) - len(parts) / len(whole.parts)) < 0.001
        counts = np.bincount(rows % 10, minlength=10)
        assert counts.max() - counts.min() <= 2
    caution = checks.sampled(len(whole.parts) - len(parts), len(parts))
    assert caution is not None
    assert caution.code == "sampled"
    assert "Of 50,000 images 14,2" in caution.detail


def test_no_caution_where_nothing_was_left_out() -> None:
    assert checks.sampled(0, 2000) is None
