"""The calls of the admin scope: upload and follow calibrations, activate versions, change what an operator may decide about a guard."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse
from structlog.contextvars import bound_contextvars

from calibration.config import CalibrationConfig, InspectionConfig
from models.durable import sync_files
from models.errors import Conflict, NotFound, Problem
from models.registry import Registry
from models.threshold import MOST_FPR
from service import uploads
from service.auth import Authenticator
from service.bodies import read_model
from service.engine import Engine
from service.jobs import ENDED, Job, Jobs
from service.views import GuardView, GuardViews
from service.worker import Worker

log = structlog.get_logger()


class Activation(BaseModel):
    """Which version to serve."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)
    version: int = Field(ge=1, lt=10**9)


class GuardChange(BaseModel):
    """What an operator may change without a calibration; what is left out stays. A target FPR holds until a version is activated."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)
    mode: Literal["enforce", "shadow"] | None = None
    target_fpr: float | None = Field(None, gt=0, le=MOST_FPR, description="null: the one that the version was calibrated for")

    @property
    def own_target(self) -> bool:
        """Whether null was sent for the target FPR, and not nothing."""
        return "target_fpr" in self.model_fields_set and self.target_fpr is None


class JobProgress(BaseModel):
    """How far a running calibration is."""

    stage: str
    fraction: float
    eta_seconds: float | None


class JobView(BaseModel):
    """A calibration job."""

    id: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    guard: str
    created: str
    started: str | None
    ended: str | None
    progress: JobProgress | None
    result: dict[str, Any] | None = Field(description="guard, version and bundle_id of a success")
    problem: dict[str, Any] | None = Field(description="status, code, title and detail of a failure")


class JobList(BaseModel):
    calibrations: list[JobView]


@dataclass(frozen=True)
class Admin:
    """What the admin calls work on."""

    engine: Engine
    jobs: Jobs
    worker: Worker
    changes: Executor  # of one thread, for what loads bundles or waits for that
    upload_bytes: int
    json_bytes: int

    @property
    def caps(self) -> dict[str, int]:
        return {"upload_bytes": self.upload_bytes, "json_bytes": self.json_bytes}

    async def change(self, what: Callable[..., object], *arguments: Any) -> None:
        """Call what changes the live guards, one after the other."""
        await asyncio.get_running_loop().run_in_executor(self.changes, what, *arguments)


def _logged_as(request: Request) -> AbstractContextManager[None]:
    """What a child process says of an upload is found in the log by the id of its request."""
    return bound_contextvars(request_id=request.state.request_id)


def _json_body(model: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def router(admin: Admin, authenticator: Authenticator) -> APIRouter:
    """The routes of the admin scope."""

    async def authorise(request: Request) -> None:  # a coroutine, so that it runs on the event loop, as all that touches the authenticator does
        authenticator.require(request, "admin")

    routes = APIRouter(prefix="/v1", tags=["admin"], dependencies=[Depends(authorise)])
    views = GuardViews(admin.engine)

    @routes.post("/calibrations", status_code=202, openapi_extra=uploads.CALIBRATION.openapi(CalibrationConfig))
    async def upload(request: Request, response: Response) -> JobView:
        """Upload a suspect and a clean set. The files are read before the answer, so that what is wrong with them is said at once."""
        key = request.headers.get("idempotency-key") or None
        await admin.jobs.room(key)
        accepted = False
        with ExitStack() as held:
            folder = await uploads.new_folder(admin.worker.uploads, held)
            job_id = folder.name
            try:
                config, digest = await uploads.receive(request, uploads.CALIBRATION, CalibrationConfig, folder, **admin.caps)
                with _logged_as(request):
                    await admin.worker.check(job_id, config.model_dump())
                await asyncio.to_thread(sync_files, folder)  # what is acknowledged outlasts a loss of power
                accepted = True  # from here on, whatever interrupts this, the job may be there
                try:
                    job = await admin.jobs.add(job_id, config.model_dump(), digest, key)
                    accepted = job.id == job_id
                except Problem:
                    accepted = False
                    raise
            finally:
                if not accepted:
                    await asyncio.to_thread(shutil.rmtree, folder, True)
        response.headers["Location"] = f"/v1/calibrations/{job.id}"
        return _view(job, admin.worker)

    @routes.post("/inspections", openapi_extra=uploads.INSPECTION.openapi(InspectionConfig))
    async def inspection(request: Request) -> dict[str, Any]:
        """What a checkpoint is: format, architecture, classes and, with clean images, its preprocessing and accuracy. Nothing is kept."""
        with ExitStack() as held:
            folder = await uploads.new_folder(admin.worker.uploads, held)
            try:
                config, _ = await uploads.receive(request, uploads.INSPECTION, InspectionConfig, folder, **admin.caps)
                with _logged_as(request):
                    return await admin.worker.inspect(folder, config.model_dump())
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, True)

    @routes.get("/calibrations")
    async def calibrations(limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> JobList:
        """The newest calibrations, newest first."""
        return JobList(calibrations=[_view(job, admin.worker) for job in await admin.jobs.recent(limit)])

    @routes.get("/calibrations/{calibration}")
    async def calibration(calibration: str) -> JobView:
        """State and progress of a calibration."""
        return _view(await admin.jobs.get(calibration), admin.worker)

    async def known(calibration: str) -> str:
        return (await admin.jobs.get(calibration)).id

    @routes.get("/calibrations/{calibration}/events", response_class=EventSourceResponse)
    async def events(calibration: str = Depends(known)) -> AsyncIterator[ServerSentEvent]:  # as a default: a string annotation could not name `known`
        """The same as server-sent events: one for each change, until the calibration has ended."""
        async for job, _ in admin.worker.follow(calibration):
            yield ServerSentEvent(data=_view(job, admin.worker), event=job.state)

    @routes.get("/calibrations/{calibration}/report", response_class=Response)
    async def report(calibration: str, format: Literal["html", "json"] = "html") -> Response:
        """The report of a calibration that succeeded."""
        job = await admin.jobs.get(calibration)
        if job.state != "succeeded" or job.outcome is None:
            raise Conflict(f"There is a report when the calibration has succeeded; it is {job.state}.")
        if format == "json":
            return JSONResponse(await admin.jobs.report(calibration))
        page = await asyncio.to_thread(_page, admin.engine.registry, job.outcome["guard"], job.outcome["version"])
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})

    @routes.delete("/calibrations/{calibration}", status_code=202)
    async def cancel(request: Request, calibration: str) -> JobView:
        """Cancel a calibration that has not ended."""
        await admin.worker.cancel(calibration)
        log.info("calibration_cancelled", job=calibration, request_id=request.state.request_id)
        return _view(await admin.jobs.get(calibration), admin.worker)

    @routes.put("/guards/{guard}/active", openapi_extra=_json_body(Activation))
    async def activate(request: Request, guard: str) -> GuardView:
        """Serve this version from now on. It is loaded and verified first; if that fails, the one before goes on serving."""
        wanted = await read_model(request, Activation, admin.json_bytes)
        await admin.change(admin.engine.activate, guard, wanted.version)
        log.info("guard_activated", guard=guard, version=wanted.version, request_id=request.state.request_id)
        return await asyncio.to_thread(views.one, guard)

    @routes.patch("/guards/{guard}", openapi_extra=_json_body(GuardChange))
    async def change(request: Request, guard: str) -> GuardView:
        """Change the mode or the target FPR; the validation scores are in the bundle, so nothing is calibrated again."""
        wanted = await read_model(request, GuardChange, admin.json_bytes)
        await admin.change(admin.engine.configure, guard, wanted.mode, wanted.target_fpr, wanted.own_target)
        log.info("guard_changed", guard=guard, request_id=request.state.request_id, **wanted.model_dump(exclude_unset=True))
        return await asyncio.to_thread(views.one, guard)

    @routes.delete("/guards/{guard}/active", status_code=204)
    async def deactivate(request: Request, guard: str) -> None:
        """Serve no version any more, so that each can be deleted; images for this guard are refused from then on."""
        await admin.change(admin.engine.deactivate, guard)
        log.info("guard_deactivated", guard=guard, request_id=request.state.request_id)

    @routes.delete("/guards/{guard}/versions/{version}", status_code=204)
    async def remove(request: Request, guard: str, version: str) -> None:
        """Delete a version that is not active."""
        if not version.isascii() or not version.isdecimal() or len(version) > 9:
            raise NotFound("There is no such version.")
        await asyncio.to_thread(admin.engine.registry.remove, guard, int(version))
        log.info("version_deleted", guard=guard, version=int(version), request_id=request.state.request_id)

    return routes


def _page(registry: Registry, guard: str, version: int) -> bytes:
    """The report of a version as HTML, read whole: it may be deleted at any moment. Raises NotFound."""
    try:
        return (registry.folder(guard, version) / "report.html").read_bytes()
    except (NotFound, FileNotFoundError) as error:
        raise NotFound(f"Version {version} of guard {guard} was deleted, and its page with it; `?format=json` still gives the report.") from error


def _view(job: Job, worker: Worker) -> JobView:
    progress = worker.progress(job.id) if job.state not in ENDED else None
    outcome = job.outcome or {}
    return JobView(
        id=job.id,
        state=job.state,
        guard=str(job.config["name"]),
        created=_time(job.created) or "",
        started=_time(job.started),
        ended=_time(job.ended),
        progress=JobProgress(**progress) if progress else None,
        result={key: outcome[key] for key in ("guard", "version", "bundle_id")} if job.state == "succeeded" else None,
        problem=outcome if job.state == "failed" else None,
    )


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
