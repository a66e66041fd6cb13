"""Whoever makes a folder has it, even where another process collects what was left behind at the same moment."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from models.claims import claim, claimed


@pytest.mark.parametrize("take", [Path.rmdir, claim], ids=["has removed it", "is about to remove it"])
def test_a_folder_is_made_anew_where_a_collection(tmp_path: Path, take: Callable[[Path], object]) -> None:
    names = iter("ab")

    def make() -> Path:
        folder = tmp_path / next(names)
        folder.mkdir()
        if folder.name == "a":
            take(folder)
        return folder

    with claimed(make) as folder:
        assert folder.name == "b"
        assert claim(folder) is None


def test_a_folder_is_made_anew_where_it_was_removed_before_it_was_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, lock = iter("ab"), fcntl.flock

    def make() -> Path:
        folder = tmp_path / next(names)
        folder.mkdir()
        return folder

    def collected_first(handle: int, operation: int) -> None:
        if (tmp_path / "a").exists():
            (tmp_path / "a").rmdir()
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", collected_first)
    with claimed(make) as folder:
        assert folder.name == "b"
        assert claim(folder) is None
