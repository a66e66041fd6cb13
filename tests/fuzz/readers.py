"""What is fuzzed: for each reader honest seeds, what is done with a file, how it is mutated, and what it may raise."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from PIL import Image

from calibration.clean_set import Limits, open_clean_set
from models.checkpoint import load_weights, read_checkpoint
from models.checkpoint.sidecar import read_sidecar
from models.checkpoint.state_dict import hints_of, locate
from models.checkpoint.torch_pickle import interpret
from models.errors import CheckpointProblem, CleanSetProblem, ImageProblem, Problem
from models.preprocessing import Preprocessing, decode
from tests.fuzz.mending import gunzip, mend_png, mend_tar, mend_tar_gz, mend_zip
from tests.fuzz.shaking import shake_header, shake_parts

FEW = Limits(images=64, entries=256, image_bytes=1 << 20, inflated_bytes=64 << 20, memory_bytes=64 << 20, pixels=50_000_000, min_images=2)
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # memory: the disk would be the slowest part


@dataclass(frozen=True)
class Reader:
    """`run` may raise `refusal` and nothing else; `mend` is applied to what the fuzzer mutated."""

    refusal: type[Problem]
    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    mend: Callable[[bytes], bytes] = bytes
    unpack: Callable[[bytes], bytes] = bytes  # what is mutated in a file: the inverse of `mend`
    shake: Callable[[bytes, random.Random], bytes] | None = None  # mutates the JSON in a file as a tree; ValueError where there is none


@contextmanager
def stored(data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        path = Path(folder, "upload")
        path.write_bytes(data)
        yield path


# ---- checkpoints


def checkpoint(data: bytes) -> None:
    with stored(data) as path:
        found = read_checkpoint(path)
        for tensor in found.tensors.values():
            tensor.clone()  # every byte is touched: a view beyond its storage would crash
        load_weights(found)


def pickled(data: bytes) -> None:
    found = interpret(memoryview(data), 100_000)
    locate(found.root)
    if isinstance(found.root, dict):
        hints_of(found.root)


def pickle_in_zip(data: bytes) -> None:
    """Beside storages of 64 bytes each: those of `small`."""
    checkpoint(zipped({"a/data.pkl": data, **{f"a/data/{key}": bytes(range(64)) for key in range(5)}}))


def sidecar(data: bytes) -> None:
    config, separator, preprocessor = data.partition(b"\0")
    read_sidecar(config, preprocessor if separator else None)


def package(data: bytes) -> None:
    """The index of divided weights and the config beside it are fuzzed, the weights are honest."""
    index, _, config = data.partition(b"\0")
    parts = {name: safetensors.torch.save({name: torch.ones(2, 2)}) for name in ("a.safetensors", "b.safetensors")}
    checkpoint(zipped({"x/model.safetensors.index.json": index, "x/config.json": config, **{f"x/{name}": part for name, part in parts.items()}}))


def state() -> dict[str, torch.Tensor]:
    shared = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {"module.conv.weight": shared, "module.conv.bias": shared[1], "module.bn.running_var": torch.ones(3), "module.bn.num_batches": torch.tensor(3)}


def safetensors_files() -> list[bytes]:
    kinds = {
        "a": torch.ones(2, dtype=torch.float16),
        "b": torch.ones(2, 2, dtype=torch.bfloat16),
        "c": torch.zeros(0, 3),
        "d": torch.ones(2, dtype=torch.int32),
    }
    return [safetensors.torch.save({name: tensor.clone() for name, tensor in state().items()}, {"format": "pt"}), safetensors.torch.save(kinds)]


def torch_files() -> list[bytes]:
    objects = [
        state(),
        {"epoch": 3, "arch": "resnet18", "num_classes": 10, "state_dict": state(), "optimizer": {"state": {0: torch.ones(2)}}},
        {"model": {"w": torch.nn.Parameter(torch.ones(2, 2))}, "img_size": (32, 32, 3), "half": torch.ones(3).half(), "args": Path("x")},
        {"w": torch.ones(2, dtype=torch.uint16), "sparse": torch.eye(2).to_sparse(), "turned": torch.ones(2, 3).T, "empty": torch.empty(0)},
        torch.nn.Linear(1, 1),
    ]
    files = []
    for thing in objects:
        torch.save(thing, buffer := io.BytesIO())
        files.append(buffer.getvalue())
    return [*files, repacked(files[0], zipfile.ZIP_DEFLATED)]


def small() -> dict[str, Any]:
    """Each storage has 64 bytes, and all of them are finite numbers."""
    rows = torch.zeros(4, 4)
    weights = {
        "model.a.weight": rows,
        "model.a.bias": rows[1],
        "model.b.weight": torch.zeros(2, 2, 8, dtype=torch.bfloat16),
        "model.c": torch.zeros(8).double(),
    }
    return {"net": weights, "ema": {"w": torch.nn.Parameter(torch.zeros(16))}, "num_classes": 10, "step": torch.zeros(8, dtype=torch.int64)}


def pickles(*objects: Any) -> list[bytes]:
    files = torch_files()
    for thing in objects:
        torch.save(thing, buffer := io.BytesIO())
        files.append(buffer.getvalue())
    return [
        zipfile.ZipFile(io.BytesIO(file)).read(name) for file in files for name in zipfile.ZipFile(io.BytesIO(file)).namelist() if name.endswith("data.pkl")
    ]


def packages() -> list[bytes]:
    config = json.dumps({"architecture": "resnet18", "num_classes": 10}).encode()
    return [zipped({"x/config.json": config, "x/model.safetensors": safetensors_files()[0]}), zipped({"x/pytorch_model.bin": torch_files()[0]})]


def indices() -> list[bytes]:
    index = {"metadata": {"total_size": 32}, "weight_map": {"a.safetensors": "a.safetensors", "b.safetensors": "b.safetensors"}}
    return [json.dumps(index).encode() + b"\0" + config.partition(b"\0")[0] for config in configs()]


def configs() -> list[bytes]:
    """As timm and transformers write them; behind the NUL a preprocessor_config.json."""
    timm = {
        "architecture": "resnet18",
        "num_classes": 10,
        "num_features": 512,
        "pretrained_cfg": {
            **{"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.95, "crop_mode": "center"},
            **{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "label_names": ["cat", "dog"]},
        },
    }
    transformers = {
        **{"architectures": ["ViTForImageClassification"], "model_type": "vit", "id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}},
        **{"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu"},
    }
    preprocessor = {
        **{"do_resize": True, "size": {"height": 224, "width": 224}, "resample": 2, "do_rescale": True, "rescale_factor": 0.00392156862745098},
        **{"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_center_crop": False, "crop_pct": None},
    }
    return [json.dumps(timm).encode(), json.dumps(transformers).encode() + b"\0" + json.dumps(preprocessor).encode()]


# ---- clean sets


def clean_set(data: bytes) -> None:
    with stored(data) as path:
        found = open_clean_set(path, FEW).labelled_by(3)
        for image in found.images():
            image.load()


def table(name: str) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        clean_set(zipped({f"{i}.png": PNGS[i] for i in range(4)} | {name: data}))

    return run


def arrays(data: bytes) -> None:
    """labels.npy, its length in the first two bytes, then images.npy."""
    cut = 2 + int.from_bytes(data[:2], "little")
    clean_set(zipped({"labels.npy": data[2:cut], "images.npy": data[cut:]}))


def pixels(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


PNGS = [encoded(Image.fromarray(pixels(i)), "PNG") for i in range(4)]
FOLDERS = {f"{('cat', 'dog', 'emu')[i % 3]}/{i}.png": PNGS[i] for i in range(4)}
SIDECARS = {f"{i}.png": PNGS[i] for i in range(4)} | {"0.cls": b"0", "1.json": b'{"label": 1}', "2.txt": b"2", "3.cls": b"1"}
CSV, JSONL = b"file_name,label\n0.png,0\n1.png,1\n2.png,2\n3.png,1\n", b"".join(b'{"file_name": "%d.png", "label": %d}\n' % (i, i % 3) for i in range(4))
STACK, LABELS = np.stack([pixels(i) for i in range(4)]), np.array([0, 1, 2, 1])


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def repacked(data: bytes, method: int) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return zipped({name: archive.read(name) for name in archive.namelist()}, method)


def tarred(files: dict[str, bytes], style: int = tarfile.PAX_FORMAT) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w", format=style) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue().rstrip(b"\0") + bytes(1024 + -len(buffer.getvalue().rstrip(b"\0")) % 512)


def zips() -> list[bytes]:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, data in FOLDERS.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    described = zipped({**{f"{i}.png": PNGS[i] for i in range(4)}, "metadata.csv": CSV})
    return [
        described,
        zipped(FOLDERS),
        zipped(FOLDERS, zipfile.ZIP_DEFLATED),
        zipped({"train/": b"", **{f"train/{name}": data for name, data in FOLDERS.items()}}),
        buffer.getvalue(),
    ]


def tars() -> list[bytes]:
    long = {f"{'x' * 120}/{name}": data for name, data in FOLDERS.items()}
    return [tarred(FOLDERS), tarred(long), tarred(long, tarfile.GNU_FORMAT), tarred(FOLDERS, tarfile.USTAR_FORMAT)]


def parquets() -> list[bytes]:
    images = pa.array([{"bytes": data, "path": None} for data in PNGS])
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}}}
    named = pa.table({"image": images, "label": LABELS}).replace_schema_metadata({"huggingface": json.dumps(info)})
    plain = pa.table({"img": pa.array(PNGS), "label": pa.array(["cat", "dog", "emu", "dog"]).dictionary_encode()})
    files = []
    for content, options in ((named, {}), (plain, {"compression": "none"}), (plain, {"compression": "zstd", "data_page_version": "2.0"})):
        pq.write_table(content, buffer := io.BytesIO(), **options)
        files.append(buffer.getvalue())
    return files


def npys() -> list[bytes]:
    def npy(array: np.ndarray) -> bytes:
        np.save(buffer := io.BytesIO(), array)
        return buffer.getvalue()

    return [len(labels := npy(kind)).to_bytes(2, "little") + labels + npy(STACK) for kind in (LABELS, LABELS.astype(">i4"), LABELS.astype(np.uint8))]


def tensor_sets() -> list[bytes]:
    return [safetensors.torch.save({"images": torch.from_numpy(STACK), "labels": torch.from_numpy(LABELS)}, meta) for meta in (None, {"made": "by hand"})]


def csvs() -> list[bytes]:
    rows = [("label", "file_name"), *((("dog", "emu", "cat, big")[i % 3], f"{i}.png") for i in range(4))]
    csv.writer(quoted := io.StringIO(), quoting=csv.QUOTE_ALL).writerows(rows)
    return [CSV, b"\xef\xbb\xbf" + CSV, quoted.getvalue().encode()]


# ---- images


def image(data: bytes) -> None:
    Preprocessing().pixels(decode(data))


def images() -> list[bytes]:
    rgb = Image.fromarray(pixels(0, 16))
    pngs = [encoded(rgb.convert(mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    jpegs = [encoded(rgb.convert(mode), "JPEG", progressive=progressive, exif=Image.Exif()) for mode in ("RGB", "L", "CMYK") for progressive in (False, True)]
    webps = [encoded(rgb, "WEBP", lossless=lossless) for lossless in (False, True)]
    moving = [encoded(rgb, kind, save_all=True, append_images=[rgb.rotate(90)]) for kind in ("PNG", "WEBP")]
    return [*pngs, encoded(rgb, "PNG", interlace=1), *jpegs, *webps, *moving]


READERS = {
    "safetensors": Reader(CheckpointProblem, checkpoint, safetensors_files, shake=shake_header),
    "torch-zip": Reader(CheckpointProblem, checkpoint, lambda: [*torch_files(), *packages()]),
    "pickle": Reader(CheckpointProblem, pickled, pickles),
    "pickle-in-zip": Reader(CheckpointProblem, pickle_in_zip, lambda: pickles(small(), small()["net"])),
    "package": Reader(CheckpointProblem, package, indices, shake=shake_parts(b"\0")),
    "sidecar": Reader(CheckpointProblem, sidecar, configs, shake=shake_parts(b"\0")),
    "set-zip": Reader(CleanSetProblem, clean_set, zips, mend_zip),
    "set-tar": Reader(CleanSetProblem, clean_set, tars, mend_tar),
    "set-tar-gz": Reader(CleanSetProblem, clean_set, lambda: [mend_tar_gz(file) for file in tars()], mend_tar_gz, gunzip),
    "set-webdataset": Reader(CleanSetProblem, clean_set, lambda: [tarred(SIDECARS)], mend_tar),
    "set-parquet": Reader(CleanSetProblem, clean_set, parquets),
    "set-safetensors": Reader(CleanSetProblem, clean_set, tensor_sets, shake=shake_header),
    "set-npz": Reader(CleanSetProblem, arrays, npys),
    "set-csv": Reader(CleanSetProblem, table("metadata.csv"), csvs),
    "set-jsonl": Reader(CleanSetProblem, table("metadata.jsonl"), lambda: [JSONL, JSONL.replace(b"label", b"category")], shake=shake_parts(b"\n")),
    "image": Reader(ImageProblem, image, images, mend_png),
}
