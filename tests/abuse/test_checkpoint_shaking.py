"""Checkpoints changed at random: nothing but CheckpointProblem comes out. (Coverage-guided fuzzing is in tests/fuzz.)"""

from __future__ import annotations

import io
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.checkpoint import load_weights, read_checkpoint
from models.errors import CheckpointProblem
from tests.abuse.hostile_checkpoints import FLOATS, Payload, packed, tensors_pickle, value

SHAKEN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def samples() -> dict[str, bytes]:
    state = {"module.conv.weight": torch.randn(2, 3), "module.bn.running_var": torch.ones(2), "module.seen": torch.tensor(1)}
    torch.save({"model": state, "epoch": 1, "args": Payload(Path("/nowhere/at/all"))}, made := io.BytesIO())
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(again := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return {"torch zip": made.getvalue(), "compressed torch zip": again.getvalue(), "safetensors": safetensors.torch.save(state)}


SAMPLES = samples()


def only_problems(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with suppress(CheckpointProblem):
        found = read_checkpoint(path)
        sum(tensor.nbytes for tensor in found.tensors.values())
        load_weights(found)


@pytest.mark.parametrize("name", SAMPLES)
@SHAKEN
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bytes_raise_nothing_but_checkpoint_problems(tmp_path: Path, name: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLES[name])
    for at, mask in flips:
        data[at % len(data)] ^= mask
    only_problems(tmp_path / "file", bytes(data))


@pytest.mark.parametrize("name", SAMPLES)
@SHAKEN
@given(start=st.integers(0, 1 << 20), stop=st.integers(0, 1 << 20), insert=st.binary(max_size=20))
def test_cut_and_spliced_files_raise_nothing_but_checkpoint_problems(tmp_path: Path, name: str, start: int, stop: int, insert: bytes) -> None:
    data = SAMPLES[name]
    only_problems(tmp_path / "file", data[: start % len(data)] + insert + data[stop % len(data) :])


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    data = SAMPLES[name]
    for end in range(0, len(data), 7):
        (tmp_path / "file").write_bytes(data[:end])
        with pytest.raises(CheckpointProblem):
            read_checkpoint(tmp_path / "file")


# Whole opcodes go deeper than chance bytes do.
OPCODES = [bytes([code]) for code in b"()]}tabdesulRQ012NbN\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"]
PIECES = [
    *OPCODES,
    *map(value, (0, -1, 6, 2**40, "0", "storage", "cpu", "t", "model", (6,), (1,))),
    b"ctorch\nFloatStorage\n",
    b"h\x00",
    b"q\x00",
]
PIECES += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._tensor\n_rebuild_from_type_v2\n"]
PIECES += [b"ccollections\nOrderedDict\n)R", tensors_pickle(("0", 6, 0, (6,), (1,)))[3:-1], tensors_pickle(("0", 6, 0, (6,), (1,)))[4:-2]]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=40))
def test_opcodes_in_any_order_raise_nothing_but_checkpoint_problems(tmp_path: Path, pieces: list[bytes]) -> None:
    only_problems(tmp_path / "file", packed(b"\x80\x02" + b"".join(pieces) + b".", {"0": FLOATS}))


def test_refusing_hundreds_of_files_leaks_no_descriptors(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(300):
        only_problems(tmp_path / "file", SAMPLES["torch zip"][: number % 900 + 900])
    assert len(os.listdir("/proc/self/fd")) <= before + 2
