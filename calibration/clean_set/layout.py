"""Where the labels are: which members are images, and which class each belongs to, from nothing but names and small text members.

Three layouts are known: one folder a class (ImageFolder), a metadata.csv or metadata.jsonl beside the images, and in tars key.jpg + key.cls
(WebDataset). Refuses nested archives, several splits in one container, and images that no layout gives a label.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.clean_set.container import Container, Entry, cleaned, counted, listed, parts_of
from calibration.clean_set.limits import LABEL_BYTES, SIDECAR_BYTES, Limits
from models.errors import CleanSetInvalid, CleanSetLabels, CleanSetSize

IMAGES = frozenset(("png", "jpg", "jpeg", "jpe", "jfif", "webp"))
OTHER_IMAGES = frozenset(("bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm", "pnm", "ico", "tga", "jp2", "heic", "heif", "avif", "svg", "npy"))
ARCHIVES = frozenset(("zip", "tar", "gz", "tgz", "bz2", "xz", "zst", "rar", "7z", "parquet", "arrow", "safetensors", "npz", "pt", "pth", "pkl", "h5"))
LITTER = frozenset(("thumbs.db", "desktop.ini", "ehthumbs.db", "__macosx", "$recycle.bin"))
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"))
METADATA = frozenset(("metadata.csv", "metadata.jsonl"))
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category")
SIDECARS = ("cls", "json", "txt")


@dataclass(frozen=True)
class Labelled:
    """Images of a container in the order of their names. `names` are distinct and sorted; `labels` index into them."""

    layout: str
    members: list[int]
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    warnings: list[str]


def lay_out(container: Container, limits: Limits) -> Labelled:
    """Find the images of a container and their labels, reading only text members."""
    warnings: list[str] = []
    kept, litter = [], 0
    for index, entry in enumerate(container.entries):
        if not entry.path or is_litter(entry):
            litter += bool(entry.path) and not entry.directory
        else:
            kept.append(index)
    if litter:
        warnings.append(f"Left out {counted(litter, 'hidden or system file')}.")
    entries = container.entries
    files = [i for i in kept if not entries[i].directory]
    nested = [entries[i].name for i in files if suffix(entries[i]) in ARCHIVES]
    if nested:
        raise CleanSetInvalid(f"The clean set holds other archives or tensors ({listed(nested)}); pack the images themselves.")
    foreign = [entries[i].name for i in files if suffix(entries[i]) in OTHER_IMAGES]
    if foreign:
        raise CleanSetInvalid(f"The clean set holds images that are not PNG, JPEG or WebP ({listed(foreign)}); convert them.")
    images = sorted((i for i in files if suffix(entries[i]) in IMAGES), key=lambda i: entries[i].path)
    if len(images) > limits.images:
        raise CleanSetSize(f"The clean set has {len(images):,} images; at most {limits.images:,} are taken.")
    if not images and not kept:
        raise CleanSetSize(f"The clean set has no images; it needs at least {limits.min_images}.")
    if not images:
        raise CleanSetInvalid("No images were found: looked for files ending in .png, .jpg, .jpeg or .webp, in one folder a class.")

    used: set[int] = set(images)
    found = _by_metadata(container, files, images, used, warnings, limits)
    if found is None and container.kind.startswith("tar"):
        found = _by_sidecar(container, files, images, used)
    if found is None:
        found = _by_folder(container, kept, images)
    others = [entries[i].name for i in files if i not in used]
    if others:
        warnings.append(f"Left out {counted(len(others), 'file')} not belonging to a labelled image: {listed(others)}.")
    layout, label_of, empty = found
    names = sort_names({*label_of.values(), *empty})
    position = {name: k for k, name in enumerate(names)}
    members = [i for i in images if i in label_of]
    return Labelled(layout, members, names, np.array([position[label_of[i]] for i in members], np.int64), warnings)


def is_litter(entry: Entry) -> bool:
    """Hidden files and what operating systems leave behind, anywhere on the path."""
    return any(part.startswith(".") or part.lower() in LITTER for part in entry.path)


def suffix(entry: Entry) -> str:
    stem, dot, end = entry.path[-1].rpartition(".")
    return end.lower() if dot and stem else ""


def is_integer(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= 18


def sort_names(names: set[str]) -> tuple[str, ...]:
    """Numerically where every name is a non-negative integer, as text otherwise."""
    if all(is_integer(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


_Found = tuple[str, dict[int, str], set[str]]  # layout, class name of each image, names of classes without images


def _by_folder(container: Container, kept: Sequence[int], images: Sequence[int]) -> _Found:
    entries = container.entries
    depth = 0  # of the wrapper folders that hold everything
    while len({entries[i].path[depth] for i in images}) == 1 and all(len(entries[i].path) > depth + 2 for i in images):
        depth += 1
    wrapper = entries[images[0]].path[:depth]
    top = {entries[i].path[depth] for i in images}
    if len(top) > 1 and all(name.lower() in SPLITS for name in top) and all(len(entries[i].path) > depth + 2 for i in images):
        raise CleanSetInvalid(f"The clean set holds several splits ({listed(sorted(top))}); send one the suspect was not trained on.")
    outside = [entries[i].name for i in images if len(entries[i].path) < depth + 2]
    if outside:
        raise CleanSetInvalid(
            f"{len(outside):,} of {len(images):,} images are in no class folder ({listed(outside)}); "
            "looked for one folder a class, or a metadata.csv with the columns file_name and label."
        )
    directories = (entries[i].path for i in kept if entries[i].directory)
    empty = {path[depth] for path in directories if len(path) == depth + 1 and path[:depth] == wrapper}
    return "ImageFolder", {i: entries[i].path[depth] for i in images}, empty


def _by_metadata(container: Container, files: Sequence[int], images: Sequence[int], used: set[int], warnings: list[str], limits: Limits) -> _Found | None:
    entries = container.entries
    tables = [i for i in files if entries[i].path[-1].lower() in METADATA]
    if not tables:
        return None
    if len(tables) > 1:
        raise CleanSetInvalid(f"The clean set holds several metadata files ({listed([entries[i].name for i in tables])}); send one split.")
    base, title = entries[tables[0]].path[:-1], entries[tables[0]].path[-1].lower()
    rows = list(islice(_rows(_text(container, tables[0], SIDECAR_BYTES), title), limits.entries))
    if not rows:
        if all(len(entries[i].path) > len(base) + 1 for i in images):
            return None  # it describes something else, and there are class folders
        raise CleanSetInvalid(f"{title} must have the columns file_name and label.")
    by_path = {entries[i].path: i for i in images}
    label_of: dict[int, str] = {}
    missing = []
    for name, value in rows:
        label = _label(value)
        if not isinstance(name, str) or label is None:
            raise CleanSetInvalid(f"A row of {title} has no file_name or no label.")
        index = by_path.get((*base, *parts_of(name)))
        if index is None:
            missing.append(name)
        elif index in label_of:
            raise CleanSetInvalid(f"{title} lists {cleaned(name)} twice.")
        else:
            label_of[index] = label
    if missing:
        raise CleanSetInvalid(f"{title} lists {len(missing):,} images that are not there: {listed(missing)}.")
    used.add(tables[0])
    if len(label_of) < len(images):
        warnings.append(f"Left out {counted(len(images) - len(label_of), 'image')} that {title} does not list.")
    return f"with {title}", label_of, set()


def _by_sidecar(container: Container, files: Sequence[int], images: Sequence[int], used: set[int]) -> _Found | None:
    entries = container.entries
    beside: dict[tuple[str, ...], dict[str, int]] = {}
    for i in files:
        if suffix(entries[i]) in SIDECARS:
            beside.setdefault(_key(entries[i]), {})[suffix(entries[i])] = i
    in_folders = all(len(entries[i].path) > 1 for i in images)
    if not any(_key(entries[i]) in beside and ("cls" in beside[_key(entries[i])] or not in_folders) for i in images):
        return None
    label_of: dict[int, str] = {}
    for i in images:
        sidecars = beside.get(_key(entries[i]), {})
        for kind in SIDECARS:
            if kind in sidecars:
                label = _sidecar_label(_text(container, sidecars[kind], LABEL_BYTES), kind)
                used.update(sidecars.values())
                if label is not None:
                    label_of[i] = label
                    break
        else:
            raise CleanSetInvalid(f"{cleaned(entries[i].name)} has no label beside it: looked for .cls, .json with label or cls, .txt.")
    return "WebDataset", label_of, set()


def _key(entry: Entry) -> tuple[str, ...]:
    return (*entry.path[:-1], entry.path[-1].partition(".")[0])


def _sidecar_label(text: str, kind: str) -> str | None:
    if kind != "json":
        return _label(text.strip())
    value = _json(text, "A .json member")
    if isinstance(value, dict):
        value = next((value[c] for c in ("cls", *LABEL_COLUMNS) if c in value), None)
    return _label(value)


def _label(value: Any) -> str | None:
    """A class name from a text cell or a JSON value; None where there is none."""
    if isinstance(value, (bool, float)) or (isinstance(value, int) and not 0 <= value < 1 << 62):
        raise CleanSetLabels("Labels must be class names or class indices from 0 on; found a negative, fractional or huge number.")
    if not isinstance(value, (str, int)):
        return None
    if isinstance(value, str) and value.strip().startswith("-") and is_integer(value.strip()[1:]):
        raise CleanSetLabels(f"Labels must be class names or class indices from 0 on; found {cleaned(value.strip())}.")
    return unicodedata.normalize("NFC", str(value).strip()) or None


def _text(container: Container, index: int, limit: int) -> str:
    try:
        return container.read(index, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CleanSetInvalid(f"{cleaned(container.entries[index].name)} is not UTF-8 text.") from error


def _rows(text: str, title: str) -> Iterator[tuple[Any, Any]]:
    """File name and label of each row; nothing where those columns are missing."""
    if title.endswith(".jsonl"):
        for line in text.splitlines():
            row = _json(line, title) if line.strip() else {}
            column = next((c for c in LABEL_COLUMNS if c in row), None) if isinstance(row, dict) else None
            if column is not None:
                yield row.get("file_name"), row[column]
        return
    try:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(rows, [])
        column = next((c for c in LABEL_COLUMNS if c in header), None)
        if column is None or "file_name" not in header:
            return
        name_at, label_at = header.index("file_name"), header.index(column)
        for cells in rows:
            if cells:
                yield (cells[name_at], cells[label_at]) if len(cells) > max(name_at, label_at) else (None, None)
    except csv.Error as error:
        raise CleanSetInvalid(f"{title} cannot be read as comma-separated values.") from error


def _json(text: str, title: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CleanSetInvalid(f"{title} is not valid JSON.") from error
