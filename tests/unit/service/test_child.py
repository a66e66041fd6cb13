"""The process that reads hostile files and calibrates."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from service import child
from service.priority import CALIBRATION


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is put back")
def test_it_gives_way_to_all_that_serves() -> None:
    async def niceness() -> int:
        process = await child.start([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            return os.getpriority(os.PRIO_PROCESS, process.pid)
        finally:
            child.tell(process, signal.SIGKILL)
            await process.wait()

    assert asyncio.run(niceness()) == max(CALIBRATION, os.getpriority(os.PRIO_PROCESS, 0))
