"""Calibrations of the example suspect, in process: what is promised, what is kept, what is the same every time."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch

from calibration.canary import KINDS, LEAST, TOOK
from calibration.clean_set import open_clean_set
from calibration.config import CalibrationConfig
from calibration.evaluation import evaluate_guard
from calibration.material import Inputs
from calibration.pipeline import Result, calibrate
from calibration.progress import STAGES, Progress
from models import architectures, bundle
from models.checkpoint import load_weights, read_checkpoint
from models.errors import CheckpointMismatch, CleanSetDegenerate, CleanSetInvalid, CleanSetLabels, CleanSetMislabelled, ConfigInvalid, FprUnreachable
from models.preprocessing import decode
from models.registry import Registry
from models.threshold import rejections_expected
from tests.conftest import EXAMPLES

CPU = torch.device("cpu")
BADNET = EXAMPLES / "suspect_badnet.safetensors"


def samples(kind: str, preprocessing, most: int = 400) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with zipfile.ZipFile(EXAMPLES / "samples.zip") as archive:
        names = [name for name in sorted(archive.namelist()) if name.startswith(f"{kind}/")][:most]
        return torch.stack([preprocessing.pixels(decode(archive.read(name))) for name in names])


def test_triggered_images_are_rejected_and_clean_ones_pass(calibrated: tuple[Path, Result]) -> None:
    data_dir, result = calibrated
    found = bundle.read(data_dir / "guards" / "planes" / str(result.version))
    threshold = found.description.threshold.value
    clean = found.guard.judge(samples("clean", found.description.preprocessing))
    triggered = found.guard.judge(samples("badnet", found.description.preprocessing))
    low, high = rejections_expected(found.description.threshold, 400, 0.99)
    assert low <= int((clean.score < threshold).sum()) <= high
    assert (triggered.score < threshold).float().mean() > 0.8  # from 400 clean images, a fifth of what the demo has


def part_of(archive: Path, folder: str, out: Path, every: int = 1) -> Path:
    """The images below a folder of an archive, as a clean set of their own."""
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(out, "w") as part:
        for name in [name for name in sorted(whole.namelist()) if name.startswith(folder)][::every]:
            part.writestr(name, whole.read(name))
    return out


def test_a_guard_is_measured_on_images_of_ones_own(calibrated: tuple[Path, Result], tmp_path: Path) -> None:
    bundle_folder = calibrated[0] / "guards" / "planes" / str(calibrated[1].version)
    clean, triggered = (part_of(EXAMPLES / "samples.zip", f"{kind}/", tmp_path / f"{kind}.zip", 4) for kind in ("clean", "badnet"))
    found = evaluate_guard(bundle_folder, clean, triggered, "airplane", None, CPU)
    assert found["clean_images"] == 100
    assert found["asr"] > 0.95
    assert found["tpr"] > 0.8
    assert found["remaining_asr"] == pytest.approx(found["asr"] - found["tpr"], abs=0.05)
    any_class = evaluate_guard(bundle_folder, clean, triggered, None, 0.2, CPU)
    assert any_class["tpr"] >= found["tpr"]  # at a higher target
    assert any_class["target_fpr"] == 0.2
    assert any_class["asr"] >= found["asr"]
    with pytest.raises(ConfigInvalid, match="knows no class 'plane'; its classes are airplane"):
        evaluate_guard(bundle_folder, clean, triggered, "plane", None, CPU)
    with pytest.raises(CleanSetInvalid, match="In the triggered set: "):
        evaluate_guard(bundle_folder, clean, tmp_path, None, None, CPU)


def test_the_triggered_images_may_be_of_one_class(calibrated: tuple[Path, Result], tmp_path: Path) -> None:
    """A source-specific attack has no others."""
    bundle_folder = calibrated[0] / "guards" / "planes" / str(calibrated[1].version)
    clean = part_of(EXAMPLES / "samples.zip", "clean/", tmp_path / "clean.zip", 10)
    triggered = part_of(EXAMPLES / "samples.zip", "badnet/automobile/", tmp_path / "triggered.zip")
    assert evaluate_guard(bundle_folder, clean, triggered, "airplane", None, CPU)["triggered_images"] > 20


def test_the_preprocessing_and_architecture_are_found_and_the_report_says_so(calibrated: tuple[Path, Result]) -> None:
    report = calibrated[1].report
    assert report["architecture"] == "resnet20"
    found = report["preprocessing"][0]["preprocessing"]
    assert (found["size"], found["channels"], found["scale"]) == (32, "rgb", "unit")
    assert found["mean"] == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.04)  # its neighbours are as good on so few images
    assert report["clean_accuracy"]["suspect"] > 0.8  # of 160 images
    rejected = report["clean_accuracy"]["suspect"] - report["clean_accuracy"]["guarded"]  # of those that it gets right
    assert 0 <= rejected < report["promise"]["rank"] / report["promise"]["n"]
    assert report["clean_accuracy"]["auxiliary"] > 0.5
    assert max(report["clean_accuracy"]["experts"]) < 0.5
    assert report["promise"]["n"] == report["images"]["validation"] >= 99
    assert report["files"]["checkpoint"] == hashlib.sha256(BADNET.read_bytes()).hexdigest()
    assert set(report["files"]) == {"checkpoint", "clean_set"}


def test_a_forwarded_prediction_is_exactly_the_suspects_own(calibrated: tuple[Path, Result]) -> None:
    data_dir, result = calibrated
    found = bundle.read(data_dir / "guards" / "planes" / str(result.version))
    preprocessing = found.description.preprocessing
    suspect = architectures.instantiate(architectures.get("resnet20"), 10, load_weights(read_checkpoint(BADNET)))
    pixels = samples("clean", preprocessing, 64)
    judged = found.guard.judge(pixels, batch=64)
    with torch.inference_mode():
        confidence, prediction = suspect(preprocessing.normalise(pixels)).softmax(1).max(1)
    assert torch.equal(judged.prediction, prediction)
    torch.testing.assert_close(judged.confidence, confidence, rtol=0, atol=1e-6)


def test_a_calibration_that_was_stopped_goes_on_and_gives_the_same_bundle_byte_for_byte(
    calibrated: tuple[Path, Result], unfinished: Path, small_clean_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir, first = calibrated
    config, inputs, registry = CalibrationConfig(name="planes", target_fpr=0.05), Inputs(BADNET, small_clean_set), Registry(tmp_path / "guards")

    def stop(progress: Progress) -> None:
        if progress.stage == "threshold":
            raise KeyboardInterrupt

    for training in ("workshop.train_tails", "workshop.train_auxiliary", "search.plant"):
        monkeypatch.setattr(f"calibration.{training}", None)  # none is made again
    with pytest.raises(KeyboardInterrupt):
        calibrate(config, inputs, registry, CPU, stop, unfinished=unfinished)
    assert not registry.versions("planes")
    second = calibrate(config, inputs, registry, CPU, unfinished=unfinished)
    assert second.report["resumed"] == ["canaries", "expert", "auxiliary"]
    assert not unfinished.exists()
    assert second.bundle_id == first.bundle_id
    assert {key: second.report[key] for key in ("settings", "expert_steps", "promise", "canaries", "search")} == {
        key: first.report[key] for key in ("settings", "expert_steps", "promise", "canaries", "search")
    }
    for name in ("suspect", "experts", "auxiliary", "distance", "validation"):
        one, other = (root / "guards" / "planes" / "1" / f"{name}.safetensors" for root in (data_dir, tmp_path))
        assert one.read_bytes() == other.read_bytes()


def test_the_published_recipe_uses_one_whole_expert_and_says_how_far_it_is(small_clean_set: Path, tmp_path: Path) -> None:
    events: list[Progress] = []
    config = CalibrationConfig(name="planes", preset="paper")
    result = calibrate(config, Inputs(BADNET, small_clean_set), Registry(tmp_path / "guards"), CPU, events.append)
    found = bundle.read(tmp_path / "guards" / "planes" / "1")
    assert (found.description.cuts, found.description.experts, found.description.c) == (None, 1, 0.5)
    assert found.guard.experts[0].state_dict().keys() == found.guard.suspect.state_dict().keys()
    settings = result.report["settings"]
    assert (settings["expert_lr"], settings["auxiliary_lr"], settings["auxiliary_epochs"], settings["auxiliary_steps"]) == (1e-4, 0.1, 10, (2, 4, 6, 8))
    assert list(dict.fromkeys(event.stage for event in events)) == [stage for stage in STAGES if stage != "canaries"]
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_canaries_choose_among_settings_and_tell_what_is_caught(calibrated: tuple[Path, Result]) -> None:
    report = calibrated[1].report
    assert [each["kind"] for each in report["canaries"]] == list(KINDS)
    took = [each for each in report["canaries"] if each["took"]]
    assert len(took) >= 3  # from 200 images
    assert all(each["asr"] >= TOOK and each["images"] >= LEAST and 0 <= each["power"] <= 1 for each in took if each["fooled"] >= LEAST)
    assert all(each["why_not"] and each["power"] is None for each in report["canaries"] if not each["took"])
    assert report["canary_copy"]["accuracy"] > 0.75 * report["canary_copy"]["suspect_accuracy"]
    assert max(each["power"] or 0 for each in took) > 0.9
    assert {(each["expert_stop"], each["auxiliary_lr"]) for each in report["search"]} == {(stop, lr) for stop in (0.2, 0.4) for lr in (0.1, 0.03)}
    assert report["settings"]["expert_stop"] in (0.2, 0.4)
    page = (calibrated[0] / "guards" / "planes" / "1" / "report.html").read_text()
    assert "What it would catch" in page
    assert f"{took[0]['asr']:.1%} of {took[0]['images']}" in page
    assert f"{took[0]['power']:.1%} of {took[0]['fooled']}" in page


def test_the_reports_are_whole_and_need_nothing_from_elsewhere(calibrated: tuple[Path, Result]) -> None:
    folder = calibrated[0] / "guards" / "planes" / "1"
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "src=" not in page
    assert "<script" not in page
    assert "@import" not in page
    assert json.loads((folder / "report.json").read_text())["guard"] == "planes"


def relabelled(source: Path, target: Path, rename) -> Path:  # type: ignore[no-untyped-def]
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for index, name in enumerate(sorted(before.namelist())):
            after.writestr(rename(index, name), before.read(name))
    return target


def test_a_clean_set_with_shuffled_labels_is_refused(small_clean_set: Path, tmp_path: Path) -> None:
    folders = sorted({name.split("/")[0] for name in zipfile.ZipFile(small_clean_set).namelist()})
    shuffled = relabelled(small_clean_set, tmp_path / "c.zip", lambda index, name: f"{folders[index % 10]}/{index}.png")
    with pytest.raises(CleanSetMislabelled, match="class order"):
        calibrate(CalibrationConfig(name="planes"), Inputs(BADNET, shuffled), Registry(tmp_path / "guards"), CPU)
    assert Registry(tmp_path / "guards").guards() == []


def test_a_clean_set_with_unknown_classes_is_refused(small_clean_set: Path, tmp_path: Path) -> None:
    eleven = relabelled(small_clean_set, tmp_path / "c.zip", lambda index, name: name if index else "zebra/0.png")
    with pytest.raises(CleanSetLabels):
        calibrate(CalibrationConfig(name="planes"), Inputs(BADNET, eleven), Registry(tmp_path / "guards"), CPU)


def test_a_promise_that_so_few_images_cannot_keep_is_refused(small_clean_set: Path, tmp_path: Path) -> None:
    with pytest.raises(FprUnreachable, match="400 images"):
        calibrate(CalibrationConfig(name="planes", target_fpr=0.001), Inputs(BADNET, small_clean_set), Registry(tmp_path / "guards"), CPU)


def test_an_architecture_that_does_not_fit_is_refused(small_clean_set: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="does not fit resnet32"):
        calibrate(CalibrationConfig(name="planes", architecture="resnet32"), Inputs(BADNET, small_clean_set), Registry(tmp_path / "guards"), CPU)


def test_a_checkpoint_as_torch_saves_it_reads_the_same(tmp_path: Path) -> None:
    weights = load_weights(read_checkpoint(BADNET))
    stream = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}}, stream)
    (tmp_path / "suspect.pth").write_bytes(stream.getvalue())
    again = load_weights(read_checkpoint(tmp_path / "suspect.pth"))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], value) for key, value in weights.items())


def test_the_example_clean_set_is_two_thousand_images_of_ten_classes() -> None:
    found = open_clean_set(EXAMPLES / "clean_set.zip").labelled_by(10)
    assert len(found) == 2000
    assert len(found.names) == 10
    assert min((found.labels == label).sum() for label in range(10)) > 150


def test_a_validation_set_of_its_own_sets_the_threshold_alone(small_clean_set: Path, tmp_path: Path) -> None:
    few = part_of(small_clean_set, "", tmp_path / "clean.zip", 4)
    others = tmp_path / "validation.zip"
    with zipfile.ZipFile(EXAMPLES / "clean_set.zip") as whole, zipfile.ZipFile(others, "w") as part:
        for name in sorted(whole.namelist())[1::10]:
            part.writestr(name, whole.read(name))
    inputs = Inputs(BADNET, few, others)
    report = calibrate(CalibrationConfig(name="planes", preset="paper"), inputs, Registry(tmp_path / "guards"), CPU).report
    assert report["images"] == {"fit": 100, "held_back": 0, "validation": 200}
    assert report["promise"]["n"] == 200


def test_what_the_validation_set_has_too_trains_nothing(small_clean_set: Path, tmp_path: Path) -> None:
    few = part_of(small_clean_set, "", tmp_path / "validation.zip", 4)
    config, registry = CalibrationConfig(name="planes", preset="paper", target_fpr=0.05), Registry(tmp_path / "guards")
    report = calibrate(config, Inputs(BADNET, small_clean_set, few), registry, CPU).report
    assert report["images"] == {"fit": 300, "held_back": 0, "validation": 100}
    assert {"code": "clean-set", "detail": "100 of 400 images trained nothing, since they are in the validation set, too, exactly or nearly."} in report[
        "warnings"
    ]
    with pytest.raises(CleanSetDegenerate, match="400 are in the validation set, too, exactly or nearly, and 0 are left"):
        calibrate(config, Inputs(BADNET, small_clean_set, small_clean_set), registry, CPU)
