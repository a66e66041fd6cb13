"""The compose file agrees with the images, the service, the README and the repository."""

import json
import re
import stat
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.deployment import DOCKER, ROOT, START, TARGETS, health_command, last, load, services


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
