"""How many cores a process takes itself to have, wherever it runs."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from models import parallel


def machine(root: Path, cgroup: str, **files: str) -> Path:
    """A file system root with /proc/self/cgroup and these files below /sys/fs/cgroup, by their paths."""
    for path, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{path}": text for path, text in files.items()}}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "given"),
    [
        ("0::/\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/pods/ours\n", {"pods/ours/cpu.max": "max 100000\n", "pods/cpu.max": "400000 100000\n"}, 4.0),
        ("0::/pods/ours\n", {"pods/ours/cpu.max": "200000 100000\n", "pods/cpu.max": "400000 100000\n"}, 2.0),
        ("0::/hidden/from/us\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("7:memory:/a\n4:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "300000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("4:cpu:/of/the/host\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("4:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "nonsense\n"}, math.inf),
    ],
)
def test_the_time_that_control_groups_give(tmp_path: Path, cgroup: str, files: dict[str, str], given: float) -> None:
    assert parallel._time_given(machine(tmp_path, cgroup, **files)) == given


def test_where_there_are_no_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert parallel._time_given(tmp_path) == math.inf


@pytest.mark.parametrize(("given", "cores"), [(math.inf, 8), (1.5, 2), (0.1, 1), (8.0, 8), (64.0, 8)])
def test_a_core_is_one_that_may_be_used(monkeypatch: pytest.MonkeyPatch, given: float, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(parallel, "_time_given", lambda _: given)
    assert parallel.cores() == cores
