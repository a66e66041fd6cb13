"""The archive around a torch checkpoint: its central directory, its entries, and tensors over their bytes.

Only the layout that `torch.save` and plain zip tools write is read: entries stored or deflated, none twice, none over another, the end
record at the end of the file. Nothing a header claims is believed before it is compared with the file. Checksums are not verified: torch
writes wrong ones on request and reads none, and a checksum in a hostile file proves nothing. Refuses encryption, other compressions,
inflation beyond a budget, big-endian numbers, and tensors that reach outside their storage or repeat it. TorchScript, exported programs
and other zips are refused with a sentence on how to convert them.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeGuard

import torch
from torch import Tensor

from models.checkpoint.torch_pickle import TensorRef
from models.errors import CheckpointFormat, CheckpointInvalid

MAGIC = b"PK\x03\x04"
MOST_DIMENSIONS = 8
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_STORED, _DEFLATED = 0, 8
_ALIGNMENT = 16  # bytes of the largest number, so that one copy of a misplaced storage serves every dtype; torch aligns to 64
_LONGEST_NAME = 512
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_FULL = 0xFFFFFFFF  # what a 32-bit field holds where the 64-bit one counts
_SAVE_AGAIN = "load it where it was made and save the weights alone: `torch.save(model.state_dict(), 'model.pt')`."


@dataclass(frozen=True, slots=True)
class Entry:
    start: int
    packed: int
    size: int
    deflated: bool


@dataclass
class Entries:
    """The entries of a zip archive. Stored bytes are views of `view`; inflated bytes are copies that share one budget."""

    view: memoryview
    by_name: dict[bytes, Entry]
    inflatable: int  # bytes that may still be inflated

    def names(self) -> list[str]:
        """The names as text; what is no UTF-8 is replaced, and `read` does not find it then."""
        return [name.decode("utf-8", "replace") for name in self.by_name]

    def read(self, name: str, most: int) -> memoryview:
        """The bytes of an entry that states at most `most`. Raises CheckpointInvalid where it states more, or is missing."""
        entry = self.by_name.get(name.encode("utf-8", "replace"))
        if entry is None or entry.size > most:
            raise CheckpointInvalid("A part that the checkpoint names is not in the archive, or is larger than it should be.")
        packed = self.view[entry.start : entry.start + entry.packed]
        if not entry.deflated:
            return packed
        self.inflatable -= entry.size
        if self.inflatable < 0:
            raise CheckpointInvalid("The archive inflates to many times its size; save the checkpoint again without compression.")
        return memoryview(_inflate(packed, entry.size))


@dataclass
class Archive:
    """What one torch checkpoint holds: the pickle, and tensors over its storages."""

    entries: Entries
    prefix: str
    storages: dict[str, Tensor] = field(default_factory=dict)

    def pickle(self, most: int) -> memoryview:
        """The pickle, of at most `most` bytes."""
        return self.entries.read(f"{self.prefix}data.pkl", most)

    def tensor(self, claim: TensorRef) -> Tensor:
        """A view of the storage, bit for bit. Raises CheckpointInvalid where the claim does not hold."""
        raw = self.storage(claim.storage.key, claim.storage.nbytes)
        size, stride = claim.size, claim.stride
        if not (_are_lengths(size) and _are_lengths(stride) and _are_lengths((claim.offset,)) and len(size) == len(stride)):
            raise CheckpointInvalid("A tensor in the checkpoint has an impossible shape.")
        if claim.storage.nbytes != len(raw) or len(raw) % claim.dtype.itemsize:
            raise CheckpointInvalid("A tensor in the checkpoint does not fit its storage: the sizes of the storage disagree.")
        elements = len(raw) // claim.dtype.itemsize
        # Lengths beside a zero are bounded too: torch overflows on strides that belong to no element.
        if math.prod(size) > elements or math.prod(max(length, 1) for length in size) > max(elements, len(self.entries.view)):
            raise CheckpointInvalid("A tensor in the checkpoint is larger than its storage (expanded?); save `tensor.contiguous()`.")
        if 0 in size:
            return torch.empty(size, dtype=claim.dtype)
        if claim.offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) >= elements:
            raise CheckpointInvalid("A tensor in the checkpoint reaches past the end of its storage.")
        # The step of a dimension of length 1 means nothing and may be too large for torch.
        steps = [step if length > 1 else 1 for length, step in zip(size, stride, strict=True)]
        return raw.view(claim.dtype).as_strided(size, steps, claim.offset)

    def storage(self, key: str, nbytes: int) -> Tensor:
        if key not in self.storages:
            self.storages[key] = bytes_tensor(self.entries.read(f"{self.prefix}data/{key}", nbytes), _ALIGNMENT)
        return self.storages[key]


def open_zip(view: memoryview, max_entries: int, inflatable: int) -> Entries:
    """The entries of any honest zip archive."""
    return Entries(view, _entries(view, max_entries), inflatable)


def is_torch(entries: Entries) -> bool:
    """Whether `torch.save` or another part of torch wrote this archive."""
    return any(name.endswith((b"/data.pkl", b"/archive_format", b"/constants.pkl")) or b"/code/" in name for name in entries.by_name)


def open_archive(entries: Entries) -> Archive:
    """The torch checkpoint in a zip archive."""
    names = set(entries.by_name)
    roots = [name[: -len(b"data.pkl")] for name in names if name.endswith(b"/data.pkl") and name.count(b"/") == 1]
    inner = {name.partition(b"/")[2] for name in names}
    if b"constants.pkl" in inner or any(name.startswith(b"code/") for name in inner):
        raise CheckpointFormat(f"The file is a TorchScript program, which cannot be read without running it; {_SAVE_AGAIN}")
    if b"archive_format" in inner or any(name.endswith(b"serialized_exported_program.json") for name in names):
        raise CheckpointFormat(f"The file is an exported program (.pt2), not a checkpoint; {_SAVE_AGAIN}")
    if len(roots) != 1:
        raise CheckpointFormat(f"The file is a zip archive but neither a torch checkpoint nor a folder with weights; {_SAVE_AGAIN}")
    archive = Archive(entries, roots[0].decode("utf-8", "replace"))
    if (byteorder := f"{archive.prefix}byteorder").encode() in names and bytes(entries.read(byteorder, 64)) != b"little":
        raise CheckpointInvalid("The checkpoint was written on a big-endian machine; save it again on a little-endian one.")
    return archive


def bytes_tensor(data: memoryview, alignment: int) -> Tensor:
    """uint8 [len(data)] over the same memory, or over a copy where that does not start at a multiple of `alignment`."""
    if not len(data):
        return torch.empty(0, dtype=torch.uint8)
    raw = torch.frombuffer(data, dtype=torch.uint8)
    return raw if raw.data_ptr() % alignment == 0 else raw.clone()


def _are_lengths(values: tuple[object, ...]) -> TypeGuard[tuple[int, ...]]:
    return len(values) <= MOST_DIMENSIONS and all(type(value) is int and value >= 0 for value in values)


def _inflate(packed: memoryview, size: int) -> bytearray:
    """Exactly `size` bytes from all of `packed`. A header that understates its size is caught after one byte too many."""
    engine, inflated = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    try:
        for start in range(0, len(packed), 1 << 16):
            block: bytes | memoryview = packed[start : start + (1 << 16)]
            while block and len(inflated) <= size:
                inflated += engine.decompress(block, size + 1 - len(inflated))
                block = engine.unconsumed_tail
    except zlib.error as error:
        raise _damaged("compressed bytes cannot be read") from error
    if not engine.eof or engine.unused_data or len(inflated) != size:
        raise _damaged("an entry is not of the size that it states")
    return inflated


def _entries(view: memoryview, max_entries: int) -> dict[bytes, Entry]:
    count, start, end = _directory(view)
    if count > max_entries:
        raise CheckpointInvalid(f"The archive has more than {max_entries:,} entries; save the state dict alone.")
    at, entries, extents = start, dict[bytes, Entry](), [(start, end)]
    try:
        for _ in range(count):
            name, entry, begin, at = _entry(view, at)
            if name in entries:
                raise _damaged("it holds an entry twice")
            entries[name] = entry
            extents.append((begin, entry.start + entry.packed))
    except struct.error as error:
        raise _damaged("its directory is cut short") from error
    extents.sort()
    if at != end or extents[-1] != (start, end) or any(before[1] > after[0] for before, after in pairwise(extents)):
        raise _damaged("its entries overlap")
    return entries


def _directory(view: memoryview) -> tuple[int, int, int]:
    """How many entries, and where their directory starts and ends. A comment or other bytes behind the end record are refused."""
    at = len(view) - _END.size
    if at < 0:
        raise _damaged("it is cut short")
    magic, disk, first_disk, here, count, length, start, comment = _END.unpack_from(view, at)
    if magic != b"PK\5\6" or comment or disk != first_disk or here != count:
        raise _damaged("it does not end with a directory")
    stated, locator = (count, length, start), at - _LOCATOR.size
    if locator >= 0 and bytes(view[locator : locator + 4]) == b"PK\6\7":
        _, _, at, _ = _LOCATOR.unpack_from(view, locator)
        if at + _END64.size != locator:
            raise _damaged("its zip64 record is elsewhere than stated")
        magic, _, _, _, disk, first_disk, here, count, length, start = _END64.unpack_from(view, at)
        agree = all(old in (new, limit) for old, new, limit in zip(stated, (count, length, start), (0xFFFF, _FULL, _FULL), strict=True))
        if magic != b"PK\6\6" or disk != first_disk or here != count or not agree:
            raise _damaged("its two end records disagree")
    if start + length != at or count * _CENTRAL.size > length:
        raise _damaged("its directory is elsewhere than stated")
    return count, start, at


def _entry(view: memoryview, at: int) -> tuple[bytes, Entry, int, int]:
    """Name, entry, where its local header begins, and where the next directory entry is."""
    magic, _, _, flags, method, _, _, _, packed, size, *lengths, _, _, _, begin = _CENTRAL.unpack_from(view, at)
    at += _CENTRAL.size
    name_end = at + lengths[0]
    if lengths[0] > _LONGEST_NAME or lengths[1] > _LONGEST_NAME:
        raise _damaged("an entry has too long a name")
    name, extra = bytes(view[at:name_end]), view[name_end : name_end + lengths[1]]
    if _FULL in (size, packed, begin):
        size, packed, begin = _zip64(extra, size, packed, begin)
    local = _LOCAL.unpack_from(view, begin) if begin <= len(view) else (b"",)
    if magic != b"PK\1\2" or local[0] != MAGIC or flags & _ENCRYPTED or local[2] & _ENCRYPTED:
        raise _damaged("an entry is encrypted or not where it should be")
    if method not in (_STORED, _DEFLATED) or method != local[3]:
        raise _damaged("an entry is compressed in a way that is not taken")
    if method == _STORED and size != packed:
        raise _damaged("an entry is not of the size that it states")
    local_name, local_extra = local[-2:]
    start = begin + _LOCAL.size + local_name
    if view[start - local_name : start] != name:
        raise _damaged("an entry has two names")
    return name, Entry(start + local_extra, packed, size, method == _DEFLATED), begin, at + sum(lengths)


def _zip64(extra: memoryview, *fields: int) -> list[int]:
    """The 32-bit fields of a directory entry, those that are full replaced by the 64-bit ones of its extra field, in their order."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{fields.count(_FULL)}Q", extra[4 : 4 + length]))
            return [next(wide) if value == _FULL else value for value in fields]
        extra = extra[4 + length :]
    raise _damaged("an entry states no size")


def _damaged(what: str) -> CheckpointInvalid:
    return CheckpointInvalid(f"The zip archive is damaged or was not written by torch.save: {what}. Save the checkpoint again.")
