"""What tests of the service share: a small real guard, the real service in this process, and the one shape of an error."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import numpy as np
import torch
from PIL import Image

from models import bundle
from models.cifar import thin_resnet
from models.guard import Guard
from models.preprocessing import Preprocessing
from models.registry import Registry
from models.threshold import conformal_threshold
from service.app import Service
from service.engine import Engine
from service.jobs import Jobs
from service.metrics import Metrics
from service.settings import Settings

ACCEPTS_ALL, REJECTS_ALL = (-60.0, -50.0), (50.0, 60.0)  # validation scores between these put the threshold below, or above, every real score
Headers = Sequence[tuple[str, str]]


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The one shape of an error (RFC 9457 with `code` and `request_id`); returns the body."""
    assert response.status_code == status, (response.status_code, response.text[:500])
    body: dict[str, Any] = response.json()
    assert body["code"] == code, body
    assert body["status"] == status
    wanted = ["type", "title", "status", "code", "detail", "request_id"]
    assert list(body) in (wanted, [*wanted, "errors"])
    assert all(body[key] for key in wanted)
    assert body["type"] == f"urn:badexpert:{code}"
    if "errors" in body:
        assert status == 422
        assert body["errors"] and all(set(error) == {"field", "message"} for error in body["errors"])
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers.get_list("x-request-id") == [body["request_id"]]
    assert re.fullmatch(r"[A-Za-z0-9._-]{8,64}", body["request_id"])
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert ("www-authenticate" in response.headers) == (status == 401)
    assert ("allow" in response.headers) == (status == 405)
    assert "Traceback" not in response.text and "site-packages" not in response.text
    return body


def network(seed: int, classes: int = 10) -> torch.nn.Module:
    """A ResNet-20 with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return thin_resnet(20, classes).eval()


def publish(
    registry: Registry,
    guard: str = "cifar",
    *,
    scores: tuple[float, float] = ACCEPTS_ALL,
    images: int = 199,
    seed: int = 0,
    fpr: float = 0.05,
    job: str | None = None,
) -> int:
    """A real bundle in a real registry, made by a job; returns its version."""
    validation = torch.linspace(*scores, images, dtype=torch.float64)
    description = bundle.Description(
        architecture="resnet20",
        num_classes=10,
        class_names=tuple(f"class {i}" for i in range(10)),
        preprocessing=Preprocessing(),
        preset="auto",
        seed=seed,
        cuts=None,
        experts=1,
        c=0.5,
        scales=None,
        threshold=conformal_threshold(validation, fpr),
    )
    judge = Guard(network(seed), [network(seed + 1)], network(seed + 2), Preprocessing())
    reports = {"report.json": "{}", "report.html": "<!doctype html><title>Report</title>"}
    with registry.staging() as folder:
        bundle.write(folder, description, judge, validation, {"created": "2026-01-01T00:00:00Z", "job": job}, reports)
        return registry.publish(guard, folder)


def make_registry(data_dir: Path, *, scores: tuple[float, float] = ACCEPTS_ALL) -> Registry:
    """One guard, `cifar`, with version 1 active."""
    registry = Registry(data_dir / "guards")
    registry.activate("cifar", publish(registry, scores=scores))
    return registry


def make_service(data_dir: Path, engine: type[Engine] = Engine, *, registry: Registry | None = None, **settings: Any) -> Service:
    """The real service on the CPU, with its real collaborators, serving `make_registry` unless told otherwise."""
    registry = registry or make_registry(data_dir)
    read = Settings(data_dir=data_dir, device="cpu", **settings)
    return Service(read, engine(registry, torch.device("cpu")), Jobs(data_dir / "jobs.sqlite", read.queued_jobs), Metrics())


class Client:
    """Speaks ASGI to a service in this process, byte for byte: nothing tidies paths or adds headers on the way."""

    def __init__(self, service: Service, runner: asyncio.Runner) -> None:
        self.service, self.runner = service, runner

    async def call(
        self,
        method: str,
        target: str,
        headers: Headers = (),
        body: bytes | Iterable[bytes] = b"",
        *,
        peer: str = "127.0.0.1",
        on_receive: Callable[[], None] = lambda: None,
    ) -> httpx.Response:
        """One request. A body of bytes announces its length, one in pieces does not; `on_receive` is called when the body is asked for."""
        pieces = iter([body] if isinstance(body, bytes) else body)
        names = {name.lower() for name, _ in headers}
        announced = [("content-length", str(len(body)))] if isinstance(body, bytes) and body and "content-length" not in names else []
        path, _, query = target.partition("?")
        answered, ended = asyncio.Event(), False
        start: dict[str, Any] = {}
        answer = bytearray()

        async def receive() -> dict[str, Any]:
            nonlocal ended
            on_receive()
            if ended:
                await answered.wait()
                return {"type": "http.disconnect"}
            piece = next(pieces, None)
            ended = piece is None
            return {"type": "http.request", "body": piece or b"", "more_body": not ended}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert not start
                start.update(message)
            else:
                answer.extend(message.get("body", b""))
                if not message.get("more_body"):
                    answered.set()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "root_path": "",
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in [("host", "localhost"), *announced, *headers]],
            "client": (peer, 50000),
            "server": ("guard.test", 80),
        }
        await self.service.app(scope, receive, send)
        assert answered.is_set()
        return httpx.Response(start["status"], headers=start["headers"], content=bytes(answer))

    def __call__(self, method: str, target: str, headers: Headers = (), body: bytes | Iterable[bytes] = b"", **options: Any) -> httpx.Response:
        return self.runner.run(self.call(method, target, headers, body, **options))

    def predict(self, data: bytes | Iterable[bytes], content_type: str = "image/png", *headers: tuple[str, str]) -> httpx.Response:
        return self("POST", "/v1/guards/cifar/predict", [("Content-Type", content_type), *headers], data)

    def json(self, method: str, target: str, body: str | bytes, *headers: tuple[str, str]) -> httpx.Response:
        return self(method, target, [("Content-Type", "application/json"), *headers], body.encode() if isinstance(body, str) else body)

    def assert_serves(self) -> None:
        """What came before has hurt nobody: a good image is judged, and nothing waits."""
        response = self.predict(png())
        assert response.status_code == 200, response.text
        assert response.json()["verdict"] == "accepted"
        assert self.service.batcher.waiting == 0


async def _nothing() -> None:
    pass


@contextmanager
def serving(service: Service) -> Iterator[Client]:
    """The service between start and end of its lifespan. Calibration jobs stay in the queue: no child process is started."""
    service.worker.start = _nothing  # type: ignore[method-assign]
    with asyncio.Runner() as runner:
        lifespan = service.api.router.lifespan_context(service.api)
        runner.run(_enter(lifespan))
        try:
            yield Client(service, runner)
        finally:
            runner.run(lifespan.__aexit__(None, None, None))


async def _enter(lifespan: Any) -> None:
    await lifespan.__aenter__()


def pixels(width: int = 32, height: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png(width: int = 32, height: int = 32, seed: int = 0) -> bytes:
    return encode(Image.fromarray(pixels(width, height, seed=seed)), "PNG")


def jpeg(width: int = 32, height: int = 32, **options: Any) -> bytes:
    return encode(Image.fromarray(pixels(width, height)), "JPEG", **options)


BOUNDARY = "boundary"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"


def part(name: str, data: bytes, filename: str | None = "a.png", *lines: str) -> bytes:
    """One part of a multipart body; without a file name it is a text field."""
    file = "" if filename is None else f'; filename="{filename}"'
    head = [f'Content-Disposition: form-data; name="{name}"{file}', *lines]
    return f"--{BOUNDARY}\r\n".encode() + "\r\n".join(head).encode("utf-8") + b"\r\n\r\n" + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
