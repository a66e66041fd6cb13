"""The log: one JSON object a line on standard error, whatever Python's libraries log or warn of included.

Whoever reads standard error may stop reading, and a write to it then waits for ever. So only a thread of its own writes. All others leave their lines in a
queue; where it is full, what follows is dropped and counted until all that waits is written, and a line in that place says how many are missing.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
from logging.handlers import QueueHandler, QueueListener

import structlog

WAITING = 1000  # lines that may wait to be written
OWN = "badexpert"  # the logger of what the service says itself, at any level; libraries are heard from warnings on
COMMON: tuple[structlog.typing.Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
)
RENDER = structlog.processors.JSONRenderer()


class _Waiting(QueueHandler):
    """Renders lines and leaves them in the queue. Never waits."""

    def __init__(self, lines: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(lines)
        self._dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._dropped:  # until it is told: what is told of then lies between the lines before it and those after it
            self._dropped += 1
            return
        try:
            super().enqueue(record)
        except queue.Full:
            self._dropped = 1

    def take_dropped(self) -> int:
        self.acquire()  # as whoever enqueues does
        try:
            dropped, self._dropped = self._dropped, 0
        finally:
            self.release()
        return dropped


class Log(QueueListener):
    """Writes what waits, in a daemon thread. Straight to the descriptor: the lock of Python's own file would be held by a write that waits for ever."""

    def __init__(self, descriptor: int) -> None:
        self._lines: queue.Queue[logging.LogRecord] = queue.Queue(WAITING)
        self.waiting = _Waiting(self._lines)
        self._descriptor = descriptor
        self._lost = 0
        super().__init__(self._lines)

    def handle(self, record: logging.LogRecord) -> None:
        self._lost += not self._write(record.getMessage())
        if self._lines.empty():
            self._lost += self.waiting.take_dropped()
            if self._lost and self._write(self._tell(self._lost)):
                self._lost = 0

    def _write(self, line: str) -> bool:
        left = line.encode() + b"\n"
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:  # nobody will ever read it, or the disk is full
            return False
        return True

    @staticmethod
    def _tell(lost: int) -> str:
        event: structlog.typing.EventDict = {"event": "log_lines_lost", "lost": lost, "detail": "Whatever reads standard error was too slow, or had stopped."}
        for step in COMMON:
            event = step(None, "warning", event)  # type: ignore[assignment]
        return str(RENDER(None, "warning", event))

    def flush(self, seconds: float) -> None:
        """Wait until all is written, but not for longer than this."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, seconds)


def configure() -> Log:
    """For the whole process."""
    log = Log(sys.stderr.fileno() if sys.stderr else os.open(os.devnull, os.O_WRONLY))
    log.waiting.addFilter(lambda record: record.name == OWN or record.levelno >= logging.WARNING)
    log.waiting.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, structlog.processors.StackInfoRenderer(), *COMMON],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, RENDER],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[log.waiting])
    own = logging.getLogger(OWN)
    own.setLevel(logging.DEBUG)
    structlog.configure(processors=[*COMMON, structlog.stdlib.ProcessorFormatter.wrap_for_formatter], logger_factory=lambda *_: own)
    logging.captureWarnings(True)
    adopt()
    log.start()
    return log


def adopt() -> None:
    """Libraries such as torch bring handlers that write lines of their own to standard error: what they log goes the one way of all."""
    for logger in list(logging.root.manager.loggerDict.values()):
        for handler in list(getattr(logger, "handlers", ())):
            if isinstance(logger, logging.Logger) and getattr(handler, "stream", None) is sys.stderr:
                logger.removeHandler(handler)
                logger.propagate = True
