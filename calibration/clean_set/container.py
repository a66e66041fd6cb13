"""What every container looks like to the rest of the package: named members whose bytes are read on demand.

Owns the one open file of a clean set, the rules for member names, and how names may appear in messages.
"""

from __future__ import annotations

import os
import unicodedata
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from models.errors import CleanSetInvalid

MAX_PATH, MAX_DEPTH = 1024, 32


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of a container. `path` holds the parts of its checked name; directories have no bytes."""

    path: tuple[str, ...]
    directory: bool = False

    @property
    def name(self) -> str:
        return "/".join(self.path)


class Container(Protocol):
    """Members in the container's order; `read` gives one member's bytes, at most `limit` of them. Safe to call from several threads."""

    @property
    def kind(self) -> str: ...

    @property
    def entries(self) -> Sequence[Entry]: ...

    def read(self, index: int, limit: int) -> bytes: ...


class ByteFile:
    """A file opened once, read by offset: threads do not disturb each other, and a path that is swapped later does not matter."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._closer = weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes. Raises CleanSetInvalid where the file ends before."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise CleanSetInvalid("The clean set is truncated: it points to data beyond its end.")
        parts = []
        while count:
            part = os.pread(self._fd, count, offset)
            if not part:
                raise CleanSetInvalid("The clean set became shorter while it was read.")
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return b"".join(parts)


def checked_path(name: str) -> tuple[str, ...]:
    """The parts of a member name, or CleanSetInvalid for a name that could lead out of a folder it is unpacked into."""
    if name.startswith("/") or name[1:2] == ":":
        raise CleanSetInvalid(f"The archive holds an absolute name, {cleaned(name)}.")
    if "\\" in name or "\0" in name:
        raise CleanSetInvalid(f"The archive holds a name with a backslash or NUL, {cleaned(name)}; separate folders with '/'.")
    parts = parts_of(name)
    if ".." in parts:
        raise CleanSetInvalid(f"The archive holds a name that leads out of it, {cleaned(name)}.")
    if len(name) > MAX_PATH or len(parts) > MAX_DEPTH:
        raise CleanSetInvalid(f"The archive holds a name that is too long or too deep, {cleaned(name)}.")
    return parts


def parts_of(name: str) -> tuple[str, ...]:
    """A name in one spelling: macOS decomposes accents, and some writers begin with "./"."""
    return tuple(unicodedata.normalize("NFC", part) for part in name.split("/") if part not in ("", "."))


def checked_unique(entries: Sequence[Entry]) -> None:
    """Two members of one name would show different readers different clean sets."""
    seen: set[tuple[str, ...]] = set()
    for entry in entries:
        if entry.path in seen and not entry.directory:
            raise CleanSetInvalid(f"The archive holds {cleaned(entry.name)} twice.")
        seen.add(entry.path)


def cleaned(name: str) -> str:
    """A name from a hostile file as it may appear in a message: printable, at most 60 characters, in quotes."""
    short = name if len(name) <= 60 else name[:28] + "..." + name[-29:]
    return "'" + "".join(c if c.isprintable() and c not in "'<>&" else "?" for c in short) + "'"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def listed(names: Collection[str]) -> str:
    """At most five cleaned names."""
    first = ", ".join(cleaned(name) for name, _ in zip(names, range(5), strict=False))
    return first + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
