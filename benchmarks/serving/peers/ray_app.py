"""Ray Serve: a proxy in Python, replicas as actors, batches gathered by each replica."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import ray  # type: ignore[import-not-found,unused-ignore]
from ray import serve  # type: ignore[import-not-found,unused-ignore]
from starlette.requests import Request

from benchmarks.serving.peers.networks import Networks

WORKERS = int(os.environ["WORKERS"])


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})  # type: ignore[untyped-decorator,unused-ignore]
class Inference:
    def __init__(self) -> None:
        self.networks = Networks()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)  # type: ignore[untyped-decorator,unused-ignore]
    async def judge(self, images: list[bytes]) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self.networks.answer, images)

    async def __call__(self, request: Request) -> dict[str, Any]:
        answer: dict[str, Any] = await self.judge(await request.body())
        return answer


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PORT"])})
    serve.run(Inference.bind(), route_prefix="/")  # type: ignore[attr-defined,unused-ignore]
    signal.pause()
