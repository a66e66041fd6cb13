"""Parquet as Hugging Face datasets writes it: an image column of {bytes, path} or plain binary, and a label column.

Row groups cannot be read an image at a time, so the encoded images are kept in memory, up to Limits.memory_bytes. Class names come from the
ClassLabel feature in the schema's metadata, in the order it declares. pyarrow is imported only here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.clean_set.container import Entry, cleaned, listed
from calibration.clean_set.layout import LABEL_COLUMNS, sort_names
from calibration.clean_set.limits import Limits
from models.errors import CleanSetFormat, CleanSetInvalid, CleanSetLabels, CleanSetSize

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png")
_LABELS = (*LABEL_COLUMNS, "fine_label", "target")
_BATCH = 16  # rows: few, since one page may stand for many large images


class ParquetRows:
    """The encoded images of a Parquet file; see Container."""

    kind = "parquet"

    def __init__(self, data: list[bytes]) -> None:
        self._data = data
        self.entries: Sequence[Entry] = [Entry((f"row {i}",)) for i in range(len(data))]

    def read(self, index: int, limit: int) -> bytes:
        if len(self._data[index]) > limit:
            raise CleanSetInvalid(f"{self.entries[index].name} has {len(self._data[index]):,} bytes; at most {limit:,} are taken.")
        return self._data[index]


@dataclass(frozen=True)
class Table:
    rows: ParquetRows
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    ordered: bool  # the names are in the order that the file declares


def read_parquet(path: Path, limits: Limits) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise CleanSetFormat("Parquet needs the package pyarrow, which is not installed here; send a zip of one folder a class.") from error
    try:
        with pq.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
            return _read(file, limits, pa)
    except MemoryError:  # ArrowMemoryError is also an ArrowException
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # damaged pages are reported as OSError
        raise CleanSetInvalid("The Parquet file is damaged.") from error


def _read(file: Any, limits: Limits, pa: Any) -> Table:
    schema, count = file.schema_arrow, file.metadata.num_rows
    if count > limits.images or count < limits.min_images:
        raise CleanSetSize(f"The clean set has {count:,} images; it needs at least {limits.min_images} and at most {limits.images:,}.")
    image, label = _columns(schema, pa)
    names = _class_names(schema, label)
    kind = schema.field(label).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise CleanSetLabels(f"The column {cleaned(label)} must hold integers or strings; found {cleaned(str(kind))}.")
    data: list[bytes] = []
    found: list[Any] = []
    kept = 0
    for batch in file.iter_batches(batch_size=_BATCH, columns=[image, label], use_threads=False):
        column = batch.column(batch.schema.get_field_index(image))
        if pa.types.is_struct(column.type):
            column = column.flatten()[column.type.get_field_index("bytes")]
        kept += column.nbytes
        if kept > limits.memory_bytes:
            raise CleanSetInvalid(f"The Parquet file holds more than {limits.memory_bytes >> 20:,} MiB of images; send a zip.")
        data += column.to_pylist()
        found += batch.column(batch.schema.get_field_index(label)).to_pylist()
    if len(data) != count or None in data:
        raise CleanSetInvalid("Some rows of the Parquet file have no image bytes; write the images into the file, not their paths.")
    if None in found:
        raise CleanSetLabels("Some rows of the Parquet file have no label.")
    return _labelled(data, found, names)


def _labelled(data: list[bytes], found: list[Any], names: tuple[str, ...] | None) -> Table:
    if isinstance(found[0], int):
        low, high = min(found), max(found)
        if low < 0 or high >= (len(names) if names is not None else 1 << 62):
            known = f"to {len(names) - 1}, as the file names {len(names)} classes" if names is not None else "on"
            raise CleanSetLabels(f"Labels must be class indices from 0 {known}; found {low} to {high}.")
        if names is not None:
            return Table(ParquetRows(data), names, np.array(found, np.int64), ordered=True)
        found = [str(value) for value in found]
    distinct = sort_names(set(found))
    position = {name: i for i, name in enumerate(distinct)}
    return Table(ParquetRows(data), distinct, np.array([position[name] for name in found], np.int64), ordered=False)


def _columns(schema: Any, pa: Any) -> tuple[str, str]:
    """The names of the image and the label column."""

    def binary(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def holds_images(kind: Any) -> bool:
        return binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and binary(kind.field("bytes").type))

    candidates = [field.name for field in schema if holds_images(field.type)]
    image = next((name for name in IMAGE_COLUMNS if name in candidates), candidates[0] if len(candidates) == 1 else None)
    label = next((name for name in _LABELS if name in schema.names), None)
    if image is None or label is None or schema.names.count(image) > 1 or schema.names.count(label) > 1:
        raise CleanSetInvalid(f"Looked for one image column (bytes, or a struct with bytes) and one column label; found {listed(schema.names) or 'none'}.")
    return image, label


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """The names of the ClassLabel feature, where Hugging Face's metadata has one."""
    try:
        value = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = value["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # written by something else, or a label that is no ClassLabel
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)) or len(set(names)) < len(names):
        raise CleanSetInvalid("The Parquet file's metadata names its classes in a way that cannot be read.")
    return tuple(names)
