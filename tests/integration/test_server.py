"""A real server process, used over its socket: upload, follow, activate, judge, scrape, refuse, drain."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.pipeline import Result
from models.registry import Registry
from service.app import LOADERS
from service.priority import WORK
from tests.conftest import EXAMPLES

BADNET = EXAMPLES / "suspect_badnet.safetensors"
PNG = {"Content-Type": "image/png"}


@contextmanager
def server(
    data_dir: Path, *options: str, stderr: int | None = None, within: tuple[str, ...] = (), **environment: str
) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """`badexpert serve` on a free port; ends it with SIGTERM and demands exit status 0."""
    command = [*within, sys.executable, "-m", "service", "serve", "--data-dir", str(data_dir), "--port", "0", "--device", "cpu", *options]
    env = {**{name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}, **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None
            with httpx.Client(base_url=found[0], timeout=120, transport=httpx.HTTPTransport(retries=20)) as client:
                assert client.get("/readyz").status_code == 200
                yield client, process
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()  # a test that failed above must not wait for a server that nobody told to end


def sample(kind: str, index: int = 0) -> bytes:
    with zipfile.ZipFile(EXAMPLES / "samples.zip") as archive:
        return archive.read([name for name in sorted(archive.namelist()) if name.startswith(f"{kind}/")][index])


def assert_problem(response: httpx.Response, status: int, code: str) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (response.status_code, body["status"], body["code"]) == (status, status, code)
    assert set(body) - {"errors"} == {"type", "title", "status", "code", "detail", "request_id"}
    assert response.headers["x-request-id"] == body["request_id"]
    return str(body["detail"])


def upload(client: httpx.Client, checkpoint: bytes, clean_set: bytes, **config: object) -> httpx.Response:
    files = {"checkpoint": ("c", checkpoint), "clean_set": ("s", clean_set)}
    return client.post("/v1/calibrations", data={"config": json.dumps({"name": "planes", **config})}, files=files)


def test_upload_follow_activate_judge_and_scrape(tmp_path: Path, small_clean_set: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with server(tmp_path, HOME=str(home), XDG_CACHE_HOME=str(home / ".cache"), XDG_CONFIG_HOME=str(home / ".config")) as (client, _):
        answer = upload(client, BADNET.read_bytes(), small_clean_set.read_bytes(), target_fpr=0.05, budget="quick")
        assert answer.status_code == 202, answer.text
        job = answer.json()
        assert answer.headers["location"] == f"/v1/calibrations/{job['id']}"
        assert_problem(client.post("/v1/guards/planes/predict", content=sample("clean"), headers=PNG), 404, "not_found")

        stages = []
        with client.stream("GET", f"/v1/calibrations/{job['id']}/events") as events:
            assert events.headers["content-type"].startswith("text/event-stream")
            for line in events.iter_lines():
                if line.startswith("data:"):
                    job = json.loads(line[5:])
                    stages.append(job["progress"] and job["progress"]["stage"])
        assert job["state"] == "succeeded", job
        assert {"expert", "auxiliary"} <= set(stages)
        assert "<svg" in client.get(f"/v1/calibrations/{job['id']}/report").text
        assert client.get(f"/v1/calibrations/{job['id']}/report?format=json").json()["guard"] == "planes"
        assert_problem(client.delete(f"/v1/calibrations/{job['id']}"), 409, "conflict")
        assert list((tmp_path / "uploads").iterdir()) == []

        assert_problem(client.post("/v1/guards/planes/predict", content=sample("clean"), headers=PNG), 503, "no_active_bundle")
        assert client.put("/v1/guards/planes/active", json={"version": job["result"]["version"]}).json()["serving"] is True

        clean = [client.post("/v1/guards/planes/predict", content=sample("clean", index), headers=PNG).json() for index in range(40)]
        accepted = [answer for answer in clean if answer["verdict"] == "accepted"]
        assert len(accepted) >= 30
        assert set(accepted[0]["prediction"]) == {"label", "class_name", "confidence"}
        assert accepted[0]["bundle_id"] == job["result"]["bundle_id"]
        assert "score" not in json.dumps(clean)
        files = [("image", (f"{index}.png", sample("badnet", index), "image/png")) for index in range(40)]
        triggered = [item["result"] for item in client.post("/v1/guards/planes/predict-batch", files=files).json()["items"]]
        rejected = [answer for answer in triggered if answer["verdict"] == "rejected"]
        assert len(rejected) >= 30
        assert all(answer["prediction"] is None for answer in rejected)

        metrics = client.get("/metrics").text
        counts = {verdict: float(re.search(rf'verdicts_total{{guard="planes",verdict="{verdict}"}} (\S+)', metrics)[1]) for verdict in ("accepted", "rejected")}  # type: ignore[index]
        assert sum(counts.values()) == 80
        assert counts["rejected"] == len(rejected) + 40 - len(accepted)
        assert 'badexpert_target_fpr_ratio{guard="planes"} 0.05' in metrics
    assert list(home.rglob("*")) == []  # no library keeps anything outside of the data directory


def test_another_target_and_shadow_mode_need_no_calibration(tmp_path: Path, calibrated: tuple[Path, Result]) -> None:
    shutil.copytree(calibrated[0], tmp_path, dirs_exist_ok=True)
    with server(tmp_path) as (client, _):
        client.put("/v1/guards/planes/active", json={"version": 1})
        url = "/v1/guards/planes/predict?explain=true"
        strict = client.post(url, content=sample("badnet"), headers=PNG).json()["explanation"]["threshold"]
        changed = client.patch("/v1/guards/planes", json={"target_fpr": 0.2, "mode": "shadow"}).json()
        assert (changed["target_fpr"], changed["mode"]) == (0.2, "shadow")
        loose = client.post(url, content=sample("badnet"), headers=PNG).json()
        assert loose["explanation"]["threshold"] > strict
        assert (loose["verdict"], loose["prediction"] is None) == ("rejected", False)
        assert_problem(client.patch("/v1/guards/planes", json={"target_fpr": 1e-6}), 422, "fpr_unreachable")
        assert client.get("/v1/guards/planes").json()["target_fpr"] == 0.2
    with server(tmp_path) as (client, _):  # what was decided survives
        assert client.get("/v1/guards/planes").json()["mode"] == "shadow"
        assert client.get("/readyz").json()["guards"] == ["planes"]


def test_no_library_reports_home_or_leaves_anything_there(tmp_path: Path, calibrated: tuple[Path, Result]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(calibrated[0] / "guards", tmp_path / "guards")
    Registry(tmp_path / "guards").activate("planes", 1)
    with server(tmp_path, HOME=str(home), XDG_CACHE_HOME=str(home / ".cache")) as (client, _):
        assert client.post("/v1/guards/planes/predict", content=sample("clean"), headers=PNG).status_code == 200
    assert list(home.rglob("*")) == []


def test_uploads_that_cannot_be_used_are_refused_with_what_to_do_and_the_server_goes_on(tmp_path: Path, small_clean_set: Path) -> None:
    weights, clean_set = load_file(BADNET), small_clean_set.read_bytes()

    def saved(changed: dict[str, torch.Tensor]) -> bytes:
        save_file(changed, tmp_path / "c.safetensors")
        return (tmp_path / "c.safetensors").read_bytes()

    canary = tmp_path / "canary"
    evil = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    few = tmp_path / "few.zip"
    with zipfile.ZipFile(small_clean_set) as whole, zipfile.ZipFile(few, "w") as part:
        for name in whole.namelist()[:99]:
            part.writestr(name, whole.read(name))
    without = {key: value for key, value in weights.items() if key != "conv1.weight"}
    wrong_shape = {**weights, "conv1.weight": torch.zeros(16, 3, 5, 5)}
    not_finite = {**weights, "conv1.weight": torch.full_like(weights["conv1.weight"], torch.nan)}
    with server(tmp_path / "data") as (client, _):
        assert_problem(upload(client, evil, clean_set), 415, "checkpoint_format")
        assert not canary.exists()
        assert "conv1.weight is missing" in assert_problem(upload(client, saved(without), clean_set), 422, "checkpoint_mismatch")
        assert "16x3x5x5, not 16x3x3x3" in assert_problem(upload(client, saved(wrong_shape), clean_set), 422, "checkpoint_mismatch")
        assert_problem(upload(client, saved(not_finite), clean_set), 422, "checkpoint_not_finite")
        assert "100" in assert_problem(upload(client, BADNET.read_bytes(), few.read_bytes()), 422, "clean_set_size")
        assert_problem(upload(client, BADNET.read_bytes(), b"no archive"), 415, "clean_set_format")
        assert "least" in assert_problem(upload(client, BADNET.read_bytes(), clean_set, target_fpr=0.0001), 422, "fpr_unreachable")
        assert client.get("/v1/calibrations").json() == {"calibrations": []}
        assert list((tmp_path / "data" / "uploads").iterdir()) == []
        assert client.get("/readyz").status_code == 200


def test_a_calibration_can_be_cancelled_and_one_that_was_running_is_taken_up_again(tmp_path: Path, small_clean_set: Path) -> None:
    with server(tmp_path) as (client, _):
        first = upload(client, BADNET.read_bytes(), small_clean_set.read_bytes()).json()["id"]
        assert client.delete(f"/v1/calibrations/{first}").json()["state"] == "cancelled"
        second = upload(client, BADNET.read_bytes(), small_clean_set.read_bytes(), preset="paper").json()["id"]
    assert list((tmp_path / "uploads").iterdir()) == [tmp_path / "uploads" / second]
    with server(tmp_path) as (client, _):
        job = {"state": "queued"}
        with client.stream("GET", f"/v1/calibrations/{second}/events") as events:
            for line in events.iter_lines():
                if line.startswith("data:"):
                    job = json.loads(line[5:])
        assert job["state"] == "succeeded", job
    assert Registry(tmp_path / "guards").versions("planes") == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness of their own")
def test_the_event_loop_goes_before_the_threads_that_judge(tmp_path: Path) -> None:
    with server(tmp_path) as (_, process):
        found = {int(task.name): os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path(f"/proc/{process.pid}/task").iterdir()}
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    if usual >= WORK:
        pytest.skip(f"these tests run at niceness {usual} themselves")
    assert found[process.pid] == usual
    assert list(found.values()).count(WORK) > LOADERS  # these, and the threads that judge and decode


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long a connection waited")
def test_callers_that_left_while_the_server_was_away_are_not_answered(tmp_path: Path) -> None:
    request, callers = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n", 40
    with server(tmp_path) as (client, process):
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        for _ in range(callers):
            with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as caller:
                caller.sendall(request)
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        seen = client.get("/metrics").text
    assert f"badexpert_connections_abandoned_total {callers}.0" in seen
    assert 'route="/livez"' not in seen


def test_x25_a_server_whose_log_nobody_reads_serves_and_ends(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"damaged" * 1000)  # of which it has much to say
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x")
    os.set_blocking(writing, True)
    try:
        with server(tmp_path, stderr=writing) as (client, _):
            assert_problem(client.get("/v1/calibrations"), 503, "jobs_unavailable")
            assert client.get("/livez").status_code == 200
    finally:
        os.close(writing)
        os.close(reading)


def test_what_the_protocol_refuses_is_counted(tmp_path: Path) -> None:
    with server(tmp_path) as (client, _):
        for message in (b"garbage\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 10_000):
            with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as caller:
                caller.sendall(message)
                assert caller.recv(100).startswith(b"HTTP/1.1 4")
        seen = client.get("/metrics").text
    for status, refused in ((400, 2), (414, 1)):
        assert f'badexpert_http_requests_total{{method="other",route="unmatched",status="{status}"}} {refused}.0' in seen


def test_x23_more_connections_than_descriptors_keep_nobody_from_being_served(tmp_path: Path) -> None:
    request = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    few = ("sh", "-c", 'ulimit -n 80; exec "$@"', "sh")
    with (tmp_path / "log").open("wb") as file, server(tmp_path, stderr=file.fileno(), within=few) as (client, _), ExitStack() as stack:
        for _ in range(100):
            caller = stack.enter_context(socket.create_connection((client.base_url.host, client.base_url.port), timeout=20))
            caller.sendall(request)  # and the connection stays open, as those of most clients do
        assert caller.recv(12) == b"HTTP/1.1 200"
    assert {json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()} == {"no_descriptors"}


def test_the_same_idempotency_key_gives_the_same_job(tmp_path: Path, small_clean_set: Path) -> None:
    with server(tmp_path) as (client, _):
        client.headers["Idempotency-Key"] = "once"
        one, two = (upload(client, BADNET.read_bytes(), small_clean_set.read_bytes()).json()["id"] for _ in range(2))
        assert one == two
        assert_problem(upload(client, BADNET.read_bytes(), small_clean_set.read_bytes(), seed=1), 409, "idempotency_conflict")
        client.delete(f"/v1/calibrations/{one}")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "service", *arguments], capture_output=True, text=True, timeout=120)


def test_a_port_in_use_and_a_data_directory_that_cannot_be_written_are_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "--data-dir", str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "choose another port" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "file").touch()
    for command in (["serve"], ["calibrate", "--checkpoint", str(BADNET), "--clean-set", str(EXAMPLES / "clean_set.zip"), "--name", "x"]):
        done = run(*command, "--data-dir", str(tmp_path / "file" / "var"))
        assert done.returncode == 1
        assert "cannot be written" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_server_that_does_not_start_does_not_say_that_it_serves(tmp_path: Path) -> None:
    (tmp_path / "uploads").touch()
    done = run("serve", "--data-dir", str(tmp_path), "--port", "0", "--device", "cpu")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Cannot start" in done.stderr.splitlines()[-1]
    assert "uploads" in done.stderr


def test_listening_to_the_world_without_tokens_is_refused(tmp_path: Path) -> None:
    done = run("serve", "--data-dir", str(tmp_path), "--host", "0.0.0.0")
    assert done.returncode == 78
    assert "needs tokens" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "UPPER"], "lower-case"),
        (["--name", "x", "--target-fpr", "0.5"], "--target-fpr"),
        (["--name", "x", "--architecture", "resnet21"], "Known are"),
        (["--name", "x", "--checkpoint", "/nowhere"], "does not exist"),
    ],
    ids=["a bad name", "a target above a fifth", "an unknown architecture", "a file that is not there"],
)
def test_the_command_line_says_what_is_wrong_with(tmp_path: Path, arguments: list[str], message: str) -> None:
    given = ["--checkpoint", str(BADNET), "--clean-set", str(EXAMPLES / "clean_set.zip"), "--data-dir", str(tmp_path), *arguments]
    done = run("calibrate", *given)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_calibration_on_the_command_line_is_one_json_object(tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_bytes(b"\x80\x04junk")
    done = run(
        "calibrate", "--checkpoint", str(tmp_path / "c.safetensors"), "--clean-set", str(EXAMPLES / "clean_set.zip"), "--name", "x", "--json",
        "--data-dir", str(tmp_path / "data"),
    )  # fmt: skip
    assert done.returncode == 1
    assert json.loads(done.stdout)["code"] in ("checkpoint_format", "checkpoint_invalid")
    assert os.listdir(tmp_path / "data" / "guards") == [".staging"]
