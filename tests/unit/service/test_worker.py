"""The worker when its surroundings fail it: one job's trouble is that job's alone. No child process calibrates anything."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from models.claims import claimed
from models.errors import CheckpointProblem
from models.registry import Registry
from service import worker as worker_module
from service.errors import JobsUnavailable
from service.jobs import ENDED, Job, Jobs, State
from service.metrics import Metrics
from service.worker import Worker
from tests.support import make_service, publish, serving


def run(tmp_path: Path, test: Callable[[Worker, Jobs], Awaitable[None]]) -> None:
    async def body() -> None:
        jobs = Jobs(tmp_path / "jobs.sqlite", most_queued=8)
        await jobs.open()
        worker = Worker(jobs, Registry(tmp_path / "guards"), tmp_path, "cpu", Metrics())
        try:
            await test(worker, jobs)
        finally:
            await worker.stop()
            await jobs.close()

    asyncio.run(asyncio.wait_for(body(), 20))


async def ended(worker: Worker, job_id: str) -> Job:
    async for job, _ in worker.follow(job_id):
        if job.state in ENDED:
            return job
    raise AssertionError("the stream ended before the job")


async def no_child(*_: Any) -> Any:
    raise OSError("no process could be started: too many open files")


def unavailable(times: int) -> Callable[..., Awaitable[None]]:
    """`Jobs._transition` of a database that cannot be used so many times."""
    left, transition = [times], Jobs._transition

    async def refusing(self: Jobs, *outcome: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise JobsUnavailable
        await transition(self, *outcome)

    return refusing


def test_a_child_that_cannot_be_started_fails_its_job_and_not_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(worker: Worker, jobs: Jobs) -> None:
        monkeypatch.setattr(worker, "_spawn", no_child)
        await worker.start()
        for job_id in ("a", "b"):
            (worker.uploads / job_id).mkdir()
            await jobs.add(job_id, {"name": "cifar"}, "digest", None)
            job = await ended(worker, job_id)
            assert (job.state, (job.outcome or {})["code"]) == ("failed", "internal")
            assert not (worker.uploads / job_id).exists()

    run(tmp_path, test)


@pytest.mark.parametrize(("published", "state"), [(False, "failed"), (True, "succeeded")])
def test_x21_the_end_of_a_job_is_written_down_as_soon_as_the_database_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: bool, state: State
) -> None:
    sleep = asyncio.sleep
    if published:  # by a child of a server that has ended
        publish(Registry(tmp_path / "guards"), job="a")

    async def test(worker: Worker, jobs: Jobs) -> None:
        monkeypatch.setattr(worker, "_spawn", no_child)
        monkeypatch.setattr(Jobs, "_transition", unavailable(2))
        monkeypatch.setattr(asyncio, "sleep", lambda _: sleep(0))
        await worker.start()
        await jobs.add("a", {"name": "cifar"}, "digest", None)
        assert (await ended(worker, "a")).state == state

    run(tmp_path, test)


@pytest.mark.parametrize("when", ["before its process is started", "while its process is started"])
def test_a_job_that_is_cancelled_before_it_has_a_process_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    async def test(worker: Worker, jobs: Jobs) -> None:
        claim, children = jobs.claim, list[asyncio.subprocess.Process]()

        async def claim_and_cancel() -> Job | None:
            job = await claim()
            if job is not None and when.startswith("before"):
                await worker.cancel(job.id)
            return job

        async def spawn(action: str, folder: Path, config: dict[str, Any]) -> asyncio.subprocess.Process:
            if when.startswith("while"):
                await worker.cancel(folder.name)
            pipe = asyncio.subprocess.PIPE
            children.append(await asyncio.create_subprocess_exec("sleep", "60", stdout=pipe, stderr=pipe, start_new_session=True))
            return children[-1]

        monkeypatch.setattr(jobs, "claim", claim_and_cancel)
        monkeypatch.setattr(worker, "_spawn", spawn)
        (worker.uploads / "a").mkdir(parents=True)
        await jobs.add("a", {"name": "cifar"}, "digest", None)
        await worker.start()
        while (worker.uploads / "a").exists():
            await asyncio.sleep(0.01)
        assert (await jobs.get("a")).state == "cancelled"
        assert [child.returncode for child in children] == [-signal.SIGTERM]

    run(tmp_path, test)


def test_what_was_published_before_the_server_ended_is_not_published_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(worker: Worker, jobs: Jobs) -> None:
        monkeypatch.setattr(worker, "_spawn", no_child)
        registry = Registry(tmp_path / "guards")
        publish(registry, job="a")
        (worker.uploads / "a").mkdir(parents=True)
        await jobs.add("a", {"name": "cifar"}, "digest", None)
        await jobs.claim()
        await jobs.requeue("a")  # as `stop` does, which could not know
        await worker.start()
        job = await ended(worker, "a")
        assert (job.state, (job.outcome or {})["version"]) == ("succeeded", 1)
        assert registry.versions("cifar") == [1]
        assert not (worker.uploads / "a").exists()

    run(tmp_path, test)


def test_x3_what_was_published_has_succeeded_though_the_server_ended_once_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And though the database cannot be used at the moment at which that is to be written down."""

    async def test(worker: Worker, jobs: Jobs) -> None:
        monkeypatch.setattr(worker, "_work", lambda _: asyncio.sleep(0))
        publish(Registry(tmp_path / "guards"), job="a")
        await jobs.add("a", {"name": "cifar"}, "digest", None)
        await jobs.claim()
        await jobs.recover()
        await jobs.claim()
        monkeypatch.setattr(Jobs, "_transition", unavailable(1))
        with pytest.raises(JobsUnavailable):
            await worker.start()
        await worker.start()
        assert (await jobs.get("a")).state == "succeeded"

    run(tmp_path, test)


@pytest.mark.parametrize("at", ["while it is claimed", "while its version is looked for"])
def test_x19_a_job_loses_no_attempt_to_a_server_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    async def test(worker: Worker, jobs: Jobs) -> None:
        claim, there, go = jobs.claim, asyncio.Event(), asyncio.Event()

        async def pause() -> None:
            there.set()
            await go.wait()

        async def claiming() -> Job | None:
            job = await claim()
            if at == "while it is claimed":
                await pause()
            return job

        async def looking(*_: Any) -> None:
            await pause()

        monkeypatch.setattr(jobs, "claim", claiming)
        monkeypatch.setattr(worker, "_run", looking)
        await jobs.add("a", {"name": "cifar"}, "digest", None)
        await worker.start()
        await there.wait()
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0)
        go.set()
        await stopping
        job = await jobs.get("a")
        assert (job.state, job.attempts) == ("queued", 0)

    run(tmp_path, test)


def test_the_names_of_very_many_classes_reach_the_child(tmp_path: Path) -> None:
    async def test(worker: Worker, jobs: Jobs) -> None:
        classes = [str(index) + "\N{CYRILLIC SMALL LETTER ZHE}" * 50 for index in range(600)]  # nearly the 64 KiB that a JSON body may have
        (worker.uploads / "a").mkdir(parents=True)
        (worker.uploads / "a" / "checkpoint").write_bytes(b"no checkpoint")
        with pytest.raises(CheckpointProblem):
            await worker.inspect(worker.uploads / "a", {"classes": classes})

    run(tmp_path, test)


def test_folders_of_jobs_that_do_not_exist_are_collected_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(worker: Worker, jobs: Jobs) -> None:
        monkeypatch.setattr(worker, "_work", lambda _: asyncio.sleep(0))
        await jobs.add("waiting", {"name": "cifar"}, "digest", None)
        for name in ("waiting", "orphan"):
            (worker.uploads / name).mkdir(parents=True)
        await worker.start()
        assert [folder.name for folder in worker.uploads.iterdir()] == ["waiting"]

    run(tmp_path, test)


def test_the_events_of_a_job_that_has_ended_are_one_event_with_its_state(tmp_path: Path) -> None:
    with serving(make_service(tmp_path)) as client:

        async def prepare(jobs: Jobs) -> None:
            await jobs.add("a", {"name": "cifar"}, "digest", None)
            await jobs.cancel("a")

        client.runner.run(prepare(client.service.jobs))
        response = client("GET", "/v1/calibrations/a/events")
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.text.count("event: cancelled") == response.text.count("data: ") == 1


def test_of_two_servers_one_works_and_the_other_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "LOOK_SECONDS", 0.02)

    async def test(first: Worker, jobs: Jobs) -> None:
        second = Worker(jobs, Registry(tmp_path / "guards"), tmp_path, "cpu", Metrics())
        children: list[tuple[str, asyncio.subprocess.Process]] = []

        def spawning(name: str) -> Callable[..., Awaitable[asyncio.subprocess.Process]]:
            async def spawn(*_: Any) -> asyncio.subprocess.Process:
                pipe = asyncio.subprocess.PIPE
                children.append((name, await asyncio.create_subprocess_exec("sleep", "60", stdout=pipe, stderr=pipe, start_new_session=True)))
                return children[-1][1]

            return spawn

        async def until(what: Callable[[], bool]) -> None:
            while not what():
                await asyncio.sleep(0.01)

        monkeypatch.setattr(first, "_spawn", spawning("first"))
        monkeypatch.setattr(second, "_spawn", spawning("second"))
        try:
            await first.start()
            await second.start()
            for job_id in ("a", "b"):
                (first.uploads / job_id).mkdir()
                await jobs.add(job_id, {"name": "cifar"}, "digest", None)
            await until(lambda: len(children) == 1)
            await asyncio.sleep(0.1)
            assert [(name, child.returncode) for name, child in children] == [("first", None)]
            assert (await jobs.get("a")).state == "running"  # the start of a second server takes nothing from the first
            await second.cancel("a")  # a server that does not run it
            await until(lambda: len(children) == 2)
            assert [(name, child.returncode) for name, child in children] == [("first", -signal.SIGTERM), ("first", None)]
            await first.stop()
            await until(lambda: len(children) == 3)
            assert children[2][0] == "second"
            assert (await jobs.get("b")).attempts == 1
        finally:
            await second.stop()

    run(tmp_path, test)


def test_what_is_being_received_is_not_taken_for_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(worker: Worker, _: Jobs) -> None:
        monkeypatch.setattr(worker, "_work", lambda _: asyncio.sleep(0))
        (worker.uploads / "received").mkdir(parents=True)
        with claimed(lambda: worker.uploads / "received"):
            await worker.start()
            assert [folder.name for folder in worker.uploads.iterdir()] == ["received"]

    run(tmp_path, test)


def test_an_upload_that_is_acknowledged_while_the_place_is_taken_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server adds the job and lets the folder go at the moment at which this one looks for what was left behind."""

    async def test(worker: Worker, jobs: Jobs) -> None:
        monkeypatch.setattr(worker, "_work", lambda _: asyncio.sleep(0))
        for name in ("uploaded", "left"):
            (worker.uploads / name).mkdir(parents=True)
        in_state = jobs.in_state

        async def late(*states: State) -> list[Job]:
            known = await in_state(*states)
            if "queued" in states:
                await jobs.add("uploaded", {"name": "cifar"}, "digest", None)
                holding.close()
            return known

        with ExitStack() as holding:
            holding.enter_context(claimed(lambda: worker.uploads / "uploaded"))
            monkeypatch.setattr(jobs, "in_state", late)
            await worker.start()
        assert [folder.name for folder in worker.uploads.iterdir()] == ["uploaded"]

    run(tmp_path, test)


def test_a_server_that_waits_goes_on_waiting_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "LOOK_SECONDS", 0.01)

    async def test(worker: Worker, jobs: Jobs) -> None:
        errors = [OSError("too many open files"), ValueError("whatever else")]
        claim_place = worker._claim_place

        def failing() -> bool:
            if errors and worker._task is not None:
                raise errors.pop()
            return claim_place()

        monkeypatch.setattr(worker, "_spawn", no_child)
        monkeypatch.setattr(worker, "_claim_place", failing)
        await worker.start()
        (worker.uploads / "a").mkdir()
        await jobs.add("a", {"name": "cifar"}, "digest", None)
        assert (await ended(worker, "a")).state == "failed"
        assert errors == []

    run(tmp_path, test)


def test_the_log_tells_what_held_a_calibration(tmp_path: Path) -> None:
    async def test(worker: Worker, jobs: Jobs) -> None:
        await jobs.add("a", {"name": "cifar"}, "digest", None)
        job = await jobs.claim()
        assert job is not None
        said = {"event": "problem", "status": 422, "code": "no_classes", "title": "T", "detail": "D", "process": {"network": True, "peak_memory": 7}}
        with capture_logs() as logs:
            await worker._finish(job, said, 1)
        (entry,) = (entry for entry in logs if entry["event"] == "calibration_ended")
        assert (entry["state"], entry["code"], entry["network"], entry["peak_memory"]) == ("failed", "no_classes", True, 7)

    run(tmp_path, test)


@pytest.mark.parametrize("said", [None, {"event": "problem", "status": 507, "code": "storage_full", "title": "T", "detail": "D"}], ids=["nothing", "a problem"])
def test_x3_a_job_whose_child_published_and_then_said(tmp_path: Path, said: dict[str, Any] | None) -> None:
    """As where the kernel's out-of-memory killer came before its last word."""

    async def test(worker: Worker, jobs: Jobs) -> None:
        await jobs.add("a", {"name": "cifar"}, "digest", None)
        job = await jobs.claim()
        assert job is not None
        publish(Registry(tmp_path / "guards"), job="a")
        await worker._finish(job, said, -signal.SIGKILL)
        found = await jobs.get("a")
        assert (found.state, (found.outcome or {}).get("version")) == ("succeeded", 1)

    run(tmp_path, test)


def test_a_published_version_whose_report_is_damaged_is_calibrated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path / "guards")
    version = publish(registry, job="a")
    (registry.folder("cifar", version) / "report.json").write_text("{damaged")
    started: list[str] = []

    async def test(worker: Worker, jobs: Jobs) -> None:
        async def spawn(action: str, *_: Any) -> Any:
            started.append(action)
            return await no_child()

        monkeypatch.setattr(worker, "_spawn", spawn)
        await jobs.add("a", {"name": "cifar"}, "digest", None)
        await jobs.claim()
        await worker.start()
        await ended(worker, "a")
        assert started == ["calibrate"]

    run(tmp_path, test)
