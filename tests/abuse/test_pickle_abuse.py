"""Hostile pickles and tensors in torch archives: rows B1a and B2 of the catalogue of bad inputs. Nothing that is in them runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from models.checkpoint import Limits, read_checkpoint
from models.errors import CheckpointDtype, CheckpointFormat, CheckpointInvalid, CheckpointProblem
from tests.abuse.hostile_checkpoints import FLOATS, FLOODS, GADGETS, HEAVY, LIES, Payload, packed, tensors_pickle, weights
from tests.abuse.refusals import at_most, read, refused


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("where", ["beside", "inside", "as key", "as state"])
def test_b1a_a_payload_in_a_torch_zip_never_runs_while_the_weights_are_read(tmp_path: Path, protocol: int, where: str) -> None:
    payload = Payload(tmp_path / "canary")
    spots = {
        "beside": {"state_dict": weights(), "args": payload},
        "inside": {"state_dict": {**weights(), "x": payload}},
        "as key": {"state_dict": weights(), payload: 1},
        "as state": {"state_dict": weights(), "args": type("Namespace", (), {"__reduce__": lambda _: (dict, (), {"x": payload})})()},
    }
    torch.save(spots[where], tmp_path / "made", pickle_protocol=protocol)
    found = read(tmp_path, (tmp_path / "made").read_bytes())
    assert all(found[name].equal(tensor) for name, tensor in weights().items())
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", GADGETS)
def test_b1a_no_opcode_calls_anything(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the command is `>X`, which makes a file
    for function in (os.system, os.popen):
        monkeypatch.setattr(os, function.__name__, lambda *_: pytest.fail("ran"))
    refused(tmp_path, packed(GADGETS[name].replace(b"{}", b">can;")), CheckpointFormat)
    assert not (tmp_path / "can").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_b2_a_pickle_by_another_name_is_refused_unread(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "canary"), protocol))
    with pytest.raises(CheckpointFormat, match="bare pickle"):
        read_checkpoint(tmp_path / "model.safetensors")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", HEAVY)
def test_b1a_a_bomb_in_the_pickle_is_refused_quickly_in_little_memory(tmp_path: Path, name: str) -> None:
    data = packed(b"\x80\x02" + HEAVY[name])
    with at_most(15, 300), pytest.raises(CheckpointProblem):
        read(tmp_path, data)


@pytest.mark.parametrize("opcodes", FLOODS, ids=str)
def test_b1a_a_flood_of_opcodes_ends_at_the_cap(tmp_path: Path, opcodes: bytes) -> None:
    (tmp_path / "file").write_bytes(packed(opcodes * 50_000))
    with at_most(10, 10), pytest.raises(CheckpointInvalid, match="more than 50,000 opcodes"):
        read_checkpoint(tmp_path / "file", Limits(pickle_opcodes=50_000))


@pytest.mark.parametrize("name", LIES)
def test_b1a_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path: Path, name: str) -> None:
    with at_most(2, 10):
        refused(tmp_path, packed(tensors_pickle(LIES[name]), {"0": FLOATS}))


def test_the_same_archive_with_honest_tensors_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, packed(tensors_pickle(("0", 6, 0, (2, 3), (3, 1)), ("0", 6, 1, (1, 2), (2**62, 3))), {"0": FLOATS}))
    assert found["t0"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["t1"].tolist() == [[1, 4]]


def test_b1a_one_storage_under_900_names_is_counted_every_time(tmp_path: Path) -> None:
    data = packed(tensors_pickle(*[("0", 2_500_000, 0, (2_500_000,), (1,))] * 900), {"0": bytes(10_000_000)})
    with at_most(15, 60):
        refused(tmp_path, data, match="share storages")


def test_b1a_more_tensors_than_the_cap_are_refused_before_one_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(packed(tensors_pickle(*[("missing", 6, 0, (1,), (1,))] * 501)))
    with pytest.raises(CheckpointInvalid, match="more than 500 tensors"):
        read_checkpoint(tmp_path / "file", Limits(tensors=500))


def test_a_lazily_negated_quantised_or_sparse_tensor_is_refused_rather_than_misread(tmp_path: Path) -> None:
    negated = torch.ones(2, dtype=torch.complex64).conj().imag
    for tensor in (negated, torch.eye(2).to_sparse()):
        torch.save({"odd.weight": tensor}, tmp_path / "made")
        assert "odd.weight" in refused(tmp_path, (tmp_path / "made").read_bytes(), CheckpointDtype)


def test_a_name_with_a_lone_surrogate_or_control_codes_is_refused_unseen(tmp_path: Path) -> None:
    for name in ("\ud800", "a\x1b[2J", "x" * 600, "\u202e"):
        torch.save({name: torch.ones(2)}, tmp_path / "made")
        assert name not in refused(tmp_path, (tmp_path / "made").read_bytes())
