"""The process that reads hostile files and calibrates, `python -m calibration`: how it is started, and what its end means."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from models.errors import OutOfMemory, Problem, TookTooLong
from service.priority import put_back

LONGEST_LINE = 8 * 1024 * 1024  # bytes: the result line carries the whole report


def command(action: str, config: str | None, admitted: Sequence[str] = (), **options: object) -> list[str]:
    """The command line. config: as JSON; admitted: the operator's own architectures, package.module:factory; options: those that are not None."""
    words = [sys.executable, "-m", "calibration", action, *([] if config is None else ["--config", config])]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    return [*words, *(f"--admit={reference}" for reference in admitted)]


def environment() -> dict[str, str]:
    """Ours, for what reads hostile files: nothing in it says what opens the service."""
    return {key: value for key, value in os.environ.items() if not (key.upper().startswith("BADEXPERT_") and "TOKEN" in key.upper())}


async def start(words: Sequence[str]) -> asyncio.subprocess.Process:
    """In a session of its own, so that nothing that it starts outlives it; it gives way to the server."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        limit=LONGEST_LINE,
        env=environment(),
    )
    put_back(process.pid, leads=True)
    return process


def tell(child: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a signal to a child of `start`, and to all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def without_a_word(status: int | None, where: str) -> Problem:
    """What a child ended of that said nothing: the kernel's out-of-memory killer, or the clock of the sandbox for what does not stop. where: more is told."""
    if status == -signal.SIGKILL:
        return OutOfMemory()
    if status == -signal.SIGXCPU:
        return TookTooLong()
    return Problem(f"The calibration process ended unexpectedly; {where}.")
