"""Checkpoints of other formats, over the caps, or with strange metadata: rows B1, B9 and B22 of the catalogue of bad inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint import read_checkpoint
from models.errors import CheckpointFormat, CheckpointInvalid, CheckpointMismatch
from tests.abuse.hostile_checkpoints import B1, framed
from tests.abuse.refusals import at_most, refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", B1)
def test_b1_another_format_is_refused_and_the_detail_says_how_to_convert(tmp_path: Path, name: str) -> None:
    B1[name](tmp_path / "file")
    detail = refused(tmp_path, (tmp_path / "file").read_bytes(), CheckpointFormat)
    assert "load it where it was made and save" in detail.lower()


def test_a_file_over_the_cap_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(5 << 30)  # sparse
    with at_most(1, 1), pytest.raises(CheckpointInvalid):
        read_checkpoint(tmp_path / "file")


def test_b9_no_tensors_fit_no_architecture(tmp_path: Path) -> None:
    for data in (framed(b"{}"), framed(b'{"__metadata__": {"format": "pt"}}')):
        refused(tmp_path, data, CheckpointMismatch)


@pytest.mark.parametrize("metadata", ["x" * 900_000, "<script>alert(1)</script>", "\x1b[2J\x07", "\u202egnp", 5, None, [["deep"]]], ids=range(7))
def test_b22_metadata_is_ignored_and_never_echoed(tmp_path: Path, metadata: Any, caplog: pytest.LogCaptureFixture) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    (tmp_path / "file").write_bytes(framed(json.dumps({"__metadata__": {"note": metadata}, "a.b": entry}).encode(), bytes(8)))
    found = read_checkpoint(tmp_path / "file")
    assert list(found.tensors) == ["a.b"]
    assert (found.notes, found.hints, caplog.text) == ((), {}, "")
    spoiled = framed(json.dumps({"__metadata__": metadata, "a.b": {**entry, "shape": [3]}}).encode(), bytes(8))
    assert "script" not in refused(tmp_path, spoiled)
