"""Hostile clean sets: rows C1 to C7 and C10 of the catalogue of bad inputs, and fuzzing. Only CleanSetProblem comes out, and nothing is written."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import stat
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from calibration.clean_set import Limits, open_clean_set
from models.errors import CleanSetFormat, CleanSetInvalid, CleanSetLabels, CleanSetProblem, CleanSetSize

FEW = Limits(min_images=24)
Files = dict[str, bytes]


def pixels(seed: int, side: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(seed: int, side: int = 12) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(seed, side)).save(out, "PNG")
    return out.getvalue()


FOLDERS: Files = {f"{('cat', 'dog')[i % 2]}/{i:03}.png": png(i) for i in range(24)}


def zipped(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(files: Files, *more: tarfile.TarInfo, mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in more:
            archive.addfile(info)
    return out.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def tensors(images: np.ndarray, labels: np.ndarray) -> bytes:
    return safetensors.numpy.save({"images": images, "labels": labels})


def raw_tensors(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def parquet(**columns: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


IMAGES = np.stack([pixels(i) for i in range(24)])
LABELS = np.arange(24, dtype=np.int64) % 3


def refused(data: bytes, tmp_path: Path, kind: type[CleanSetProblem], match: str, limits: Limits = FEW) -> None:
    """The upload is refused with this class and detail, quickly in memory, and leaves nothing behind."""
    folder = tmp_path / "only"
    folder.mkdir()
    path = folder / "upload"
    path.write_bytes(data)
    with pytest.raises(kind, match=match) as caught:
        open_clean_set(path, limits)
    assert type(caught.value) is kind
    assert len(caught.value.detail) < 600
    assert caught.value.detail.isprintable()
    assert os.listdir(folder) == ["upload"]
    assert sorted(os.listdir(tmp_path)) == ["only"]


# C1: other formats

FOREIGN: dict[str, tuple[bytes, str]] = {
    "a rar archive": (b"Rar!\x1a\x07\x01\x00" + bytes(600), "Rar archives are not taken"),
    "a 7z archive": (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(600), "7z archives are not taken"),
    "a pickle": (pickle.dumps({"images": IMAGES}), "Pickles are never loaded"),
    "a bare npy array": (b"\x93NUMPY\x01\x00" + bytes(600), "numpy.savez"),
    "a bzip2 tar": (tarred(FOLDERS, mode="w:bz2"), "Bzip2 is not taken"),
    "an xz tar": (tarred(FOLDERS, mode="w:xz"), "Xz is not taken"),
    "an HDF5 file": (b"\x89HDF\r\n\x1a\n" + bytes(600), "HDF5 is not taken"),
    "a single image": (png(0), "This is one image"),
    "a gzip of something else": (gzip.compress(os.urandom(4096)), "The gzip holds no tar"),
    "a file of torch.save": (zipped({"archive/data.pkl": b"x", "archive/data/0": b"y"}), "is a pickle"),
    "a web page": (b"<!doctype html><html>" + b" " * 600, "of no format that is taken"),
    "an npz of objects": (npz(images=np.array([{}, []], object), labels=LABELS), "holds Python objects"),
}


@pytest.mark.parametrize("upload", FOREIGN)
def test_another_format_is_refused_with_advice_for(upload: str, tmp_path: Path) -> None:
    data, advice = FOREIGN[upload]
    refused(data, tmp_path, CleanSetFormat, advice)


# C1a: hostile archives


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def symlink_in_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in FOLDERS.items():
            archive.writestr(name, data)
        info = zipfile.ZipInfo("cat/link.png")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return out.getvalue()


def twice_in_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in FOLDERS.items():
            archive.writestr(name, data)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("cat/000.png", png(1))
    return out.getvalue()


def patched(data: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite a field in the first record that begins with `mark`."""
    at = data.index(mark) + offset
    return data[:at] + value + data[at + len(value) :]


def overlapping() -> bytes:
    """All entries of the directory point to the first member, as in a quine bomb."""
    data = bytearray(zipped({f"cat/{i:03}.png": png(0) for i in range(24)}))
    at = 0
    while (at := data.find(b"PK\x01\x02", at)) >= 0:
        data[at + 42 : at + 46] = bytes(4)
        data[at + 46 : at + 46 + 11] = b"cat/000.png"
        at += 46
    return bytes(data)


def same_data_under_new_names() -> bytes:
    """Local headers are right, but each member's declared length reaches into the next."""
    data = bytearray(zipped(FOLDERS, zipfile.ZIP_STORED))
    at = 0
    while (at := data.find(b"PK\x01\x02", at)) >= 0:
        size = int.from_bytes(data[at + 20 : at + 24], "little") + 64
        data[at + 20 : at + 28] = struct.pack("<LL", size, size)
        at += 46
    return bytes(data)


BOMB = b"\x89PNG\r\n\x1a\n" + bytes(9 << 20)

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a zip that climbs out": (lambda: zipped({"../cat/x.png": png(0)}), "leads out of it"),
    "a zip with an absolute name": (lambda: zipped({"/cat/x.png": png(0)}), "absolute name"),
    "a zip with a drive letter": (lambda: zipped({"C:/cat/x.png": png(0)}), "absolute name"),
    "a zip with backslashes": (lambda: zipped({"cat/y.png": b""}).replace(b"cat/y", b"cat\\y"), "backslash"),
    "a zip with a link": (symlink_in_zip, "link or device"),
    "a zip with one name twice": (twice_in_zip, "'cat/000.png' twice"),
    "a zip that is encrypted": (lambda: patched(zipped(FOLDERS), b"PK\x01\x02", 8, b"\x01"), "encrypted"),
    "a zip with another method": (lambda: zipped(FOLDERS, zipfile.ZIP_LZMA), "compressed with method 14"),
    "a zip that inflates a thousandfold": (lambda: zipped({"cat/x.png": BOMB}), "inflates more than 100 times"),
    "a zip whose members are one": (overlapping, "twice|overlap|another name"),
    "a zip whose members overlap": (same_data_under_new_names, "overlap"),
    "a zip with another name inside": (lambda: patched(zipped(FOLDERS), b"PK\x03\x04", 30, b"dog"), "another name in its directory"),
    "a zip that lies about a size": (lambda: patched(zipped(FOLDERS), b"PK\x01\x02", 24, b"\x07\x00\x00\x00"), "size or checksum"),
    "a zip that lies about a checksum": (lambda: patched(zipped(FOLDERS), b"PK\x01\x02", 16, b"\x07\x00\x00\x00"), "size or checksum"),
    "a zip behind other data": (lambda: b"PK\x03\x04" + zipped(FOLDERS), "not where it should be"),
    "a zip before other data": (lambda: zipped(FOLDERS) + b"tail", "data follows its end"),
    "a zip in a zip": (lambda: zipped({**FOLDERS, "cat/more.zip": zipped(FOLDERS)}), "other archives or tensors .'cat/more.zip'"),
    "a zip of bitmaps": (lambda: zipped({"cat/x.bmp": b"BM"}), "not PNG, JPEG or WebP .'cat/x.bmp'"),
    "a zip of text called png": (lambda: zipped({**FOLDERS, "cat/liar.png": b"<script>alert(1)</script>"}), "'cat/liar.png' cannot be used"),
    "a zip with a truncated image": (lambda: zipped({**FOLDERS, "cat/half.png": png(0)[:200]}), "'cat/half.png' cannot be used"),
    "a zip with images of 7 pixels": (
        lambda: zipped({**FOLDERS, "cat/t.png": png(0, side=7)}),
        "'cat/t.png' cannot be used.*7x7",
    ),
    "a tar that climbs out": (lambda: tarred({"cat/../../x.png": png(0)}), "leads out of it"),
    "a tar with an absolute name": (lambda: tarred({"/etc/x.png": png(0)}), "absolute name"),
    "a tar with a symlink": (lambda: tarred(FOLDERS, link("cat/l.png", tarfile.SYMTYPE)), "link, device or sparse"),
    "a tar with a hard link": (lambda: tarred(FOLDERS, link("cat/l.png", tarfile.LNKTYPE)), "link, device or sparse"),
    "a tar with a device": (lambda: tarred(FOLDERS, link("cat/l.png", tarfile.CHRTYPE)), "link, device or sparse"),
    "a tar with a pipe": (lambda: tarred(FOLDERS, link("cat/l.png", tarfile.FIFOTYPE)), "link, device or sparse"),
    "a tar with one name twice": (lambda: tarred({**FOLDERS, "./cat/000.png": png(1)}), "twice"),
    "a tar in a tar": (lambda: tarred({**FOLDERS, "cat/more.tar": tarred(FOLDERS)}), "other archives"),
    "a tar without its end": (lambda: tarred(FOLDERS).rstrip(b"\0")[:-300], "truncated|beyond its end"),
    "a tar.gz without its end": (lambda: tarred(FOLDERS, mode="w:gz")[:-9], "truncated or damaged"),
    "a tar.gz with a wrong checksum": (lambda: tarred(FOLDERS, mode="w:gz")[:-8] + bytes(8), "truncated or damaged"),
    "a tar.gz that inflates a thousandfold": (lambda: gzip.compress(tarred({"cat/x.bin": bytes(80 << 20)}), 1), "more than 100 times"),
}


@pytest.mark.parametrize("upload", HOSTILE)
def test_nothing_comes_of(upload: str, tmp_path: Path) -> None:
    make, detail = HOSTILE[upload]
    refused(make(), tmp_path, CleanSetInvalid, detail)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_member_without_a_name_is_left_out_of_a_tar(mode: str, tmp_path: Path) -> None:
    (tmp_path / "set").write_bytes(tarred({**FOLDERS, ".": b"x"}, mode=mode))
    assert len(open_clean_set(tmp_path / "set", FEW)) == 24


@pytest.mark.parametrize("pack", [zipped, tarred], ids=["zip", "tar"])
def test_more_entries_than_the_cap_are_refused_in(pack: Callable[[Files], bytes], tmp_path: Path) -> None:
    refused(pack(FOLDERS), tmp_path, CleanSetInvalid, "more than 20 entries", Limits(min_images=24, entries=20))


def test_more_images_than_the_cap_are_refused_before_one_is_decoded(tmp_path: Path) -> None:
    files = dict.fromkeys(FOLDERS, b"not an image")
    refused(zipped(files), tmp_path, CleanSetSize, "24 images; at most 23", Limits(min_images=2, images=23))


def test_an_encoded_image_above_the_cap_is_refused_by_name(tmp_path: Path) -> None:
    for index, pack in enumerate((zipped, tarred)):
        (tmp_path / str(index)).mkdir()
        refused(pack(FOLDERS), tmp_path / str(index), CleanSetInvalid, "cat/000.png' has .* bytes", Limits(min_images=24, image_bytes=100))


def test_a_large_tar_gz_is_refused_with_advice(tmp_path: Path) -> None:
    refused(tarred(FOLDERS, mode="w:gz"), tmp_path, CleanSetInvalid, "send a zip or a plain tar", Limits(min_images=24, memory_bytes=4096))


def test_a_file_above_the_cap_and_too_many_pixels_are_refused(tmp_path: Path) -> None:
    for index, limits in enumerate((Limits(file_bytes=1000), Limits(min_images=24, pixels=1000))):
        (tmp_path / str(index)).mkdir()
        refused(zipped(FOLDERS), tmp_path / str(index), CleanSetSize, "at most 0 MiB|1,000 pixels together", limits)


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(zipped({**FOLDERS, **{f"cat/b{i}.png": bytes(9 << 20) for i in range(20)}}))
    tracemalloc.start()
    with pytest.raises(CleanSetInvalid):
        open_clean_set(tmp_path / "bomb", FEW)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_long_number_in_a_header_costs_no_time(tmp_path: Path) -> None:
    """Found by fuzzing: 242 bytes took 23 seconds, when a run of digits could be read as several numbers in as many ways as there are."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"3" * 96 + b"4,), } "
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    start = time.process_time()
    refused(zipped({"images.npy": array, "labels.npy": array}), tmp_path, CleanSetInvalid, "header cannot be read")
    assert time.process_time() - start < 1


def test_a_hostile_name_is_cleaned_and_shortened_in_the_detail(tmp_path: Path) -> None:
    name = "cat/\x1b[31m<b>\u202e" + "x" * 300 + ".png"
    path = tmp_path / "z"
    path.write_bytes(zipped({**FOLDERS, name: b"no image"}))
    with pytest.raises(CleanSetInvalid) as caught:
        open_clean_set(path, FEW)
    assert caught.value.detail.startswith("'cat/?[31m?b??xxx")
    assert len(caught.value.detail.split("' cannot")[0]) <= 61


def test_a_folder_may_not_link_outside_itself(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name, data in FOLDERS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "cat" / "inside.png").symlink_to(root / "cat" / "000.png")
    assert len(open_clean_set(root, FEW)) == 25
    (tmp_path / "secret.png").write_bytes(png(99))
    (root / "cat" / "out.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(CleanSetInvalid, match=r"leads outside it, 'out\.png'"):
        open_clean_set(root, FEW)
    (root / "cat" / "out.png").unlink()
    os.mkfifo(root / "cat" / "pipe.png")
    with pytest.raises(CleanSetInvalid, match=r"device or pipe, 'pipe\.png'"):
        open_clean_set(root, FEW)


def test_a_path_without_a_file_or_to_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("nothing", "pipe"):
        with pytest.raises(CleanSetInvalid, match="no file or folder"):
            open_clean_set(tmp_path / name, FEW)


# C2 to C5, C10: what is inside does not fit

CSV = b"file_name,label\n"
INSIDE: dict[str, tuple[Callable[[], bytes], type[CleanSetProblem], str]] = {
    "no class folders": (lambda: zipped({k[4:]: v for k, v in FOLDERS.items()}), CleanSetInvalid, "24 of 24 images are in no class folder"),
    "one image beside the folders": (lambda: zipped({**FOLDERS, "x.png": png(0)}), CleanSetInvalid, "1 of 25 images are in no class"),
    "no images": (lambda: zipped({"cat/notes.txt": b"hello"}), CleanSetInvalid, "No images were found: looked for"),
    "nothing at all": (lambda: zipped({}), CleanSetSize, "no images"),
    "one image": (lambda: zipped({"cat/x.png": png(0)}), CleanSetSize, "has 1 images; it needs at least 24"),
    "metadata of missing files": (lambda: zipped({**FOLDERS, "metadata.csv": CSV + b"../x.png,1\n"}), CleanSetInvalid, "not there: '../x.png'"),
    "metadata that lists one twice": (
        lambda: zipped({**FOLDERS, "metadata.csv": CSV + b"cat/000.png,1\ncat/000.png,2\n"}),
        CleanSetInvalid,
        "twice",
    ),
    "metadata with a short row": (lambda: zipped({**FOLDERS, "metadata.csv": CSV + b"cat/000.png\n"}), CleanSetInvalid, "no label"),
    "metadata that is not text": (lambda: zipped({**FOLDERS, "metadata.csv": b"\xff\xfe\x00"}), CleanSetInvalid, "not UTF-8"),
    "metadata with an endless field": (lambda: zipped({**FOLDERS, "metadata.csv": CSV + b"x" * 200_000}), CleanSetInvalid, "comma-separated"),
    "metadata nested without end": (lambda: zipped({**FOLDERS, "metadata.jsonl": b"[" * 100_000}), CleanSetInvalid, "not valid JSON"),
    "metadata with a float label": (
        lambda: zipped({**FOLDERS, "metadata.jsonl": b'{"file_name": "cat/000.png", "label": 1.5}'}),
        CleanSetLabels,
        "fractional",
    ),
    "metadata with a negative label": (
        lambda: zipped({**FOLDERS, "metadata.jsonl": b'{"file_name": "cat/000.png", "label": -1}'}),
        CleanSetLabels,
        "negative",
    ),
    "metadata with a negative label in text": (
        lambda: zipped({**FOLDERS, "metadata.csv": CSV + b"cat/000.png,-1\n"}),
        CleanSetLabels,
        "found '-1'",
    ),
    "a WebDataset image without a label": (
        lambda: tarred({"0.png": png(0), "0.cls": b"1", "1.png": png(1)}),
        CleanSetInvalid,
        "'1.png' has no label beside it",
    ),
    "parquet without images": (lambda: parquet(label=LABELS, text=["x"] * 24), CleanSetInvalid, "Looked for one image column.*'label', 'text'"),
    "parquet without labels": (lambda: parquet(image=[png(i) for i in range(24)]), CleanSetInvalid, "Looked for .* column label"),
    "parquet of paths": (
        lambda: parquet(image=[{"bytes": None if i else b"x", "path": "/etc/passwd"} for i in range(24)], label=LABELS),
        CleanSetInvalid,
        "no image bytes",
    ),
    "parquet with float labels": (
        lambda: parquet(image=[png(i) for i in range(24)], label=LABELS.astype(float)),
        CleanSetLabels,
        "integers or strings; found 'double'",
    ),
    "parquet with missing labels": (lambda: parquet(image=[png(i) for i in range(24)], label=[None, 1] * 12), CleanSetLabels, "no label"),
    "parquet with negative labels": (lambda: parquet(image=[png(i) for i in range(24)], label=LABELS - 1), CleanSetLabels, "found -1 to 1"),
    "parquet with too few rows": (lambda: parquet(image=[png(0)], label=[1]), CleanSetSize, "1 images"),
    "parquet of text": (lambda: parquet(image=[b"hello"] * 24, label=LABELS), CleanSetInvalid, "'row 0' cannot be used"),
    "parquet without its end": (lambda: parquet(image=[png(i) for i in range(24)], label=LABELS)[:-9], CleanSetInvalid, "damaged"),
    "float images": (lambda: tensors(IMAGES.astype(np.float32), LABELS), CleanSetInvalid, r"found float32 \[24, 12, 12, 3\]"),
    "channels first": (lambda: tensors(IMAGES.transpose(0, 3, 1, 2).copy(), LABELS), CleanSetInvalid, "put the channels last"),
    "one channel": (lambda: tensors(IMAGES[..., :1].copy(), LABELS), CleanSetInvalid, r"\[24, 12, 12, 1\]"),
    "four channels": (lambda: tensors(np.concatenate([IMAGES, IMAGES[..., :1]], 3), LABELS), CleanSetInvalid, r"\[24, 12, 12, 4\]"),
    "a side of 7": (lambda: tensors(IMAGES[:, :7].copy(), LABELS), CleanSetInvalid, "12x7; sides of 8 to 4096"),
    "a side of 5000": (lambda: tensors(np.zeros((24, 8, 5000, 3), np.uint8), LABELS), CleanSetInvalid, "5000x8"),
    "other array names": (lambda: npz(x=IMAGES, y=LABELS), CleanSetInvalid, "Looked for the arrays images and labels; found 'x', 'y'"),
    "a label too few": (lambda: tensors(IMAGES, LABELS[:-1]), CleanSetSize, "one integer for each of the 24 images"),
    "no rows": (lambda: npz(images=IMAGES[:0], labels=LABELS[:0]), CleanSetSize, "has 0 images"),
    "negative labels": (lambda: tensors(IMAGES, LABELS - 1), CleanSetLabels, "found -1 to 1"),
    "float labels": (lambda: tensors(IMAGES, LABELS.astype(np.float64)), CleanSetLabels, "must be integers; found float64"),
    "labels above 2^63": (lambda: npz(images=IMAGES, labels=LABELS.astype(np.uint64) + np.uint64(2**63)), CleanSetLabels, "from 0 on"),
    "an npz in Fortran order": (lambda: npz(images=np.asfortranarray(IMAGES), labels=LABELS), CleanSetInvalid, "Fortran order"),
    "a damaged npz": (lambda: zipped({"images.npy": b"\x93NUMPY\x01\x00\x10\x00{[((", "labels.npy": b""}), CleanSetInvalid, "header cannot"),
    "an empty file": (lambda: b"", CleanSetInvalid, "empty"),
    "seven bytes": (lambda: b"seven b", CleanSetInvalid, "empty or truncated"),
    "a header of 2^63 bytes": (lambda: (1 << 63).to_bytes(8, "little") + b"{}", CleanSetInvalid, "header is longer"),
    "a header of 1 MiB and a byte": (lambda: raw_tensors(b"{" + b" " * (1 << 20)), CleanSetInvalid, "header is longer"),
    "a header that is not JSON": (lambda: raw_tensors(b"not json"), CleanSetInvalid, "not JSON"),
    "a header nested without end": (lambda: raw_tensors(b'{"a":' * 100_000), CleanSetInvalid, "not JSON"),
    "a header with one key twice": (lambda: raw_tensors(b'{"a": 1, "a": 2}'), CleanSetInvalid, "not JSON"),
    "a header with negative offsets": (
        lambda: raw_tensors({"images": {"dtype": "U8", "shape": [0], "data_offsets": [-1, -1]}}),
        CleanSetInvalid,
        "not described",
    ),
    "a shape that overflows": (
        lambda: raw_tensors({"images": {"dtype": "U8", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}, bytes(8)),
        CleanSetInvalid,
        "not described",
    ),
    "an unknown dtype": (
        lambda: raw_tensors({k: {"dtype": "Q4", "shape": [8], "data_offsets": [i, i + 8]} for i, k in ((0, "images"), (8, "labels"))}, bytes(16)),
        CleanSetInvalid,
        "found q4",
    ),
    "tensors that overlap": (
        lambda: raw_tensors({k: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for k in ("images", "labels")}, bytes(8)),
        CleanSetInvalid,
        "overlap or leave a gap",
    ),
    "tensors before other data": (lambda: tensors(IMAGES, LABELS) + b"x", CleanSetInvalid, "shorter or longer"),
    "tensors without the last byte": (lambda: tensors(IMAGES, LABELS)[:-1], CleanSetInvalid, "shorter or longer"),
}


@pytest.mark.parametrize("content", INSIDE)
def test_a_clean_set_is_refused_for(content: str, tmp_path: Path) -> None:
    make, kind, detail = INSIDE[content]
    refused(make(), tmp_path, kind, detail)


def test_hundred_thousand_empty_tensors_are_refused_unread(tmp_path: Path) -> None:
    header = {str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    refused(raw_tensors(header), tmp_path, CleanSetInvalid, "longer than 1 MiB")


# Fuzzing

VALID = {
    "zip": zipped(FOLDERS),
    "tar": tarred(FOLDERS),
    "tar.gz": tarred(FOLDERS, mode="w:gz"),
    "npz": npz(images=IMAGES, labels=LABELS),
    "safetensors": tensors(IMAGES, LABELS),
    "webdataset": tarred({f"{i}.{kind}": data for i in range(24) for kind, data in (("png", png(i)), ("cls", b"%d" % (i % 3)))}),
    "metadata": zipped({**FOLDERS, "metadata.csv": CSV + b"".join(b"%s,a\n" % name.encode() for name in FOLDERS)}, zipfile.ZIP_STORED),
}


def weak_spots(data: bytes) -> st.SearchStrategy[int]:
    """Offsets, half of them near the beginning and the end, where the structure is."""
    n = len(data)
    return st.one_of(st.integers(0, n - 1), st.integers(0, min(600, n - 1)), st.integers(max(0, n - 1500), n - 1))


@pytest.mark.parametrize("container", VALID)
def test_only_a_clean_set_problem_comes_of_a_damaged(container: str, tmp_path: Path) -> None:
    valid = VALID[container]
    path = tmp_path / "upload"

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(
        flips=st.lists(st.tuples(weak_spots(valid), st.integers(0, 255)), min_size=1, max_size=4),
        end=st.one_of(st.just(len(valid)), weak_spots(valid)),
    )
    def damage(flips: list[tuple[int, int]], end: int) -> None:
        data = bytearray(valid)
        for at, value in flips:
            data[at] = value
        path.write_bytes(data[:end])
        with suppress(CleanSetProblem):
            clean = open_clean_set(path, FEW).labelled_by(3)
            assert len(clean) >= 24

    damage()
