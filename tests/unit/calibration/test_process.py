"""The process of a calibration, as far as no calibration runs in it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import pytest
import torch

from calibration.__main__ import _device
from models import device


@pytest.fixture
def settings() -> Iterator[None]:
    kept = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = kept


@pytest.mark.usefixtures("settings")
def test_on_a_gpu_it_is_deterministic_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of VGG's adaptive pooling has no deterministic kernel there, and must not end the calibration."""
    monkeypatch.setattr(device, "find_device", lambda name: torch.device(name))
    assert _device(Namespace(device="cuda")).type == "cuda"
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
