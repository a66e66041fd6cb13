"""What the process that reads untrusted files may no longer do: a bug in a parser then costs one calibration and not the host.

Owns the limits of `python -m calibration`. `enter` holds for the rest of the process: no core file, no file beyond a size, no program started, no
socket but local ones, no hand in another process. `reading` holds memory and processor time while hostile bytes are parsed. Nothing here imports
torch, so all of it is in place before torch is. It never fails where a kernel lacks something: `Confinement` says what holds.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from calibration.landlock import seclude

_MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one calibration process may cost."""

    file_bytes: int = 16 << 30  # one file that it writes: the largest checkpoint's 8 GiB of weights, doubled where they become float32
    memory_bytes: int = 4 << 30  # while reading: 1 GiB of images that a container keeps, twice while they are unpacked; threads; what libraries reserve
    memory_factor: int = 6  # of the files' sizes, for what is made from them: inflated storages, float32 weights, the network
    cpu_seconds: float = 1800.0  # while reading: the largest clean set (20 gigapixels) takes 430 s as PNG, 1,000 s as the slowest JPEG of noise
    grace_seconds: float = 10.0  # of processor time until what does not stop is killed

    def memory_for(self, *files: Path) -> int:
        """The budget of `reading` in bytes for these files; a folder counts as its files."""
        return self.memory_bytes + self.memory_factor * sum(map(_size, files))


@dataclass(frozen=True)
class Confinement:
    """What holds from now on; False where this kernel or machine cannot. Each was tried, not only asked for."""

    network: bool  # no socket but AF_UNIX, no io_uring
    programs: bool  # no program can be started
    processes: bool  # nothing can be seen of the process that started this one
    memory: bool  # `reading` can hold memory
    files: bool  # no file grows beyond Limits.file_bytes


class TookTooLong(BaseException):
    """Reading the files took more processor time than it may.

    Not an Exception: readers turn whatever a decoder raises into "this file is damaged", and this must come through them.
    """


def enter(limits: Limits = Limits()) -> Confinement:
    """Confine this process for good; call it first, while there is one thread. The parent's end ends it, too."""
    _lower(resource.RLIMIT_CORE, 1)  # a core file would hold the images; 1 and not 0 since crash collectors behind a pipe are run for 0
    files = _lower(resource.RLIMIT_FSIZE, limits.file_bytes)  # Python ignores SIGXFSZ: a write beyond it is an OSError
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # a calibration that nobody waits for must not hold a GPU
        if not Path("/dev/nvidia-uvm").exists():  # after a boot, the first use of CUDA starts a program that makes it: now or never
            with suppress(OSError, AttributeError):
                ctypes.CDLL("libcuda.so.1").cuInit(0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        seclude(libc)
        _filter_calls(libc)
    return Confinement(
        network=_refused(lambda: socket.socket(socket.AF_INET).close()),
        programs=_refused(lambda: os.execv("", ["-"])),  # noqa: S606  # no file has this name: without the filter it is "not found"
        processes=_refused(lambda: os.close(os.open(f"/proc/{os.getppid()}/mem", os.O_RDONLY))),
        memory=_memory_can_be_held(),
        files=files,
    )


@contextmanager
def reading(memory_bytes: int | None, cpu_seconds: float, grace_seconds: float = Limits.grace_seconds) -> Iterator[None]:
    """Hold what the body adds to this process's memory and processor time. Main thread only; not to be nested.

    memory_bytes: private writable memory beyond that in use now, copy-on-write maps of files and stacks of threads included; None for no limit,
    as a CUDA context needs. cpu_seconds: of all threads together. Raises MemoryError, also where torch or a library says so in another way, or
    TookTooLong; a body that does not come to an end `grace_seconds` later is killed with SIGXCPU. Hard limits are not touched.
    """
    memory, cpu = resource.getrlimit(resource.RLIMIT_DATA), resource.getrlimit(resource.RLIMIT_CPU)
    stop = signal.signal(signal.SIGPROF, _stop)
    try:
        # Not RLIMIT_AS: torch's libraries and the arenas of malloc reserve gigabytes of address space that they never use.
        _lower_soft(resource.RLIMIT_DATA, None if memory_bytes is None else _data_bytes() + memory_bytes)
        # Two clocks: the first raises in Python and again each second; no Python runs while C code hangs, and the second kills.
        _lower_soft(resource.RLIMIT_CPU, _processor_seconds() + cpu_seconds + grace_seconds + 1)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds, 1.0)
        yield
    except (OSError, RuntimeError) as error:
        if _means_no_memory(error):
            raise MemoryError from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, stop)
        resource.setrlimit(resource.RLIMIT_DATA, memory)
        resource.setrlimit(resource.RLIMIT_CPU, cpu)


def peak_memory() -> int:
    """The most memory this process ever held at once, bytes. Not ru_maxrss where that can be helped: a child inherits its parent's."""
    with suppress(OSError, AttributeError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024  # type: ignore[index]  # AttributeError is suppressed
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _stop(_: int, __: FrameType | None) -> None:
    raise TookTooLong


# What C and C++ say where Python would say MemoryError: torch's allocators, the C++ runtime, thread creation, mmap.
_NO_MEMORY = re.compile(r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|bad_alloc|can't start new thread", re.IGNORECASE)


def _means_no_memory(error: OSError | RuntimeError) -> bool:
    return error.errno == errno.ENOMEM if isinstance(error, OSError) else bool(_NO_MEMORY.search(str(error)))


# ---- limits


def _lower(kind: int, value: int) -> bool:
    """Both the soft and the hard limit, for good. False where a limit cannot be set."""
    try:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    except (OSError, ValueError):
        return False
    return True


_CPUCLOCK_PROF = ~0 << 3  # of this process, as Linux numbers such clocks (MAKE_PROCESS_CPUCLOCK); elsewhere an error


def _lower_soft(kind: int, value: float | None) -> None:
    soft, hard = resource.getrlimit(kind)
    if value is not None and (soft == resource.RLIM_INFINITY or value < soft):
        resource.setrlimit(kind, (int(value), hard))


def _processor_seconds() -> float:
    """What RLIMIT_CPU compares with: whole ticks, on some machines a tenth more than time.process_time, which measures."""
    with suppress(OSError):
        return max(time.process_time(), time.clock_gettime(_CPUCLOCK_PROF))
    return time.process_time()


def _data_bytes() -> int:
    """What RLIMIT_DATA counts, and a little more: the stack. 0 where /proc does not say, so that the limit is then too strict, not too lax."""
    with suppress(OSError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[5]) * mmap.PAGESIZE
    return 0


def _memory_can_be_held() -> bool:
    """Whether a map beyond RLIMIT_DATA is refused: Linux does since 4.7, others count the heap alone."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        _lower_soft(resource.RLIMIT_DATA, _data_bytes() + 16 * _MIB)
        mmap.mmap(-1, 64 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, ValueError):
        return _data_bytes() > 0
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    return False


def _size(path: Path) -> int:
    with suppress(OSError):
        return sum(map(_size, path.iterdir())) if path.is_dir() else path.stat().st_size
    return 0


# ---- system calls

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SET_MODE_FILTER, _ALL_THREADS, _NO_SPECULATION_PENALTY = 1, 1, 4  # the last: else older kernels slow down all that follows
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF: load a 32-bit word of seccomp_data, compare, return
_NUMBER, _ARCH, _ARGUMENT = 0, 4, 16  # offsets in seccomp_data; the first argument, its low half
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_X32 = 0x40000000  # numbers from here on are the same calls by other names


@dataclass(frozen=True)
class _Calls:
    """Numbers of one architecture; `refused` are those that start programs, open rings, and reach into other processes."""

    arch: int  # AUDIT_ARCH of the native calls
    seccomp: int
    socket: int
    refused: tuple[int, ...]


# refused: execve, execveat, io_uring_setup, ptrace, process_vm_readv, process_vm_writev, pidfd_getfd
_CALLS = {
    "x86_64": _Calls(0xC000003E, 317, 41, (59, 322, 425, 101, 310, 311, 438)),
    "aarch64": _Calls(0xC00000B7, 277, 198, (221, 281, 425, 117, 270, 271, 438)),
}


def _filter_calls(libc: ctypes.CDLL) -> None:
    """Answer EACCES to what no calibration needs, for all threads. CUDA, matplotlib and ctypes all live without, or take it for "not there"."""
    calls = _CALLS.get(os.uname().machine)
    if calls is None or struct.calcsize("P") != 8:  # a 32-bit process on a 64-bit kernel makes other calls
        return
    code = _program(calls)
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer := ctypes.create_string_buffer(code, len(code))))
    libc.syscall(ctypes.c_long(calls.seccomp), _SET_MODE_FILTER, _ALL_THREADS | _NO_SPECULATION_PENALTY, program)
    del buffer  # the kernel has its copy


def _program(calls: _Calls) -> bytes:
    """The filter as BPF: steps of (operation, value, steps to skip if so, if not). Another architecture's numbers mean other calls: all refused."""
    refuse, allow = (_RETURN, _ERRNO | errno.EACCES, 0, 0), (_RETURN, _ALLOW, 0, 0)
    steps = [
        *((_LOAD, _ARCH, 0, 0), (_EQUAL, calls.arch, 1, 0), refuse),
        *((_LOAD, _NUMBER, 0, 0), (_AT_LEAST, _X32, 0, 1), refuse),
        *(step for number in calls.refused for step in ((_EQUAL, number, 0, 1), refuse)),
        *((_EQUAL, calls.socket, 1, 0), allow),
        *((_LOAD, _ARGUMENT, 0, 0), (_EQUAL, socket.AF_UNIX, 1, 0), refuse),  # the kernel takes an int, so the high half says nothing
        allow,
    ]
    return b"".join(struct.pack("=HBBI", operation, yes, no, value) for operation, value, yes, no in steps)


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except PermissionError:
        return True
    except OSError:
        return False
    return False
