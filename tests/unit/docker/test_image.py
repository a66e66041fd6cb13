"""The Dockerfile, checked without a container engine: what is in an image, as whom it runs, and what it is asked for its health."""

import http.client
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path, PurePosixPath

import pytest

from tests.deployment import (
    DOCKER,
    ROOT,
    START,
    TARGETS,
    copies,
    dockerfile_stages,
    health_command,
    in_build_context,
    inherited,
    last,
    load,
    services,
    start_command,
)


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_a_fixed_user_who_is_not_root(target: str) -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last(target, "USER"))


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_starts_the_service_without_a_shell(target: str) -> None:
    assert start_command(target) == START
    assert last(target, "STOPSIGNAL") == "SIGTERM"
    assert last(target, "VOLUME") == "/data"


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_holds_no_build_tools(target: str) -> None:
    commands = " ".join(rest for keyword, rest in inherited(target) if keyword == "RUN")
    assert not re.search(r"\b(apt-get|apt|apk|gcc|g\+\+|cmake|make|git|curl|wget|uv)\b|pip install", commands)
    assert [rest for keyword, rest in inherited(target) if keyword in {"COPY", "ADD"}] == [f"--from=venv-{target} /opt/venv /opt/venv"]


def test_only_the_dependencies_that_the_lock_pins_are_installed() -> None:
    for target in TARGETS:
        commands = [rest for keyword, rest in inherited(f"venv-{target}") if keyword == "RUN"]
        assert "install-dependencies.sh /opt/venv /src/requirements.lock" in commands[0]
        assert all("--no-deps" in command for command in commands if "pip install" in command.replace("--python /opt/venv/bin/python ", ""))


def test_images_are_pinned_to_a_version() -> None:
    stages = dockerfile_stages()
    bases = {stage.base for stage in stages.values()} - set(stages)
    for image in bases | {service["image"] for service in services().values()}:
        assert re.fullmatch(r"[a-z/]+:[a-z0-9.-]+", image)
        assert not image.endswith(":latest")


def test_everything_copied_is_in_the_repository_and_reaches_the_build() -> None:
    for origin, source in copies():
        if origin:
            assert origin in dockerfile_stages()
        else:
            assert (ROOT / source).exists(), source
            assert in_build_context(source.rstrip("/")), source


def test_nothing_private_reaches_the_build_or_a_commit() -> None:
    secret_files = [f"docker/{PurePosixPath(secret['file'])}" for secret in load("compose.yaml")["secrets"].values()]
    private = [*secret_files, ".git/config", ".env", "var/bundle", "models/__pycache__/x.pyc"]
    assert [path for path in private if in_build_context(path)] == []
    assert "/secrets/" in (DOCKER / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1)])
def test_the_health_check_succeeds_only_when_livez_answers_200(status: int, exit_code: int) -> None:
    asked: list[str] = []

    class Live(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Live) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        program, *arguments = [word.replace(":8080", f":{server.server_port}") for word in health_command("cpu")]
        assert program == "python"
        environment = {**os.environ, "http_proxy": "http://127.0.0.1:9"}
        finished = subprocess.run([sys.executable, *arguments], env=environment, stderr=subprocess.DEVNULL, timeout=30)
        server.shutdown()
    assert (finished.returncode, asked) == (exit_code, ["/livez"])


LOCK = """\
numpy==2.4.0 \\
    --hash=sha256:01
    # via torch
nvidia-cublas==13.1 ; sys_platform == 'linux' \\
    --hash=sha256:02
torch==2.15.0 \\
    --hash=sha256:03 \\
    --hash=sha256:04
    # via badexpert
torchvision==0.29.2 \\
    --hash=sha256:05
triton==3.8 ; sys_platform == 'linux' \\
    --hash=sha256:06
typer==0.30 \\
    --hash=sha256:07
"""


def recorded_installs(tmp_path: Path, *torch_index: str) -> list[str]:
    """The arguments, and then the requirements, of every pip that the script calls."""
    (tmp_path / "lock").write_text(LOCK)
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$*"\nfor last; do :; done\n[ ! -f "$last" ] || cat "$last"\n')
    pip.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["sh", str(DOCKER / "install-dependencies.sh"), "/venv", str(tmp_path / "lock"), *torch_index]
    return subprocess.run(script, env=environment, check=True, capture_output=True, text=True, timeout=30).stdout.splitlines()


def test_without_a_torch_index_the_whole_lock_is_installed_by_hash(tmp_path: Path) -> None:
    arguments, *requirements = recorded_installs(tmp_path, "")
    assert "--require-hashes" in arguments
    assert requirements == LOCK.splitlines()


def test_with_a_torch_index_torch_comes_from_there_and_the_rest_by_hash(tmp_path: Path) -> None:
    first, *requirements, second = recorded_installs(tmp_path, "http://127.0.0.1/torch")
    assert "--require-hashes" in first
    assert [line.split("==")[0] for line in requirements if "==" in line and not line.startswith(" ")] == ["numpy", "typer"]
    assert re.findall(r"sha256:(\d+)", " ".join(requirements)) == ["01", "07"]
    assert second.endswith("--index-url http://127.0.0.1/torch torch==2.15.0 torchvision==0.29.2")
