"""The directory of bundles: publish, list, activate, roll back, collect.

    <root>/<guard>/<version>/         a bundle, named by a number that only grows
    <root>/<guard>/state.json         the active version, the mode, another target FPR, and the highest number ever given: replaced whole
    <root>/.staging/<id>/             bundles being written; renamed into place when complete

Publishing is a rename on one file system, so a half-written bundle never has a version. A lock file a guard orders writers of several processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from models.claims import claimed, remove_unclaimed
from models.durable import storage_errors, sync_folder, write_file
from models.errors import BundleNotReady, ConfigInvalid, Conflict, NotFound

Mode = Literal["enforce", "shadow"]
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)


@dataclass(frozen=True)
class GuardState:
    """What an operator decides about a guard: `target_fpr` None means the one that the active version was calibrated for.

    highest: the highest version number that is known to have been given, be that version still there or not; 0 in a file from before it was kept.
    The registry counts it: it is not compared, since nobody decides it.
    """

    active: int | None = None
    mode: Mode = "enforce"
    target_fpr: float | None = None
    highest: int = field(default=0, compare=False)


def check_name(name: str) -> str:
    """A guard's name; raises ConfigInvalid for anything that is not 1 to 63 lower-case letters, digits and inner hyphens."""
    if not _NAME.fullmatch(name):
        raise ConfigInvalid("A guard's name is 1 to 63 lower-case letters, digits and hyphens, and begins and ends with a letter or digit.")
    return name


class Registry:
    """Owns one bundle directory. Safe to use from several threads and processes at once.

    What changes it raises StorageFull or StorageUnwritable where the disk refuses.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._staging = root / ".staging"
        self._staging.mkdir(parents=True, exist_ok=True)

    def guards(self) -> list[str]:
        """Names of all guards with at least one version, sorted."""
        return sorted(path.name for path in self.root.iterdir() if _NAME.fullmatch(path.name) and self.versions(path.name))

    def versions(self, guard: str) -> list[int]:
        """Version numbers of a guard, oldest first; empty for an unknown guard."""
        if not _NAME.fullmatch(guard) or not (self.root / guard).is_dir():
            return []
        return sorted(int(path.name) for path in (self.root / guard).iterdir() if path.name.isdecimal() and path.is_dir())

    def folder(self, guard: str, version: int) -> Path:
        """Where a bundle lies. Raises NotFound."""
        if version not in self.versions(guard):
            raise NotFound(f"Guard {guard} has no version {version}." if self.versions(guard) else "There is no such guard.")
        return self.root / guard / str(version)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder to write a bundle into; removed at the end unless it was published."""
        with ExitStack() as held:
            with storage_errors():
                folder = held.enter_context(claimed(lambda: Path(tempfile.mkdtemp(dir=self._staging))))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, guard: str, staged: Path) -> int:
        """Give a complete staged bundle the next version number of a guard: one that none of its versions ever had."""
        home = self.root / check_name(guard)
        with storage_errors():
            if not home.is_dir():
                home.mkdir(exist_ok=True)
                sync_folder(self.root, home.rmdir)
            with self._locked(guard):
                state = self._readable_state(guard)
                version = self._highest(guard, state or GuardState()) + 1
                if state is not None:  # a damaged file stays as it is until an activation mends it: to replace it would hide what was lost
                    self._write(guard, replace(state, highest=version))
                os.chmod(staged, 0o755)  # noqa: S103 - mkdtemp's 0700 would keep a server under another user out
                os.rename(staged, home / str(version))
                sync_folder(home, lambda: os.rename(home / str(version), staged))
        return version

    def state(self, guard: str) -> GuardState:
        """The operator's decisions about a guard. Raises NotFound, or BundleNotReady where they cannot be read."""
        if not self.versions(guard):
            raise NotFound("There is no such guard.")
        return self._read(guard)

    def activate(self, guard: str, version: int) -> GuardState:
        """Make a version the active one, with the target FPR of its own calibration. Raises NotFound."""
        with self._locked(guard):
            self.folder(guard, version)  # under the lock, or it could be deleted before the state names it
            before = self._readable_state(guard) or GuardState()  # activation is the way out of a damaged state
            return self._write(guard, replace(before, active=version, target_fpr=None))

    def deactivate(self, guard: str) -> GuardState:
        """Make no version the active one. Raises NotFound."""
        with self._locked(guard):
            if not self.versions(guard):
                raise NotFound("There is no such guard.")
            before = self._readable_state(guard) or GuardState()  # a way out of a damaged state, like activation
            return self._write(guard, replace(before, active=None, target_fpr=None))

    def configure(self, guard: str, *, mode: Mode | None = None, target_fpr: float | None = None, own_target: bool = False) -> GuardState:
        """Change the mode, the target FPR, or both; None leaves one as it is. own_target: take an earlier change of the target back."""
        with self._locked(guard):
            state = self.state(guard)
            target = None if own_target else target_fpr or state.target_fpr
            return self._write(guard, replace(state, mode=mode or state.mode, target_fpr=target))

    def remove(self, guard: str, version: int) -> None:
        """Delete a version for good; its number is not given again. Raises NotFound, or Conflict for the active one."""
        with self._locked(guard):
            folder, state = self.folder(guard, version), self.state(guard)
            if state.active == version:
                raise Conflict(f"Version {version} of guard {guard} is active; activate another first, or take the guard out of service.")
            if version == self._highest(guard, state) > state.highest:  # only its folder tells that number; otherwise a full disk must not be in the way
                self._write(guard, state)
            shutil.rmtree(folder)

    def collect(self) -> int:
        """Remove what crashed writers left in staging, and nothing that somebody is writing, in whatever process; returns how many folders."""
        return remove_unclaimed(self._staging.iterdir())

    def _read(self, guard: str) -> GuardState:
        """What state.json says. Raises BundleNotReady where it is damaged."""
        try:
            state = GuardState(**json.loads((self.root / guard / "state.json").read_bytes()))
            if type(state.highest) is not int:
                raise TypeError("the highest version is no whole number")
        except FileNotFoundError:
            return GuardState()
        except (OSError, ValueError, TypeError) as error:
            raise BundleNotReady(f"The state of guard {guard} is damaged; activate a version again.") from error
        return state

    def _readable_state(self, guard: str) -> GuardState | None:
        """The same; None where it is damaged."""
        try:
            return self._read(guard)
        except BundleNotReady:
            return None

    def _highest(self, guard: str, state: GuardState) -> int:
        """The highest version number that was given, 0 for none: the folders tell of those that nobody wrote down."""
        return max([state.highest, *self.versions(guard)])

    def _write(self, guard: str, state: GuardState) -> GuardState:
        state = replace(state, highest=self._highest(guard, state))
        write_file(self.root / guard / "state.json", json.dumps(asdict(state)).encode())
        return state

    @contextmanager
    def _locked(self, guard: str) -> Iterator[None]:
        if not _NAME.fullmatch(guard) or not (self.root / guard).is_dir():
            raise NotFound("There is no such guard.")
        with storage_errors(), open(self.root / guard / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
