"""A tar or tar.gz read header by header: inert, bounded, and never written to disk.

A plain tar is indexed by offsets. A tar.gz cannot be read at random, so the images of one are kept in memory, up to Limits.memory_bytes; a
larger one is refused with the advice to send a zip. Refuses links, devices, sparse files, bombs, names that lead out, and missing ends.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from calibration.clean_set.container import ByteFile, Entry, checked_path, checked_unique, cleaned
from calibration.clean_set.limits import MAX_RATIO, RATIO_FREE, SIDECAR_BYTES, Limits
from models.errors import CleanSetFormat, CleanSetInvalid

BLOCK = 512
_REGULAR, _DIRECTORY = (b"0", b"\0", b"7"), b"5"
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"
_EXTENSION_BYTES = 1 << 16  # one long name or one pax header
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_PAX_RECORD = re.compile(rb"([0-9]{1,9}) ([^=\n]+)=")


@dataclass(frozen=True, slots=True)
class _Header:
    name: bytes
    size: int
    kind: bytes


class TarArchive:
    """The members of a tar file; see Container. `wanted` tells which members of a tar.gz are kept."""

    def __init__(self, file: ByteFile, limits: Limits, wanted: Callable[[Entry], bool]) -> None:
        self._file = file
        stream: _Plain | _Inflated = _Inflated(file, limits) if is_gzip(file) else _Plain(file)
        self.kind = "tar.gz" if isinstance(stream, _Inflated) else "tar"
        self.entries: list[Entry] = []
        self._data: list[bytes | tuple[int, int]] = []  # kept, or where to find it
        kept = 0
        for name, size, directory in _members(stream, limits):
            entry = Entry(checked_path(name), directory)
            if len(self.entries) == limits.entries:
                raise CleanSetInvalid(f"The tar has more than {limits.entries:,} entries.")
            if isinstance(stream, _Inflated) and not directory and wanted(entry):
                if size > max(limits.image_bytes, SIDECAR_BYTES):
                    raise CleanSetInvalid(f"{cleaned(name)} has {size:,} bytes; at most {limits.image_bytes:,} are taken.")
                kept += size
                if kept > limits.memory_bytes:
                    raise CleanSetInvalid(f"The tar.gz holds more than {limits.memory_bytes >> 20:,} MiB of images; send a zip or a plain tar.")
                self._data.append(stream.read(size))
            else:
                self._data.append((stream.position, size))
                stream.skip(size)
            stream.skip(-size % BLOCK)
            self.entries.append(entry)
        stream.finish()
        checked_unique(self.entries)

    def read(self, index: int, limit: int) -> bytes:
        data = self._data[index]
        size = len(data) if isinstance(data, bytes) else data[1]
        if size > limit:
            raise CleanSetInvalid(f"{cleaned(self.entries[index].name)} has {size:,} bytes; at most {limit:,} are taken.")
        return data if isinstance(data, bytes) else self._file.read(*data)


def is_gzip(file: ByteFile) -> bool:
    return file.size >= 2 and file.read(0, 2) == b"\x1f\x8b"


def is_header(block: bytes) -> bool:
    """Whether 512 bytes are a tar header, by their checksum."""
    if len(block) != BLOCK:
        return False
    match = _OCTAL.fullmatch(block[148:156])
    return match is not None and int(match[1], 8) == sum(block) - sum(block[148:156]) + 8 * 32


class _Plain:
    """Forward reading of a file; skipping costs nothing."""

    def __init__(self, file: ByteFile) -> None:
        self._file, self.position = file, 0

    def read(self, count: int) -> bytes:
        data = self._file.read(self.position, count)
        self.position += count
        return data

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > self._file.size:
            raise CleanSetInvalid("The tar is truncated: its last member is not whole.")

    def finish(self) -> None:
        """What follows the end marker is padding, as every tar reader takes it."""


class _Inflated:
    """Forward reading of a gzip under the inflation caps."""

    def __init__(self, file: ByteFile, limits: Limits) -> None:
        self._raw, self._limits, self.position = _Raw(file), limits, 0
        self._stream = gzip.GzipFile(fileobj=io.BufferedReader(self._raw, 1 << 16), mode="rb")

    def read(self, count: int) -> bytes:
        data = self._up_to(count)
        if len(data) != count:
            raise CleanSetInvalid("The tar.gz is truncated: its last member is not whole.")
        return data

    def skip(self, count: int) -> None:
        while count:
            count -= len(self.read(min(count, 1 << 20)))

    def finish(self) -> None:
        """Read to the end: only there gzip's checksum is compared."""
        while self._up_to(1 << 20):
            pass

    def _up_to(self, count: int) -> bytes:
        try:
            data = self._stream.read(count)
        except (EOFError, OSError, zlib.error) as error:  # BadGzipFile is an OSError; the file itself is read by ByteFile
            raise CleanSetInvalid("The tar.gz is truncated or damaged: it cannot be inflated.") from error
        self.position += len(data)
        if self.position > self._limits.inflated_bytes:
            raise CleanSetInvalid(f"The tar.gz inflates to more than {self._limits.inflated_bytes >> 20:,} MiB.")
        if self.position > 64 * RATIO_FREE and self.position > MAX_RATIO * self._raw.position:
            raise CleanSetInvalid(f"The tar.gz inflates more than {MAX_RATIO} times; images do not.")
        return data


class _Raw(io.RawIOBase):
    """A ByteFile as a stream, for the gzip module."""

    def __init__(self, file: ByteFile) -> None:
        self._file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # the base class says Buffer, which 3.11 cannot name
        count = min(len(buffer), self._file.size - self.position)
        buffer[:count] = self._file.read(self.position, count)
        self.position += count
        return count


def _members(stream: _Plain | _Inflated, limits: Limits) -> Iterator[tuple[str, int, bool]]:
    """Name, size and whether it is a directory, of each member; the caller consumes the data between two of them."""
    long_name: bytes | None = None
    long_size: int | None = None
    budget = 4 * limits.entries  # of headers: extensions before a member have no entry of their own
    while (header := _header(stream)) is not None:
        budget -= 1
        if budget < 0:
            raise CleanSetInvalid(f"The tar has more than {limits.entries:,} entries.")
        if header.kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            if header.size > _EXTENSION_BYTES:
                raise CleanSetInvalid("The tar is damaged: a name or attribute is too long.")
            body = stream.read(header.size)
            stream.skip(-header.size % BLOCK)
            if header.kind == _LONG_NAME:
                long_name = body.rstrip(b"\0")
            elif header.kind == _PAX:
                attributes = _pax(body)
                long_name = attributes.get(b"path", long_name)
                if b"size" in attributes:
                    long_size = _decimal(attributes[b"size"])
            elif header.kind == _PAX_GLOBAL and _pax(body).keys() & {b"path", b"size"}:
                raise CleanSetInvalid("The tar is damaged: one name or size is given to all its members.")
            continue
        name = _decoded(header.name if long_name is None else long_name)
        size = header.size if long_size is None else long_size
        long_name = long_size = None
        if header.kind not in _REGULAR and header.kind != _DIRECTORY:
            raise CleanSetInvalid(f"The tar holds a link, device or sparse file, {cleaned(name)}; only files and folders are taken.")
        directory = header.kind == _DIRECTORY or name.endswith("/")
        yield name, 0 if directory else size, directory
    if long_name is not None or long_size is not None:
        raise CleanSetInvalid("The tar is truncated: a name without its member ends it.")


def _header(stream: _Plain | _Inflated) -> _Header | None:
    """The next header, or None at the end marker."""
    block = stream.read(BLOCK)
    if not block.strip(b"\0"):
        if stream.read(BLOCK).strip(b"\0"):
            raise CleanSetInvalid("The tar is damaged: an empty block stands between its members.")
        return None
    if not is_header(block):
        raise CleanSetInvalid("The tar is damaged: a header does not match its checksum.")
    name = block[:100].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU keeps times where POSIX keeps a prefix of the name
        name = block[345:500].split(b"\0")[0] + b"/" + name
    return _Header(name, _number(block[124:136]), block[156:157])


def _number(field: bytes) -> int:
    if field[0] == 0x80:  # GNU: base 256, for sizes that octal cannot hold
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise CleanSetInvalid("The tar is damaged: a size is not a number.")
    return int(match[1], 8)


def _pax(body: bytes) -> dict[bytes, bytes]:
    """Records of "length key=value\\n", the length counting itself."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(body) and body[at]:
        match = _PAX_RECORD.match(body, at)
        end = at + int(match[1]) if match else 0
        if match is None or end > len(body) or end <= match.end() or body[end - 1 : end] != b"\n":
            raise CleanSetInvalid("The tar is damaged: an attribute cannot be read.")
        records[match[2]] = body[match.end() : end - 1]
        at = end
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise CleanSetInvalid("The tar holds a sparse file; only whole files are taken.")
    return records


def _decimal(value: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", value):
        raise CleanSetInvalid("The tar is damaged: a size is not a number.")
    return int(value)


def _decoded(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("latin-1")


def check_tar_inside(file: ByteFile, limits: Limits) -> None:
    """Raise CleanSetFormat for a gzip of something that is not a tar."""
    head = _Inflated(file, limits).read(BLOCK)
    if head.strip(b"\0") and not is_header(head):
        raise CleanSetFormat("The gzip holds no tar; send a zip or tar.gz of one folder a class.")
