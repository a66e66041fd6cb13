"""A bundle comes back as it was written, and whatever was done to it afterwards is noticed before a tensor is used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from calibration.finetune import LabelledPixels
from calibration.fusion import fit_distances, fuse
from models import architectures, bundle, trunk
from models.errors import BundleNotReady
from models.guard import Cuts, Fusion, Guard, Scales
from models.preprocessing import Preprocessing
from models.score import Scale
from models.threshold import conformal_threshold
from models.trunk import choose_cut, places, tail_copy

PIXELS = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make(folder: Path, seed: int = 0, cut: bool = True) -> tuple[Guard, str]:
    torch.manual_seed(seed)
    suspect, auxiliary = (architectures.get("resnet20").build(10).eval() for _ in range(2))
    example = torch.zeros(1, 3, 32, 32)
    cuts = Cuts(choose_cut(suspect, example, 0.1).name, tuple(place.name for place in places(suspect, example, (0.1, 0.2)))) if cut else None
    experts = [tail_copy(suspect, cuts.experts if cuts else None) for _ in range(3 if cut else 1)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    guard = Guard(suspect, experts, auxiliary, preprocessing, cuts=cuts)
    if cut:
        pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
        clean = LabelledPixels(pixels, torch.arange(64) % 10)
        guard = fuse(guard, fit_distances(guard, clean, 10), LabelledPixels(pixels[:20], clean.labels[:20]), asked=0.5)
    scores = torch.rand(200, dtype=torch.float64)
    description = bundle.Description(
        architecture="resnet20",
        num_classes=10,
        class_names=tuple("abcdefghij"),
        preprocessing=preprocessing,
        preset="auto",
        seed=seed,
        cuts=cuts,
        experts=len(experts),
        c=0.5,
        scales=guard.scales,
        threshold=conformal_threshold(scores, 0.01),
    )
    folder.mkdir(exist_ok=True)
    bundle_id = bundle.write(folder, description, guard, scores, {"created": "now"}, {"report.json": "{}", "report.html": "<p>"})
    return guard, bundle_id


@pytest.mark.parametrize("cut", [True, False], ids=["with a shared trunk", "with whole networks"])
def test_what_is_read_judges_as_what_was_written(tmp_path: Path, cut: bool) -> None:
    guard, bundle_id = make(tmp_path, cut=cut)
    read = bundle.read(tmp_path)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    assert read.bundle_id == bundle_id
    assert read.description.threshold.n == 200
    torch.testing.assert_close(read.guard.judge(pixels).score, guard.judge(pixels).score, rtol=1e-5, atol=1e-5)


def test_the_same_content_has_the_same_id_whenever_it_was_made(tmp_path: Path) -> None:
    assert make(tmp_path / "a")[1] == make(tmp_path / "b")[1] != make(tmp_path / "c", seed=1)[1]


@pytest.mark.parametrize("role", ["suspect", "experts", "auxiliary", "distance", "validation"])
def test_one_flipped_bit_in_any_weight_file_is_noticed(tmp_path: Path, role: str) -> None:
    make(tmp_path)
    path = tmp_path / f"{role}.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleNotReady, match=role):
        bundle.read(tmp_path)


def test_swapped_roles_are_noticed(tmp_path: Path) -> None:
    make(tmp_path)
    suspect, auxiliary = (tmp_path / f"{role}.safetensors" for role in ("suspect", "auxiliary"))
    first, second = suspect.read_bytes(), auxiliary.read_bytes()
    suspect.write_bytes(second)
    auxiliary.write_bytes(first)
    with pytest.raises(BundleNotReady, match="suspect"):
        bundle.read(tmp_path)


def test_a_changed_threshold_is_noticed(tmp_path: Path) -> None:
    make(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["content"]["threshold"]["value"] = -100.0
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleNotReady, match="changed"):
        bundle.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"content": {"schema": 99}}', '{"content": {}}', "\udcff"], ids=repr)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    make(tmp_path)
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleNotReady):
        bundle.read(tmp_path)


@pytest.mark.parametrize("change", ["missing", "added", "symlink", "truncated"])
def test_missing_added_linked_and_truncated_files_are_refused(tmp_path: Path, change: str) -> None:
    make(tmp_path / "bundle")
    path = tmp_path / "bundle" / "experts.safetensors"
    if change == "missing":
        path.unlink()
    elif change == "added":
        (tmp_path / "bundle" / "extra").touch()
    elif change == "symlink":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleNotReady):
        bundle.read(tmp_path / "bundle")


def test_a_network_that_can_no_longer_be_taken_apart_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise trunk.CannotCut("it depends on values")

    make(tmp_path / "bundle")
    monkeypatch.setattr(trunk, "tail_copy", cannot)
    with pytest.raises(BundleNotReady, match=r"resnet20, cannot be taken apart here .* depends on values"):
        bundle.read(tmp_path / "bundle")


def test_a_folder_that_is_removed_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    make(tmp_path / "bundle")
    monkeypatch.setattr(Path, "iterdir", gone)
    with pytest.raises(BundleNotReady, match="cannot be read"):
        bundle.read(tmp_path / "bundle")


def test_a_guard_that_judges_otherwise_where_it_is_served_is_refused(tmp_path: Path) -> None:
    """A few images may change sides; as many as break the promise may not."""
    guard, _ = make(tmp_path)
    read = bundle.read(tmp_path)
    bundle.check(read)  # of a bundle without images to check with nothing is asked
    pixels = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8)
    scores = guard.judge(pixels).score
    threshold = conformal_threshold(scores, 0.05)
    known = replace(read.description, threshold=threshold)
    reference = bundle.nearest(pixels, scores, threshold)
    assert len(reference.scores) == threshold.rank - 1 + bundle.NEAREST
    assert int((reference.scores < threshold.value).sum()) == threshold.rank - 1
    bundle.check(replace(read, description=known, reference=reference))
    for parameter in read.guard.auxiliary.parameters():
        parameter.data *= 1.0001
    bundle.check(replace(read, description=known, reference=reference))
    once_lower = replace(reference, scores=reference.scores - 100)  # all were rejected then
    with pytest.raises(BundleNotReady, match="Calibrate again"):
        bundle.check(replace(read, description=known, reference=once_lower))
    for parameter in read.guard.experts.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(BundleNotReady, match="no number"):
        bundle.check(replace(read, description=known, reference=reference))


class Judging:
    """Gives the reference images these scores."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def judge(self, pixels: Tensor) -> Any:
        return SimpleNamespace(score=self.scores)


def test_what_serves_decides_about_the_stored_images_as_the_guard_does_but_for_rounding(tmp_path: Path) -> None:
    make(tmp_path)
    read, scores = bundle.read(tmp_path), torch.arange(200).double()
    threshold = conformal_threshold(scores, 0.01)
    reference = bundle.nearest(torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1), scores, threshold)
    found = replace(read, description=replace(read.description, threshold=threshold), reference=reference)
    guard = found.guard
    guard.judge = lambda pixels: SimpleNamespace(score=pixels.flatten().double())  # type: ignore[assignment, method-assign, return-value]

    class Served(nn.Module):
        def __init__(self, moved: float) -> None:
            super().__init__()
            self.moved = moved

        def forward(self, pixels: Tensor) -> Any:
            return SimpleNamespace(score=pixels.flatten().double() + self.moved)

    assert bundle.repeats_verdicts(found, Served(0))
    assert bundle.repeats_verdicts(found, Served(-5e-6))
    older = replace(threshold, value=scores[threshold.rank - 1].item())
    assert bundle.repeats_verdicts(replace(found, description=replace(read.description, threshold=older)), Served(-5e-6))
    assert not bundle.repeats_verdicts(found, Served(-1.5))
    assert not bundle.repeats_verdicts(found, Served(1.5))
    assert bundle.repeats_verdicts(replace(found, reference=None), Served(1.5))


@pytest.mark.parametrize("as_old", [False, True], ids=["as many images as it takes", "sixteen on a side, as in older bundles"])
@pytest.mark.parametrize(("n", "target"), [(99, 0.01), (200, 0.01), (2000, 0.05), (5600, 0.01), (60_000, 0.01)])
def test_a_guard_whose_scores_all_moved_is_refused_however_many_images_set_its_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, target: float, as_old: bool
) -> None:
    make(tmp_path)
    read, scores = bundle.read(tmp_path), torch.arange(n).double()
    threshold = conformal_threshold(scores, target)
    if as_old:
        monkeypatch.setattr(bundle, "MOST_NEAREST", bundle.NEAREST)
    reference = bundle.nearest(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), scores, threshold)
    assert len(reference.scores) <= 2 * bundle.MOST_NEAREST
    known = replace(read.description, threshold=threshold)

    def check(moved: float) -> None:
        bundle.check(replace(read, description=known, reference=reference, guard=cast(Guard, Judging(reference.scores + moved))))

    check(0)
    check(-1)  # one image more is rejected
    if threshold.rank > 5:
        check(1)
    with pytest.raises(BundleNotReady, match="Calibrate again"):
        check(-1e6)
    if threshold.interval[0] * n >= 1 or threshold.rank > bundle.NEAREST:  # where none may be rejected that says nothing
        with pytest.raises(BundleNotReady, match="Calibrate again"):
            check(1e6)


def as_of_schema(folder: Path, schema: int, distances: dict[str, torch.Tensor], **changed: object) -> None:
    """Make the bundle in a folder one that an older version wrote."""
    data = safetensors.torch.save(distances)
    (folder / "distance.safetensors").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    content = {**manifest["content"], "schema": schema, **changed}
    content["sha256"]["distance"] = hashlib.sha256(data).hexdigest()
    bundle_id = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "content": content, "bundle_id": bundle_id}))


def of_schema_4(guard: Guard) -> Guard:
    """Its distances count as they are, and lie as far beyond what is usual as before; and its auxiliary is not compared with the suspect."""
    assert guard.scales is not None
    scales = []
    for distance, scale in zip(guard.distances, guard.scales.distances, strict=True):
        unit = distance.spread.mean().item()
        scales.append(Scale(scale.median * unit, scale.excess * unit))
        distance.spread = torch.ones_like(distance.spread)
    fusion = Fusion(list(guard.distances), replace(guard.scales, distances=tuple(scales), shortfall=None))
    return Guard(guard.suspect, list(guard.experts), guard.auxiliary, guard.preprocessing, cuts=guard.cuts, fusion=fusion, c=guard.c)


def without_shortfall(scales: Scales) -> dict[str, Any]:
    """As the manifest had them up to schema 5."""
    return {name: value for name, value in asdict(scales).items() if name != "shortfall"}


def test_a_bundle_of_the_second_schema_judges_as_it_did(tmp_path: Path) -> None:
    """It knew one distance, stored by its means, with no spread of each class, and asked the auxiliary about every image."""
    guard = of_schema_4(make(tmp_path)[0])
    assert guard.scales is not None
    assert guard.cuts is not None
    distance, scales, cuts = guard.distances[-1], guard.scales, guard.cuts
    old = {"means": distance.centres.float() @ torch.linalg.pinv(distance.whitening.float()) + distance.origin, "whitening": distance.whitening.float()}
    known = {
        "cuts": {"experts": cuts.experts, "features": cuts.places[-1]},
        "scales": [vars(scales.expert), vars(scales.auxiliary), vars(scales.distances[-1])],
    }
    as_of_schema(tmp_path, 2, old, **known)
    one = Fusion([distance], replace(scales, distances=scales.distances[-1:], gate=0.0))
    alone = Guard(guard.suspect, list(guard.experts), guard.auxiliary, guard.preprocessing, cuts=Cuts(cuts.experts, cuts.places[-1:]), fusion=one)
    judged = bundle.read(tmp_path).guard.judge(PIXELS)
    torch.testing.assert_close(judged.score, alone.judge(PIXELS).score, rtol=1e-3, atol=1e-3)
    assert judged.auxiliary.isfinite().all()


@pytest.mark.parametrize(("schema", "unknown"), [(3, ("origin", "spread")), (4, ("spread",))], ids=["schema 3", "schema 4"])
def test_a_bundle_with_less_about_its_distances_judges_as_it_did(tmp_path: Path, schema: int, unknown: tuple[str, ...]) -> None:
    guard = of_schema_4(make(tmp_path)[0])
    assert guard.scales is not None
    for distance in guard.distances:
        if "origin" in unknown:
            distance.origin = torch.zeros_like(distance.origin)
    kept = {key: value for key, value in guard.distances.state_dict().items() if not key.endswith(unknown)}
    as_of_schema(tmp_path, schema, kept, scales=without_shortfall(guard.scales))
    read = bundle.read(tmp_path).guard
    assert guard.distances.state_dict().keys() == read.distances.state_dict().keys()
    for key, value in read.distances.state_dict().items():
        assert torch.equal(value, guard.distances.state_dict()[key]), key
    torch.testing.assert_close(read.judge(PIXELS).score, guard.judge(PIXELS).score, rtol=1e-5, atol=1e-5)


def test_a_bundle_that_does_not_compare_the_auxiliary_with_the_suspect_judges_as_it_did(tmp_path: Path) -> None:
    guard = make(tmp_path)[0]
    assert guard.scales is not None
    as_of_schema(tmp_path, bundle.SCHEMA, guard.distances.state_dict(), scales=without_shortfall(guard.scales))
    with pytest.raises(BundleNotReady, match="lacks something"):
        bundle.read(tmp_path)
    as_of_schema(tmp_path, 5, guard.distances.state_dict(), scales=without_shortfall(guard.scales))
    before = Fusion(list(guard.distances), replace(guard.scales, shortfall=None))
    alone = Guard(guard.suspect, list(guard.experts), guard.auxiliary, guard.preprocessing, cuts=guard.cuts, fusion=before)
    score = bundle.read(tmp_path).guard.judge(PIXELS).score
    torch.testing.assert_close(score, alone.judge(PIXELS).score, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(score, guard.judge(PIXELS).score, atol=0.01)
