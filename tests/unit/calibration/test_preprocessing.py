"""The preprocessing is found from 200 images. The networks are one really trained suspect, rewritten for other preprocessings."""

from __future__ import annotations

import copy
import zipfile
from dataclasses import replace
from functools import cache

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from calibration.labels import check_labels
from calibration.preprocessing import Finding, find_preprocessing
from calibration.preprocessing.candidates import Candidates
from calibration.preprocessing.search import AFFORDED
from models import architectures
from models.cifar import thin_resnet
from models.errors import CleanSetMislabelled, SuspectModelUseless
from models.preprocessing import Preprocessing
from tests.conftest import EXAMPLES

TRAINED = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.243, 0.261))
OTHERS = {
    "none": Preprocessing(),
    "half": Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "imagenet": Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "0 to 255": Preprocessing(scale="byte"),
    "Caffe's": Preprocessing(scale="byte", channels="bgr", mean=(103.939, 116.779, 123.68)),
}
CPU = torch.device("cpu")


@cache
def clean(count: int = 200) -> tuple[list[Image.Image], Tensor]:
    with zipfile.ZipFile(EXAMPLES / "clean_set.zip") as archive:
        names = sorted(archive.namelist())
        classes = sorted({name.split("/")[0] for name in names})
        chosen = [names[int(i)] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(1))[:count]]
        images = [Image.open(archive.open(name)).convert("RGB") for name in chosen]
    return images, torch.tensor([classes.index(name.split("/")[0]) for name in chosen])


@cache
def suspect() -> nn.Module:
    network = thin_resnet(20, 10)
    network.load_state_dict(load_file(EXAMPLES / "suspect_badnet.safetensors"))
    return network.eval()


def rewritten(network: nn.Module, other: Preprocessing) -> nn.Module:
    """The network that answers under `other` as `network` does under TRAINED, but for the border that the first convolution pads with."""
    network = copy.deepcopy(network)
    flip = other.channels == "bgr"
    order = [2, 1, 0] if flip else [0, 1, 2]
    unit = 255.0 if other.scale == "byte" else 1.0
    # Per channel in `other`'s order: the trained input is (other's input * spread + centre - mean) / std.
    centre, spread = (torch.tensor(values) / unit for values in (other.mean, other.std))
    mean, std = (torch.tensor(values)[order] for values in (TRAINED.mean, TRAINED.std))
    with torch.no_grad():
        weight = network.conv1.weight[:, order]
        network.bn1.running_mean -= (weight.sum((2, 3)) * ((centre - mean) / std)).sum(1)
        network.conv1.weight.copy_(weight * (spread / std)[None, :, None, None])
    return network


def search(network: nn.Module, labels: Tensor | None = None, sizes: tuple[int, ...] = (32,), claimed: Preprocessing | None = None) -> Finding:
    images, truth = clean()
    return find_preprocessing(network, images.__getitem__, range(len(images)), truth if labels is None else labels, sizes, CPU, claimed)


@cache
def usual() -> Finding:
    return search(suspect(), sizes=(32, 64))


def test_neighbouring_normalisations_are_told_apart() -> None:
    found = usual()
    assert found.best.preprocessing == TRAINED
    assert found.best.accuracy > 0.85
    assert found.images == 200


@pytest.mark.parametrize("name", OTHERS)
def test_the_preprocessing_is_found_whatever_it_was(name: str) -> None:
    found = search(rewritten(suspect(), OTHERS[name]))
    assert found.best.preprocessing == OTHERS[name]
    assert found.clear or found.candidates[1].accuracy > 0.8  # what is not clear is no worse


def test_a_suspect_that_is_never_sure_says_as_much_by_how_often_it_is_right() -> None:
    """The logits of a network that was hardly trained are small; without batch norms the labels are all there is."""

    class Affine(nn.Module):
        def __init__(self, norm: nn.BatchNorm2d) -> None:
            super().__init__()
            assert norm.running_mean is not None and norm.running_var is not None
            self.factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            self.offset = norm.bias - norm.running_mean * self.factor

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor[:, None, None] + self.offset[:, None, None]

    network = rewritten(suspect(), OTHERS["Caffe's"]).requires_grad_(False)
    for name, norm in [(name, module) for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]:
        network.set_submodule(name, Affine(norm))
    network.linear.weight.mul_(1e-4)
    network.linear.bias.mul_(1e-4)
    found = search(network)
    assert found.best.preprocessing == OTHERS["Caffe's"]


def test_a_claim_is_taken_where_it_agrees_and_not_where_the_images_speak_against_it() -> None:
    close = replace(TRAINED, mean=(0.49, 0.48, 0.45))
    assert search(suspect(), claimed=close).best.preprocessing == close
    found = search(suspect(), claimed=Preprocessing(mean=(0.9, 0.9, 0.9), std=(0.1, 0.1, 0.1)))
    assert found.best.preprocessing == TRAINED
    assert any("not taken" in note for note in found.notes)


def test_where_labels_tell_nothing_the_usual_of_the_architecture_is_taken_at_a_bounded_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AFFORDED, "cpu", 1e11)  # as if the network were costlier than it is
    torch.manual_seed(0)
    architecture = architectures.get("mobilenet_v3_small")
    images, labels = clean()
    sizes = (224, 32, 64, 96, 128, 160, 256, 288, 320, 384)
    found = find_preprocessing(architecture.build(10).eval(), images.__getitem__, range(40), labels[:40], sizes, CPU, usual=architecture.preprocessing)
    assert found.best.preprocessing == architecture.preprocessing == replace(OTHERS["imagenet"], size=224, resize=256)
    assert not found.clear
    assert any("usual for its architecture" in note for note in found.notes)
    assert found.forwards < 600


def test_costly_networks_are_shown_fewer_images() -> None:
    def looked(afforded: float) -> Finding:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(AFFORDED, "cpu", afforded)
            return search(suspect(), sizes=(32, 64))

    rich, poor = looked(1e12), looked(1e10)
    assert poor.best.preprocessing.size == rich.best.preprocessing.size == 32
    assert poor.images < rich.images
    assert poor.forwards < rich.forwards / 2


class AThirdOfTheSize(nn.Module):
    """For 96 pixels; at 64 it is right less often, and of the usual size of its architecture it makes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.network = copy.deepcopy(suspect())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(nn.functional.interpolate(x, scale_factor=1 / 3, mode="area"))
        return logits * (x.shape[-1] < 200)


def test_a_size_that_fits_does_not_end_the_search_before_a_larger_one_that_fits_better() -> None:
    found = search(AThirdOfTheSize().eval(), sizes=(224, 32, 64, 96, 128, 160, 256))
    assert (found.best.preprocessing.size, found.best.preprocessing.resize) == (96, 96)
    assert found.best.accuracy > 0.75


def test_images_that_must_be_resized_are_resized_as_in_training() -> None:
    """A network for 32 pixels, and the same images twice as large."""
    images, labels = clean()
    large = [image.resize((64, 64), Image.Resampling.NEAREST) for image in images]
    found = find_preprocessing(suspect(), large.__getitem__, range(len(large)), labels, (32,), CPU)
    assert (found.best.preprocessing.size, found.best.preprocessing.resize) == (32, 32)
    assert found.best.accuracy > 0.85


@pytest.mark.parametrize(("side", "size", "cropped"), [(32, 96, False), (64, 96, False), (128, 96, True), (32, 224, True)])
def test_small_images_that_are_enlarged_a_little_are_not_cropped(side: int, size: int, cropped: bool) -> None:
    tried = Candidates((size,), [(side, side)] * 3, None).geometries(size)
    assert any(each.resize > size for each in tried) is cropped
    assert {each.interpolation for each in tried if each.resize == size} == {"bilinear", "bicubic"}


def test_a_shuffled_class_order_is_reported_and_the_preprocessing_found_all_the_same() -> None:
    _, truth = clean()
    names = [f"class {i}" for i in range(10)]
    shift = (torch.arange(10) + 3) % 10  # the labels say 3 more than the suspect
    found = search(suspect(), labels=shift[truth])
    assert found.best.preprocessing == TRAINED
    order = check_labels(found.logits, shift[truth], names)
    assert order is not None
    assert list(order.names) == [names[int(shift[output])] for output in range(10)]
    assert order.accuracy > 0.85 > 0.2 > order.given


def test_two_classes_that_were_swapped_are_named() -> None:
    _, truth = clean()
    names = [f"class {i}" for i in range(10)]
    swapped = torch.tensor([0, 1, 2, 3, 9, 5, 6, 7, 8, 4])[truth]
    order = check_labels(usual().logits, swapped, names)
    assert order is not None and set(order.moved) == {"class 4", "class 9"}


def test_the_right_order_is_left_alone() -> None:
    _, truth = clean()
    assert check_labels(usual().logits, truth, [str(i) for i in range(10)]) is None


def test_labels_mixed_up_among_the_images_are_told_from_a_useless_suspect() -> None:
    _, truth = clean()
    mixed = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(5))]
    with pytest.raises(CleanSetMislabelled):
        check_labels(usual().logits, mixed, [str(i) for i in range(10)])
    torch.manual_seed(0)
    with pytest.raises(SuspectModelUseless):
        check_labels(search(thin_resnet(20, 10).eval()).logits, truth, [str(i) for i in range(10)])
