"""A server that cannot start says what to do."""

from __future__ import annotations

import pytest
import torch

from service.server import CannotStart, _device
from service.settings import Settings


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(CannotStart, match="'gpu' cannot be used"):
        _device(Settings(device="gpu"))


def test_a_full_device_is_not_told_to_be_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(CannotStart, match="no free memory"):
        _device(Settings(device="cpu"))
