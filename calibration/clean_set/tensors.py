"""Clean sets that are two arrays, `images` uint8 [N, H, W, 3] and `labels` of integers [N]: safetensors, and npz without numpy's loader.

Refuses float, one-channel and channels-first images, object arrays, and headers that disagree with the data. Images of a safetensors file
stay in it; those of an npz are inflated into memory, up to Limits.memory_bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calibration.clean_set.container import ByteFile, listed
from calibration.clean_set.limits import Limits
from calibration.clean_set.zip_archive import ZipArchive
from models.errors import CleanSetFormat, CleanSetInvalid, CleanSetLabels, CleanSetSize

MIN_SIDE, MAX_SIDE = 8, 4096
MAX_HEADER = 1 << 20
_DTYPES = {"U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8", "BOOL": "?"}
_DTYPES |= {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
# Each number but the last has its comma: were it optional, a run of digits could be divided in more ways than there is time to try.
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|=][a-zA-Z][0-9]{0,4})', 'fortran_order': (True|False), 'shape': \(((?:[0-9]{1,12}, ?){0,7}(?:[0-9]{1,12})?)\),? ?\}[ \n]*"
)


@dataclass(frozen=True)
class Array:
    """One array of a file: `read(offset, count)` gives bytes of its data."""

    dtype: str  # numpy's name, or the file's own where numpy has none
    shape: tuple[int, ...]
    read: Callable[[int, int], bytes]


_UNREAD = Array("", (), lambda offset, count: b"")


@dataclass(frozen=True)
class Tensors:
    """Images in an array; see Images."""

    images: Array

    def __len__(self) -> int:
        return self.images.shape[0]

    def name(self, index: int) -> str:
        return f"image {index}"

    def image(self, index: int) -> Image.Image:
        shape = self.images.shape[1:]
        size = math.prod(shape)
        pixels = np.frombuffer(self.images.read(index * size, size), np.uint8).reshape(shape)  # [H, W, 3]
        return Image.fromarray(pixels)


def labelled(arrays: dict[str, Array], limits: Limits) -> tuple[Tensors, NDArray[np.int64]]:
    """The images and labels among the arrays of a file, checked."""
    if not {"images", "labels"} <= arrays.keys():
        raise CleanSetInvalid(f"Looked for the arrays images and labels; found {listed(sorted(arrays)) or 'none'}.")
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != "uint8" or len(images.shape) != 4 or images.shape[3] != 3:
        hint = "; put the channels last" if len(images.shape) == 4 and images.shape[1] == 3 else ""
        raise CleanSetInvalid(f"images must be uint8 [N, height, width, 3]; found {images.dtype} {list(images.shape)}{hint}.")
    n, height, width, _ = images.shape
    if labels.shape != (n,):
        raise CleanSetSize(f"labels must be one integer for each of the {n:,} images; found the shape {list(labels.shape)}.")
    if n > limits.images or n < limits.min_images:
        raise CleanSetSize(f"The clean set has {n:,} images; it needs at least {limits.min_images} and takes at most {limits.images:,}.")
    if not (MIN_SIDE <= height <= MAX_SIDE and MIN_SIDE <= width <= MAX_SIDE):
        raise CleanSetInvalid(f"images are {width}x{height}; sides of {MIN_SIDE} to {MAX_SIDE} pixels are taken.")
    if not re.fullmatch(r"u?int(8|16|32|64)", labels.dtype):
        raise CleanSetLabels(f"labels must be integers; found {labels.dtype}.")
    dtype = np.dtype(labels.dtype)
    values = np.frombuffer(labels.read(0, n * dtype.itemsize), dtype)
    if int(values.min()) < 0 or int(values.max()) >= 1 << 62:
        raise CleanSetLabels(f"labels must be class indices from 0 on; found {int(values.min())} to {int(values.max())}.")
    return Tensors(images), values.astype(np.int64)


def read_safetensors(file: ByteFile) -> dict[str, Array]:
    """The arrays of a safetensors file. The data must follow the header without gap, overlap or rest."""
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER or length + 8 > file.size:
        raise CleanSetInvalid("The safetensors file is damaged: its header is longer than 1 MiB or than the file.")
    try:
        header = json.loads(file.read(8, length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CleanSetInvalid("The safetensors file is damaged: its header is not JSON.") from error
    if not isinstance(header, dict):
        raise CleanSetInvalid("The safetensors file is damaged: its header is not an object.")
    spans = []
    arrays = {}
    for name, field in header.items():
        if name != "__metadata__":
            dtype, shape, begin, end = _described(field)
            spans.append((begin, end))
            arrays[name] = Array(dtype, shape, _window(file, 8 + length + begin, end - begin))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise CleanSetInvalid("The safetensors file is damaged: its tensors overlap or leave a gap.")
        at = end
    if at != file.size - 8 - length:
        raise CleanSetInvalid("The safetensors file is damaged: its data is shorter or longer than its header says.")
    return arrays


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _described(field: Any) -> tuple[str, tuple[int, ...], int, int]:
    damaged = CleanSetInvalid("The safetensors file is damaged: a tensor is not described as it should be.")
    if not isinstance(field, dict):
        raise damaged
    name, shape, offsets = field.get("dtype"), field.get("shape"), field.get("data_offsets")
    if not (isinstance(name, str) and _naturals(shape) and _naturals(offsets)) or len(offsets) != 2 or len(shape) > 8:
        raise damaged
    begin, end = offsets
    if name not in _DTYPES:
        if begin > end:
            raise damaged
        return name.lower()[:16], tuple(shape), begin, end  # of a type that is not taken; other checks say so
    dtype = np.dtype(_DTYPES[name])
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise damaged
    return dtype.name, tuple(shape), begin, end


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _window(file: ByteFile, start: int, size: int) -> Callable[[int, int], bytes]:
    def read(offset: int, count: int) -> bytes:
        if offset + count > size:
            raise CleanSetInvalid("The safetensors file is damaged: it is shorter than its header says.")
        return file.read(start + offset, count)

    return read


def read_npz(archive: ZipArchive, limits: Limits) -> dict[str, Array]:
    """The arrays named images and labels, in memory; others only by name."""
    names = {entry.name.removesuffix(".npy"): i for i, entry in enumerate(archive.entries)}
    taken = {name: i for name, i in names.items() if name in ("images", "labels")}
    if sum(archive.size(i) for i in taken.values()) > limits.memory_bytes:
        raise CleanSetInvalid(f"The npz inflates to more than {limits.memory_bytes >> 20:,} MiB; use `safetensors.numpy.save_file`.")
    return {name: _read_npy(archive.read(i, limits.memory_bytes)) if name in taken else _UNREAD for name, i in names.items()}


def _read_npy(data: bytes) -> Array:
    wide = data[6:7] in (b"\2", b"\3")
    start = 12 if wide else 10
    end = start + int.from_bytes(data[8:start], "little")
    match = _NPY_HEADER.fullmatch(data, start, min(end, start + 4096))
    if data[:6] != b"\x93NUMPY" or data[6:7] not in (b"\1", b"\2", b"\3") or match is None:
        raise CleanSetInvalid("The npz is damaged: an array's header cannot be read.")
    if match[2] == b"True":
        raise CleanSetInvalid("An array of the npz is in Fortran order; save it with np.ascontiguousarray.")
    shape = tuple(int(v) for v in match[3].replace(b",", b" ").split())
    if match[1][1:2] == b"O":
        raise CleanSetFormat("The npz holds Python objects, which are never loaded; save plain arrays of uint8 and int64.")
    if match[1][1:2] not in b"iufb":
        return Array(match[1].decode(), shape, lambda o, c: b"")
    try:
        dtype = np.dtype(match[1].decode())
    except TypeError as error:
        raise CleanSetInvalid("The npz is damaged: an array has an unknown type.") from error
    if len(data) - end != math.prod(shape) * dtype.itemsize:
        raise CleanSetInvalid("The npz is damaged: an array is shorter or longer than its header says.")
    if not dtype.isnative:
        data, end = np.frombuffer(data, dtype, offset=end).astype(dtype.newbyteorder("=")).tobytes(), 0
    return Array(dtype.name, shape, lambda offset, count: data[end + offset : end + offset + count])
