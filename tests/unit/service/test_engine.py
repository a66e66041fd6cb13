"""What the engine leaves behind, and how it tells a device that is lost."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.serving.activations import resident_mib
from models.guard import Guard
from models.registry import Registry
from models.trunk import CannotCut
from service.engine import Engine, LiveGuard, give_back_memory, largest_batch
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

    def serve(guard: Guard, images: Tensor, threads: int, most: int, faithful: object) -> nn.Module:
        prepared.append(most)
        return guard

    monkeypatch.setattr("service.engine.serving", serve)
    Engine(make_registry(tmp_path), torch.device("cpu"), max_batch=7).refresh("cifar")
    assert prepared == [7]


class Takes(nn.Module):
    """Takes so many seconds of a clock that stands still otherwise for a batch of so many images, and has memory for `fits`."""

    def __init__(self, seconds: Callable[[int], float], fits: int = 1000) -> None:
        super().__init__()
        self.seconds, self.fits, self.now = seconds, fits, 0.0
        self.asked: list[int] = []

    def forward(self, pixels: Tensor, ungated: bool = False) -> Tensor:
        assert ungated
        if len(pixels) > self.fits:
            raise torch.OutOfMemoryError
        self.asked.append(len(pixels))
        self.now += self.seconds(len(pixels))
        return pixels


@pytest.mark.parametrize(
    ("network", "most", "asked"),
    [
        (Takes(lambda images: 0.001 * images), 64, [8] * 3),
        (Takes(lambda images: 0.1 * images), 20, [8] * 3 + [16] * 3),
        (Takes(lambda images: 3.0 * images), 1, [8]),
        (Takes(lambda images: 1.0), 64, [8] * 3 + [16] * 3 + [32] * 3 + [64] * 3),
        (Takes(lambda images: 0.1 * images, fits=8), 8, [8] * 3),
    ],
    ids=["a fast one", "a slow one", "a very slow one", "one that takes the same for any batch", "one that takes much memory"],
)
def test_x14_no_batch_takes_so_long_that_its_device_seems_lost(monkeypatch: pytest.MonkeyPatch, network: Takes, most: int, asked: list[int]) -> None:
    monkeypatch.setattr("service.engine.time.perf_counter", lambda: network.now)
    assert largest_batch(network, torch.zeros(8, 1), 1, 64) == most
    assert network.asked == asked


def test_of_three_turns_the_best_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [3.0, 0.01, 2.0]
    network = Takes(lambda images: left.pop(0))
    monkeypatch.setattr("service.engine.time.perf_counter", lambda: network.now)
    assert largest_batch(network, torch.zeros(8, 1), 1, 64) == 64


def test_memory_for_not_even_a_few_images_is_said_as_it_is() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        largest_batch(Takes(lambda images: 0.0, fits=7), torch.zeros(8, 1), 1, 64)


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


def test_there_are_as_many_slots_as_cores_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.cores", lambda: 3)
    assert Engine(make_registry(tmp_path), torch.device("cpu")).slots == 3


def test_one_guard_that_cannot_be_loaded_keeps_no_other_from_being_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, load = make_registry(tmp_path), Engine._load
    registry.activate("planes", publish(registry, "planes"))
    registry.activate("signs", publish(registry, "signs"))
    raised = {"planes": CannotCut("it branches"), "cifar": MemoryError()}

    def failing(engine: Engine, guard: str, version: int) -> LiveGuard:
        if guard in raised:
            raise raised[guard]
        return load(engine, guard, version)

    monkeypatch.setattr(Engine, "_load", failing)
    engine = Engine(registry, torch.device("cpu"))
    failed = engine.load_all()
    assert {name: problem.code for name, problem in failed.items()} == {"planes": "bundle_not_ready", "cifar": "bundle_not_ready"}
    assert [live.name for live in engine.all_live()] == ["signs"]


def test_a_target_is_that_of_the_active_version_and_the_mode_that_of_the_guard(tmp_path: Path) -> None:
    """Where another server has activated a version that this one has not loaded."""
    registry = make_registry(tmp_path)
    engine = Engine(registry, torch.device("cpu"))
    engine.load_all()
    engine.configure("cifar", target_fpr=0.1)
    registry.activate("cifar", publish(registry, images=1999))
    registry.configure("cifar", target_fpr=0.001)  # which 199 validation images cannot promise
    engine.configure("cifar", mode="shadow")
    live = engine.live("cifar")
    assert live is not None
    assert (live.version, live.mode, live.threshold.target_fpr) == (1, "shadow", 0.1)
    assert registry.state("cifar").mode == "shadow"


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
