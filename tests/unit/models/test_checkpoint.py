"""What read_checkpoint and load_weights make of honest files: every format, wrapper and dtype that training scripts really write."""

from __future__ import annotations

import argparse
import collections
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from models.checkpoint import WEIGHT_KEYS, Checkpoint, clean_name, load_weights, read_checkpoint
from models.errors import CheckpointDegenerate, CheckpointDtype, CheckpointFormat, CheckpointMismatch, CheckpointNotFinite


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def named() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"stem.conv.weight": torch.randn(4, 3, 3, 3), "head.weight": torch.randn(2, 4), "head.bias": torch.zeros(2)}


def saved(tmp_path: Path, value: Any, **options: Any) -> Checkpoint:
    torch.save(value, path := tmp_path / "file.bin", **options)
    return read_checkpoint(path)


def assert_same(read: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert read[name].contiguous().flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8)), name


@pytest.mark.parametrize("kind", ["torch-zip", "safetensors"])
@pytest.mark.parametrize("make", [network, torchvision.models.shufflenet_v2_x0_5], ids=["own net", "torchvision net"])
def test_a_state_dict_comes_back_bit_for_bit_in_its_order(tmp_path: Path, kind: str, make: Callable[[], nn.Module]) -> None:
    state = make().state_dict()
    if kind == "torch-zip":
        torch.save(state, tmp_path / "file")
    else:
        safetensors.torch.save_file(state, tmp_path / "file")
    read = read_checkpoint(tmp_path / "file")
    assert (read.format, read.source, read.notes, read.hints) == (kind, "", (), {})
    # The library writes by size and name; ours keeps the header's order, which is that of the library's own reader.
    assert_same({name: read.tensors[name] for name in state}, dict(state))
    make().load_state_dict(load_weights(read))


KINDS = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "uint16",
    "float8_e4m3fn",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_is_read_as_it_is_from_both_formats(tmp_path: Path, kind: str) -> None:
    state = {"odd": torch.ones(3).to(getattr(torch, kind)), "next": torch.arange(5).to(getattr(torch, kind))}
    torch.save(state, tmp_path / "zip")
    safetensors.torch.save_file(state, tmp_path / "st")
    for name in ("zip", "st"):
        read = read_checkpoint(tmp_path / name).tensors
        assert_same({key: read[key] for key in state}, state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_that_torch_can_write_is_read(tmp_path: Path, protocol: int) -> None:
    assert_same(saved(tmp_path, {"state_dict": named(), "epoch": 3}, pickle_protocol=protocol).tensors, named())


def test_views_transposed_tied_scalar_and_empty_tensors_are_read(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    state = {
        "t.w": base.t(),
        "part.w": base[2:5, 1:7:2],
        "tied.w": base,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "one": base[:1],
    }
    assert_same(saved(tmp_path, state).tensors, state)


def test_parameters_and_buffer_objects_are_read_as_tensors(tmp_path: Path) -> None:
    state = {"a.p": nn.Parameter(torch.randn(3)), "a.b": nn.Buffer(torch.randn(3))}
    assert_same(saved(tmp_path, state).tensors, {name: value.detach() for name, value in state.items()})


def test_writing_to_a_tensor_changes_neither_the_file_nor_the_process(tmp_path: Path) -> None:
    for save, name in ((torch.save, "zip"), (safetensors.torch.save_file, "st")):
        save(named(), tmp_path / name)
        before = (tmp_path / name).read_bytes()
        read_checkpoint(tmp_path / name).tensors["head.weight"].fill_(7)
        assert (tmp_path / name).read_bytes() == before


def test_an_archive_packed_again_with_compression_is_read(tmp_path: Path) -> None:
    torch.save(named(), buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "again", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_same(read_checkpoint(tmp_path / "again").tensors, named())


@dataclass
class Settings:
    rate: float = 0.1


FOREIGN = {
    "args": argparse.Namespace(lr=0.1, path=Path("/tmp")),
    "scalar": np.float64(0.9),
    "array": np.arange(1000),
    "image": Image.new("RGB", (40, 40)),
    "settings": Settings(),
    "counts": collections.Counter("abc"),
    "defaults": collections.defaultdict(list, a=[1]),
    "set": {1, 2},
    "frozen": frozenset({(1, 2)}),
    "complex": 1j,
    "big": 10**100,
    "text": "x" * 5000,
    "bytes": b"\x00" * 300,
    5: {(1, 2): None},
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "size": torch.Size([1]),
    "generator": torch.Generator().get_state(),
    "function": torch.nn.functional.relu,
    "module": nn.Linear(2, 2),
}


@pytest.mark.parametrize("key", FOREIGN, ids=str)
def test_any_object_beside_the_weights_is_passed_over(tmp_path: Path, key: Any) -> None:
    assert_same(saved(tmp_path, {key: FOREIGN[key], "state_dict": named()}).tensors, named())


@pytest.mark.parametrize("key", WEIGHT_KEYS)
def test_weights_are_found_under_every_usual_name(tmp_path: Path, key: str) -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    read = saved(tmp_path, {"epoch": 1, key: named(), "optimizer": optimizer.state_dict(), "mean": torch.zeros(3)})
    assert_same(read.tensors, named())
    assert read.source == key
    assert f"taken from {key}." in read.notes[0]


def test_plain_weights_come_before_their_moving_average_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    average = {name: value + 1 for name, value in named().items()}
    read = saved(tmp_path, {"best": (weights := named()), "ema": average, "state_dict_ema": dict(average), "model": weights})
    assert_same(read.tensors, named())
    assert read.source == "model"
    assert "left aside, in: ema, state_dict_ema" in read.notes[1]


def test_without_a_usual_name_the_largest_dict_of_tensors_is_taken_and_said(tmp_path: Path) -> None:
    read = saved(tmp_path, {"generator": {"a": torch.ones(1)}, "classifier": named()})
    assert_same(read.tensors, named())
    assert read.source == "classifier"
    assert "largest" in read.notes[0]


def test_weights_two_levels_down_are_found(tmp_path: Path) -> None:
    read = saved(tmp_path, {"model": {"config": {"depth": 1}, "state_dict": named()}})
    assert_same(read.tensors, named())
    assert read.source == "model.state_dict"


def test_a_backdoorbench_result_gives_weights_and_hints(tmp_path: Path) -> None:
    images = {"x": torch.zeros(5, 3, 2, 2), "y": torch.zeros(5), "array": np.zeros((2, 2)), "pil": [Image.new("RGB", (2, 2))]}
    result = {"model_name": "preactresnet18", "num_classes": 43, "model": named(), "img_size": (32, 32, 3), "clean_data": "gtsrb"}
    read = saved(tmp_path, {**result, "bd_train": images, "bd_test": images})
    assert_same(read.tensors, named())
    assert read.hints == {"model_name": "preactresnet18", "num_classes": 43, "img_size": 32}


@pytest.mark.parametrize("value", ["<b>", "a" * 61, 5, None, ["resnet18"], True])
def test_a_hint_that_is_not_plain_is_dropped(tmp_path: Path, value: Any) -> None:
    assert saved(tmp_path, {"model": named(), "model_name": value, "num_classes": -1, "img_size": (32, 16)}).hints == {}


PREFIXES = ["module.", "_orig_mod.", "model.", "net.", "1.", "module._orig_mod.", "model.module.", "module.1.", "_orig_mod.module.1."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file], ids=["torch zip", "safetensors"])
def test_a_wrapper_prefix_is_stripped_and_said(tmp_path: Path, prefix: str, save: Callable[..., None]) -> None:
    save({prefix + name: value for name, value in named().items()}, tmp_path / "file")
    read = read_checkpoint(tmp_path / "file")
    assert_same({name: read.tensors[name] for name in named()}, named())
    assert read.notes[-1].startswith("Wrapper prefixes")


def test_a_compiled_block_inside_a_network_loses_its_prefix(tmp_path: Path) -> None:
    assert list(saved(tmp_path, {"stem.w": torch.ones(1), "layer1._orig_mod.0.w": torch.ones(1)}).tensors) == ["stem.w", "layer1.0.w"]


def test_the_counter_of_an_averaged_model_does_not_hide_its_prefix(tmp_path: Path) -> None:
    state = torch.optim.swa_utils.AveragedModel(network()).state_dict()
    assert list(saved(tmp_path, state).tensors) == list(network().state_dict())


@pytest.mark.parametrize("names", [("1.weight", "1.bias"), ("features.0.w", "features.1.w"), ("module.a", "b.a"), ("0.0.w", "1.w"), ("module", "module.a")])
def test_names_that_are_no_wrapper_of_all_keys_are_kept(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert tuple(saved(tmp_path, dict.fromkeys(names, torch.ones(2))).tensors) == names


def test_entries_of_a_state_dict_that_are_no_tensors_are_left_out_and_said(tmp_path: Path) -> None:
    read = saved(tmp_path, {**named(), "quant._extra_state": {"scale": 1}})
    assert_same(read.tensors, named())
    assert "quant._extra_state" in read.notes[0]


@pytest.mark.parametrize("value", [network(), nn.DataParallel(network()), {"model": network()}, named()["head.weight"], [named()], None])
def test_a_file_without_a_state_dict_says_to_save_one(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointFormat, match=r"model\.state_dict\(\)"):
        saved(tmp_path, value)


@pytest.mark.parametrize("value", [{}, {"state_dict": {}}, {"epoch": 1}], ids=str)
def test_a_dict_without_tensors_fits_no_architecture(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointMismatch):
        saved(tmp_path, value)


def checkpoint(**tensors: Tensor) -> Checkpoint:
    return Checkpoint("safetensors", {"conv.weight": torch.ones(2, 2), **tensors}, "", ())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
def test_floating_weights_become_float32_and_counters_stay(dtype: torch.dtype) -> None:
    weights = load_weights(checkpoint(w=torch.full((2, 2), 0.1, dtype=dtype), seen=torch.tensor(3), index=torch.ones(1, dtype=torch.int32)))
    assert weights["w"].equal(torch.full((2, 2), 0.1, dtype=dtype).to(torch.float32))
    assert weights["w"].dtype == torch.float32
    assert weights["seen"].dtype == torch.int64
    assert weights["index"].dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_b11_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointDtype, match=r"conv\.odd"):
        load_weights(checkpoint(**{"conv.odd": torch.ones(2).to(dtype)}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_b12_one_number_that_is_not_finite_is_found_among_many(value: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(64, 65, dtype=dtype)
    tensor[40, 3] = value
    with pytest.raises(CheckpointNotFinite, match=r"layer\.w"):
        load_weights(checkpoint(**{"layer.w": tensor}))


def test_b12_at_most_five_names_are_shown() -> None:
    with pytest.raises(CheckpointNotFinite, match=r"w0, w1, w2, w3, w4 and 3 more\."):
        load_weights(checkpoint(**{f"w{i}": torch.full((1,), float("nan")) for i in range(8)}))


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e38, -1e38, 1e30], ids=str)
def test_b12_weights_that_are_all_zero_subnormal_or_huge_are_refused(value: float) -> None:
    with pytest.raises(CheckpointDegenerate):
        load_weights(Checkpoint("safetensors", {"conv.weight": torch.full((3, 3), value), "norm.weight": torch.ones(3)}, "", ()))


def test_a_double_that_overflows_float32_is_refused() -> None:
    with pytest.raises(CheckpointDegenerate):
        load_weights(checkpoint(w=torch.tensor([[1e300]], dtype=torch.float64)))


def test_a_checkpoint_without_floating_weights_is_degenerate() -> None:
    with pytest.raises(CheckpointDegenerate):
        load_weights(Checkpoint("safetensors", {"seen": torch.tensor(1)}, "", ()))


@pytest.mark.parametrize("variance", [[-1e-3, 1.0], [0.0, 0.0], [-0.0, 0.0]], ids=str)
def test_b13_negative_or_vanished_running_variances_are_refused(variance: list[float]) -> None:
    with pytest.raises(CheckpointDegenerate, match=r"bn\.running_var"):
        load_weights(checkpoint(**{"bn.running_var": torch.tensor(variance)}))


def test_one_dead_channel_is_taken_as_trained_networks_have_them() -> None:
    load_weights(checkpoint(**{"bn.running_var": torch.tensor([0.0, 1.0]), "bn.weight": torch.zeros(2)}))


def test_names_in_messages_are_plain_and_short() -> None:
    assert clean_name("a.b\x1b[31m<script>\u202e" + "x" * 100) == "a.b??31m?script??" + "x" * 43
