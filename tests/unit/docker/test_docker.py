"""The container files, checked without a container engine: that they agree with each other, with the repository and with
the service, and that the start command of the image starts a service here too."""

import http.client
import http.server
import json
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from service.metrics import NAMES

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "docker"
TARGETS = ("cpu", "cuda")
START = ["badexpert", "serve", "--data-dir", "/data", "--host", "0.0.0.0", "--port", "8080"]


@dataclass(frozen=True)
class Stage:
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def dockerfile_stages() -> dict[str, Stage]:
    """Every stage by name; an instruction is its keyword and the rest of its (joined) line."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    stage = Stage("")
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        keyword, rest = line.split(maxsplit=1)
        if keyword == "FROM":
            base, _, name = rest.split()
            stage = stages[name] = Stage(base)
        else:
            stage.instructions.append((keyword, rest))
    return stages


def inherited(target: str) -> list[tuple[str, str]]:
    """The instructions that make up a target's image, those of the stages it is built on first."""
    stages = dockerfile_stages()
    if target not in stages:
        return []
    return inherited(stages[target].base) + stages[target].instructions


def last(target: str, keyword: str) -> str:
    return [rest for word, rest in inherited(target) if word == keyword][-1]


def start_command(target: str) -> list[str]:
    return [*json.loads(last(target, "ENTRYPOINT")), *json.loads(last(target, "CMD"))]


def health_command(target: str) -> list[str]:
    command: list[str] = json.loads(last(target, "HEALTHCHECK").split(" CMD ", 1)[1])
    return command


def copies() -> Iterator[tuple[str, str]]:
    """(stage it is taken from or "", path) of everything that any stage copies."""
    for stage in dockerfile_stages().values():
        for keyword, rest in stage.instructions:
            if keyword == "COPY":
                words = rest.split()
                origin = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else ""
                yield from ((origin, source) for source in words[:-1])


def load(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())


def services() -> dict[str, Any]:
    found: dict[str, Any] = load("compose.yaml")["services"]
    return found


def in_build_context(path: str) -> bool:
    """Whether .dockerignore lets a path through: of the rules that match it or a folder above it, the last one counts."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    folders = [path, *map(str, PurePosixPath(path).parents)][:-1]
    matching = [rule for rule in rules if any(fnmatch(folder, rule.removeprefix("!")) for folder in folders)]
    return not matching or matching[-1].startswith("!")


def metrics_in(expression: str) -> set[str]:
    """The metric names in a PromQL expression, or in Grafana's label_values(metric, label), without histogram suffixes."""
    expression = re.sub(r"label_values\((\w+), *\w+\)", r"\1", expression)
    expression = re.sub(r'"[^"]*"', "", expression)
    expression = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", expression)
    expression = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", expression)
    words = re.findall(r"[A-Za-z_:][\w:]*(?!\w*\s*\()", expression)
    names = set(words) - {"and", "or", "unless", "bool", "offset"}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def alert_rules() -> list[dict[str, Any]]:
    return [rule for group in load("alerts.yml")["groups"] for rule in group["rules"]]


def dashboard() -> Any:
    return json.loads((DOCKER / "grafana/dashboards/badexpert.json").read_text())


def expressions() -> Iterator[tuple[str, str]]:
    """(who asks, what is asked) for everything that is asked of Prometheus."""
    yield from ((f"alert {rule['alert']}", rule["expr"]) for rule in alert_rules())
    yield from ((f"variable {variable['name']}", variable["query"]) for variable in dashboard()["templating"]["list"])
    yield from ((f"panel {panel['title']}", target["expr"]) for panel in dashboard()["panels"] for target in panel["targets"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- the image


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


# --- compose


def test_compose_runs_the_command_of_the_image() -> None:
    service = services()["badexpert"]
    target = service["build"]["target"]
    entrypoint = service.get("entrypoint", json.loads(last(target, "ENTRYPOINT")))
    assert [*entrypoint, *service.get("command", json.loads(last(target, "CMD")))] == START


def test_compose_builds_targets_that_exist() -> None:
    built = {"cpu": services()["badexpert"], "cuda": load("compose.cuda.yaml")["services"]["badexpert"]}
    assert {name: (service["build"]["target"], service["image"]) for name, service in built.items()} == {name: (name, f"badexpert:{name}") for name in TARGETS}
    build = services()["badexpert"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()


@pytest.mark.parametrize("name", ["badexpert", "prometheus", "grafana"])
def test_every_container_is_confined(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert not {"privileged", "cap_add", "network_mode", "pid", "user", "devices"} & set(service)


def test_ports_and_paths_agree_everywhere() -> None:
    port = START[-1]
    service = services()["badexpert"]
    job = load("prometheus.yml")["scrape_configs"][0]
    assert last("cpu", "EXPOSE") == last("cuda", "EXPOSE") == port
    assert [published.split(":")[-1] for published in service["ports"]] == [port]
    assert job["static_configs"] == [{"targets": [f"badexpert:{port}"]}]
    assert job["metrics_path"] == "/metrics"
    assert service["healthcheck"]["test"] == ["CMD", *health_command("cpu")] == ["CMD", *health_command("cuda")]
    assert f"http://127.0.0.1:{port}/livez" in health_command("cpu")[-1]
    assert START[START.index("--data-dir") + 1] in [volume.split(":")[1] for volume in service["volumes"]]


def test_every_secret_is_mounted_where_it_is_read() -> None:
    declared = set(load("compose.yaml")["secrets"])
    mounted = {name: set(service.get("secrets", [])) for name, service in services().items()}
    assert set().union(*mounted.values()) == declared
    settings = {name: service.get("environment", {}) for name, service in services().items()}
    read = {name: {value for key, value in found.items() if key.endswith("_FILE")} for name, found in settings.items()}
    read["prometheus"].add(load("prometheus.yml")["scrape_configs"][0]["authorization"]["credentials_file"])
    assert read == {name: {f"/run/secrets/{secret}" for secret in names} for name, names in mounted.items()}
    assert set(settings["badexpert"]) == {f"BADEXPERT_{scope}_TOKEN_FILE" for scope in ("PREDICT", "ADMIN", "METRICS")}


def test_everything_mounted_exists() -> None:
    for service in services().values():
        for source in (volume.split(":")[0] for volume in service["volumes"]):
            assert (DOCKER / source).exists() if source.startswith(".") else source in load("compose.yaml")["volumes"]


def test_the_readme_creates_exactly_the_secrets_that_compose_mounts(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    commands = re.findall(r"```sh\n(.*?)```", (DOCKER / "README.md").read_text(), re.DOTALL)[0].splitlines()
    assert len(commands) == 3
    subprocess.run(["sh", "-c", f"umask 077; {commands[0]}"], cwd=tmp_path, check=True, timeout=30)
    expected = {tmp_path / "docker" / secret["file"] for secret in load("compose.yaml")["secrets"].values()}
    created = set((tmp_path / "docker/secrets").iterdir())
    assert created == expected
    assert stat.S_IMODE((tmp_path / "docker/secrets").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in created} == {0o444}
    assert all(re.fullmatch(r"[0-9a-f]{64}", path.read_text()) for path in created)
    assert len({path.read_text() for path in created}) == len(created)


def test_no_file_names_a_host_outside() -> None:
    files = [ROOT / ".dockerignore", *(path for path in DOCKER.rglob("*") if path.is_file() and "secrets" not in path.parts)]
    hosts = {urlsplit(url).hostname for path in files for url in re.findall(r"https?://[^\s'\">)]+", path.read_text())}
    assert hosts <= {"127.0.0.1", "prometheus"}


# --- Prometheus and Grafana


def test_names_of_metrics_are_found_in_an_expression() -> None:
    expression = 'sum by (guard) (rate(a_bucket{b="c"}[5m])) / on (d) group_left () e > 0.8 and absent(f) or histogram_quantile(0.9, g_sum)'
    assert metrics_in(expression) == {"a", "e", "f", "g"}
    assert metrics_in("label_values(h, i)") == {"h"}


@pytest.mark.parametrize("expression", [pytest.param(asked, id=who) for who, asked in expressions()])
def test_alerts_and_dashboard_ask_only_for_metrics_that_the_service_has(expression: str) -> None:
    names = metrics_in(expression)
    assert names
    assert all(name.startswith("badexpert_") for name in names)
    assert names <= NAMES


def test_every_alert_says_what_it_means_and_how_urgent_it_is() -> None:
    rules = alert_rules()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["for"]


def test_grafana_finds_its_data_and_its_dashboard() -> None:
    datasource = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    provider = load("grafana/provisioning/dashboards/badexpert.yaml")["providers"][0]
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in services()["grafana"]["volumes"]}
    assert datasource["url"] == "http://prometheus:9090"
    assert mounts[provider["options"]["path"]] == "./grafana/dashboards"
    home = PurePosixPath(services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DOCKER / mounts[str(home.parent)] / home.name).is_file()
    uses = [panel["datasource"] for panel in dashboard()["panels"]]
    uses += [target["datasource"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert all(use == {"type": datasource["type"], "uid": datasource["uid"]} for use in uses)
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(dashboard()["panels"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("arguments", ["check config --syntax-only prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"])
def test_prometheus_itself_accepts_the_rules(arguments: str) -> None:
    finished = subprocess.run(["promtool", *arguments.split()], cwd=DOCKER, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr


# --- the same command without Docker


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
