"""Rows B1 to B22 and C1 to C14 of the catalogue of bad inputs, from the upload to the answer: status and code over HTTP, the message on the command
line, nothing run and nothing left behind, and what it cost the child process that read the files.

The rows are in `upload_rows`. A few go through a real server and its real children; where the child is a call in this process, only its start is replaced.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from calibration.__main__ import main
from service.cli import app
from tests.abuse.upload_rows import ELSEWHERE, ROWS, VARIANTS, Row, good_checkpoint, good_clean_set
from tests.conftest import EXAMPLES
from tests.support import MULTIPART, Client, assert_problem, form, make_service, part, serving

ROOT = Path(__file__).parent.parent.parent
PEAK_BYTES = 5 << 28  # 1.25 GiB: torch and the libraries of architectures are 0.75 of it, and none of the files here may add more than the rest
CALIBRATE, INSPECT = "/v1/calibrations", "/v1/inspections"


def files(row: Row, canary: Path) -> dict[str, bytes]:
    """The parts of the upload, one of them hostile."""
    if row.is_checkpoint:
        return {"checkpoint": row.make(canary), "clean_set": good_clean_set()}
    return {"checkpoint": good_checkpoint(), "clean_set": row.make(canary)}


def judge(row: Row, response: httpx.Response, taken: int = 202) -> None:
    if response.is_success:
        assert (202, None) in row.outcomes, (row.name, response.text)
        assert response.status_code == taken
        return
    body = response.json()
    assert (response.status_code, body["code"]) in row.outcomes, body
    assert_problem(response, response.status_code, body["code"])
    assert len(body["detail"]) < 1000 and body["detail"].isprintable()
    if (response.status_code, body["code"]) == (row.status, row.code):
        assert re.search(row.detail, body["detail"]), body["detail"]


def rows(*chosen: Row) -> Any:
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in chosen])


# ---- a real server and real children


def _inside(folder: Path) -> list[Path]:
    """Everything below a folder; unlike `rglob`, also while it is being removed."""
    return [Path(parent, name) for parent, folders, names in os.walk(folder) for name in (*folders, *names)]


@dataclass
class Server:
    """`badexpert serve` with the stall deadline of uploads cut from two minutes to five seconds."""

    data_dir: Path
    log: Path
    client: httpx.Client
    process: subprocess.Popen[str]
    answers: dict[str, Future[httpx.Response]] = field(default_factory=dict)

    def post(self, parts: dict[str, bytes], config: dict[str, Any], request_id: str = "") -> httpx.Response:
        uploads = {name: (f"../{name}.bin", data) for name, data in parts.items()}
        config = {"name": "rows", "target_fpr": 0.2, **config}
        return self.client.post(CALIBRATE, data={"config": json.dumps(config)}, files=uploads, headers={"X-Request-Id": request_id})

    def ask(self, row: Row, parts: dict[str, bytes]) -> httpx.Response:
        """Upload; what is accepted is cancelled at once, where its job is not expected to fail."""
        response = self.post(parts, row.config, request_id(row))
        if response.status_code == 202 and row.job is None:
            cancelled = self.client.delete(response.headers["location"])
            assert (cancelled.status_code, cancelled.json()["state"]) == (202, "cancelled")
        return response

    def ended(self, request_id: str) -> dict[str, Any]:
        """What the log says of the child that read the files of a request."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        (found,) = (line for line in lines if line.get("request_id") == request_id and line["event"] == "child_ended")
        return found

    def job(self, response: httpx.Response) -> dict[str, Any]:
        """The job of an accepted upload, when it has ended."""
        while (job := self.client.get(response.headers["location"]).json())["state"] in ("queued", "running"):
            time.sleep(0.2)
        return dict(job)

    def left_behind(self) -> list[Path]:
        """What lies in the folder of uploads, when it had five seconds to become empty."""
        deadline = time.monotonic() + 5
        while (found := _inside(self.data_dir / "uploads")) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found


def request_id(row: Row) -> str:
    return "row-" + re.sub(r"[^A-Za-z0-9]+", "-", row.name)[:60]


START = (
    "import functools, service.server as server\n"
    "server.ProtocolLimits = functools.partial(server.ProtocolLimits, upload_seconds=5.0)\n"
    "from service.cli import main\n"
    "main()"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("rows")
    command = [sys.executable, "-c", START, "serve", "--data-dir", str(home / "data"), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BADEXPERT_QUEUED_JOBS": "100"}
    with ExitStack() as stack:
        log = stack.enter_context((home / "log").open("w"))
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment))
        stack.callback(process.kill)
        assert process.stdout is not None
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address is not None
        client = stack.enter_context(httpx.Client(base_url=address[0], timeout=240, transport=httpx.HTTPTransport(retries=20)))
        server = Server(home / "data", home / "log", client, process)
        pool = stack.enter_context(ThreadPoolExecutor(2))  # the server itself lets two children read at a time
        stack.callback(pool.shutdown, cancel_futures=True)
        chosen = list[Row]()
        for item in request.session.items:
            row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
            if isinstance(row, Row) and item.originalname == "test_a_real_child_finds":
                chosen.append(row)
        for row in sorted(chosen, key=lambda row: row.job is None):  # jobs that are to run first, since those of the others wait behind them
            server.answers[row.name] = pool.submit(server.ask, row, files(row, home / "canary"))
        yield server
        pool.shutdown(cancel_futures=True)  # while the server is there: without it, who is still asking tries again for hours
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in (home / "log").read_text()


def test_uploads_of_real_rows_are_on_their_way(server: Server) -> None:
    """What follows runs while they are; their answers are looked at in the end."""
    assert server.client.get("/readyz").status_code == 200


# ---- the child as a call in this process


class Done:
    """A process that has ended: the child's work was done here, unconfined, when it was started."""

    pid = 2**31 - 1  # of no process, since its group is signalled

    def __init__(self, command: list[str]) -> None:
        assert command[:3] == [sys.executable, "-m", "calibration"]
        self.stdout, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(self.stdout), redirect_stderr(errors), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.returncode = main(command[3:], confine=False)
        self.stdout.seek(0)
        assert "Traceback" not in errors.getvalue(), errors.getvalue()

    async def communicate(self) -> tuple[bytes, bytes]:
        return self.stdout.read().encode(), b""

    def __enter__(self) -> Done:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def children_here(monkeypatch: pytest.MonkeyPatch) -> None:
    async def create(*command: str, **_: Any) -> Done:
        return Done(list(command))

    monkeypatch.setattr("service.worker.asyncio.create_subprocess_exec", create)
    monkeypatch.setattr("service.cli.subprocess.Popen", lambda command, **_: Done(command))


@pytest.fixture(scope="module")
def module_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(make_service(tmp_path_factory.mktemp("here") / "data")) as client:
        yield client


@pytest.fixture
def client(module_client: Client, children_here: None) -> Iterator[Client]:
    """Holds the service to what every row promises: nothing is left of an upload that was refused or cancelled."""
    yield module_client
    assert list(module_client.service.worker.uploads.iterdir()) == []


def post(client: Client, target: str, parts: dict[str, bytes], config: dict[str, Any], *headers: tuple[str, str]) -> httpx.Response:
    body = form(part("config", json.dumps(config).encode(), None), *(part(name, data, f"../{name}") for name, data in parts.items()))
    return client("POST", target, [("Content-Type", MULTIPART), *headers], body)


@rows(*(row for row in ROWS if not row.real), *VARIANTS)
def test_a_child_finds(row: Row, client: Client, tmp_path: Path) -> None:
    parts = files(row, canary := tmp_path / "canary")
    response = post(client, CALIBRATE, parts, {"name": "rows", "target_fpr": 0.2, **row.config})
    judge(row, response)
    if response.is_success:
        client("DELETE", response.headers["location"])
    if row.is_checkpoint:
        judge(row, post(client, INSPECT, {"checkpoint": parts["checkpoint"]}, row.config), taken=200)
    assert not canary.exists()


@rows(
    *(row for row in ROWS if row.id != "C14"),  # which has nothing to say, and is long
)
def test_the_command_line_says_of(row: Row, children_here: None, tmp_path: Path) -> None:
    parts = files(row, canary := tmp_path / "canary")
    for name, data in parts.items():
        (tmp_path / name).write_bytes(data)
    options = [f"--{name.replace('_', '-')}={','.join(value) if isinstance(value, list) else value}" for name, value in row.config.items()]
    code = row.code or row.job
    if code is None:
        clean_set = [] if row.is_checkpoint else ["--clean-set", str(tmp_path / "clean_set")]
        done = CliRunner().invoke(app, ["inspect", str(tmp_path / "checkpoint"), *clean_set, *options])
        assert done.exit_code == 0, done.stderr
        assert re.search(row.detail, done.stdout), done.stdout
    else:
        given = ["--checkpoint", str(tmp_path / "checkpoint"), "--clean-set", str(tmp_path / "clean_set"), "--name", "rows", "--target-fpr", "0.2"]
        done = CliRunner().invoke(app, ["calibrate", *given, "--data-dir", str(tmp_path / "data"), *options])
        assert done.exit_code == 1, done.output
        assert f"({code}): " in done.stderr or code == "config_invalid", done.stderr
        assert re.search(row.detail, done.stderr), done.stderr
        assert done.stdout == ""
        assert list((tmp_path / "data").rglob("manifest.json")) == []
    assert not canary.exists()
    assert "marker-of-row" not in done.output


@pytest.mark.parametrize(
    ("signalled", "status", "code"),
    [(signal.SIGKILL, 422, "out_of_memory"), (signal.SIGXCPU, 422, "took_too_long"), (signal.SIGSEGV, 500, "internal")],
    ids=["the kernel's out-of-memory killer", "the sandbox's clock", "a crash"],
)
@pytest.mark.parametrize("target", [CALIBRATE, INSPECT])
def test_a_child_without_a_last_word_was_ended_by(
    client: Client, monkeypatch: pytest.MonkeyPatch, target: str, signalled: signal.Signals, status: int, code: str
) -> None:
    monkeypatch.setattr(f"{__name__}.main", lambda *_, **__: -signalled)
    parts = {"checkpoint": b"x", **({"clean_set": b"x"} if target == CALIBRATE else {})}
    assert_problem(post(client, target, parts, {"name": "rows"} if target == CALIBRATE else {}), status, code)


@pytest.mark.parametrize("name", ["checkpoint", "clean_set"])
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "in chunks"])
def test_b16_c11_a_file_over_the_cap_is_refused(tmp_path: Path, name: str, announced: bool) -> None:
    with serving(make_service(tmp_path, upload_bytes=1 << 20)) as client:
        body = form(part("config", b'{"name": "rows"}', None), part(name, bytes((1 << 20) + 1)))
        pieces = [body[at : at + 65536] for at in range(0, len(body), 65536)]
        assert_problem(client("POST", CALIBRATE, [("Content-Type", MULTIPART)], body if announced else pieces), 413, "body_too_large")
        assert list(client.service.worker.uploads.iterdir()) == []
        client.assert_serves()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
@pytest.mark.parametrize("kilobytes", [1, 1000], ids=["on closing", "on writing"])
def test_c12_a_full_disk_is_said_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kilobytes: int) -> None:
    def full(path: Path, mode: str) -> Any:
        path.touch()
        return open("/dev/full", "wb")

    with serving(make_service(tmp_path)) as client:
        monkeypatch.setattr("service.uploads.open", full, raising=False)
        response = post(client, CALIBRATE, {"checkpoint": bytes(kilobytes * 1000), "clean_set": b"x"}, {"name": "rows"})
        assert_problem(response, 507, "storage_full")
        assert list(client.service.worker.uploads.iterdir()) == []
        client.assert_serves()


# ---- the command line as it is installed


def spawned(*arguments: str | Path, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}
    return subprocess.run(
        [sys.executable, "-m", "service", *map(str, arguments)], check=False, capture_output=True, text=True, cwd=cwd, env=environment, timeout=200
    )


@rows(*(row for row in ROWS if row.name in ("B2: a pickle called safetensors", "B10: 8 keys missing", "C1a: a tar with links and devices", "C4: 99 images")))
def test_a_real_command_says_of(row: Row, tmp_path: Path) -> None:
    for name, data in files(row, tmp_path / "canary").items():
        (tmp_path / name).write_bytes(data)
    done = spawned("calibrate", "--checkpoint", "checkpoint", "--clean-set", "clean_set", "--name", "rows", "--data-dir", "data", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(rf"\({row.code}\): .*{row.detail}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "canary").exists()


SOFTMAX = """
from models.cifar import thin_resnet

def build(num_classes):
    network = thin_resnet(20, num_classes)
    network.register_forward_hook(lambda module, arguments, logits: logits.softmax(1))
    return network

build.input_size = 32
"""


def test_b14_a_network_of_the_operators_own_that_ends_in_a_softmax_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SOFTMAX)
    (tmp_path / "clean_set").write_bytes(good_clean_set())
    checkpoint, own = EXAMPLES / "suspect_badnet.safetensors", ("--architecture", "own:build")
    done = spawned("inspect", checkpoint, *own, "--clean-set", "clean_set", "--json", cwd=tmp_path, path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "outputs-probabilities" in [warning["code"] for warning in json.loads(done.stdout)["warnings"]]


# ---- what came of the uploads to the real server


@rows(*(row for row in ROWS if row.real))
def test_a_real_child_finds(row: Row, server: Server, record_property: Callable[[str, object], None]) -> None:
    judge(row, response := server.answers[row.name].result())
    if row.job is not None:
        job = server.job(response)
        assert (job["state"], job["problem"]["status"], job["problem"]["code"]) == ("failed", 422, row.job)
        assert re.search(row.detail, job["problem"]["detail"])
    ended = server.ended(request_id(row))
    assert ended["code"] == row.code
    print(f"{row.name}: {ended['peak_memory'] >> 20} MiB")
    record_property("peak_memory", ended["peak_memory"])
    assert ended["peak_memory"] < PEAK_BYTES
    assert not (server.data_dir.parent / "canary").exists()
    assert "marker-of-row" not in server.log.read_text()


def head(length: int) -> bytes:
    return f"POST {CALIBRATE} HTTP/1.1\r\nHost: a\r\nContent-Type: {MULTIPART}\r\nContent-Length: {length}\r\n\r\n".encode()


def connect(server: Server) -> socket.socket:
    url = server.client.base_url
    return socket.create_connection((url.host, url.port or 80), timeout=30)


BODY = form(part("config", b'{"name": "rows"}', None), part("checkpoint", bytes(300_000)), part("clean_set", bytes(300_000)))


def test_b17_an_upload_that_stalls_is_ended_and_its_files_are_removed(server: Server) -> None:
    with connect(server) as stalled:
        stalled.sendall(head(len(BODY)) + BODY[: len(BODY) // 2])
        answer = b""
        while piece := stalled.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"receive_timeout"' in answer
    assert server.left_behind() == []


def test_b18_files_of_100_clients_that_vanish_are_removed(server: Server) -> None:
    for _ in range(100):
        with connect(server) as client:
            client.sendall(head(len(BODY)) + BODY[: len(BODY) // 2])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
    assert server.left_behind() == []
    assert server.client.get("/readyz").status_code == 200


# ---- the catalogue


def test_every_row_of_the_catalogue_is_here_or_elsewhere() -> None:
    here = {row.id.rstrip("a") for row in ROWS}
    assert here.isdisjoint(ELSEWHERE)
    assert here | ELSEWHERE.keys() == {f"B{i}" for i in range(1, 23)} | {f"C{i}" for i in range(1, 15)}
    for pointer in ELSEWHERE.values():
        path, _, test = pointer.partition("::")
        assert f"def {test}" in (ROOT / path).read_text()
    assert len({request_id(row) for row in ROWS}) == len(ROWS)
