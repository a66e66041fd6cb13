"""What the engine leaves behind."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.serving.activations import resident_mib
from service.engine import Engine, give_back_memory
from tests.support import make_registry, publish


@pytest.mark.skipif(not (sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")), reason="another C library gives back when it will")
def test_what_is_free_between_pieces_that_stay_goes_back_to_the_system() -> None:
    pieces = [bytes(4096) for _ in range(50_000)]  # 200 MiB
    staying = pieces[::500]
    held = resident_mib(os.getpid())
    pieces.clear()
    give_back_memory()
    assert resident_mib(os.getpid()) < held - 100
    assert len(staying) == 100


def test_memory_is_given_back_where_a_bundle_was_loaded_and_only_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a server starts and when it activates; a change of the mode or the target loads nothing."""
    registry, given_back = make_registry(tmp_path), []
    monkeypatch.setattr("service.engine.give_back_memory", lambda: given_back.append(True))
    engine = Engine(registry, torch.device("cpu"))
    engine.refresh("cifar")
    assert len(given_back) == 1
    registry.configure("cifar", mode="shadow")
    live = engine.refresh("cifar")
    assert live is not None
    assert (live.version, live.mode) == (1, "shadow")
    assert len(given_back) == 1
    registry.activate("cifar", publish(registry, seed=1))
    live = engine.refresh("cifar")
    assert live is not None
    assert live.version == 2
    assert engine.live("cifar") is live
    assert len(given_back) == 2
    assert engine.activate("cifar", 1).version == 1
    assert len(given_back) == 3
    engine.configure("cifar", mode="enforce", target_fpr=0.1)
    assert len(given_back) == 3
