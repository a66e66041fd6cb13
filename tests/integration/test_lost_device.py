"""A real server process whose device fails it: it ends by itself, or when it is told to, though a thread of its never comes back."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from service.jobs import Jobs
from tests.support import make_registry, png

# The server with a device that fails, and with a calibration that takes a minute.
SERVER = """
import asyncio, sys, threading
from pathlib import Path
from service import engine
from service.engine import Engine
from service.server import serve
from service.settings import Settings
from service.worker import Worker

def fail(*_):
    raise RuntimeError("CUDA error: device-side assert triggered")

async def spawn(*_):
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec("sleep", "60", stdout=pipe, stderr=pipe, start_new_session=True)

Worker._spawn = spawn
engine.serving = lambda guard, *_: guard  # to choose a faster program takes seconds
if sys.argv[2] == "lost":
    Engine.run = Engine.probe = fail
else:
    Engine.run = lambda *_: threading.Event().wait()
serve(Settings(data_dir=Path(sys.argv[1]), port=0, device="cpu", threads=1, deadline_seconds=0.3, drain_seconds=0.5))
"""


@contextmanager
def server(data_dir: Path, fault: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """Serves the guard `cifar`, while a calibration runs."""
    make_registry(data_dir)

    async def add() -> None:
        jobs = Jobs(data_dir / "jobs.sqlite", most_queued=8)
        await jobs.add("a", {"name": "cifar"}, "digest", None)
        await jobs.close()

    asyncio.run(add())
    with subprocess.Popen([sys.executable, "-c", SERVER, str(data_dir), fault], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None
            with httpx.Client(base_url=found[0], timeout=10) as client:
                assert client.get("/readyz").status_code == 200
                while client.get("/v1/calibrations/a").json()["state"] != "running":
                    time.sleep(0.02)
                yield client, process
        finally:
            process.kill()


def predict(client: httpx.Client) -> tuple[int, str]:
    answer = client.post("/v1/guards/cifar/predict", content=png(), headers={"Content-Type": "image/png"})
    return answer.status_code, answer.json()["code"]


def said(process: subprocess.Popen[str], event: str) -> dict[str, object]:
    """Every line of the log is a JSON object; returns the one of this event."""
    assert process.stderr is not None
    (found,) = (line for line in map(json.loads, process.stderr.read().splitlines()) if line["event"] == event)
    return dict(found)


def job(data_dir: Path) -> tuple[str, int]:
    connection = sqlite3.connect(data_dir / "jobs.sqlite")
    try:
        state, attempts = connection.execute("SELECT state, attempts FROM jobs").fetchone()
        return str(state), int(attempts)
    finally:
        connection.close()


def test_p9_a_lost_device_ends_the_process_with_70_within_five_seconds_and_its_calibration_is_put_back(tmp_path: Path) -> None:
    with server(tmp_path, "lost") as (client, process):
        began = time.perf_counter()
        assert predict(client) == (503, "device_failed")
        assert client.get("/readyz").status_code == 503
        assert process.wait(10) == 70
        assert time.perf_counter() - began < 5
        assert "device-side assert" in str(said(process, "device_lost")["cause"])
    assert job(tmp_path) == ("queued", 0)


def test_p10_sigterm_ends_a_server_whose_forward_hangs_in_time_and_its_calibration_is_put_back(tmp_path: Path) -> None:
    with server(tmp_path, "hanging") as (client, process):
        assert predict(client) == (504, "deadline_exceeded")
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.perf_counter() - began < 0.5 + 2 + 0.5  # the promise, and room for a busy machine
        assert any("device" in str(name) for name in said(process, "threads_left")["threads"])  # type: ignore[attr-defined]
    assert job(tmp_path) == ("queued", 0)
