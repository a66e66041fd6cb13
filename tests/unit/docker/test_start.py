"""The start command of the image starts a service here, without an image."""

import http.client
import http.server
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deployment import services, start_command


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def status_of(port: int, path: str, token: str = "") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until_live(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"exited with {process.returncode}:\n{log.read_text()}"
        try:
            if status_of(port, "/livez") == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    pytest.fail(f"/livez did not answer 200 within {seconds:.0f} s:\n{log.read_text()}")


def test_the_image_starts_the_same_command_without_docker(tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BADEXPERT_")}
    tokens: dict[str, str] = {}
    for name in services()["badexpert"]["environment"]:
        tokens[name] = secrets.token_hex(32)
        environment[name] = str(tmp_path / name)
        (tmp_path / name).write_text(tokens[name])
    console_script, *arguments = start_command("cpu")
    arguments[arguments.index("--data-dir") + 1] = str(tmp_path / "data")
    arguments[arguments.index("--port") + 1] = str(port)
    (tmp_path / "data").mkdir()

    with running([str(Path(sys.executable).parent / console_script), *arguments], environment, log) as process:
        wait_until_live(process, port, log)
        assert status_of(port, "/metrics") == 401
        assert status_of(port, "/metrics", tokens["BADEXPERT_METRICS_TOKEN_FILE"]) == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
