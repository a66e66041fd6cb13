"""Runs the app under uvicorn: one socket, the hardened protocol, a drain that ends with exit status 0."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import torch
import uvicorn

from models import architectures
from models.device import find_device
from models.errors import Problem
from models.registry import Registry
from service.app import Service
from service.engine import Engine
from service.jobs import Jobs
from service.listener import AT_ONCE, Listener
from service.metrics import Metrics
from service.priority import step_back
from service.protocol import ProtocolLimits, make_protocol
from service.settings import Settings

# Between two steps, a thread that judges or decodes asks for the interpreter's lock, which the event loop gives back this late when it is busy: Python's own
# 5 ms are longer than the judging of an image.
SWITCH_SECONDS = 0.0003


class CannotStart(Exception):
    """The server cannot start; the message says what to do."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises CannotStart."""
    _configure_logging()
    _admit(settings)
    device = _device(settings)
    registry, jobs = _data(settings)
    metrics = Metrics()
    listener = _listen(settings, metrics)
    service = Service(settings, Engine(registry, device, settings.threads), jobs, metrics)
    limits = ProtocolLimits(upload_prefixes=("/v1/calibrations", "/v1/inspections"))
    sys.setswitchinterval(SWITCH_SECONDS)
    config = uvicorn.Config(
        service.app,
        http=make_protocol(limits, service.app.refusal),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        timeout_keep_alive=30,
        backlog=AT_ONCE,  # how long the queue is, the listener decides
    )
    address = f"http://{settings.host}:{listener.getsockname()[1]}"
    print(f"Serving on {address} (device {device.type}, data in {settings.data_dir})", flush=True)  # noqa: T201 - what a person waits for
    server = _Server(config, service)
    asyncio.run(server.serve([listener]))
    if not server.started:
        raise CannotStart("The server could not start; the log above says why.")


class _Server(uvicorn.Server):
    """uvicorn's server, but a signal begins the drain at once and is not raised again after it: a clean end is exit status 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        step_back()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        self._service.begin_drain()
        self.handle_exit(number, None)  # a second SIGINT makes uvicorn stop waiting


def _configure_logging() -> None:
    """One JSON object a line on standard error, the libraries' warnings included."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format='{"level": "%(levelname)s", "logger": "%(name)s", "event": "%(message)s"}')


def _admit(settings: Settings) -> None:
    for reference in settings.own_architectures:
        try:
            architectures.admit(reference)
        except Problem as problem:
            raise CannotStart(problem.detail) from problem


def _device(settings: Settings) -> torch.device:
    try:
        return find_device(settings.device)
    except Problem as problem:
        raise CannotStart(problem.detail) from problem


def _data(settings: Settings) -> tuple[Registry, Jobs]:
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        probe = settings.data_dir / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
        return Registry(settings.data_dir / "guards"), Jobs(settings.data_dir / "jobs.sqlite", settings.queued_jobs)
    except OSError as error:
        raise CannotStart(
            f"The data directory {settings.data_dir} cannot be written ({error.strerror}); choose another with --data-dir, or mend its permissions."
        ) from error


def _listen(settings: Settings, metrics: Metrics) -> Listener:
    try:
        return Listener(settings.host, settings.port, metrics.connections_abandoned.inc)
    except OSError as error:
        raise CannotStart(
            f"Cannot listen on {settings.host} port {settings.port} ({error.strerror}); choose another port with --port, or stop what uses it."
        ) from error
