"""Folders and zips around weights: which file is taken, and what is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from models.checkpoint import read_checkpoint
from models.errors import CheckpointFormat, CheckpointInvalid, CheckpointMismatch

STATE = {"stem.weight": torch.ones(4, 3), "stem.bias": torch.zeros(4)}
HEAD = {"head.weight": torch.ones(2, 4)}


def packed(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("folder", ["", "model/", "a/b/"])
def test_the_weights_are_found_in_a_zip_however_deep_and_litter_is_forgiven(tmp_path: Path, method: int, folder: str) -> None:
    litter = {"__MACOSX/model.safetensors": b"x", ".DS_Store": b"x", f"{folder}README.md": b"# model"}
    read = read_checkpoint(packed(tmp_path / "m.zip", {f"{folder}model.safetensors": save(STATE), **litter}, method))
    assert {name: tensor.tolist() for name, tensor in read.tensors.items()} == {name: tensor.tolist() for name, tensor in STATE.items()}
    assert read.format == "safetensors"


def test_safetensors_is_preferred_and_a_torch_file_inside_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert read_checkpoint(tmp_path).format == "torch-zip"
    save_file(STATE, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).format == "safetensors"
    torch_inside = packed(tmp_path / "m.zip", {"x/pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    assert read_checkpoint(torch_inside).format == "torch-zip"


def test_divided_weights_are_put_together(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model-1-of-2.safetensors")
    save_file(HEAD, tmp_path / "model-2-of-2.safetensors")
    parts = {**dict.fromkeys(STATE, "model-1-of-2.safetensors"), **dict.fromkeys(HEAD, "model-2-of-2.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    assert read_checkpoint(tmp_path).tensors.keys() == {*STATE, *HEAD}
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointInvalid, match="missing: model-2-of-2"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", [b"", b"{}", b"[]", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": ["../../x"]}}', b"{" * 100_000]
)
def test_a_damaged_index_is_refused(tmp_path: Path, index: bytes) -> None:
    path = packed(tmp_path / "m.zip", {"model.safetensors.index.json": index, "model-1.safetensors": save(STATE)})
    with pytest.raises(CheckpointInvalid):
        read_checkpoint(path)


def test_several_files_that_may_be_meant_are_named(tmp_path: Path) -> None:
    for name in ("first.safetensors", "second.safetensors"):
        save_file(STATE, tmp_path / name)
    with pytest.raises(CheckpointInvalid, match=r"first\.safetensors, second\.safetensors"):
        read_checkpoint(tmp_path)
    several = packed(tmp_path / "m.zip", {"a/model.safetensors": save(STATE), "b/model.safetensors": save(STATE)})
    with pytest.raises(CheckpointInvalid, match="several folders"):
        read_checkpoint(several)


def test_a_folder_without_weights_is_refused_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    save_file(STATE, tmp_path / "outside.safetensors")
    (tmp_path / "inside" / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointFormat, match="holds no weights"):
        read_checkpoint(tmp_path / "inside")


def test_what_is_inside_is_judged_as_it_would_be_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFormat, match="pickle"):
        read_checkpoint(packed(tmp_path / "a.zip", {"model.bin": b"\x80\x04\x95" + b"x" * 60}))
    with pytest.raises(CheckpointFormat, match="neither a torch checkpoint"):
        read_checkpoint(packed(tmp_path / "b.zip", {"model.bin": (packed(tmp_path / "c.zip", {"model.safetensors": save(STATE)})).read_bytes()}))
    with pytest.raises(CheckpointInvalid, match="inflates"):
        read_checkpoint(packed(tmp_path / "d.zip", {"model.safetensors": bytes(200 << 20)}))


def test_a_config_beside_the_weights_that_contradicts_them_is_told(tmp_path: Path) -> None:
    from calibration.suspect import read_suspect
    from models.cifar import thin_resnet

    save_file(thin_resnet(20, 5).state_dict(), tmp_path / "model.safetensors")
    claims = {"architecture": "resnet18", "num_classes": 5, "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0, 0, 0], "std": [1, 1, 1]}}
    (tmp_path / "config.json").write_text(json.dumps(claims))
    suspect = read_suspect(tmp_path / "model.safetensors", None, None, torch.device("cpu"))
    assert suspect.architecture.name == "resnet20"
    assert any("timm/resnet18" in note for note in suspect.notes)
    (tmp_path / "config.json").write_text(json.dumps({**claims, "num_classes": 7}))
    with pytest.raises(CheckpointMismatch, match="7 classes"):
        read_suspect(tmp_path, None, None, torch.device("cpu"))
    (tmp_path / "config.json").write_text('{"somebody\'s": "own"}')
    assert read_suspect(tmp_path, None, None, torch.device("cpu")).checkpoint.sidecar is None
