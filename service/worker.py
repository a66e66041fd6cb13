"""Runs calibration jobs, one at a time, each as a child process; owns that process and the upload folders.

Of several servers of one data directory one works, the others wait to take its place; all of them take uploads, and tell of all jobs.

What the child says on standard output becomes the job's progress; its standard error goes to the log. Files of a job are removed when it has ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import structlog

from models import bundle
from models.claims import all_unclaimed, claim
from models.errors import Conflict, Problem, TookTooLong, from_code
from models.registry import Registry
from service import child
from service.errors import JobsUnavailable
from service.jobs import ENDED, Job, Jobs
from service.metrics import Metrics

log = structlog.get_logger()
STOP_SECONDS = 5.0  # what a child gets to end by itself
ASK_SECONDS = 3600.0  # for a check or an inspection: twice the processor time that the sandbox gives it, since it steps back for all else
LOOK_SECONDS = 2.0  # until what another server did is noticed: a new job, a cancelled one, its end
LOG = "see the server's log"


class Worker:
    """One per server. `uploads` holds a folder a job, named by its id."""

    def __init__(self, jobs: Jobs, registry: Registry, data_dir: Path, device: str, metrics: Metrics, admitted: Sequence[str] = ()) -> None:
        """admitted: the operator's own architectures, package.module:factory."""
        self._jobs, self._registry, self._data_dir, self._device, self._metrics = jobs, registry, data_dir, device, metrics
        self._admitted = admitted
        self.uploads = data_dir / "uploads"
        self._progress: dict[str, dict[str, Any]] = {}
        self._child: asyncio.subprocess.Process | None = None
        self._current: str | None = None  # the job that was claimed last, until it has ended
        self._claiming: asyncio.Task[Job | None] | None = None
        self._moved = asyncio.Condition()
        self._asking = asyncio.Semaphore(2)
        self._released = False
        self._task: asyncio.Task[None] | None = None
        self._place: int | None = None  # what holds the place of the one that works

    async def start(self) -> None:
        """Take up what the last server left, and begin to work, or wait for the server that works to end. Raises JobsUnavailable: call it again then."""
        self.uploads.mkdir(parents=True, exist_ok=True)
        first = self._claim_place()
        if first:
            await self._take_up()
        else:
            log.info("worker_waits", data_dir=str(self._data_dir), detail="Another server of this data directory calibrates.")
        self._task = asyncio.get_running_loop().create_task(self._work(first), name="worker")

    def _claim_place(self) -> bool:
        """Whether this is the server that works, from now on or already."""
        if self._place is None:
            self._place = claim(self.uploads)
        return self._place is not None

    async def _take_up(self) -> None:
        for stale in await self._jobs.in_state("running"):
            published = await asyncio.to_thread(self._published_by, stale)
            if published is not None:
                with suppress(Conflict):  # cancelled meanwhile: as it was decided
                    await self._jobs.end(stale.id, "succeeded", published)
        for job_id in await self._jobs.recover():  # only now: it may call a job failed
            self._metrics.calibrations.labels("failed").inc()
            log.error("calibration_given_up", job=job_id, detail="The server ended twice while it ran; its memory may be too small for it.")
        with all_unclaimed(list(self.uploads.iterdir())) as left:
            # Asked only now: another server may have acknowledged an upload and let its folder go a moment ago.
            known = {job.id for job in await self._jobs.in_state("queued", "running")}
            for folder in left:
                if folder.name not in known:
                    await asyncio.to_thread(shutil.rmtree, folder, True)
        self._registry.collect()

    async def stop(self) -> None:
        """End the running child, put its job back into the queue, and give up the place."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self._claiming is not None:  # the database's thread may be at it
            await asyncio.gather(self._claiming, return_exceptions=True)
        if self._current is not None:
            job_id = self._current
            await self._stop_child()
            with suppress(JobsUnavailable):
                await self._jobs.requeue(job_id)
            self._current = None
        if self._place is not None:
            os.close(self._place)
            self._place = None

    async def check(self, job_id: str, config: dict[str, Any]) -> None:
        """Read the uploaded files in a child, as the calibration will; raises the Problem that it finds in them."""
        await self._ask("check", self.uploads / job_id, config)

    async def inspect(self, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """What a child finds out about the files in a folder. Raises the Problem that it finds in them."""
        found: dict[str, Any] = (await self._ask("inspect", folder, config))["inspection"]
        return found

    async def _ask(self, action: str, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        """Run a short action in a child; at most two at a time, so that uploads do not starve what is served."""
        async with self._asking:
            process = await self._spawn(action, folder, config)
            try:
                output, errors = await asyncio.wait_for(process.communicate(), ASK_SECONDS)
            except TimeoutError:
                raise TookTooLong(f"The files could not be read within {ASK_SECONDS:.0f} seconds.") from None
            finally:
                child.tell(process, signal.SIGKILL)
        for line in errors.decode("utf-8", "replace").splitlines():
            log.warning("child_stderr", action=action, folder=folder.name, line=line[:2000])
        try:
            event: dict[str, Any] = json.loads(output.splitlines()[-1])
            said = event["event"]
        except (IndexError, ValueError, KeyError):
            log.warning("child_lost", action=action, folder=folder.name, status=process.returncode)
            raise child.without_a_word(process.returncode, LOG) from None
        log.info("child_ended", action=action, folder=folder.name, code=event.get("code"), **event.get("process", {}))
        if said == "problem":
            raise from_code(event["code"], event["detail"])
        return event

    async def cancel(self, job_id: str) -> None:
        """End a queued or running job for good. Raises NotFound or Conflict."""
        before = await self._jobs.cancel(job_id)
        if before == "running" and self._current == job_id:
            await self._stop_child()
        elif before == "queued":
            self._forget(job_id)
        if before != "cancelled":
            self._metrics.calibrations.labels("cancelled").inc()
        await self._notify()

    def progress(self, job_id: str) -> dict[str, Any] | None:
        """The last thing a running job said: stage, fraction, eta_seconds."""
        return self._progress.get(job_id)

    async def follow(self, job_id: str) -> AsyncIterator[tuple[Job, dict[str, Any] | None]]:
        """The job and its progress now and after every change, until it has ended. Raises NotFound."""
        last: tuple[Any, ...] | None = None
        while True:
            job = await self._jobs.get(job_id)
            state = (job.state, self.progress(job_id))
            if state != last:
                yield job, state[1]
                last = state
            if job.state in ENDED or self._released:
                return
            async with self._moved:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._moved.wait(), 5.0)

    def release_followers(self) -> None:
        """End all `follow` streams soon: the server is about to shut down."""
        self._released = True
        asyncio.get_running_loop().create_task(self._notify())

    async def _work(self, first: bool) -> None:
        taken_up = first
        while True:
            try:
                if not self._claim_place():
                    await asyncio.sleep(LOOK_SECONDS)
                    continue
                if not taken_up:
                    await self._take_up()
                    taken_up = True
                self._jobs.changed.clear()
                self._claiming = asyncio.get_running_loop().create_task(self._claim())
                await asyncio.wait({self._claiming})  # it goes on where this is cancelled, so that `stop` knows what to put back
                job = self._claiming.result()
            except JobsUnavailable:
                await asyncio.sleep(1.0)
                continue
            except Exception:  # descriptors may have run out; who gave up now would calibrate nothing until the server is started again
                log.exception("worker_tries_again")
                await asyncio.sleep(LOOK_SECONDS)
                continue
            if job is None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._jobs.changed.wait(), LOOK_SECONDS)
                continue
            try:
                await self._run(job)
            except Exception:  # one job's trouble must not end the work on the others
                log.exception("calibration_lost", job=job.id)
                await self._stop_child()
                await self._finish(job, None, None)

    async def _claim(self) -> Job | None:
        job = await self._jobs.claim()
        self._current = None if job is None else job.id
        return job

    async def _run(self, job: Job) -> None:
        published = await asyncio.to_thread(self._published_by, job)
        if published is not None:  # by an attempt that was ended before anybody wrote that down: not once more
            await self._ended(job, "succeeded", published)
            return
        self._metrics.calibrations_running.set(1)
        log.info("calibration_started", job=job.id, attempt=job.attempts)
        self._child = await self._spawn("calibrate", self.uploads / job.id, job.config)
        with suppress(JobsUnavailable):
            if (await self._jobs.get(job.id)).state == "cancelled":  # while there was no child yet that `cancel` could have stopped
                await self._stop_child()
        errors = asyncio.get_running_loop().create_task(self._log_errors(self._child, job.id))
        watch = asyncio.get_running_loop().create_task(self._stop_if_cancelled(job.id))
        try:
            last = await self._listen(self._child, job.id)
            await self._child.wait()
        finally:
            watch.cancel()
        await errors
        await self._finish(job, last, self._child.returncode)

    async def _stop_if_cancelled(self, job_id: str) -> None:
        """By way of another server."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            with suppress(JobsUnavailable):
                if (await self._jobs.get(job_id)).state == "cancelled":
                    await self._stop_child()
                    return

    async def _spawn(self, action: str, folder: Path, config: dict[str, Any]) -> asyncio.subprocess.Process:
        said = json.dumps(config, ensure_ascii=False, separators=(",", ":"))  # no longer than it was sent: Linux passes no argument above 128 KiB
        sets = {name: folder / name for name in ("clean_set", "validation_set") if (folder / name).exists()}
        unfinished = folder / "unfinished"  # goes with the job's files
        options = {"data_dir": self._data_dir, "device": self._device, "job": folder.name, "unfinished": unfinished}
        return await child.start(child.command(action, said, self._admitted, checkpoint=folder / "checkpoint", **sets, **options))

    async def _listen(self, process: asyncio.subprocess.Process, job_id: str) -> dict[str, Any] | None:
        """Keep the progress up to date; returns the child's last event if it was not progress."""
        assert process.stdout is not None  # asked for at its start
        last: dict[str, Any] | None = None
        async for line in process.stdout:
            with suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == "progress":
                    self._progress[job_id] = {key: event[key] for key in ("stage", "fraction", "eta_seconds")}
                    await self._notify()
                else:
                    last = event
        return last

    async def _log_errors(self, process: asyncio.subprocess.Process, job_id: str) -> None:
        assert process.stderr is not None  # asked for at its start
        async for line in process.stderr:
            log.warning("calibration_stderr", job=job_id, line=line.decode("utf-8", "replace").rstrip()[:2000])

    async def _finish(self, job: Job, last: dict[str, Any] | None, status: int | None) -> None:
        published: dict[str, Any] | None = None
        if status == 0 and last is not None and last.get("event") == "result":
            published = {key: last[key] for key in ("guard", "version", "bundle_id", "report")}
        else:  # it may have ended between publishing and saying so
            with suppress(OSError):
                published = await asyncio.to_thread(self._published_by, job)
        state: Literal["succeeded", "failed"] = "failed"
        if published is not None:
            state, outcome = "succeeded", published
        elif last is not None and last.get("event") == "problem":
            outcome = {key: last[key] for key in ("status", "code", "title", "detail")}
        else:
            problem = child.without_a_word(status, LOG)
            outcome = {"status": problem.status, "code": problem.code, "title": problem.title, "detail": problem.detail}
        await self._ended(job, state, outcome, **(last or {}).get("process", {}))

    async def _ended(self, job: Job, state: Literal["succeeded", "failed"], outcome: dict[str, Any], **process: Any) -> None:
        """Write down how a job ended, where it was not cancelled meanwhile, and let go of it. process: what held it, for the log."""
        self._progress.pop(job.id, None)
        ended = await self._end(job.id, state, outcome)
        if ended:
            self._metrics.calibrations.labels(state).inc()
        log.info("calibration_ended", job=job.id, state=state if ended else "cancelled", code=outcome.get("code") if ended else None, **process)
        self._forget(job.id)
        self._child = self._current = None
        self._metrics.calibrations_running.set(0)
        await self._notify()

    async def _end(self, job_id: str, state: Literal["succeeded", "failed"], outcome: dict[str, Any]) -> bool:
        """Write down how a job ended, as soon as the database can be used; False where it was cancelled meanwhile, and that stands."""
        while True:
            try:
                await self._jobs.end(job_id, state, outcome)
            except Conflict:
                return False
            except JobsUnavailable:
                await asyncio.sleep(1.0)
            else:
                return True

    async def _stop_child(self) -> None:
        process = self._child
        if process is None or process.returncode is not None:
            return
        child.tell(process, signal.SIGTERM)
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
        finally:  # also where this server may wait no longer
            child.tell(process, signal.SIGKILL)
        await process.wait()

    def _published_by(self, job: Job) -> dict[str, Any] | None:
        """The result of a job that published a version before its server could write that down; not of one that is damaged: that is calibrated again."""
        guard = str(job.config.get("name"))
        for version in reversed(self._registry.versions(guard)):
            with suppress(Problem, OSError, ValueError):
                folder = self._registry.folder(guard, version)
                bundle_id, _, record = bundle.describe(folder)
                if record.get("job") == job.id:
                    report = json.loads((folder / "report.json").read_bytes())
                    return {"guard": guard, "version": version, "bundle_id": bundle_id, "report": report}
        return None

    def _forget(self, job_id: str) -> None:
        shutil.rmtree(self.uploads / job_id, ignore_errors=True)

    async def _notify(self) -> None:
        async with self._moved:
            self._moved.notify_all()
