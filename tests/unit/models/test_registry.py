"""Versions appear whole or not at all; what an operator decided survives, and only what exists can be active."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from models import durable
from models.errors import BundleNotReady, ConfigInvalid, Conflict, NotFound, StorageFull, StorageUnwritable
from models.registry import GuardState, Registry, check_name


def publish(registry: Registry, guard: str = "cars") -> int:
    with registry.staging() as folder:
        (folder / "manifest.json").write_text("{}")
        return registry.publish(guard, folder)


def test_versions_only_grow(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    assert [publish(registry) for _ in range(3)] == [1, 2, 3]
    registry.activate("cars", 3)
    registry.remove("cars", 2)
    assert registry.versions("cars") == [1, 3]
    assert publish(registry) == 4
    assert registry.guards() == ["cars"]


@pytest.mark.parametrize(
    "delete", [lambda registry: registry.remove("cars", 2), lambda registry: shutil.rmtree(registry.folder("cars", 2))], ids=["the registry", "hand"]
)
def test_a_number_is_not_given_again_where_its_version_was_deleted_by(tmp_path: Path, delete: Callable[[Registry], None]) -> None:
    registry = Registry(tmp_path)
    registry.activate("cars", publish(registry))
    assert publish(registry) == 2
    delete(registry)
    assert publish(Registry(tmp_path)) == 3
    assert registry.versions("cars") == [1, 3]
    assert registry.state("cars") == GuardState(1)


def test_a_number_is_not_given_again_where_no_version_is_left(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.remove("cars", publish(registry))
    assert registry.guards() == []
    assert publish(registry) == 2


def test_a_number_is_not_given_again_where_the_state_was_written_before_numbers_were_kept(tmp_path: Path) -> None:
    registry, path = Registry(tmp_path), tmp_path / "cars" / "state.json"
    for _ in range(3):
        publish(registry)
    path.write_text('{"active": 1, "mode": "shadow", "target_fpr": 0.02}')
    registry.remove("cars", 2)
    registry.remove("cars", 3)
    assert registry.state("cars") == GuardState(1, "shadow", 0.02)
    assert publish(registry) == 4


@pytest.mark.parametrize("state", [None, "", "[]", '{"active": 1, "highest": "9"}', '{"active": 1, "highest": null}'])
def test_without_a_readable_state_the_folders_tell_the_next_number(tmp_path: Path, state: str | None) -> None:
    registry, path = Registry(tmp_path), tmp_path / "cars" / "state.json"
    for _ in range(2):
        publish(registry)
    path.unlink() if state is None else path.write_text(state)
    assert publish(registry) == 3
    if state is not None:
        assert path.read_text() == state, "what was lost is hidden"
    registry.activate("cars", 1)
    assert json.loads(path.read_bytes()) == {"active": 1, "mode": "enforce", "target_fpr": None, "highest": 3}


def test_a_full_disk_does_not_keep_a_version_from_being_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path)
    publish(registry)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        publish(registry)
    registry.remove("cars", 1)
    monkeypatch.undo()
    assert registry.guards() == []
    assert publish(registry) == 2


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_x7_a_registry_that_may_not_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    registry = Registry(tmp_path)
    registry.activate("cars", publish(registry))

    def refused(*_: object, **__: object) -> None:
        raise OSError(code, "refused")

    changes: list[Callable[[], object]] = [
        lambda: registry.activate("cars", 1),
        lambda: registry.deactivate("cars"),
        lambda: registry.configure("cars", mode="shadow"),
        lambda: registry.remove("cars", 1),
        lambda: publish(registry),
    ]
    monkeypatch.setattr("models.registry.open", refused, raising=False)
    monkeypatch.setattr("models.registry.tempfile.mkdtemp", refused)
    for change in changes:
        with pytest.raises(StorageUnwritable):
            change()
    assert registry.state("cars") == GuardState(1)


@pytest.mark.parametrize("call", [Registry.activate, Registry.remove])
def test_a_version_that_is_deleted_while_one_waits_for_the_lock_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Registry, str, int], object]
) -> None:
    registry = Registry(tmp_path)
    publish(registry)
    registry.activate("cars", publish(registry))
    lock = fcntl.flock

    def lock_after_another(file: object, operation: int) -> None:
        shutil.rmtree(tmp_path / "cars" / "1")
        lock(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", lock_after_another)
    with pytest.raises(NotFound):
        call(registry, "cars", 1)
    assert registry.state("cars").active == 2


@pytest.mark.parametrize("guard", ["..", ".staging", "boats"])
def test_nothing_is_written_for_what_is_no_guard(tmp_path: Path, guard: str) -> None:
    registry = Registry(tmp_path / "guards")
    for call in (lambda: registry.activate(guard, 1), lambda: registry.remove(guard, 1), lambda: registry.configure(guard, mode="shadow")):
        with pytest.raises(NotFound):
            call()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".staging", "guards"]


def test_a_new_version_is_not_active_until_it_is_activated(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    publish(registry)
    assert registry.state("cars") == GuardState()
    registry.activate("cars", 1)
    registry.configure("cars", mode="shadow", target_fpr=0.02)
    publish(registry)
    assert Registry(tmp_path).state("cars") == GuardState(1, "shadow", 0.02)


def test_a_changed_target_holds_until_a_version_is_activated_or_it_is_taken_back(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    publish(registry)
    publish(registry)
    registry.activate("cars", 1)
    registry.configure("cars", target_fpr=0.02)
    assert registry.configure("cars", mode="shadow") == GuardState(1, "shadow", 0.02)
    assert registry.activate("cars", 2) == GuardState(2, "shadow", None)
    registry.configure("cars", target_fpr=0.02)
    assert registry.configure("cars", own_target=True) == GuardState(2, "shadow", None)


def test_a_guard_whose_state_is_damaged_can_be_taken_out_of_service(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    publish(registry)
    (tmp_path / "cars" / "state.json").write_text("{")
    assert registry.deactivate("cars") == GuardState(None)
    registry.remove("cars", 1)


def test_what_is_no_longer_active_can_be_deleted(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    publish(registry)
    registry.activate("cars", 1)
    assert registry.deactivate("cars") == GuardState(None)
    registry.remove("cars", 1)
    assert registry.versions("cars") == []
    with pytest.raises(NotFound):
        registry.deactivate("cars")


def test_an_abandoned_staging_folder_is_never_a_version(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    with contextlib.suppress(RuntimeError), registry.staging() as folder:
        (folder / "manifest.json").write_text("{}")
        raise RuntimeError
    (tmp_path / ".staging" / "left-by-a-crash").mkdir()
    assert registry.guards() == []
    with registry.staging() as in_use:
        assert registry.collect() == 1
        assert [folder.name for folder in (tmp_path / ".staging").iterdir()] == [in_use.name]
    assert not any((tmp_path / ".staging").iterdir())


def test_only_existing_versions_can_be_active_and_the_active_one_stays(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    publish(registry)
    for guard, version in (("cars", 2), ("cars", 0), ("boats", 1), ("..", 1)):
        with pytest.raises(NotFound):
            registry.activate(guard, version)
    registry.activate("cars", 1)
    with pytest.raises(Conflict):
        registry.remove("cars", 1)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a-", "A", "é", "a" * 64, "a\n", ".staging"])
def test_names_that_could_leave_the_directory_are_refused(name: str) -> None:
    with pytest.raises(ConfigInvalid):
        check_name(name)


def test_a_damaged_state_is_said_and_mended_by_activation(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    publish(registry)
    (tmp_path / "cars" / "state.json").write_text("{")
    with pytest.raises(BundleNotReady):
        registry.state("cars")
    assert registry.activate("cars", 1) == GuardState(1)


def test_publishers_in_parallel_get_different_versions(tmp_path: Path) -> None:
    registry, found = Registry(tmp_path), list[int]()
    threads = [threading.Thread(target=lambda: found.append(publish(registry))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 9))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "state.json"
    durable.write_file(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageFull):
        durable.write_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(("call", "nth"), [("activate", 1), ("configure", 1), ("deactivate", 1), ("publish", 1), ("publish", 2), ("publish first", 1)])
def test_x6_what_fails_because_a_folder_cannot_be_flushed_does_not_come_into_force_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int
) -> None:
    registry = Registry(tmp_path)
    registry.activate("cars", publish(registry))
    publish(registry)
    calls: dict[str, Callable[[], object]] = {
        "activate": lambda: registry.activate("cars", 2),
        "configure": lambda: registry.configure("cars", mode="shadow"),
        "deactivate": lambda: registry.deactivate("cars"),
        "publish": lambda: publish(registry),
        "publish first": lambda: publish(registry, "boats"),
    }
    fsync, folders = os.fsync, list[int]()

    def failing(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            folders.append(handle)
            if len(folders) >= nth:
                raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        calls[call]()
    monkeypatch.undo()
    again = Registry(tmp_path)
    assert again.state("cars") == GuardState(1)
    assert again.versions("cars") == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".staging", "cars"]
    assert sorted(path.name for path in (tmp_path / "cars").iterdir()) == [".lock", "1", "2", "state.json"]
