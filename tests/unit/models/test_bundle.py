"""A bundle comes back as it was written, and whatever was done to it afterwards is noticed before a tensor is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models import architectures, bundle
from models.errors import BundleNotReady
from models.guard import Cuts, Guard, fuse
from models.preprocessing import Preprocessing
from models.threshold import conformal_threshold
from models.trunk import choose_cut, feature_cut, tail_copy


def make(folder: Path, seed: int = 0, cut: bool = True) -> tuple[Guard, str]:
    torch.manual_seed(seed)
    suspect, auxiliary = (architectures.get("resnet20").build(10).eval() for _ in range(2))
    example = torch.zeros(1, 3, 32, 32)
    cuts = Cuts(choose_cut(suspect, example, 0.1).name, feature_cut(suspect, example).name) if cut else None
    experts = [tail_copy(suspect, cuts.experts if cuts else None) for _ in range(3 if cut else 1)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    guard = Guard(suspect, experts, auxiliary, preprocessing, cuts=cuts)
    if cut:
        pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
        guard = fuse(guard, pixels, torch.arange(64) % 10, pixels[:20], 10)
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
        scales=None if guard.fusion is None else guard.fusion.scales,
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
