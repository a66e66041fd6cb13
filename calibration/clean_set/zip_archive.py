"""A zip read by its central directory, without trusting it: inert, bounded, and never written to disk.

Refuses encrypted members, links and devices, names that lead out, members that overlap or are listed twice, methods other than stored and
deflate, bombs, and any disagreement between the directory and the members. zip64 is read; prefixed and multi-disk archives are not.
"""

from __future__ import annotations

import stat
import struct
import zlib
from dataclasses import dataclass

from calibration.clean_set.container import ByteFile, Entry, checked_path, checked_unique, cleaned
from calibration.clean_set.limits import MAX_RATIO, RATIO_FREE, Limits
from models.errors import CleanSetInvalid

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _STRONG, _UTF8 = 0x1, 0x40, 0x800


@dataclass(frozen=True, slots=True)
class _Member:
    method: int
    crc: int
    packed: int
    size: int
    offset: int  # of the local header while the directory is read, of the data afterwards


class ZipArchive:
    """The members of a zip file; see Container."""

    kind = "zip"

    def __init__(self, file: ByteFile, limits: Limits) -> None:
        self._file = file
        start, length, count = _find_directory(file)
        if count > limits.entries or length > limits.entries * 512:
            raise CleanSetInvalid(f"The zip has more than {limits.entries:,} entries.")
        entries, members, names = _read_directory(file.read(start, length), count)
        if sum(member.size for member in members) > limits.inflated_bytes:
            raise CleanSetInvalid(f"The zip inflates to more than {limits.inflated_bytes >> 20:,} MiB.")
        checked_unique(entries)
        self.entries = entries
        self._members = _locate(file, entries, members, names, start)

    def size(self, index: int) -> int:
        return self._members[index].size

    def read(self, index: int, limit: int) -> bytes:
        member, name = self._members[index], cleaned(self.entries[index].name)
        if member.size > limit:
            raise CleanSetInvalid(f"{name} has {member.size:,} bytes; at most {limit:,} are taken.")
        data = self._file.read(member.offset, member.packed)
        if member.method == _DEFLATED:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = inflater.decompress(data, member.size + 1)  # one more than declared shows a lie without inflating it all
            except zlib.error as error:
                raise CleanSetInvalid(f"{name} is damaged: it cannot be inflated.") from error
        if len(data) != member.size or zlib.crc32(data) != member.crc:
            raise CleanSetInvalid(f"{name} is damaged: its size or checksum does not match.")
        return data


def _find_directory(file: ByteFile) -> tuple[int, int, int]:
    """Offset, length and entry count of the central directory."""
    tail_start = max(0, file.size - 65535 - _END.size)
    tail = file.read(tail_start, file.size - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise CleanSetInvalid("The zip is truncated: its directory is missing.")
    *numbers, comment = _END.unpack_from(tail, at)[1:]
    end = tail_start + at
    if end + _END.size + comment != file.size:
        raise CleanSetInvalid("The zip is damaged: data follows its end.")
    locator = file.read(end - _END64_LOCATOR.size, _END64_LOCATOR.size) if end >= _END64_LOCATOR.size else b""
    if locator.startswith(b"PK\x06\x07"):  # some writers add it always; it must say the same, or what the short record leaves to it
        end = _END64_LOCATOR.unpack(locator)[2]
        magic64, _, _, _, *wide = _END64.unpack(file.read(end, _END64.size))
        if magic64 != b"PK\x06\x06" or any(short not in (0xFFFF, 0xFFFFFFFF, full) for short, full in zip(numbers, wide, strict=True)):
            raise CleanSetInvalid("The zip is damaged: its zip64 directory is missing or another.")
        numbers = wide
    elif 0xFFFF in numbers[2:4] or 0xFFFFFFFF in numbers[4:]:
        raise CleanSetInvalid("The zip is damaged: its zip64 directory is missing.")
    disk, disk0, here, count, length, start = numbers
    if disk or disk0 or here != count:
        raise CleanSetInvalid("The zip is one part of several; join them into one.")
    if start + length != end:
        raise CleanSetInvalid("The zip is damaged: its directory is not where it should be.")
    return start, length, count


def _read_directory(directory: bytes, count: int) -> tuple[list[Entry], list[_Member], list[bytes]]:
    entries: list[Entry] = []
    members: list[_Member] = []
    names: list[bytes] = []
    at = 0
    while at < len(directory):
        if len(entries) == count or at + _CENTRAL.size > len(directory):
            raise CleanSetInvalid("The zip is damaged: its directory does not hold as many entries as it says.")
        magic, _, _, flags, method, _, _, crc, packed, size, *rest = _CENTRAL.unpack_from(directory, at)
        name_length, extra_length, comment_length, disk, _, attributes, offset = rest
        at += _CENTRAL.size
        raw, extra = directory[at : at + name_length], directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if magic != b"PK\x01\x02" or at > len(directory) or disk not in (0, 0xFFFF):
            raise CleanSetInvalid("The zip is damaged: its directory cannot be read.")
        name = _decode_name(raw, flags)
        if flags & (_ENCRYPTED | _STRONG):
            raise CleanSetInvalid(f"The zip is encrypted ({cleaned(name)}); send it without a password.")
        if stat.S_IFMT(attributes >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise CleanSetInvalid(f"The zip holds a link or device, {cleaned(name)}; only files and folders are taken.")
        size, packed, offset = _wide(extra, size, packed, offset)
        if method not in (_STORED, _DEFLATED):
            raise CleanSetInvalid(f"{cleaned(name)} is compressed with method {method}; zip with deflate or without compression.")
        if (method == _STORED and packed != size) or (size > RATIO_FREE and size > MAX_RATIO * packed):
            raise CleanSetInvalid(f"{cleaned(name)} inflates more than {MAX_RATIO} times; images do not.")
        entries.append(Entry(checked_path(name), directory=name.endswith("/")))
        members.append(_Member(method, crc, packed, size, offset))
        names.append(raw)
    if len(entries) != count:
        raise CleanSetInvalid("The zip is damaged: its directory does not hold as many entries as it says.")
    return entries, members, names


def _decode_name(raw: bytes, flags: int) -> str:
    try:
        return raw.decode("utf-8")  # macOS writes UTF-8 without saying so
    except UnicodeDecodeError as error:
        if flags & _UTF8:
            raise CleanSetInvalid("The zip is damaged: a name is not UTF-8.") from error
        return raw.decode("cp437")


def _wide(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """The sizes from the zip64 extra field where the 32-bit ones are saturated."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        field, at = extra[at + 4 : at + 4 + length], at + 4 + length
        if tag != 1:
            continue
        numbers = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
        size, packed, offset = (next(numbers, v) if v == 0xFFFFFFFF else v for v in (size, packed, offset))
    return size, packed, offset


def _locate(file: ByteFile, entries: list[Entry], members: list[_Member], names: list[bytes], end: int) -> list[_Member]:
    """Members with the offset of their data. Each must end before the next begins, so that no byte is read twice."""
    located = list(members)
    for index in sorted(range(len(members)), key=lambda i: -members[i].offset):
        member, name = members[index], cleaned(entries[index].name)
        magic, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(file.read(member.offset, _LOCAL.size))
        if magic != b"PK\x03\x04" or method != member.method or flags & (_ENCRYPTED | _STRONG):
            raise CleanSetInvalid(f"The zip is damaged: {name} does not match its directory.")
        if file.read(member.offset + _LOCAL.size, name_length) != names[index]:
            raise CleanSetInvalid(f"The zip is damaged: {name} has another name in its directory.")
        data = member.offset + _LOCAL.size + name_length + extra_length
        if data + member.packed > end:
            raise CleanSetInvalid(f"The zip holds members that overlap, {name} among them.")
        end = member.offset
        located[index] = _Member(member.method, member.crc, member.packed, member.size, data)
    return located
