"""Hostile safetensors files: rows B3 to B8 and B11 of the catalogue of bad inputs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from models.checkpoint import read_checkpoint
from models.errors import CheckpointDtype, CheckpointInvalid
from tests.abuse.hostile_checkpoints import SAFETENSORS, described, framed
from tests.abuse.refusals import at_most, refused


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_hostile_safetensors_file_is_refused_quickly(tmp_path: Path, name: str) -> None:
    spent = []
    for _ in range(3):  # the best of three: the collector of a test process has more to walk than that of a calibration
        start = time.process_time()
        refused(tmp_path, SAFETENSORS[name])
        spent.append(time.process_time() - start)
    assert min(spent) < 0.2


def test_b4_the_header_cap_is_checked_before_the_header_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(framed(b"{" + b" " * 101_000_000))
    with at_most(1, 1), pytest.raises(CheckpointInvalid):
        read_checkpoint(tmp_path / "file")


def test_b11_a_dtype_of_less_than_a_byte_is_refused_by_its_own_code(tmp_path: Path) -> None:
    refused(tmp_path, described(bytes(1), a=("F4", [2], [0, 1])), CheckpointDtype)
