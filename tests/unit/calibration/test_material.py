"""What a clean set is divided into, and how one that does not fit into memory is thinned out evenly."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from calibration import checks
from calibration.config import CalibrationConfig
from calibration.material import PIXEL_BYTES, Inputs, Opened, affordable, read
from calibration.split import Parts
from models.errors import CleanSetDegenerate, CleanSetSize, FprUnreachable
from models.threshold import conformal_threshold

EXAMPLES = Path(__file__).parent.parent.parent.parent / "examples"


def opened(n: int) -> Opened:
    images: Any = SimpleNamespace(labels=np.arange(n) % 10, groups=np.arange(n))
    rows = np.arange(n)
    return Opened(images, images, images, Parts(rows[: n // 2], rows[n // 2 : n * 6 // 10], rows[n * 6 // 10 :]), ())


def test_what_fits_is_left_as_it_is() -> None:
    whole = opened(50_000)
    assert affordable(whole, 32, 0.01, 0) is whole.parts


def test_what_does_not_fit_keeps_its_proportions() -> None:
    whole = opened(50_000)
    parts = affordable(whole, 224, 0.01, 0)
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


def test_a_target_that_is_out_of_reach_of_what_fits_is_refused_before_anything_is_trained() -> None:
    whole = opened(5000)
    assert len(affordable(whole, 600, 0.002, 0).validation) == 795
    with pytest.raises(FprUnreachable, match=r"1,988 fit into memory, 795 of them for validation; .* 0\.001 needs 999\. Ask for 0\.00126 or more"):
        affordable(whole, 600, 0.001, 0)
    assert conformal_threshold(torch.zeros(795), 0.00126).rank == 1


def lights(originals: int, copies: int, path: Path) -> Path:
    """A clean set of example images, each as often as that in another light."""
    with zipfile.ZipFile(EXAMPLES / "clean_set.zip") as source, zipfile.ZipFile(path, "w") as made:
        for name in sorted(name for name in source.namelist() if name.endswith(".png"))[:: 2000 // originals][:originals]:
            image = Image.open(io.BytesIO(source.read(name)))
            for copy in range(copies):
                data = io.BytesIO()
                ImageEnhance.Brightness(image).enhance(1 - 0.05 * copy).save(data, "PNG")
                made.writestr(name.replace(".png", f"-{copy}.png"), data.getvalue())
    return path


def test_copies_in_another_light_take_no_more_than_their_share(tmp_path: Path) -> None:
    config = CalibrationConfig.model_validate({"name": "guard", "target_fpr": 0.05})
    inputs = Inputs(EXAMPLES / "suspect_badnet.safetensors", lights(100, 5, tmp_path / "clean.zip"))
    found = read(config, inputs, torch.device("cpu"))
    assert abs(len(found.parts.validation) - 200) <= 5
    assert abs(len(found.parts.fit) - 255) <= 10
    assert len(set(found.clean.groups[found.parts.validation].tolist())) <= 45


def test_where_hardly_anything_is_left_to_train_with_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("calibration.material.LEAST_FIT", 300)
    config = CalibrationConfig.model_validate({"name": "guard", "target_fpr": 0.05})
    with pytest.raises(CleanSetDegenerate, match="left to train with"):
        read(config, Inputs(EXAMPLES / "suspect_badnet.safetensors", lights(100, 5, tmp_path / "clean.zip")), torch.device("cpu"))


def test_a_validation_set_that_cannot_be_used_is_told_from_the_clean_set(tmp_path: Path) -> None:
    config = CalibrationConfig.model_validate({"name": "guard"})
    inputs = Inputs(EXAMPLES / "suspect_badnet.safetensors", EXAMPLES / "clean_set.zip", lights(20, 1, tmp_path / "validation.zip"))
    with pytest.raises(CleanSetSize, match=r"^In the validation set: The clean set has 20 images"):
        read(config, inputs, torch.device("cpu"))


def test_no_caution_where_nothing_was_left_out() -> None:
    assert checks.sampled(0, 2000) is None
