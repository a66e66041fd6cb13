"""A device that cannot be used is named, and whoever named it learns what can be."""

from __future__ import annotations

import pytest
import torch

from models.device import find_device
from models.errors import ConfigInvalid


def test_auto_is_a_device_that_computes() -> None:
    assert torch.ones(2, device=find_device("auto")).sum() == 2


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta:x", ""])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"'{name}' cannot be used here; auto, cpu"):
        find_device(name)


def test_a_full_device_is_not_told_to_be_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(ConfigInvalid, match="no free memory"):
        find_device("cpu")
