"""docs/uploads.md is true: each format in its tables is made, small, and read, and what comes of it is what the table says."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from calibration.clean_set import open_clean_set
from models.checkpoint import read_checkpoint
from models.errors import CheckpointProblem, CleanSetProblem

PAGE = Path(__file__).parent.parent.parent / "docs" / "uploads.md"
Write = Callable[[Path], Any]


def tables() -> Iterator[tuple[str, str, str, str]]:
    """Section, format, taken and how to convert of each row."""
    for section in PAGE.read_text().split("\n## ")[1:]:
        for line in re.findall(r"^\| (.*) \|$", section, re.MULTILINE)[1:]:
            name, taken, _, convert = (cell.strip() for cell in line.replace("| |", "|  |").split("|"))
            yield section.split("\n")[0], name, taken, convert


def layer() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))


STATE = layer().state_dict()


def files(**contents: bytes) -> Write:
    def write(path: Path) -> None:
        path.mkdir()
        for name, data in contents.items():
            (path / name.replace("__", "-").replace("_dot_", ".")).write_bytes(data)

    return write


def zipped(contents: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(contents: dict[str, bytes], mode: str = "w") -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def data(content: bytes) -> Write:
    return lambda path: path.write_bytes(content)


def numpy_saved(save: Callable[..., None], *arrays: np.ndarray, **named: np.ndarray) -> Write:
    save(out := io.BytesIO(), *arrays, **named)
    return data(out.getvalue())


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(layer(), (torch.ones(1, 12),)), written := path.with_suffix(".pt2"))
    written.rename(path)


MODEL = safetensors.torch.save(STATE)
DIVIDED = {"weight_map": {"1.weight": "a.safetensors", "1.bias": "b.safetensors"}}
HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(600)
CHECKPOINTS: dict[str, Write] = {
    "safetensors": data(MODEL),
    "torch.save of a state dict": lambda path: torch.save(STATE, path),
    "torch.save of a training checkpoint": lambda path: torch.save({"model": STATE, "optimizer": {"state": {}}, "epoch": 3}, path),
    "Lightning checkpoint": lambda path: torch.save({"state_dict": {f"model.{k}": v for k, v in STATE.items()}, "pytorch-lightning_version": "2.6.0"}, path),
    "folder as timm and transformers write it": files(model_dot_safetensors=MODEL, config_dot_json=b'{"architecture": "own"}'),
    "zip of such a folder": data(zipped({"net/model.safetensors": MODEL, "net/config.json": b"{}"})),
    "divided safetensors with an index": files(
        a_dot_safetensors=safetensors.torch.save({"1.weight": STATE["1.weight"]}),
        b_dot_safetensors=safetensors.torch.save({"1.bias": STATE["1.bias"]}),
        model_dot_safetensors_dot_index_dot_json=json.dumps(DIVIDED).encode(),
    ),
    "torch.save of a whole module": lambda path: torch.save(layer(), path),
    "torch.save before torch 1.6": lambda path: torch.save(STATE, path, _use_new_zipfile_serialization=False),
    "bare pickle": data(pickle.dumps({"weight": [1.0]})),
    "TorchScript": lambda path: torch.jit.save(torch.jit.trace(layer(), torch.ones(1, 12)), str(path)),
    "torch.export": exported,
    "ONNX": data(b"\x08\x0a\x12\x07pytorch\x1a\x052.8.0:\x9e\x01" + bytes(300)),
    "HDF5": data(HDF5),
    "GGUF": data(b"GGUF\x03\x00\x00\x00" + bytes(300)),
    "numpy archive": numpy_saved(np.savez, weight=np.ones((2, 12))),
    "tar archive": data(tarred({"model.safetensors": MODEL})),
    "gzip": data(b"\x1f\x8b\x08\x00" + b"\x99" * 300),
}


PIXELS = np.random.default_rng(0).integers(0, 256, (100, 12, 12, 3), dtype=np.uint8)
LABELS = np.arange(100) % 2


def png(index: int, format: str = "PNG") -> bytes:
    Image.fromarray(PIXELS[index]).save(out := io.BytesIO(), format)
    return out.getvalue()


FOLDERS = {f"{'cat' if label else 'dog'}/{i:03}.png": png(i) for i, label in enumerate(LABELS)}


def parquet(path: Path) -> None:
    rows = pa.array([{"bytes": png(i), "path": None} for i in range(100)], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": rows, "label": LABELS}), path)


def folder(path: Path) -> None:
    for name, content in FOLDERS.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


LISTED = {f"{i}.png": png(i) for i in range(100)} | {"metadata.csv": b"file_name,label\n" + b"".join(b"%d.png,%d\n" % (i, i % 2) for i in range(100))}
CLEAN_SETS: dict[str, Write] = {
    "zip of one folder a class": data(zipped(FOLDERS)),
    "zip with metadata.csv or metadata.jsonl": data(zipped(LISTED)),
    "folder": folder,
    "tar or tar.gz of one folder a class": data(tarred(FOLDERS, "w:gz")),
    "WebDataset tar": data(tarred({f"{i}.{kind}": content for i in range(100) for kind, content in (("png", png(i)), ("cls", b"%d" % (i % 2)))})),
    "Parquet of Hugging Face datasets": parquet,
    "safetensors of images and labels": data(safetensors.numpy.save({"images": PIXELS, "labels": LABELS})),
    "npz of images and labels": numpy_saved(np.savez, images=PIXELS, labels=LABELS),
    "npy": numpy_saved(np.save, PIXELS),
    "pickle": data(pickle.dumps({"images": PIXELS, "labels": LABELS})),
    "torch.save of tensors": lambda path: torch.save({"images": torch.from_numpy(PIXELS)}, path),
    "rar": data(b"Rar!\x1a\x07\x01\x00" + bytes(600)),
    "7z": data(b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(600)),
    "tar.bz2": data(tarred(FOLDERS, "w:bz2")),
    "tar.xz": data(tarred(FOLDERS, "w:xz")),
    "HDF5": data(HDF5),
    "Arrow": data(b"ARROW1\0\0" + bytes(600)),
    "zip of bitmaps": data(zipped({name.replace(".png", ".bmp"): png(i, "BMP") for i, name in enumerate(FOLDERS)})),
    "zip of zips": data(zipped({"cat.zip": zipped(FOLDERS), "dog.zip": zipped(FOLDERS)})),
}
MADE = {"Checkpoints": CHECKPOINTS, "Clean sets": CLEAN_SETS}


def test_the_tables_list_what_is_tried_here() -> None:
    rows = list(tables())
    assert {section: {name for where, name, _, _ in rows if where == section} for section in MADE} == {section: set(made) for section, made in MADE.items()}
    assert {section for section, *_ in rows} == set(MADE)


@pytest.mark.parametrize(("section", "name", "taken", "convert"), [pytest.param(*row, id=f"{row[0]}: {row[1]}") for row in tables()])
def test_a_format_is_taken_or_refused_as_the_page_says(tmp_path: Path, section: str, name: str, taken: str, convert: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of formats that torch has left behind
        MADE[section][name](path := tmp_path / "file")
    read: Callable[[Path], object] = read_checkpoint if section == "Checkpoints" else open_clean_set
    if taken == "yes":
        assert convert == ""
        read(path)
    else:
        assert taken == "no"
        with pytest.raises((CheckpointProblem, CleanSetProblem)) as caught:
            read(path)
        assert re.search("save|send|write|convert|pack", caught.value.detail), "the refusal does not say how to convert it"
