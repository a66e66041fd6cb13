"""Runs the app under uvicorn: one socket, the hardened protocol, a drain that ends in time and with exit status 0."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import structlog
import torch
import uvicorn

from models import architectures
from models.device import find_device
from models.errors import Problem
from models.registry import Registry
from service import logs
from service.app import Service
from service.engine import Engine
from service.jobs import Jobs
from service.listener import AT_ONCE, Full, Listener
from service.logs import Log
from service.metrics import Metrics
from service.protocol import ProtocolLimits, close_waiting, make_protocol
from service.settings import Settings

# Between two steps, a thread that judges or decodes asks for the interpreter's lock, which the event loop gives back this late when it is busy: Python's own
# 5 ms are longer than the judging of an image.
SWITCH_SECONDS = 0.0003
LEAVE_SECONDS = 1.8  # after the drain's time the process is left, whatever still runs in it
FLUSH_SECONDS, LAST_FLUSH_SECONDS = 1.0, 0.1  # for what is still to be written to the log, at a usual end and when the process is left
TICK_SECONDS = 1.0  # between two settings of the Date that answers carry
log = structlog.get_logger()


class CannotStart(Exception):
    """The server cannot start; the message says what to do."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises CannotStart."""
    log_lines = logs.configure()
    try:
        _serve(settings, log_lines)
    finally:
        log_lines.flush(FLUSH_SECONDS)


def _serve(settings: Settings, log_lines: Log) -> None:
    _admit(settings)
    device = _device(settings)
    registry, jobs = _data(settings)
    metrics = Metrics()
    listener = _listen(settings, metrics)
    engine = Engine(registry, device, settings.threads, settings.max_batch)
    try:
        service = Service(settings, engine, jobs, metrics)
    except RuntimeError as error:  # of its pools: nothing else in it computes or starts
        raise CannotStart(f"{error}: let this process have more threads (TasksMax= of systemd, --pids-limit of Docker, ulimit -u).") from error
    limits = ProtocolLimits(upload_prefixes=("/v1/calibrations", "/v1/inspections"))
    sys.setswitchinterval(SWITCH_SECONDS)
    config = uvicorn.Config(
        service.app,
        http=make_protocol(limits, service.app.refusal, lambda status: metrics.requests.labels("other", "unmatched", str(status)).inc()),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.floor(settings.drain_seconds) + 1,  # a whole number, and more than what was admitted gets to be answered
        timeout_keep_alive=30,
        backlog=AT_ONCE,  # how long the queue is, the listener decides
    )
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    server = _Server(config, service, log_lines, f"Serving on {address} (device {device.type}, data in {settings.data_dir}{_openness(settings)})")
    listener.on_full = lambda: close_waiting(server.server_state.connections)
    try:
        asyncio.run(server.serve([listener]))
    except SystemExit as error:  # uvicorn's way to say that the app did not start
        raise CannotStart("The server could not start; the log above says why.") from error


class _Server(uvicorn.Server):
    """uvicorn's server, but a signal begins the drain at once and is not raised again after it: a clean end is exit status 0."""

    def __init__(self, config: uvicorn.Config, service: Service, log_lines: Log, announcement: str) -> None:
        super().__init__(config)
        self._service, self._log_lines, self._announcement = service, log_lines, announcement
        self._last: threading.Timer | None = None
        self._signalled = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().set_exception_handler(_on_error_of_loop)
        logs.adopt()  # whatever was imported for the bundles, too
        print(self._announcement, flush=True)  # noqa: T201 - what a person waits for

    async def main_loop(self) -> None:
        """Until a signal came. uvicorn's own looks for one ten times a second, and most of what an idle server takes is that it wakes up."""
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._signalled.wait(), TICK_SECONDS)

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
        self._signalled.set()
        if self._last is None:
            # The interpreter would wait for its threads, and one that waits for the device may never end.
            self._last = threading.Timer(self._service.settings.drain_seconds + LEAVE_SECONDS, _leave, [self._log_lines])
            self._last.daemon = True
            self._last.start()


def _on_error_of_loop(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), Full):  # of which the listener itself tells, and not each second
        loop.default_exception_handler(context)


def _leave(log_lines: Log) -> None:
    running = sorted(thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread())
    log.error("threads_left", threads=running, detail="The time for the drain is over; what these threads wait for does not come.")
    log_lines.flush(LAST_FLUSH_SECONDS)
    os._exit(0)


def _openness(settings: Settings) -> str:
    if settings.token("admin"):
        return ""
    others = settings.token("predict") or settings.token("metrics")
    return "; no admin token is set: " + ("nobody may administer" if others else "all programs of this machine may administer")


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
        remedy = "choose another port with --port, or stop what uses it"
        if error.errno == errno.EADDRNOTAVAIL:
            remedy = "--host has to be an address of this machine, or 0.0.0.0 for all of them"
        raise CannotStart(f"Cannot listen on {settings.host} port {settings.port} ({error.strerror}); {remedy}.") from error
