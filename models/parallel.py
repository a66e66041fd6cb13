"""How many CPU threads there are to compute with, and how many a network is worth."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from models.lowering import has_fast_bf16
from models.trunk import operations

# Below this many operations an image, a second thread waits more than it works; and where another process wants the core, threads that wait for one
# another make everything several times slower (measured with a ResNet-20 on two cores: 13 ms an image instead of 3).
SMALL_OPERATIONS = 500_000_000
MOST_FOR_SMALL = 4


def cores() -> int:
    """CPU cores that this process may use: those of its affinity, and no more than its control groups give it the time of.

    A container that is limited to two of 64 cores sees all of them, and with a thread for each is made to wait most of the time.
    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _time_given(Path("/")))))


def usual_threads() -> int:
    """As many as torch computes with unless it is told otherwise, but one a core at most: of a container's limits it knows nothing."""
    return min(torch.get_num_threads(), cores())


def _time_given(root: Path) -> float:
    """Seconds of processor time a second that the control groups allow, infinite where they set no limit; root: where /proc and /sys are."""
    allowed = math.inf
    with suppress(OSError, ValueError):  # elsewhere than on Linux, hidden from us, or unlike all that is known
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("" if not controllers else "cpu")
            own = top / path.strip("/")
            for group in [own, *own.parents]:  # a limit of a group holds for all below it
                allowed = min(allowed, _quota(group))
                if group == top:
                    break
    return allowed


def _quota(group: Path) -> float:
    """Of one control group, of version 2 or 1."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # not there; or "max", which is no limit
            quota, period = (int(word) for name in names for word in (group / name).read_text().split())
            if quota > 0 and period > 0:
                return quota / period
    return math.inf


def cpu_threads(network: nn.Module, size: int) -> int:
    """1 for a small network, one a core otherwise; by the network alone, since the number decides the last bits of what is computed."""
    small = operations(network, torch.zeros(1, 3, size, size)) < SMALL_OPERATIONS
    return 1 if small else cores()


def training_threads(network: nn.Module, size: int) -> int:
    """As `cpu_threads`, but up to MOST_FOR_SMALL for a small network on a CPU that computes in float32: its batches are work enough for several there.

    Meant for a process whose threads sleep while they wait, as `python -m calibration` has them: a step of a ResNet-20 with 64 images then takes 353 ms with
    one thread and 238 with two, 383 and 401 beside a busy process, 649 and 600 beside two (AVX2, two cores). Where bfloat16 makes the same step several
    times shorter, they would wait for one another again. Whoever runs several such processes beside one another says so by OMP_NUM_THREADS.
    """
    threads = cpu_threads(network, size)
    if threads > 1 or has_fast_bf16(torch.device("cpu")):
        return threads
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # of nested levels the outermost
    return min(MOST_FOR_SMALL, max(1, int(asked)) if asked.strip().isdigit() else cores())


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Within the block the calling thread computes with so many; other threads, and it afterwards, as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
