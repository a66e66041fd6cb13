"""Hostile code and hostile sizes inside the process that reads files: promise P12, and memory and time held at their budgets.

Each test is a child process that enters the sandbox and then does what an exploited parser would do; where it matters, the same child without
the sandbox shows that the deed would have been done.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
ENTER = "from calibration import sandbox\nheld = sandbox.enter(sandbox.Limits(file_bytes=1 << 20))\n"
HELD = json.loads(subprocess.check_output([sys.executable, "-c", ENTER + "import dataclasses, json; print(json.dumps(dataclasses.asdict(held)))"]))
needs_filter = pytest.mark.skipif(not (HELD["network"] and HELD["programs"]), reason="this kernel or machine has no system call filter")
needs_landlock = pytest.mark.skipif(not HELD["processes"], reason="this kernel has no Landlock")
needs_memory = pytest.mark.skipif(not HELD["memory"], reason="this kernel does not hold private memory")
x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86_64")


def child(code: str, confined: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    code = (ENTER if confined else "from calibration import sandbox\n") + code
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def said(code: str, confined: bool = True, cwd: Path | None = None) -> str:
    """What the child printed; it came to a good end."""
    result = child(code, confined, cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


REFUSED = """
def refused(deed):
    try:
        deed()
    except PermissionError:
        return True
    return False
"""


@needs_filter
class TestNetwork:
    def test_nothing_can_be_reached(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            code = f"import socket\nsocket.create_connection(('127.0.0.1', {listener.getsockname()[1]})).close()\nprint('connected')"
            assert said(code, confined=False) == "connected"
            listener.accept()[0].close()
            assert "PermissionError" in child(code).stderr
            listener.settimeout(0.2)
            with pytest.raises(TimeoutError):
                listener.accept()

    def test_no_family_of_sockets_is_left_but_local_ones(self) -> None:
        families = "(2, 10, 15, 16, 17, 29, 31, 38, 40, 44)"  # IPv4, IPv6, PF_KEY, netlink, packet, CAN, Bluetooth, ALG, vsock, XDP
        code = f"import socket{REFUSED}\nprint(all(refused(lambda: socket.socket(family, kind)) for family in {families} for kind in (1, 2, 3)))"
        assert said(code) == "True"
        assert said("import socket; a, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))") == "b'x'"

    @pytest.mark.parametrize("where", ["a thread", "a fork", "a thread from before"])
    def test_it_holds_in(self, where: str) -> None:
        deed = f"import os, socket, threading{REFUSED}\nout = lambda: os.write(1, str(refused(lambda: socket.socket(2, 1))).encode())\n"
        if where == "a fork":
            assert said(deed + "if os.fork():\n    os.wait()\nelse:\n    out()") == "True"
        elif where == "a thread":
            assert said(deed + "t = threading.Thread(target=out); t.start(); t.join()") == "True"
        else:
            early = "import threading\ngo = threading.Event()\nt = threading.Thread(target=lambda: (go.wait(), out()))\nt.start()\n"
            assert said(early + ENTER + deed + "go.set()\nt.join()", confined=False) == "True"


@needs_filter
class TestPrograms:
    DEEDS = {  # noqa: RUF012
        "subprocess": "subprocess.run(['/bin/sh', '-c', 'touch canary'])",
        "os.system": "os.system('touch canary')",
        "execv": "os.execv('/bin/sh', ['sh', '-c', 'touch canary'])",
        "posix_spawn": "os.waitpid(os.posix_spawn('/bin/sh', ['sh', '-c', 'touch canary'], {}), 0)",
        "a file without a name": (
            "fd = os.memfd_create('x'); os.write(fd, open('/bin/sh', 'rb').read()); os.execve(fd, ['sh', '-c', 'touch canary'], os.environ)"
        ),
    }

    @pytest.mark.parametrize("deed", DEEDS)
    def test_none_can_be_started_by(self, deed: str, tmp_path: Path) -> None:
        code = "import os, subprocess\n" + self.DEEDS[deed]
        child(code, confined=False, cwd=tmp_path)
        assert (tmp_path / "canary").exists()
        (tmp_path / "canary").unlink()
        child(code, cwd=tmp_path)
        assert not (tmp_path / "canary").exists()

    def test_an_uploaded_library_of_machine_code_finds_no_other_way(self) -> None:
        code = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nnumbers = sandbox._CALLS[os.uname().machine].refused\n"
        code += "print([(libc.syscall(ctypes.c_long(number), 0, 0, 0, 0, 0, 0), ctypes.get_errno()) for number in numbers])"
        assert said(code) == str([(-1, 13)] * 7)

    @x86_64
    def test_other_names_of_the_same_calls_are_refused(self) -> None:
        x32 = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.syscall(ctypes.c_long(0x40000000 + 39)), ctypes.get_errno())"
        assert said(x32) == "-1 13"
        # mov eax, 20 (getpid); int 0x80; ret: a call of the 32-bit table
        i386 = "import ctypes, mmap\npage = mmap.mmap(-1, 4096, prot=7)\npage.write(bytes.fromhex('b814000000cd80c3'))\n"
        i386 += "print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())"
        assert said(i386) == "-13"

    def test_no_privilege_comes_back(self) -> None:
        assert "NoNewPrivs:\t1" in said("print(open('/proc/self/status').read())")


class TestOtherProcesses:
    """What a child could do to the process that started it, which here has a token in its environment and a secret in its memory and in a file."""

    PARENT = """
import os, subprocess, sys, tempfile
if {hidden}:
    from service.unseen import hide
    hide()
secret = tempfile.TemporaryFile()
child = subprocess.run([sys.executable, "-c", {child!r}, str(secret.fileno())], stdout=subprocess.PIPE, text=True)
print(child.stdout, child.returncode)
"""
    LOOK = """
import os, signal, sys
parent, deeds = f"/proc/{os.getppid()}", []
for name, flags in (("environ", 0), ("mem", 0), ("mem", os.O_RDWR), ("maps", 0), ("fd/" + sys.argv[1], 0), ("cwd", 0), ("root", 0)):
    try:
        os.close(os.open(f"{parent}/{name}", flags))
        deeds.append(name)
    except PermissionError:
        pass
print(",".join(deeds) or "nothing")
"""
    KILL = "import os, signal\ntry:\n    os.kill(os.getppid(), signal.SIGCONT)\n    print('signalled')\nexcept PermissionError:\n    print('refused')\n"
    CAPABILITIES_ALONE = """
import ctypes
from calibration import landlock
landlock._call = lambda *_: -1  # as where a kernel has no Landlock
landlock.seclude(ctypes.CDLL(None))
"""

    def says(self, child: str, hidden: bool = False) -> str:
        return said(self.PARENT.format(hidden=hidden, child=child), confined=False).splitlines()[0]

    @needs_landlock
    def test_nothing_is_seen_of_them(self) -> None:
        assert "environ" in self.says(self.LOOK)
        assert self.says(ENTER + self.LOOK) == "nothing"

    @needs_landlock
    def test_they_get_no_signal(self) -> None:
        assert self.says(self.KILL) == "signalled"
        assert self.says(ENTER + self.KILL) == "refused"

    @pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
    def test_without_landlock_the_service_hides_itself(self) -> None:
        if os.geteuid():  # what root starts sees nothing once it has less capabilities
            assert "mem" in self.says(self.CAPABILITIES_ALONE + self.LOOK)
        assert self.says(self.CAPABILITIES_ALONE + self.LOOK, hidden=True) == "nothing"

    @needs_landlock
    def test_a_file_still_moves_from_one_folder_to_another(self, tmp_path: Path) -> None:
        (tmp_path / "staging" / "bundle").mkdir(parents=True)
        (tmp_path / "guard").mkdir()
        assert said("import os\nos.rename('staging/bundle', 'guard/1')\nprint(os.listdir('guard'))", cwd=tmp_path) == "['1']"


class TestFiles:
    def test_none_grows_beyond_its_size(self, tmp_path: Path) -> None:
        code = "with open('file', 'wb', buffering=0) as file:\n    file.write(bytes(1 << 20)); print('whole')\n    file.write(b'x')"
        result = child(code, cwd=tmp_path)
        assert result.stdout == "whole\n"
        assert "File too large" in result.stderr
        assert (tmp_path / "file").stat().st_size == 1 << 20

    def test_a_crash_leaves_no_core(self, tmp_path: Path) -> None:
        code = "import os, resource\nprint(max(resource.getrlimit(resource.RLIMIT_CORE)) <= 1, flush=True)\nos.abort()"
        result = child(code, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (-signal.SIGABRT, "True\n")
        assert not list(tmp_path.iterdir())


@needs_memory
class TestMemory:
    DEEDS = {  # noqa: RUF012
        "bytes": "bytes(256 << 20)",
        "many small objects": "[str(i) for i in range(10_000_000)]",
        "a map": "__import__('mmap').mmap(-1, 256 << 20, flags=0x22)",
        "a private copy of a file": "file = open('sparse', 'rb'); __import__('mmap').mmap(file.fileno(), 0, access=3)",
        "an inflated bomb": "__import__('zlib').decompress(bomb)",
        "threads": "[__import__('threading').Thread(target=__import__('time').sleep, args=(9,), daemon=True).start() for _ in range(500)]",
    }

    @pytest.mark.parametrize("deed", DEEDS)
    def test_stops_at_the_budget(self, deed: str, tmp_path: Path) -> None:
        with open(tmp_path / "sparse", "wb") as file:
            file.truncate(256 << 20)
        code = f"""
import os, zlib
bomb = zlib.compress(bytes(256 << 20), 1)
try:
    with sandbox.reading(64 << 20, 60.0):
        {self.DEEDS[deed]}
except MemoryError:
    print('stopped', len(bytes(256 << 20)) >> 20, sandbox.peak_memory() >> 20, flush=True)
os._exit(0)
"""
        stopped, again, _ = said(code, cwd=tmp_path).split()
        assert (stopped, again) == ("stopped", "256")  # and afterwards there is room again

    def test_torch_and_arrow_say_so_in_their_own_ways(self, tmp_path: Path) -> None:
        images = pa.array([bytes(1 << 20)] * 100)
        pq.write_table(pa.table({"image": images, "label": [0, 1] * 50}), tmp_path / "set")
        code = """
import os, torch
from pathlib import Path
from calibration.clean_set import open_clean_set
torch.ones(1000, 1000).sum()  # its threads are there
def attempt(deed):
    try:
        with sandbox.reading(64 << 20, 60.0):
            deed()
    except MemoryError as error:
        print(type(error.__cause__ or error).__name__, end=' ')
attempt(lambda: [torch.ones(1000, 1000) for _ in range(100)])
attempt(lambda: open_clean_set(Path('set')))
print(torch.ones(1000, 100, 1000).sum().item(), flush=True)
os._exit(0)
"""
        assert said(code, cwd=tmp_path) == "RuntimeError ArrowMemoryError 100000000.0"


class TestTime:
    def test_python_code_is_stopped(self) -> None:
        code = """
def forever():
    while True:
        try:
            sorted(range(1000))
        except Exception:
            pass
try:
    with sandbox.reading(None, 0.2):
        forever()
except sandbox.TookTooLong:
    print('stopped')
"""
        assert said(code) == "stopped"

    HANG = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)"

    def test_what_hangs_in_c_is_killed(self) -> None:
        assert child(f"import hashlib\nwith sandbox.reading(None, 0.1, 0.1):\n    {self.HANG}").returncode == -signal.SIGXCPU

    def test_what_hangs_in_another_thread_is_ended_too(self) -> None:
        start = f"import hashlib, threading\nthread = threading.Thread(target=lambda: {self.HANG}, daemon=True)\n"
        result = child(start + "with sandbox.reading(None, 0.1, 0.1):\n    thread.start()\n    thread.join()")
        assert result.returncode == -signal.SIGXCPU or "TookTooLong" in result.stderr  # where the kernel wakes the main thread

    def test_afterwards_there_is_time_again(self) -> None:
        code = "import time\nwith sandbox.reading(None, 0.1, 0.0):\n    pass\nwhile time.process_time() < 2.0:\n    pass\nprint('done')"
        assert said(code) == "done"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_it_ends_with_its_parent() -> None:
    inner = ENTER + "import time\nprint('ready', flush=True)\ntime.sleep(60)"
    code = f"import os, subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {inner!r}], stdout=subprocess.PIPE)\nchild.stdout.readline()\n"
    code += "print(child.pid, flush=True)\nos.kill(os.getpid(), 9)"
    pid = int(child(code, confined=False).stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it outlived its parent")


def test_honest_work_is_unaffected() -> None:
    code = f"""
import ctypes.util, os, platform, tempfile, zipfile, io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from PIL import Image
with sandbox.reading(1 << 30, 60.0), zipfile.ZipFile({str(EXAMPLES / "clean_set.zip")!r}) as archive, ThreadPoolExecutor(2) as pool:
    names = [name for name in archive.namelist() if name.endswith('.png')][:50]
    images = list(pool.map(lambda name: np.asarray(Image.open(io.BytesIO(archive.read(name)))), names))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'x').write_bytes(bytes(1000))
    ctypes.util.find_library('m'), platform.machine(), os.path.expanduser('~'), np.linalg.svd(np.ones((50, 50)))
print(len(images), sandbox.peak_memory() > 1 << 20)
"""
    assert said(code) == "50 True"
