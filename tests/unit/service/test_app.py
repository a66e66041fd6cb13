"""The service when something under it fails for good: its device, its job database, the end of what it waits for."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from service.engine import Engine, LiveGuard, Outcome
from service.jobs import Jobs
from tests import support
from tests.support import Client, assert_problem, make_service, png, serving

PREDICT, IMAGE = "/v1/guards/cifar/predict", [("Content-Type", "image/png")]


def until(client: Client, condition: Callable[[], bool]) -> None:
    """Let the event loop turn until this is so."""

    async def wait() -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    client.runner.run(wait())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that would make a test slow, a hundredth as long."""
    monkeypatch.setattr("service.batcher.WATCH_SECONDS", 0.005)
    for module in ("app", "health"):
        monkeypatch.setattr(f"service.{module}.STUCK_SECONDS", 0.1)
    monkeypatch.setattr("service.app.HUNG_SECONDS", 0.2)
    monkeypatch.setattr("service.app.ANSWER_SECONDS", 0.01)
    monkeypatch.setattr("service.app.RETRY_SECONDS", 0.02)
    monkeypatch.setattr("service.jobs.LOCK_SECONDS", 0.01)


@contextmanager
def watched(data_dir: Path, engine: type[Engine] = Engine, **settings: Any) -> Iterator[tuple[Client, list[int]]]:
    """A service in this process, and the exit statuses with which it would have ended that."""
    service, ended = make_service(data_dir, engine, **settings), list[int]()
    service.end_process = ended.append
    with serving(service) as client:
        yield client, ended


class Lost(Engine):
    """A device after an error that persists."""

    def run(self, live: LiveGuard, pixels: list[Tensor]) -> list[Outcome]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    def probe(self) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")


class Full(Engine):
    """A device without memory for a batch."""

    def run(self, live: LiveGuard, pixels: list[Tensor]) -> list[Outcome]:
        raise torch.OutOfMemoryError("CUDA out of memory")


class Hanging(Engine):
    """A device from which no batch comes back until the test is over."""

    def __init__(self, *collaborators: Any) -> None:
        super().__init__(*collaborators)
        self.over = threading.Event()

    def run(self, live: LiveGuard, pixels: list[Tensor]) -> list[Outcome]:
        assert self.over.wait(30)
        return super().run(live, pixels)


def hanging(client: Client) -> threading.Event:
    assert isinstance(client.service.engine, Hanging)
    return client.service.engine.over


def test_x11_an_error_that_persists_takes_readiness_and_ends_the_process_with_70_once_all_are_answered(tmp_path: Path, quick: None) -> None:
    with watched(tmp_path, Lost) as (client, ended), capture_logs() as logs:
        assert_problem(client.predict(png()), 503, "device_failed")
        assert_problem(client("GET", "/readyz"), 503, "not_ready")
        assert "badexpert_ready 0.0" in client("GET", "/metrics").text
        assert_problem(client.predict(png()), 503, "device_failed")
        until(client, lambda: ended == [70])
    (said,) = (entry for entry in logs if entry["event"] == "device_lost")
    assert "device-side assert" in said["cause"]
    assert "supervisor should start it again" in said["detail"]
    assert ended == [70]  # and the end of the lifespan adds no other


def test_p9_a_calibration_is_put_back_before_the_process_ends_but_not_waited_for_any_longer_than_promised(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.app.LAST_SECONDS", 0.1)
    asked: list[str] = []

    async def stop_for_ever() -> None:
        asked.append("stop")
        await asyncio.sleep(60)

    with watched(tmp_path, Lost, drain_seconds=0) as (client, ended):
        client.service.worker.stop = stop_for_ever  # type: ignore[method-assign]
        began = time.perf_counter()
        client.predict(png())
        until(client, lambda: ended == [70])
        assert asked == ["stop"]
        assert time.perf_counter() - began < 5


def test_x9_full_memory_fails_its_image_and_neither_readiness_nor_the_process(tmp_path: Path, quick: None) -> None:
    with watched(tmp_path, Full) as (client, ended):
        for _ in range(3):
            assert_problem(client.predict(png()), 503, "device_failed")
        until(client, lambda: client.service.batcher.busy_since is None)
        assert client("GET", "/readyz").status_code == 200
        assert ended == []


def test_x14_a_forward_that_hangs_is_answered_at_the_deadline_takes_readiness_and_then_ends_the_process_though_its_thread_is_stuck(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("app", "health"):
        monkeypatch.setattr(f"service.{module}.STUCK_SECONDS", 1.0)  # so long that a busy machine asks for readiness before
    monkeypatch.setattr("service.app.HUNG_SECONDS", 2.0)
    with watched(tmp_path, Hanging, deadline_seconds=0.05) as (client, ended), capture_logs() as logs:
        assert_problem(client.predict(png()), 504, "deadline_exceeded")
        assert client("GET", "/readyz").status_code == 200
        until(client, lambda: client.service.health.not_ready() is not None)
        assert ended == []
        until(client, lambda: ended == [70])
        assert not hanging(client).is_set()
        assert_problem(client("GET", "/readyz"), 503, "not_ready")
        assert "does not come back" in next(entry["detail"] for entry in logs if entry["event"] == "device_lost")
        hanging(client).set()


def test_x14_where_images_may_wait_longer_a_forward_may_take_longer(tmp_path: Path, quick: None) -> None:
    with watched(tmp_path, Hanging, deadline_seconds=600) as (client, ended):

        async def for_a_while() -> None:
            task = asyncio.create_task(client.call("POST", PREDICT, IMAGE, png()))
            await asyncio.sleep(0.5)
            hanging(client).set()
            assert (await task).status_code == 200

        client.runner.run(for_a_while())
        assert ended == []


def test_p10_the_end_comes_in_time_though_a_forward_hangs_and_the_worker_is_stopped_before(tmp_path: Path) -> None:
    service, stopped = make_service(tmp_path, Hanging, drain_seconds=0.3), list[float]()

    async def stop() -> None:
        stopped.append(time.perf_counter())

    service.worker.stop = stop  # type: ignore[method-assign]
    with serving(service) as client:

        async def begin() -> asyncio.Task[Any]:
            task = asyncio.create_task(client.call("POST", PREDICT, IMAGE, png()))
            while service.batcher.busy_since is None:
                await asyncio.sleep(0.005)
            return task

        under_way = client.runner.run(begin())
        began = time.perf_counter()
    assert time.perf_counter() - began < 0.3 + 2
    assert stopped and stopped[0] - began < 0.3  # at once: what a calibration takes to end goes on beside the drain
    assert_problem(under_way.result(), 503, "draining")
    hanging(client).set()


def test_p10_the_worker_is_stopped_once_and_not_while_it_is_started_since_its_job_may_be_another_servers_then(tmp_path: Path) -> None:
    service, done, released = make_service(tmp_path), list[str](), asyncio.Event()

    async def start() -> None:
        done.append("starts")
        await released.wait()
        done.append("started")

    async def stop() -> None:
        done.append("stopped")

    async def run() -> None:
        service.worker.start, service.worker.stop = start, stop  # type: ignore[method-assign]
        starting = asyncio.create_task(service._begin_jobs())
        while not done:
            await asyncio.sleep(0.005)
        service.begin_drain()
        await asyncio.sleep(0.05)
        assert done == ["starts"]
        released.set()
        await starting
        assert await service._begin_jobs()
        await service._close([asyncio.create_task(asyncio.sleep(60))])

    asyncio.run(run())
    assert done == ["starts", "started", "stopped"]


def in_jobs(work: Callable[[Jobs], Awaitable[object]], path: Path) -> None:
    async def run() -> None:
        jobs = Jobs(path, most_queued=8)
        await work(jobs)
        await jobs.close()

    asyncio.run(run())


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often the worker was started."""
    starts: list[str] = []

    async def start() -> None:
        starts.append("start")

    monkeypatch.setattr(support, "_nothing", start)
    return starts


def assert_serves_without_jobs(client: Client) -> None:
    client.assert_serves()
    assert client("GET", "/readyz").status_code == 200
    for method, target in (("GET", "/v1/calibrations"), ("GET", "/v1/calibrations/a"), ("DELETE", "/v1/calibrations/a"), ("POST", "/v1/calibrations")):
        assert_problem(client(method, target), 503, "jobs_unavailable")
    assert "badexpert_jobs_available 0.0" in client("GET", "/metrics").text


def test_x21_a_damaged_job_database_keeps_no_guard_from_serving_and_is_taken_up_when_it_is_mended(tmp_path: Path, quick: None, begun: list[str]) -> None:
    path = tmp_path / "jobs.sqlite"
    damaged = b"this is no database" * 100
    path.write_bytes(damaged)
    with watched(tmp_path) as (client, _), capture_logs() as logs:
        assert_serves_without_jobs(client)
        assert begun == []
        assert path.read_bytes() == damaged
        path.rename(tmp_path / "damaged")
        until(client, lambda: begun == ["start"])
        assert client("GET", "/v1/calibrations").json() == {"calibrations": []}
        assert "badexpert_jobs_available 1.0" in client("GET", "/metrics").text
        client.runner.run(asyncio.sleep(0.1))
    assert begun == ["start"]  # once, and never again
    assert [entry["event"] for entry in logs if entry["event"].startswith("jobs_")] == ["jobs_available"]
    assert (tmp_path / "damaged").read_bytes() == damaged


def test_x21_a_lock_that_goes_away_is_mended_without_a_restart(tmp_path: Path, quick: None, begun: list[str]) -> None:
    path = tmp_path / "jobs.sqlite"
    in_jobs(lambda jobs: jobs.add("a", {"name": "cifar"}, "digest", None), path)
    locker = sqlite3.connect(path, isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    with watched(tmp_path) as (client, _):
        assert_serves_without_jobs(client)
        locker.close()
        until(client, lambda: begun == ["start"])
        assert client("GET", "/v1/calibrations/a").json()["state"] == "queued"
