"""From a path to a CleanSet: sniff the container by its content, find the labels, decode every image once, and mark duplicates.

Refuses other containers with a sentence that says how to convert. Every image is decoded here, so that a damaged one is found before a
calibration starts and not in the middle of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calibration.clean_set.container import ByteFile, Container, Entry, cleaned, counted
from calibration.clean_set.duplicates import SIDE, digest, near_groups_by_class, thumbnail
from calibration.clean_set.folder import Folder
from calibration.clean_set.layout import IMAGES, METADATA, SIDECARS, is_litter, lay_out, sort_names, suffix
from calibration.clean_set.limits import Limits
from calibration.clean_set.parquet import read_parquet
from calibration.clean_set.set import CleanSet, Images
from calibration.clean_set.tar_archive import BLOCK, TarArchive, check_tar_inside, is_gzip, is_header
from calibration.clean_set.tensors import labelled, read_npz, read_safetensors
from calibration.clean_set.zip_archive import ZipArchive
from models.errors import CleanSetDegenerate, CleanSetFormat, CleanSetInvalid, CleanSetSize, ImageProblem
from models.preprocessing import decode

MIN_GROUPS = 20  # with fewer different scenes no split into fit and validation means anything
DUPLICATES_KEPT = 0.05

_ZIP = "send a zip or tar.gz of one folder a class"
_REFUSED = (
    (b"Rar!\x1a\x07", f"Rar archives are not taken; unpack it and {_ZIP}."),
    (b"7z\xbc\xaf\x27\x1c", f"7z archives are not taken; unpack it and {_ZIP}."),
    (b"\x93NUMPY", "A .npy array has no labels; save images and labels together with `numpy.savez`."),
    (b"\x89HDF\r\n\x1a\n", "HDF5 is not taken; save the arrays images and labels with `safetensors.numpy.save_file`."),
    (b"BZh", f"Bzip2 is not taken; unpack it and {_ZIP}."),
    (b"\xfd7zXZ\0", f"Xz is not taken; unpack it and {_ZIP}."),
    (b"\x28\xb5\x2f\xfd", f"Zstd is not taken; unpack it and {_ZIP}."),
    (b"ARROW1", "Arrow files are not taken; write Parquet with `Dataset.to_parquet`."),
    (b"\x89PNG", f"This is one image; {_ZIP}."),
    (b"\xff\xd8\xff", f"This is one image; {_ZIP}."),
    *((bytes((0x80, protocol)), f"Pickles are never loaded; {_ZIP}, or save arrays with `numpy.savez`.") for protocol in range(2, 6)),
)


@dataclass(frozen=True)
class _Encoded:
    """Encoded images in a container; see Images."""

    container: Container
    members: Sequence[int]
    limit: int

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return cleaned(self.container.entries[self.members[index]].name)

    def image(self, index: int) -> Image.Image:
        member = self.members[index]
        data = self.container.read(member, self.limit)
        try:
            return decode(data)
        except ImageProblem as problem:
            raise CleanSetInvalid(f"{cleaned(self.container.entries[member].name)} cannot be used. {problem.detail}") from problem


@dataclass(frozen=True)
class _Found:
    images: Images
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    source: str
    warnings: Sequence[str] = ()
    ordered: bool = False


def open_clean_set(path: Path, limits: Limits = Limits()) -> CleanSet:  # noqa: B008  # frozen
    """The clean set in a file or folder. Raises a subclass of CleanSetProblem for whatever cannot be used.

    Reads and decodes everything once. The file is kept open, and must not change, while the CleanSet lives.
    """
    found = _find(path, limits)
    count = len(found.labels)
    if count < limits.min_images:
        raise CleanSetSize(f"The clean set has {count:,} images; it needs at least {limits.min_images}.")
    if count > limits.images:
        raise CleanSetSize(f"The clean set has {count:,} images; at most {limits.images:,} are taken.")
    digests, thumbnails = _look(found.images, limits)
    places = dict[bytes, int]()
    first = np.array([places.setdefault(each, place) for place, each in enumerate(digests)], np.int64)
    warnings = list(found.warnings)
    originals, position = np.unique(first, return_inverse=True)
    if len(originals) < limits.min_images:
        raise CleanSetDegenerate(f"Only {len(originals):,} of {count:,} images differ from each other; at least {limits.min_images} must.")
    groups = near_groups_by_class(thumbnails[originals], found.labels[originals])[position]
    contradicted = int(np.count_nonzero(found.labels != found.labels[first]))
    if contradicted:
        warnings.append(f"{counted(contradicted, 'image')} appear again under another class.")
    kept = np.arange(count)
    if count - len(originals) > DUPLICATES_KEPT * count:
        kept = originals
        warnings.append(f"{count - len(originals):,} of {count:,} images are exact duplicates and were left out.")
    groups = np.unique(groups[kept], return_inverse=True)[1].astype(np.int64)
    different = int(groups.max()) + 1
    if different < min(MIN_GROUPS, limits.min_images):
        raise CleanSetDegenerate(f"The {count:,} images show only {different} different scenes; at least {MIN_GROUPS} are needed.")
    if different < len(kept):
        warnings.append(f"{counted(len(kept) - different, 'image')} nearly repeat others; they stay together on one side of every split.")
    known_by = thumbnails[kept], tuple(digests[place] for place in kept)
    return CleanSet(found.names, found.labels[kept], found.source, tuple(warnings), groups, *known_by, found.images, kept, found.ordered)


def _look(images: Images, limits: Limits) -> tuple[list[bytes], NDArray[np.uint8]]:
    """Decode all images: their digests, and thumbnails, uint8 [N, SIDE, SIDE, 3]."""
    thumbnails = np.empty((len(images), SIDE, SIDE, 3), np.uint8)
    digests = list[bytes]()
    pixels = 0
    for i in range(len(images)):
        image = images.image(i)
        pixels += image.width * image.height
        if pixels > limits.pixels:
            raise CleanSetSize(f"The images have more than {limits.pixels:,} pixels together; use fewer or smaller ones.")
        digests.append(digest(image))
        thumbnails[i] = thumbnail(image)
    return digests, thumbnails


def _find(path: Path, limits: Limits) -> _Found:
    if path.is_dir():
        return _in_container(Folder(path, limits), limits)
    if not path.is_file():
        raise CleanSetInvalid("There is no file or folder at the path of the clean set.")
    file = ByteFile(path)
    if file.size > limits.file_bytes:
        raise CleanSetSize(f"The clean set has {file.size >> 20:,} MiB; at most {limits.file_bytes >> 20:,} MiB are taken.")
    if file.size < 8:
        raise CleanSetInvalid("The clean set is empty or truncated.")
    head = file.read(0, min(file.size, BLOCK))
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _in_zip(ZipArchive(file, limits), limits)
    if is_gzip(file):
        check_tar_inside(file, limits)
    if is_gzip(file) or is_header(head):
        return _in_container(TarArchive(file, limits, _wanted), limits)
    if head.startswith(b"PAR1"):
        table = read_parquet(path, limits)
        images = _Encoded(table.rows, range(len(table.rows.entries)), limits.image_bytes)
        return _Found(images, table.names, table.labels, "parquet", ordered=table.ordered)
    for magic, advice in _REFUSED:
        if head.startswith(magic):
            raise CleanSetFormat(advice)
    if head[8:9] == b"{" or int.from_bytes(head[:8], "little") <= file.size - 8:
        return _in_tensors(*labelled(read_safetensors(file), limits), "safetensors")
    if head.startswith(b"ustar", 257):
        raise CleanSetInvalid("The tar is damaged: its first header does not match its checksum.")
    raise CleanSetFormat(f"The content is of no format that is taken; {_ZIP}, Parquet, a WebDataset tar, safetensors or npz.")


def _in_zip(archive: ZipArchive, limits: Limits) -> _Found:
    names = {entry.name for entry in archive.entries}
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise CleanSetFormat("This is a file of torch.save, which is a pickle; save images and labels with `safetensors.torch.save_file`.")
    if names and all(name.endswith(".npy") for name in names):
        return _in_tensors(*labelled(read_npz(archive, limits), limits), "npz")
    return _in_container(archive, limits)


def _in_container(container: Container, limits: Limits) -> _Found:
    found = lay_out(container, limits)
    images = _Encoded(container, found.members, limits.image_bytes)
    return _Found(images, found.names, found.labels, f"{container.kind} {found.layout}", found.warnings)


def _in_tensors(images: Images, values: NDArray[np.int64], source: str) -> _Found:
    distinct, labels = np.unique(values, return_inverse=True)
    return _Found(images, sort_names({str(value) for value in distinct}), labels.astype(np.int64), source)


def _wanted(entry: Entry) -> bool:
    """Whether a member of a tar.gz can matter for the layout or the images."""
    return bool(entry.path) and not is_litter(entry) and (suffix(entry) in IMAGES or suffix(entry) in SIDECARS or entry.path[-1].lower() in METADATA)
