"""What those who operate the service ask it: metrics, whether it lives, whether it is ready."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.auth import Authenticator
from service.bodies import Budget
from service.engine import Engine
from service.errors import NotReady
from service.health import Health
from service.jobs import Jobs
from service.metrics import MOST_CLASSES, Metrics
from service.predict import ImageBatcher


@dataclass(frozen=True)
class Operations:
    """What the answers are made of."""

    health: Health
    engine: Engine
    batcher: ImageBatcher
    jobs: Jobs
    metrics: Metrics
    queue_images: int
    bodies: Budget

    def exposition(self) -> bytes:
        """The metrics, with gauges as things are now."""
        m = self.metrics
        m.queue_images.set(self.batcher.waiting)
        m.queue_capacity.set(self.queue_images)
        m.body_bytes.set(self.bodies.held)
        m.body_capacity.set(self.bodies.most)
        m.ready.set(0 if self.health.not_ready() else 1)
        m.jobs_available.set(1 if self.jobs.available else 0)
        for series in (m.guard_info, m.threshold, m.target_fpr, m.guard_unavailable):
            series.clear()
        for name in self.health.unavailable():
            m.guard_unavailable.labels(name).set(1)
        for live in self.engine.all_live():
            m.threshold.labels(live.name).set(live.threshold.value)
            m.target_fpr.labels(live.name).set(live.threshold.target_fpr)
            m.guard_info.labels(live.name, str(live.version), live.bundle_id[:12], live.mode).set(1)
            for verdict in ("accepted", "rejected"):
                m.verdicts.labels(live.name, verdict)  # a series from the start: rate() sees the first rejection
            for label in range(min(len(live.description.class_names), MOST_CLASSES)):
                m.rejections.labels(live.name, str(label))
        return m.render()


def router(operations: Operations, authenticator: Authenticator) -> APIRouter:
    """The routes for Prometheus and for what starts and stops servers."""
    router, health = APIRouter(tags=["operations"]), operations.health

    @router.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Prometheus exposition. Where any token is set, this needs the metrics or the admin scope."""
        authenticator.require(request, "metrics")
        return Response(operations.exposition(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/livez")
    async def livez() -> dict[str, str]:
        """The event loop turns. A process whose device is lost ends by itself."""
        return {"status": "alive"}

    @router.get("/readyz")
    async def readyz() -> dict[str, object]:
        """Traffic may be sent here. Guards under `unavailable` could not be loaded, and why; 503 where there are only such."""
        reason = health.not_ready()
        if reason:
            raise NotReady(reason)
        return {"status": "ready", "guards": sorted(live.name for live in operations.engine.all_live()), "unavailable": health.unavailable()}

    return router
