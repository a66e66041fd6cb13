"""A folder on this machine, read in place. Refuses links that lead outside it, devices, and too many files; follows no linked folder."""

from __future__ import annotations

import os
import stat
import unicodedata
from pathlib import Path

from calibration.clean_set.container import Entry, cleaned
from calibration.clean_set.limits import Limits
from models.errors import CleanSetInvalid, CleanSetSize


class Folder:
    """The files below a folder; see Container."""

    kind = "folder"

    def __init__(self, root: Path, limits: Limits) -> None:
        self._root = root.resolve()
        self.entries: list[Entry] = []
        self._paths: list[Path] = []
        total = 0
        for where, folders, files in os.walk(self._root):
            folders.sort()
            for name in [*folders, *sorted(files)]:
                path = Path(where, name)
                info = path.lstat()
                if stat.S_ISLNK(info.st_mode):
                    info = self._inside(path).stat()
                directory = stat.S_ISDIR(info.st_mode)
                if not directory and not stat.S_ISREG(info.st_mode):
                    raise CleanSetInvalid(f"The folder holds a device or pipe, {cleaned(name)}; only files and folders are taken.")
                if len(self.entries) == limits.entries:
                    raise CleanSetInvalid(f"The folder has more than {limits.entries:,} entries.")
                parts = path.relative_to(self._root).parts
                self.entries.append(Entry(tuple(unicodedata.normalize("NFC", _text(part)) for part in parts), directory))
                self._paths.append(path)
                total += 0 if directory else info.st_size
        if total > limits.file_bytes:
            raise CleanSetSize(f"The folder holds {total >> 20:,} MiB; at most {limits.file_bytes >> 20:,} MiB are taken.")

    def read(self, index: int, limit: int) -> bytes:
        name = cleaned(self.entries[index].name)
        try:
            path = self._inside(self._paths[index])  # again: a link may have changed since
            with open(path, "rb", opener=_without_following) as file:
                data: bytes = file.read(limit + 1)
        except OSError as error:
            raise CleanSetInvalid(f"{name} cannot be read: {error.strerror}.") from error
        if len(data) > limit:
            raise CleanSetInvalid(f"{name} has more than {limit:,} bytes.")
        return data

    def _inside(self, path: Path) -> Path:
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
            raise CleanSetInvalid(f"The folder holds a link that leads nowhere, {cleaned(path.name)}.") from error
        if not target.is_relative_to(self._root):
            raise CleanSetInvalid(f"The folder holds a link that leads outside it, {cleaned(path.name)}.")
        return target


def _without_following(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe put there meanwhile must not block


def _text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
