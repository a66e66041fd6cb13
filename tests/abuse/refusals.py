"""What refusing a checkpoint file has to be: of one kind, in short and printable words, and cheap."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import Tensor

from models.checkpoint import read_checkpoint
from models.errors import CheckpointInvalid, CheckpointProblem


def read(tmp_path: Path, data: bytes) -> dict[str, Tensor]:
    (tmp_path / "file").write_bytes(data)
    return read_checkpoint(tmp_path / "file").tensors


def refused(tmp_path: Path, data: bytes, kind: type[CheckpointProblem] = CheckpointInvalid, match: str | None = None) -> str:
    with pytest.raises(kind, match=match) as caught:
        read(tmp_path, data)
    assert type(caught.value) is kind
    assert len(caught.value.detail) < 500
    assert caught.value.detail.isprintable()
    return caught.value.detail


@contextmanager
def at_most(seconds: float, mebibytes: float) -> Iterator[None]:
    """Processor time rather than wall time, since the machine may be shared; memory as Python sees it."""
    tracemalloc.start()
    start = time.process_time()
    yield
    spent, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert spent < seconds
    assert peak < mebibytes * 2**20
