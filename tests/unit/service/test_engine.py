"""What the engine leaves behind."""

from __future__ import annotations

import ctypes
import os
import sys

import pytest

from benchmarks.serving.activations import resident_mib
from service.engine import give_back_memory


@pytest.mark.skipif(not (sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")), reason="another C library gives back when it will")
def test_what_is_free_between_pieces_that_stay_goes_back_to_the_system() -> None:
    pieces = [bytes(4096) for _ in range(50_000)]  # 200 MiB
    staying = pieces[::500]
    held = resident_mib(os.getpid())
    pieces.clear()
    give_back_memory()
    assert resident_mib(os.getpid()) < held - 100
    assert len(staying) == 100
