"""The sandbox's parts that need no process of their own; what it withstands is in tests/abuse/test_sandbox_abuse.py."""

from __future__ import annotations

import errno
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibration import sandbox

MIB = 1 << 20
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EACCES
X86, ARM = sandbox._CALLS["x86_64"], sandbox._CALLS["aarch64"]


def answer(calls: sandbox._Calls, arch: int, number: int, argument: int = 0) -> int:
    """What the kernel would answer: the filter run over a seccomp_data."""
    data = struct.pack("<IIQ6Q", number, arch, 0, argument, 0, 0, 0, 0, 0)
    steps, at, word = list(struct.iter_unpack("=HBBI", sandbox._program(calls))), 0, 0
    while True:
        operation, yes, no, value = steps[at]
        at += 1
        if operation == sandbox._RETURN:
            return int(value)
        if operation == sandbox._LOAD:
            (word,) = struct.unpack_from("<I", data, value)
        else:
            at += yes if (word == value if operation == sandbox._EQUAL else word >= value) else no


@pytest.mark.parametrize("calls", [X86, ARM], ids=["x86_64", "aarch64"])
class TestTheFilter:
    def test_refuses_the_named_calls_and_no_others(self, calls: sandbox._Calls) -> None:
        refused = {number for number in range(600) if answer(calls, calls.arch, number, socket.AF_UNIX) == REFUSE}
        assert refused == set(calls.refused)

    def test_lets_sockets_be_local_only(self, calls: sandbox._Calls) -> None:
        allowed = {family for family in range(64) if answer(calls, calls.arch, calls.socket, family) == ALLOW}
        assert allowed == {socket.AF_UNIX}

    def test_is_not_misled_by_the_high_half_of_the_family(self, calls: sandbox._Calls) -> None:
        assert answer(calls, calls.arch, calls.socket, 1 << 32 | socket.AF_INET) == REFUSE

    def test_refuses_every_call_of_another_architecture(self, calls: sandbox._Calls) -> None:
        others = {X86.arch, ARM.arch, 0x40000003, 0x40000028} - {calls.arch}  # and i386, arm
        assert {answer(calls, arch, number) for arch in others for number in range(600)} == {REFUSE}

    def test_refuses_every_call_under_its_x32_number(self, calls: sandbox._Calls) -> None:
        assert {answer(calls, calls.arch, 0x40000000 + number) for number in range(600)} == {REFUSE}


def test_it_is_in_place_before_torch_is() -> None:
    code = "import sys; from calibration import sandbox; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestReading:
    def test_puts_back_what_it_found(self) -> None:
        limits = [resource.getrlimit(kind) for kind in (resource.RLIMIT_DATA, resource.RLIMIT_CPU)]
        with sandbox.reading(512 * MIB, 60.0):
            during = [resource.getrlimit(kind) for kind in (resource.RLIMIT_DATA, resource.RLIMIT_CPU)]
        after = [resource.getrlimit(kind) for kind in (resource.RLIMIT_DATA, resource.RLIMIT_CPU)]
        assert after == limits
        assert [hard for _, hard in during] == [hard for _, hard in limits]
        assert all(soft > 0 for soft, _ in during)
        assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGPROF) == signal.SIG_DFL

    def test_counts_time_as_the_kernel_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The clock of the limit runs ahead of process_time, and a process that had worked for minutes was killed at once."""
        monkeypatch.setattr(sandbox.time, "clock_gettime", lambda _: time.process_time() + 5000)
        with sandbox.reading(None, 60.0):
            assert resource.getrlimit(resource.RLIMIT_CPU)[0] >= 5060

    def test_leaves_memory_alone_where_none_is_named(self) -> None:
        before = resource.getrlimit(resource.RLIMIT_DATA)
        with sandbox.reading(None, 60.0):
            assert resource.getrlimit(resource.RLIMIT_DATA) == before

    def test_never_raises_a_limit_that_stands(self) -> None:
        before = resource.getrlimit(resource.RLIMIT_CPU)
        lower = int(time.process_time()) + 3600
        resource.setrlimit(resource.RLIMIT_CPU, (lower, before[1]))
        try:
            with sandbox.reading(None, 1e6):
                assert resource.getrlimit(resource.RLIMIT_CPU)[0] == lower
        finally:
            resource.setrlimit(resource.RLIMIT_CPU, before)

    def test_ends_a_body_that_takes_too_long_through_readers_that_catch_everything(self) -> None:
        def decode() -> None:
            try:
                sum(range(10_000))
            except Exception:
                raise AssertionError("a damaged image") from None

        def forever() -> None:
            while True:
                decode()

        with pytest.raises(sandbox.TookTooLong), sandbox.reading(None, 0.05):
            forever()

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
            RuntimeError("std::bad_alloc"),
            RuntimeError("can't start new thread"),
            OSError(errno.ENOMEM, "Cannot allocate memory"),
        ],
        ids=str,
    )
    def test_says_MemoryError_whatever_a_library_says(self, error: Exception) -> None:
        with pytest.raises(MemoryError) as caught, sandbox.reading(None, 60.0):
            raise error
        assert caught.value.__cause__ is error

    @pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), FileNotFoundError(errno.ENOENT, "no"), ValueError("memory")], ids=str)
    def test_hands_on_every_other_error(self, error: Exception) -> None:
        with pytest.raises(type(error)) as caught, sandbox.reading(None, 60.0):
            raise error
        assert caught.value is error


def test_the_budget_grows_with_the_files(tmp_path: Path) -> None:
    limits = sandbox.Limits(memory_bytes=100, memory_factor=3)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_bytes(bytes(5))
    (tmp_path / "file").write_bytes(bytes(7))
    assert limits.memory_for(tmp_path / "file", tmp_path / "folder", tmp_path / "missing") == 100 + 3 * 12


def test_peak_memory_is_that_of_this_process_alone() -> None:
    code = "from calibration import sandbox; a = sandbox.peak_memory(); b = b'x' * (64 << 20); print(a, sandbox.peak_memory())"
    ballast = b"x" * (256 * MIB)  # in this process; a child's ru_maxrss would show it
    before, after = map(int, subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())
    assert len(ballast) > before
    assert 48 * MIB < after - before < 96 * MIB
