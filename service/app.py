"""Puts the service together: routes, start, readiness, drain, and the end of the process where the device is lost."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib import metadata

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from torch import Tensor

from models.errors import Problem
from models.parallel import cores
from service import admin, operations, predict
from service.auth import Authenticator
from service.auth import Scope as TokenScope
from service.batcher import BatchDone, Batcher
from service.docs import add_docs
from service.door import Door
from service.engine import Engine, LiveGuard, Outcome
from service.envelope import METHODS, Envelope
from service.errors import Draining, FieldsInvalid, JobsUnavailable, from_http, render
from service.health import STUCK_SECONDS, Health
from service.images import Images
from service.jobs import Jobs
from service.metrics import Metrics
from service.predict import ImageBatcher
from service.priority import working
from service.settings import Settings
from service.traffic import Traffic
from service.views import GuardViews
from service.worker import Worker

log = structlog.get_logger()
LOADERS = 4  # threads for what would block the event loop
HUNG_SECONDS = 20.0  # one that runs longer than this, and than anybody waits, is taken to hang for ever
DEVICE_LOST = 70  # the exit status that asks for a restart: EX_SOFTWARE of sysexits.h
ANSWER_SECONDS, LAST_SECONDS = 1.0, 3.0  # until that exit: for answers to be on their way, and at most, for a calibration to be put back
RETRY_SECONDS = 2.0  # until a job database that could not be used is tried again
MOST_FAILURES = 100  # kinds of errors of the device that the log tells of
YOUNG = 20_000  # objects until the youngest are collected: with Python's 700, what a few requests hold is walked time and again
CLOSE_SECONDS = 0.5  # after the drain's time, for what is still to be closed


class Service:
    """The collaborators of one server process, and its app."""

    def __init__(self, settings: Settings, engine: Engine, jobs: Jobs, metrics: Metrics, end_process: Callable[[int], object] = os._exit) -> None:
        """end_process: gets an exit status and waits for nothing, since a thread that hangs would keep the interpreter from ending."""
        self.settings, self.engine, self.jobs, self.metrics, self.end_process = settings, engine, jobs, metrics, end_process
        self.worker = Worker(jobs, engine.registry, settings.data_dir, settings.device, metrics, settings.own_architectures)
        self.images = Images(
            image_bytes=settings.image_bytes,
            batch_images=settings.batch_images,
            body_bytes=settings.body_bytes,
            workers=cores(),
            pending=settings.queue_images,
        )
        self._device = working(engine.slots, "device")
        self._changes = working(1, "changes")  # of guards: one waits for the other, and should hold none of the threads that all else uses meanwhile
        self.batcher: ImageBatcher = Batcher(
            self._run,
            capacity=settings.queue_images,
            most=lambda live: live.most,
            slots=engine.slots,
            share=engine.share,
            on_batch=self._count_batch,
            probe=self._probe,
        )
        self.health = Health(engine, self.batcher)
        self._failures: set[str] = set()  # kinds of errors that the log has told of
        self._cause: str | None = None  # what the device answered when it was probed in vain
        self._drained_by: float | None = None
        self._worker_changes = asyncio.Lock()
        self._stopping: asyncio.Task[None] | None = None
        scopes: tuple[TokenScope, ...] = ("predict", "admin", "metrics")
        self.authenticator = Authenticator({scope: token for scope in scopes if (token := settings.token(scope))})
        traffic = Traffic(settings.deadline_seconds)
        self.judge = predict.Judge(engine, self.images, self.batcher, metrics, settings.deadline_seconds, traffic, self.authenticator)
        self.api = self._api()
        self.app = Door(self.api, Envelope(predict.direct(self.judge, _on_problem), metrics, self.health), metrics, traffic)

    def _run(self, live: LiveGuard, pixels: Sequence[Tensor]) -> asyncio.Future[list[Outcome]]:
        """On the way to the device when this returns."""
        forward = asyncio.get_running_loop().run_in_executor(self._device, self.engine.run, live, list(pixels))
        forward.add_done_callback(partial(self._tell_failure, live, len(pixels)))
        return forward

    def _tell_failure(self, live: LiveGuard, images: int, forward: asyncio.Future[list[Outcome]]) -> None:
        if forward.cancelled() or (error := forward.exception()) is None:
            return
        kind = f"{type(error).__name__}: {error}"[:100]
        if kind not in self._failures and len(self._failures) < MOST_FAILURES:  # a batch that fails is halved, and each part may fail again
            self._failures.add(kind)
            log.error("batch_failed", guard=live.name, version=live.version, images=images, detail="Told once for each kind of error.", exc_info=error)

    async def _probe(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._device, self.engine.probe)
        except Exception as error:
            self._cause = str(error)
            raise

    def _count_batch(self, done: BatchDone) -> None:
        self.metrics.batch_images.observe(len(done.waits))
        self.metrics.batches.labels(done.released).inc()
        self.metrics.forward_seconds.observe(done.seconds)
        for wait in done.waits:
            self.metrics.queue_seconds.observe(max(wait, 0.0))

    def begin_drain(self) -> None:
        """Take no new work from now on; what was admitted is finished, or answered 503 when the time for that is over."""
        self.health.draining = True
        if self._drained_by is None:
            loop = asyncio.get_running_loop()
            self._drained_by = loop.time() + self.settings.drain_seconds
            loop.call_at(self._drained_by, self.batcher.give_up, Draining)
            self.worker.release_followers()
            self._stop_worker()

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(working(LOADERS, "work"))  # load bundles, whose runtimes may start threads of their own
        failed = await asyncio.to_thread(self.engine.load_all)
        for guard, problem in failed.items():
            log.error("guard_not_loaded", guard=guard, detail=problem.detail)
        self.health.not_loaded = {guard: problem.detail for guard, problem in failed.items()}
        tasks = [loop.create_task(self._watch(), name="watch")]
        if not await self._begin_jobs():
            tasks.append(loop.create_task(self._retry_jobs(), name="retry jobs"))
        gc.collect()
        gc.freeze()  # a full collection would walk all that was imported and loaded, and every request would wait for it a fifth of a second
        usual = gc.get_threshold()
        gc.set_threshold(YOUNG)
        self.health.started = True
        try:
            yield
        finally:
            gc.set_threshold(*usual)
            gc.unfreeze()
            self.begin_drain()
            await self.batcher.drain()
            await self._close(tasks)

    async def _begin_jobs(self) -> bool:
        """Open the job database and begin to calibrate; False where it cannot be used, which the log then says. Everything else is served without it."""
        async with self._worker_changes:
            if self._stopping is not None:
                return True
            try:
                await self.jobs.open()
                await self.worker.start()
            except JobsUnavailable:
                return False
            return True

    async def _retry_jobs(self) -> None:
        begun = False
        while not begun:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                begun = await self._begin_jobs()
            except Exception:  # at the start of the server it ends it; now it serves
                log.exception("worker_not_started")

    async def _watch(self) -> None:
        """End the process once the device is lost: neither an error that persists nor a thread that hangs goes away before it does."""
        found = await self.batcher.watch(max(HUNG_SECONDS, self.settings.deadline_seconds + STUCK_SECONDS))
        what = "The device fails on everything since an error." if found == "failed" else "A forward pass does not come back from the device."
        detail = f"{what} This process ends with status {DEVICE_LOST}: its supervisor should start it again."
        log.critical("device_lost", device=str(self.engine.device), found=found, cause=self._cause, detail=detail)
        await asyncio.gather(asyncio.sleep(ANSWER_SECONDS), asyncio.wait({self._stop_worker()}, timeout=LAST_SECONDS))
        self.end_process(DEVICE_LOST)

    def _stop_worker(self) -> asyncio.Task[None]:
        """End a running calibration and put its job back into the queue; once, since another server may take that up at once."""

        async def stop() -> None:
            async with self._worker_changes:
                await self.worker.stop()

        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(stop(), name="stop worker")
        return self._stopping

    async def _close(self, tasks: list[asyncio.Task[None]]) -> None:
        """Of the threads and the job database, wait for none longer than the drain may take: they may hang, too."""
        loop = asyncio.get_running_loop()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        until = max(self._drained_by or 0.0, loop.time()) + CLOSE_SECONDS
        await asyncio.wait({self._stop_worker()}, timeout=until - loop.time())
        await asyncio.wait({loop.create_task(self.jobs.close())}, timeout=until - loop.time())
        self.images.close()
        for threads in (self._device, self._changes):
            threads.shutdown(wait=False, cancel_futures=True)

    def _api(self) -> FastAPI:
        app = FastAPI(
            title="BaDExpert Guard",
            description="A backdoor filter in front of an image classifier that somebody else trained.",
            version=metadata.version("badexpert"),
            lifespan=self._lifespan,
            redirect_slashes=False,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            exception_handlers={Problem: _on_problem, HTTPException: _on_http, RequestValidationError: _on_validation},
        )
        app.include_router(predict.router(self.judge, GuardViews(self.engine)))
        calls = admin.Admin(self.engine, self.jobs, self.worker, self._changes, self.settings.upload_bytes, self.settings.json_bytes)
        app.include_router(admin.router(calls, self.authenticator))
        app.include_router(
            operations.router(
                operations.Operations(self.health, self.engine, self.batcher, self.jobs, self.metrics, self.settings.queue_images, self.images.budget),
                self.authenticator,
            )
        )
        if self.settings.docs:
            add_docs(app)
        app.add_middleware(Envelope, metrics=self.metrics, health=self.health)
        return app


async def _on_problem(request: Request, problem: Problem) -> Response:
    if problem.status >= 500:
        log.warning("request_failed", request_id=request.state.request_id, code=problem.code)
    return render(problem, request.state.request_id)


async def _on_http(request: Request, error: HTTPException) -> Response:
    headers = error.headers
    if error.status_code == 405:  # Starlette names the methods of the first route of this path only
        allowed = [m for m in sorted(METHODS) if any(route.matches({**request.scope, "method": m})[0] is Match.FULL for route in request.app.routes)]
        headers = {"Allow": ", ".join(allowed)}
    return render(from_http(error.status_code, headers), request.state.request_id)


async def _on_validation(request: Request, error: RequestValidationError) -> Response:
    fields = [{"field": ".".join(map(str, item["loc"]))[:60], "message": item["msg"]} for item in error.errors()[:20]]
    return render(FieldsInvalid(None, errors=fields), request.state.request_id)
