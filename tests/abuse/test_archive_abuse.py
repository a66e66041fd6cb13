"""Torch archives that lie about what is in them: row B1a of the catalogue of bad inputs."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import pytest

from models.checkpoint import Limits, read_checkpoint
from models.errors import CheckpointInvalid
from tests.abuse.hostile_checkpoints import ARCHIVES, CENTRAL, LOCAL, full_end, honest, packed, patched, tensors_pickle, weights
from tests.abuse.refusals import at_most, read, refused


def test_an_archive_that_hands_its_numbers_to_the_zip64_record_is_read(tmp_path: Path) -> None:
    assert list(read(tmp_path, full_end(honest()))) == list(weights())


@pytest.mark.parametrize("name", ARCHIVES)
def test_b1a_an_archive_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    data = ARCHIVES[name]()
    with at_most(2, 20):
        refused(tmp_path, data)


def test_b1a_an_entry_that_inflates_a_thousandfold_is_refused_unmade(tmp_path: Path) -> None:
    data = packed(tensors_pickle(("0", 50_000_000, 0, (50_000_000,), (1,))), {"0": bytes(200_000_000)}, method=zipfile.ZIP_DEFLATED)
    with at_most(5, 20):
        refused(tmp_path, data, match="inflates")


def test_b1a_many_entries_that_inflate_share_one_budget(tmp_path: Path) -> None:
    claims = [(str(i), 1_000_000, 0, (1_000_000,), (1,)) for i in range(20)]
    data = packed(tensors_pickle(*claims), {str(i): bytes(4_000_000) for i in range(20)}, method=zipfile.ZIP_DEFLATED)
    with at_most(5, 60):
        refused(tmp_path, data, match="inflates")


def test_b1a_an_entry_that_inflates_to_more_than_it_states_is_stopped_at_once(tmp_path: Path) -> None:
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = engine.compress(bytes(100_000_000)) + engine.flush()
    data = packed(tensors_pickle(("0", 6, 0, (6,), (1,))), {"0": bomb})  # stored, then called deflated with 24 bytes inside
    data = patched(patched(data, LOCAL, 8, "<H", 8), CENTRAL, 10, "<H", 8)
    with at_most(2, 20):
        refused(tmp_path, patched(data, CENTRAL, 24, "<I", 24), match="size that it states")


def test_b1a_a_compressed_pickle_larger_than_its_cap_is_never_inflated(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(packed(b"N" * 2_000_000 + b".", method=zipfile.ZIP_DEFLATED))
    with at_most(2, 10), pytest.raises(CheckpointInvalid):
        read_checkpoint(tmp_path / "file", Limits(pickle_bytes=1_000_000))


def test_b1a_more_entries_than_the_cap_are_refused_before_they_are_listed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(packed(b"N.", {str(i): b"" for i in range(2_000)}))
    with at_most(2, 5), pytest.raises(CheckpointInvalid, match="entries"):
        read_checkpoint(tmp_path / "file", Limits(zip_entries=1_000))
