"""Puts the service together: routes, start and drain."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp
from torch import Tensor

from models.errors import Problem
from service import admin, predict
from service.auth import Authenticator
from service.auth import Scope as TokenScope
from service.batcher import BatchDone, Batcher
from service.engine import Engine, LiveGuard, Outcome
from service.envelope import METHODS, Door, Envelope, Health
from service.errors import FieldsInvalid, NotReady, from_http, render
from service.images import Images
from service.jobs import Jobs
from service.metrics import Metrics
from service.predict import ImageBatcher
from service.priority import at_full_priority
from service.settings import Settings
from service.traffic import Traffic
from service.views import GuardViews
from service.worker import Worker

log = structlog.get_logger()
LOADERS = 4  # threads for what would block the event loop
STUCK_SECONDS = 10.0  # a forward that runs longer than this means that the device hangs


class Service:
    """The collaborators of one server process, and its app."""

    def __init__(self, settings: Settings, engine: Engine, jobs: Jobs, metrics: Metrics) -> None:
        self.settings, self.engine, self.jobs, self.metrics = settings, engine, jobs, metrics
        self.health = Health()
        self.worker = Worker(jobs, engine.registry, settings.data_dir, settings.device, metrics, settings.own_architectures)
        cores = os.cpu_count() or 1
        self.images = Images(image_bytes=settings.image_bytes, batch_images=settings.batch_images, workers=cores, pending=settings.queue_images)
        self._device = at_full_priority(engine.slots, "device")
        self.batcher: ImageBatcher = Batcher(
            self._run,
            capacity=settings.queue_images,
            max_batch=settings.max_batch,
            slots=engine.slots,
            share=engine.share,
            on_batch=self._count_batch,
        )
        scopes: tuple[TokenScope, ...] = ("predict", "admin", "metrics")
        self.authenticator = Authenticator({scope: token for scope in scopes if (token := settings.token(scope))})
        traffic = Traffic(settings.deadline_seconds)
        self.judge = predict.Judge(engine, self.images, self.batcher, metrics, settings.deadline_seconds, traffic, self.authenticator)
        self.api = self._api()
        self.app = Door(self.api, Envelope(predict.direct(self.judge, _on_problem), metrics, self.health), metrics, traffic)

    async def _run(self, live: LiveGuard, pixels: Sequence[Tensor]) -> Sequence[Outcome]:
        return await asyncio.get_running_loop().run_in_executor(self._device, self.engine.run, live, list(pixels))

    def _count_batch(self, done: BatchDone) -> None:
        self.metrics.batch_images.observe(len(done.waits))
        self.metrics.batches.labels(done.released).inc()
        self.metrics.forward_seconds.observe(done.seconds)
        for wait in done.waits:
            self.metrics.queue_seconds.observe(max(wait, 0.0))

    def begin_drain(self) -> None:
        """Take no new work from now on; what was admitted is finished."""
        self.health.draining = True
        self.worker.release_followers()

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(at_full_priority(LOADERS, "work"))  # loads bundles, whose runtimes may start threads of their own
        await self.jobs.open()
        failed = await asyncio.to_thread(self.engine.load_all)
        for guard, problem in failed.items():
            log.error("guard_not_loaded", guard=guard, detail=problem.detail)
        self.health.unavailable = {guard: problem.detail for guard, problem in failed.items()}
        self.batcher.start()
        await self.worker.start()
        gc.collect()
        gc.freeze()  # a full collection would walk all that was imported and loaded, and every request would wait for it a fifth of a second
        self.health.started = True
        try:
            yield
        finally:
            gc.unfreeze()
            self.health.draining = True
            await self.batcher.drain()
            await self.worker.stop()
            await self.jobs.close()
            self.images.close()
            self._device.shutdown()

    def _api(self) -> FastAPI:
        docs = self.settings.docs
        app = FastAPI(
            title="BaDExpert Guard",
            description="A backdoor filter in front of an image classifier that somebody else trained.",
            version="0.1.0",
            lifespan=self._lifespan,
            redirect_slashes=False,
            docs_url="/docs" if docs else None,
            redoc_url=None,
            openapi_url="/openapi.json" if docs else None,
            exception_handlers={Problem: _on_problem, HTTPException: _on_http, RequestValidationError: _on_validation},
        )
        app.include_router(predict.router(self.judge, GuardViews(self.engine)))
        app.include_router(
            admin.router(admin.Admin(self.engine, self.jobs, self.worker, self.settings.upload_bytes, self.settings.json_bytes), self.authenticator)
        )
        self._add_operations(app)
        app.add_middleware(Envelope, metrics=self.metrics, health=self.health)
        return app

    def _add_operations(self, app: FastAPI) -> None:
        @app.get("/metrics", tags=["operations"], response_class=Response)
        async def metrics(request: Request) -> Response:
            """Prometheus exposition. Where any token is set, this needs the metrics or the admin scope."""
            self.authenticator.require(request, "metrics")
            self._gauges()
            return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

        @app.get("/livez", tags=["operations"])
        async def livez() -> dict[str, str]:
            """The event loop turns."""
            return {"status": "alive"}

        @app.get("/readyz", tags=["operations"])
        async def readyz() -> dict[str, object]:
            """Traffic may be sent here."""
            reason = self._not_ready()
            if reason:
                raise NotReady(reason)
            return {"status": "ready", "guards": sorted(live.name for live in self.engine.all_live()), "unavailable": self.health.unavailable}

    def _not_ready(self) -> str | None:
        if not self.health.started or self.health.draining:
            return "The server is starting." if not self.health.started else "The server is shutting down."
        busy = self.batcher.busy_since
        if busy is not None and asyncio.get_running_loop().time() - busy > STUCK_SECONDS:
            return "The device has not finished a forward pass in time."
        return None

    def _gauges(self) -> None:
        m = self.metrics
        m.queue_images.set(self.batcher.waiting)
        m.queue_capacity.set(self.settings.queue_images)
        m.ready.set(0 if self._not_ready() else 1)
        m.guard_info.clear()
        for live in self.engine.all_live():
            m.threshold.labels(live.name).set(live.threshold.value)
            m.target_fpr.labels(live.name).set(live.threshold.target_fpr)
            m.guard_info.labels(live.name, str(live.version), live.bundle_id[:12], live.mode).set(1)
            for verdict in ("accepted", "rejected"):
                m.verdicts.labels(live.name, verdict)  # a series from the start: rate() sees the first rejection


def create_app(settings: Settings, engine: Engine, jobs: Jobs, metrics: Metrics) -> ASGIApp:
    """The ASGI application over its collaborators."""
    return Service(settings, engine, jobs, metrics).app


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
