"""How much memory an activation costs, from what was seen."""

from __future__ import annotations

import os

import pytest

from benchmarks.serving.activations import growth, resident_mib


def test_a_leak_is_told_by_its_size_and_a_jump_is_none() -> None:
    settling = [400.0, 480.0, 500.0, 510.0, 512.0]
    assert growth([*settling, *[512.0 + each for each in range(1, 16)]], every=8) == pytest.approx(128)
    assert growth([*settling, *[512.0] * 11, *[540.0] * 4], every=8) == 0
    assert growth([*settling, *[512.0, 511.0] * 8], every=8) <= 0


def test_the_memory_of_a_process_is_its_resident_set() -> None:
    assert 10 < resident_mib(os.getpid()) < 100_000
