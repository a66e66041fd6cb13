"""What the engine leaves behind, and how it tells a device that is lost."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.serving.activations import resident_mib
from models.guard import Guard, Judgement
from models.registry import Registry
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


def test_a_gpu_prepares_for_the_largest_batch_that_the_server_sends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []

    def serve(guard: Guard, images: Tensor, threads: int, most: int) -> nn.Module:
        prepared.append(most)
        return guard

    monkeypatch.setattr("service.engine.serving", serve)
    Engine(make_registry(tmp_path), torch.device("cpu"), max_batch=7).refresh("cifar")
    assert prepared == [7]


class Slow(nn.Module):
    """Judges as the guard does, but so many seconds an image later."""

    def __init__(self, guard: Guard, seconds: float) -> None:
        super().__init__()
        self.guard, self.seconds = guard, seconds

    def forward(self, pixels: Tensor, ungated: bool = False, threshold: float = math.inf) -> Judgement:
        time.sleep(self.seconds * len(pixels))
        judged: Judgement = self.guard(pixels, ungated, threshold)
        return judged


@pytest.mark.parametrize(("allowed", "takes", "found"), [(1e9, 0.0, range(64, 65)), (0.1, 0.005, range(1, 21)), (0.1, 0.11, range(1, 2))])
def test_x14_no_batch_of_a_slow_network_takes_so_long_that_its_device_seems_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: float, takes: float, found: range
) -> None:
    """allowed: seconds a batch; takes: seconds an image, at least."""
    monkeypatch.setattr("service.engine.BATCH_SECONDS", allowed)
    monkeypatch.setattr("service.engine.serving", lambda guard, images, threads, most: Slow(guard, takes))
    live = Engine(make_registry(tmp_path), torch.device("cpu")).refresh("cifar")
    assert live is not None
    assert live.most in found


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


def a_pulse(*errors: Exception | None) -> Any:
    """A tensor whose computations end so, one after the other."""
    left = list(errors)

    class Pulse:
        def fill_(self, _: float) -> Pulse:
            return self

        def item(self) -> float:
            error = left.pop(0)
            if error is not None:
                raise error
            return 1.0

    return Pulse()


ASSERTED = RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize(
    "errors",
    [
        (None,),
        (ASSERTED, None),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError("no memory")),
        (RuntimeError("CUDA error: out of memory"), RuntimeError("CUDA error: out of memory")),
    ],
    ids=["a device that computes", "an error that was left behind by what went before", "full memory", "full memory where a kernel was to be loaded"],
)
def test_x9_the_device_is_not_lost_for(tmp_path: Path, errors: tuple[Exception | None, ...]) -> None:
    engine = Engine(Registry(tmp_path), torch.device("cpu"))
    engine.probe()
    engine._pulse = a_pulse(*errors)
    engine.probe()


def test_x11_an_error_that_persists_is_raised_by_the_probe(tmp_path: Path) -> None:
    engine = Engine(Registry(tmp_path), torch.device("cpu"))
    engine._pulse = a_pulse(ASSERTED, ASSERTED)
    with pytest.raises(RuntimeError, match="assert triggered"):
        engine.probe()
