"""A folder of files around the weights, on disk or in a zip, as timm and transformers write it: which file holds the weights, and what lies beside.

Only names decide here; what the chosen files hold is judged by their readers. Refuses a folder that holds no weights, or several that may be meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from models.checkpoint.limits import Limits, listed
from models.checkpoint.mapping import map_file
from models.checkpoint.sidecar import MOST_BYTES
from models.checkpoint.strict_json import parse
from models.checkpoint.torch_zip import Entries
from models.errors import CheckpointFormat, CheckpointInvalid

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".th")
USUAL = ("model.safetensors", "pytorch_model.bin")  # in the order of preference; what else lies beside them is for other libraries
JSON_BYTES = MOST_BYTES

Read = Callable[[int], memoryview]  # the bytes of a file, if they are not more than so many


@dataclass(frozen=True)
class Package:
    """weights: one file, or all parts of a divided one. config and preprocessor are None where they are missing."""

    weights: dict[str, Read]
    config: bytes | None
    preprocessor: bytes | None


def holds_weights(names: Iterable[str]) -> bool:
    """Whether a zip is meant as a package at all."""
    return any(PurePosixPath(name).suffix.lower() in SUFFIXES for name in names)


def from_folder(folder: Path, limits: Limits) -> Package:
    """The files directly in a folder; links are not followed."""
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink()}
    return _package({name: _reader(path, limits) for name, path in files.items()})


def from_zip(entries: Entries, limits: Limits) -> Package:
    """The files of the one folder in a zip that holds weights, however deep."""
    folders: dict[str, dict[str, Read]] = {}
    for name in entries.names():
        path = PurePosixPath(name)
        if not name.endswith("/") and not any(part.startswith((".", "__MACOSX")) for part in path.parts):
            folders.setdefault(str(path.parent), {})[path.name] = lambda most, name=name: entries.read(name, most)  # type: ignore[misc]
    holding = [folder for folder, files in folders.items() if holds_weights(files)]
    if len(holding) != 1:
        raise CheckpointInvalid(f"The zip holds weights in several folders ({listed(sorted(holding))}); pack the folder of one model.")
    return _package(folders[holding[0]])


def beside(weights: Path) -> bytes | None:
    """The config.json in the folder of a weight file: the two are the pair that timm writes."""
    path = weights.with_name("config.json")
    return bytes(map_file(path, JSON_BYTES)) if path.is_file() and not path.is_symlink() and 0 < path.stat().st_size <= JSON_BYTES else None


def _reader(path: Path, limits: Limits) -> Read:
    return lambda most: map_file(path, min(most, limits.file_bytes))


def _package(files: Mapping[str, Read]) -> Package:
    texts = [bytes(files[name](JSON_BYTES)) if name in files else None for name in ("config.json", "preprocessor_config.json")]
    return Package(_weights(files), *texts)


def _weights(files: Mapping[str, Read]) -> dict[str, Read]:
    for usual in USUAL:
        if usual in files:
            return {usual: files[usual]}
    if indices := [name for name in files if name.endswith(".safetensors.index.json")]:
        return {name: files[name] for name in _parts(bytes(files[indices[0]](JSON_BYTES)), files)}
    for kinds in (SUFFIXES[:1], SUFFIXES[1:]):
        found = [name for name in files if name.lower().endswith(kinds)]
        if len(found) > 1:
            raise CheckpointInvalid(f"There are several files of weights ({listed(found)}); name or pack the one that is meant.")
        if found:
            return {found[0]: files[found[0]]}
    raise CheckpointFormat(f"The folder holds no weights: looked for {', '.join(USUAL)}, or one file that ends in {', '.join(SUFFIXES)}.")


def _parts(index: bytes, files: Mapping[str, Read]) -> list[str]:
    try:
        names = sorted(set(parse(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointInvalid("The index of the divided weights is damaged.") from error
    if missing := [str(name) for name in names if name not in files]:
        raise CheckpointInvalid(f"Parts of the weights are missing: {listed(missing)}.")
    if not names:
        raise CheckpointInvalid("The index of the divided weights names no part.")
    return names
