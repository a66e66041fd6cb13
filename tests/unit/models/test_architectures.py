"""Which architecture a state dict belongs to, and what is said where it belongs to none."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor

from models import architectures
from models.architectures.index import entries
from models.architectures.meta import build_on_meta
from models.cifar import NETWORKS
from models.errors import CheckpointMismatch, ConfigInvalid


def fitting(state: Mapping[str, Tensor]) -> list[tuple[str, int | None]]:
    """The first match: others that fit compute something else, such as timm/resnetblur18 from the weights of a resnet18."""
    match = architectures.identify(state)[0]
    return [(match.fit.architecture.name, match.fit.num_classes)]


@pytest.mark.parametrize("name", [*NETWORKS, "resnet18", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("num_classes", [2, 43])
def test_each_architecture_is_recognised_by_its_own_keys_and_shapes(name: str, num_classes: int) -> None:
    state = architectures.get(name).build(num_classes).state_dict()
    assert fitting(state) == [(name, num_classes)]


def test_the_weights_arrive_unchanged() -> None:
    torch.manual_seed(0)
    network = architectures.get("resnet20").build(10).eval()
    rebuilt = architectures.instantiate(architectures.get("resnet20"), 10, network.state_dict())
    inputs = torch.randn(2, 3, 32, 32)
    assert all(torch.equal(value, rebuilt.state_dict()[key]) for key, value in network.state_dict().items())
    with torch.inference_mode():
        torch.testing.assert_close(rebuilt(inputs), network(inputs), rtol=1e-5, atol=1e-5)


def test_batch_counters_may_be_missing() -> None:
    state = {key: value for key, value in architectures.get("resnet20").build(10).state_dict().items() if "num_batches" not in key}
    assert fitting(state) == [("resnet20", 10)]
    architectures.instantiate(architectures.get("resnet20"), 10, state)


def test_a_missing_key_is_named() -> None:
    state = architectures.get("resnet20").build(10).state_dict()
    del state["layer2.1.conv1.weight"]
    with pytest.raises(CheckpointMismatch, match=r"Closest: resnet20 \(1 of 116 keys differ\).* layer2\.1\.conv1\.weight is missing"):
        architectures.identify(state)


def test_a_wrong_shape_is_named_with_both_shapes() -> None:
    state = architectures.get("resnet20").build(10).state_dict()
    state["conv1.weight"] = torch.zeros(16, 3, 5, 5)
    with pytest.raises(CheckpointMismatch, match=r"conv1\.weight is 16x3x5x5, not 16x3x3x3"):
        architectures.identify(state, "resnet20")


def test_a_transposed_head_is_refused() -> None:
    state = architectures.get("resnet20").build(10).state_dict()
    state["linear.weight"] = state["linear.weight"].T.contiguous()
    with pytest.raises(CheckpointMismatch, match=r"linear\.weight is 64x10, not classesx64"):
        architectures.identify(state, "resnet20")


def test_at_most_five_keys_are_named_and_their_letters_are_cleaned() -> None:
    state = {f"evil\x1b[31m{index}": torch.zeros(1) for index in range(50)}
    with pytest.raises(CheckpointMismatch) as caught:
        architectures.identify(state, "resnet20")
    assert "\x1b" not in caught.value.detail
    assert caught.value.detail.count(";") == 5


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigInvalid, match="resnet20, resnet32"):
        architectures.resolve("../../etc/passwd")


@pytest.mark.parametrize(
    "name", ["resnet26", "mobilenetv3_small_100", "convnext_atto", "vit_tiny_patch16_224", "tf_efficientnet_b0", "deit3_small_patch16_224"]
)
def test_networks_of_timm_are_found_by_keys_alone(name: str) -> None:
    state = timm.create_model(name, num_classes=7).state_dict()
    matches = architectures.identify(state)
    names = [{match.fit.architecture.name, *match.equivalent} for match in matches]
    assert any(f"timm/{name}" in group for group in names)
    assert {match.fit.num_classes for match in matches} == {7}


def test_networks_that_compute_different_things_from_the_same_keys_are_kept_apart() -> None:
    """tf_efficientnet_b0 pads and normalises otherwise than efficientnet_b0."""
    matches = architectures.identify(timm.create_model("efficientnet_b0", num_classes=7).state_dict())
    groups = [{match.fit.architecture.name, *match.equivalent} for match in matches]
    assert len(groups) > 1
    assert not any({"timm/efficientnet_b0", "timm/tf_efficientnet_b0"} <= group for group in groups)


def test_a_name_with_two_meanings_is_taken_as_the_one_that_fits() -> None:
    """torchvision and timm each have a convnext_tiny, with other keys."""
    ours = build_on_meta(lambda: torchvision.models.convnext_tiny(num_classes=5)).state_dict()
    theirs = build_on_meta(lambda: timm.create_model("convnext_tiny", num_classes=5)).state_dict()
    assert architectures.identify(ours, "convnext_tiny")[0].fit.architecture.library == "torchvision"
    assert architectures.identify(theirs, "convnext_tiny")[0].fit.architecture.library == "timm"


@pytest.mark.parametrize(("make", "library"), [
    (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=64), "timm"),
    (lambda: torchvision.models.vit_b_16(num_classes=4, image_size=96), "torchvision"),
])  # fmt: skip
def test_the_input_size_of_a_transformer_is_read_off_its_position_embedding(make, library: str) -> None:  # type: ignore[no-untyped-def]
    network = make().eval()
    (match, *_) = architectures.identify(network.state_dict())
    found = match.fit.architecture
    assert (found.library, found.size) == (library, 64 if library == "timm" else 96)
    rebuilt = architectures.instantiate(architectures.get(found.name, found.options), 4, network.state_dict())
    inputs = torch.randn(1, 3, found.size, found.size)
    with torch.inference_mode():
        torch.testing.assert_close(rebuilt(inputs), network(inputs), rtol=1e-4, atol=1e-4)


def test_a_network_of_another_depth_is_refused_by_comparison_with_its_kin() -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=5).state_dict()
    with pytest.raises(CheckpointMismatch, match=r"Closest: timm/(deit|vit)_tiny.*keys differ.*is missing.*and \d+ more"):
        architectures.identify(state)


def test_the_index_agrees_with_the_installed_libraries() -> None:
    """A sample: the whole takes minutes. Where this fails, run `python -m models.architectures.index`."""
    assert len(entries()) > 1300
    for name in list(entries())[::97]:
        architecture = architectures.get(name)
        assert name in fitted_names(build_on_meta(lambda architecture=architecture: architecture.build(3)).state_dict()), name  # type: ignore[misc]


def fitted_names(state: Mapping[str, Tensor]) -> set[str]:
    from models.architectures.index import with_keys

    return {entry.name for entry in with_keys(state)}


OWN = """
import torch
from torch import nn

def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))

make.input_size = 40
nothing = 7

def without_a_count():
    return make(10)

def no_module(num_classes):
    return {"layers": []}

def raising(num_classes):
    raise KeyError("no such layer")

def counting(num_classes):
    rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]  # a tensor without memory has no numbers
    return make(num_classes)
"""


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "operators_networks.py").write_text(OWN)
    (tmp_path / "operators_slip.py").write_text("def make(:\n")
    (tmp_path / "operators_end.py").write_text("raise SystemExit(2)\n")
    (tmp_path / "operators_fault.py").write_text("raise OSError('no such disk')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("models.architectures.catalogue._admitted", {})
    sys.modules.pop("operators_networks", None)
    return "operators_networks:make"


def test_an_architecture_of_the_operators_is_known_once_it_was_admitted(own_package: str) -> None:
    with pytest.raises(ConfigInvalid):
        architectures.resolve(own_package)
    assert "operators_networks" not in sys.modules
    architectures.admit(own_package)
    architecture = architectures.get(own_package)
    assert (architecture.size, architecture.library) == (40, "own")
    state = architecture.build(3).state_dict()
    assert fitting(state) == [(own_package, 3)]
    assert architectures.identify(state, own_package)[0].fit.num_classes == 3


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("nowhere", "package.module:factory"),
        (":make", "package.module:factory"),
        ("operators_networks:", "package.module:factory"),
        ("nowhere:make", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("operators_networks:missing", "cannot be imported: AttributeError"),
        ("operators_slip:make", "cannot be imported: SyntaxError"),
        ("operators_fault:make", "cannot be imported: OSError: no such disk"),
        ("operators_end:make", "cannot be imported: SystemExit: 2"),
        ("operators_networks:nothing", "no function of a class count"),
        ("operators_networks:without_a_count", "cannot be built for 7919 classes: TypeError: without_a_count"),
        ("operators_networks:raising", "cannot be built for 7919 classes: KeyError: 'no such layer'"),
        ("operators_networks:no_module", "gives dict, not a torch.nn.Module"),
    ],
)
def test_what_cannot_be_admitted_is_refused_with_a_reason(own_package: str, reference: str, reason: str) -> None:
    with pytest.raises(ConfigInvalid, match=re.escape(reason)):
        architectures.admit(reference)


def test_a_network_that_computes_while_it_is_built_is_admitted(own_package: str) -> None:
    name = architectures.admit("operators_networks:counting")
    state = architectures.get(name).build(3).state_dict()
    assert fitting(state) == [(name, 3)]
    assert build_on_meta(lambda: architectures.get(name).build(3)).state_dict().keys() == state.keys()


def test_a_faulty_entry_point_is_in_the_way_of_no_other_network(own_package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = EntryPoint("faulty", "operators_fault:make", "badexpert.architectures")
    good = EntryPoint("good", own_package, "badexpert.architectures")
    monkeypatch.setattr("models.architectures.catalogue._installed", lambda: (faulty, good))
    assert fitting(NETWORKS["resnet20"](10).state_dict()) == [("resnet20", 10)]
    assert fitting(architectures.get("good").build(3).state_dict()) == [("good", 3)]
    with pytest.raises(ConfigInvalid, match="no such disk"):
        architectures.get("faulty")
