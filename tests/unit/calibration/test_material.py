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
from calibration.finetune import LabelledPixels
from calibration.material import PIXEL_BYTES, Inputs, Material, Opened, affordable, read
from calibration.split import Parts
from models.errors import CleanSetDegenerate, CleanSetSize, FprUnreachable
from models.preprocessing import Preprocessing
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


def test_of_large_scenes_each_part_keeps_its_share() -> None:
    """Of fifty thousand frames of two hundred scenes, where 2,700 fit: fewer than a scene each of what is held back and of what trains could go."""
    rows, scenes = np.arange(50_000), np.arange(50_000) // 250
    images: Any = SimpleNamespace(labels=scenes % 10, groups=scenes)
    whole = Opened(images, images, images, Parts(rows[:25_500], rows[25_500:30_000], rows[30_000:]), ())
    parts = affordable(whole, 512, 0.01, 0)
    assert [len(part) for part in vars(parts).values()] == [1392, 246, 1092]
    assert {len(set(scenes[part].tolist())) for part in (parts.fit, parts.validation)} == {102, 80}  # all of them are still shown


@pytest.mark.parametrize(
    ("training", "validating", "kept"),
    [(100, 49_900, (100, 14_163)), (49_900, 100, (14_163, 100)), (25_000, 25_000, (7131, 7132)), (10_000, 40_000, (5705, 8558))],
)
def test_a_part_that_is_small_gives_nothing_up_for_one_that_is_large(training: int, validating: int, kept: tuple[int, int]) -> None:
    """At 224x224 pixels 14,266 fit, a few fewer by rounding."""
    rows = np.arange(training + validating)
    images: Any = SimpleNamespace(labels=rows % 10, groups=rows)
    whole = Opened(images, images, images, Parts(rows[: training * 17 // 20], rows[training * 17 // 20 : training], rows[training:]), ())
    parts = affordable(whole, 224, 0.01, 0)
    assert len(parts.fit) + len(parts.held_back) == pytest.approx(kept[0], abs=4)
    assert len(parts.validation) == pytest.approx(kept[1], abs=4)


def test_images_so_large_that_hardly_any_are_left_to_train_are_refused() -> None:
    with pytest.raises(CleanSetDegenerate, match=r"Of images of 6000x6000 pixels, .* 19 fit into memory, 9 of them to train with; at least 30 must be"):
        affordable(opened(5000), 6000, 0.01, 0)  # nor is a target named that would help nothing


def test_a_target_that_is_out_of_reach_of_what_fits_is_refused_before_anything_is_trained() -> None:
    whole = opened(5000)
    assert len(affordable(whole, 600, 0.002, 0).validation) == 796
    with pytest.raises(FprUnreachable, match=r"1,988 fit into memory, 796 of them for validation; .* 0\.001 needs 999\. Ask for 0\.00126 or more"):
        affordable(whole, 600, 0.001, 0)
    assert conformal_threshold(torch.zeros(796), 0.00126).rank == 1


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


def flat(labels: str, path: Path, count: int = 100) -> Path:
    """Example images, and among them as many of one grey each, of these classes in turn: too flat to be compared by their likeness."""
    with zipfile.ZipFile(lights(count, 1, path.with_suffix(".part"))) as source, zipfile.ZipFile(path, "w") as made:
        for name in source.namelist():
            made.writestr(name, source.read(name))
        for grey in range(count):
            data = io.BytesIO()
            Image.new("RGB", (32, 32), (grey, grey, 2 * grey)).save(data, "PNG")
            made.writestr(f"{labels.split()[grey % len(labels.split())]}/flat-{grey}.png", data.getvalue())
    return path


def test_the_same_image_trains_nothing_whatever_it_shows_and_whatever_class_it_is_said_to_be(tmp_path: Path) -> None:
    config = CalibrationConfig.model_validate({"name": "guard", "target_fpr": 0.05})
    clean = flat("airplane ship", tmp_path / "clean.zip", 150)
    validation = flat("ship airplane dog", tmp_path / "validation.zip", 100)
    found = read(config, Inputs(EXAMPLES / "suspect_badnet.safetensors", clean, validation), torch.device("cpu"))
    theirs = set(found.validation.digests)
    trained = [*found.parts.fit.tolist(), *found.parts.held_back.tolist()]
    assert len(theirs) == 200
    assert trained
    assert not {found.clean.digests[row] for row in trained} & theirs


def test_the_same_weights_under_another_function_are_another_calibration() -> None:
    suspect = SimpleNamespace(architecture=SimpleNamespace(name="resnet20", short_name="resnet20", options={}), num_classes=10, network=torch.nn.Identity())
    understood: Any = SimpleNamespace(suspect=suspect, preprocessing=Preprocessing(8, 8))
    images = LabelledPixels(torch.full((4, 3, 8, 8), 200, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    material = Material(understood, images, None, images, opened(100).parts, torch.device("cpu"))
    config = CalibrationConfig.model_validate({"name": "guard", "preset": "paper"})
    seen = {material.fingerprint(config)}
    suspect.network = torch.nn.ReLU6()
    assert material.fingerprint(config) in seen  # of values below 6 it is the same function
    suspect.network = torch.nn.GELU()
    seen.add(material.fingerprint(config))
    suspect.architecture.options = {"img_size": 8}
    seen.add(material.fingerprint(config))
    suspect.architecture.name = "resnet32"
    seen.add(material.fingerprint(config))
    assert len(seen) == 4
