"""Cutting real networks of every family at every place where they can be cut."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn

from models import architectures
from models.trunk import CannotCut, choose_cut, cuts, feature_cut, operations, places, split, tail_copy, trace

FAMILIES = ("resnet20", "resnet18_cifar", "resnet18", "vgg16_bn", "mobilenet_v2", "vit_b_16")


@pytest.mark.parametrize("name", FAMILIES)
def test_trunk_and_tail_give_exactly_what_the_network_gives(name: str) -> None:
    torch.manual_seed(0)
    architecture = architectures.get(name)
    network = architecture.build(10).eval()
    inputs = torch.randn(2, 3, architecture.size, architecture.size)
    cut = choose_cut(network, inputs[:1], 0.1)
    trunk, tail = split(network, cut.name)
    with torch.inference_mode():
        assert torch.equal(tail(trunk(inputs)), network(inputs))
    assert 0.1 <= cut.tail_share < 0.5


def test_a_tenth_of_a_resnet20_is_its_last_block() -> None:
    network = architectures.get("resnet20").build(10).eval()
    cut = choose_cut(network, torch.zeros(1, 3, 32, 32), 0.1)
    tail = tail_copy(network, cut.name)
    assert {name.rsplit(".", 2)[0] for name, _ in tail.named_parameters() if "layer" in name} == {"layer3.2"}
    assert cut.tail_share == pytest.approx(0.116, abs=0.01)


def test_no_cut_tears_a_residual_block() -> None:
    network = architectures.get("resnet20").build(10).eval()
    inputs = torch.randn(1, 3, 32, 32)
    for cut in cuts(network, inputs):
        trunk, tail = split(network, cut.name)
        with torch.inference_mode():
            torch.testing.assert_close(tail(trunk(inputs)), network(inputs), rtol=0, atol=0)


def test_the_share_behind_a_cut_only_falls_from_input_to_output() -> None:
    shares = [cut.tail_share for cut in cuts(architectures.get("resnet18_cifar").build(10), torch.zeros(1, 3, 32, 32))]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99 - 0.01


def test_training_a_tail_copy_leaves_the_suspect_as_it_was() -> None:
    torch.manual_seed(0)
    network = architectures.get("resnet20").build(10).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    cut = choose_cut(network, torch.zeros(1, 3, 32, 32), 0.1).name
    trunk, tail = split(network, cut)[0], tail_copy(network, cut).train()
    tail(trunk(torch.randn(4, 3, 32, 32)).detach()).sum().backward()
    torch.optim.SGD(tail.parameters(), 0.1).step()
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_cut_network_that_is_gone_leaves_nothing_behind() -> None:
    network = architectures.get("resnet20").build(10).eval()
    cut = choose_cut(network, torch.zeros(1, 3, 32, 32), 0.1).name

    def kept() -> tuple[int, int, int]:
        gc.collect()
        parts = sum(issubclass(type(each), (nn.Module, fx.Graph, fx.Node)) for each in gc.get_objects())  # others come and go with the interpreter
        classes = len(fx.GraphModule.__subclasses__())  # one for each traced network
        return parts, classes, len(fx.graph_module._loader.eval_cache)  # sources are strings, which `gc` does not count

    after = []
    for _ in range(3):
        copy.deepcopy(tail_copy(network, cut))
        after.append(kept())
    assert after[2] == after[1]  # the first also fills caches that stay as they are


def test_networks_compute_in_other_threads_while_one_is_traced() -> None:
    serving, inputs, failed, done = architectures.get("resnet20").build(10).eval(), torch.zeros(1, 3, 32, 32), list[Exception](), threading.Event()
    expected = serving(inputs)

    def serve() -> None:
        while not done.is_set():
            try:
                assert torch.equal(serving(inputs), expected)
            except Exception as error:
                failed.append(error)
                return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(5):
            trace(architectures.get("resnet20").build(10))
    finally:
        done.set()
        thread.join()
    assert failed == []


def test_an_unknown_cut_is_refused() -> None:
    with pytest.raises(KeyError):
        split(architectures.get("resnet20").build(10), "nowhere")


OTHERS = {
    "timm/vit_tiny_patch16_224": {"img_size": 64},
    "timm/swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4},
    "timm/eva02_tiny_patch14_224": {"img_size": 56},  # position embeddings of every block computed ahead of the first
    "timm/convnext_atto": {},
    "timm/mobilenetv3_small_100": {},
    "timm/resnet18": {},
    "timm/tf_efficientnet_b0": {},  # padding that depends on the input's size
    "swin_t": {},
    "convnext_tiny": {},
    "densenet121": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_timm_and_torchvision_are_cut_in_three(name: str) -> None:
    torch.manual_seed(0)
    library, _, short = name.rpartition("/")
    network = timm.create_model(short, num_classes=10, **OTHERS[name]) if library else torchvision.models.get_model(short, num_classes=10)
    size = OTHERS[name].get("img_size", 64)
    inputs = torch.randn(2, 3, size, size)
    experts, features = choose_cut(network, inputs[:1], 0.1), feature_cut(network, inputs[:1])
    trunk, body, head = split(network, experts.name, features.name)
    with torch.inference_mode():
        shared = trunk(inputs)
        kept = shared.clone()
        assert torch.equal(head(body(shared)), network(inputs))
        assert torch.equal(shared, kept)
    assert 0.1 <= experts.tail_share < 0.45
    assert 0 < features.tail_share < 0.1
    tail = tail_copy(network, experts.name)
    tail.train()(kept.clone()).sum().backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    tail_copy(network, experts.name).load_state_dict(tail.state_dict())  # the same names each time


class _Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class _Torn(nn.Module):
    """Two branches that meet only behind all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3 * 8 * 8, 10), nn.Linear(3 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x.flatten(1)) + self.right(x.flatten(1))


@pytest.mark.parametrize(("network", "message"), [(_Asks(), "_Asks cannot be traced"), (_Torn(), "no cut leaves 10%")])
def test_where_no_cut_can_be_had_it_is_said(network: nn.Module, message: str) -> None:
    example = torch.zeros(1, 3, 8, 8)
    operations(network, example)  # counts whether or not it can be traced
    with pytest.raises(CannotCut, match=message):
        choose_cut(network, example, 0.1)


def test_no_cut_is_where_a_later_step_writes() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.ELU(inplace=True), nn.Linear(10, 10))
    assert [cut.name for cut in cuts(network, torch.zeros(1, 3, 8, 8))] == ["_0", "_2"]


def test_what_the_user_may_pass_beside_the_image_keeps_its_default() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(192, 10)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.head(x.flatten(1) if mask is None else (x * mask).flatten(1))

    network, example = Masked(), torch.randn(1, 3, 8, 8)
    trunk, tail = split(network, feature_cut(network, example).name)
    assert torch.equal(tail(trunk(example)), network(example))


BLOCK = 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8  # 5 tokens of width 8: four square matrices, two of 8x16, and attention


@pytest.mark.parametrize(
    ("network", "shape", "multiplications"),
    [
        (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 5 * 7),
        (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 6, 6), 2 * 4 * 4 * 8 * 2 * 9),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (1, 5, 8), BLOCK),
        (torchvision.models.vision_transformer.EncoderBlock(2, 8, 16, 0.0, 0.0), (1, 5, 8), BLOCK),
        (timm.models.vision_transformer.Block(8, 2, mlp_ratio=2), (1, 5, 8), BLOCK),
    ],
    ids=["linear", "convolution", "torch", "torchvision", "timm"],
)
def test_operations_are_two_a_multiplication(network: nn.Module, shape: tuple[int, ...], multiplications: int) -> None:
    assert operations(network, torch.zeros(shape)) == 2 * multiplications


def test_distances_are_measured_at_several_depths_in_the_order_of_flow() -> None:
    network = architectures.get("resnet20").build(10).eval()
    example = torch.zeros(1, 3, 32, 32)
    found = places(network, example, (0.1, 0.2))
    assert [place.shape for place in found] == [(1, 64, 8, 8), (1, 64, 8, 8), (1, 64, 8, 8), (1, 64)]
    assert [round(place.tail_share, 1) for place in found] == [0.2, 0.1, 0.0, 0.0]
    assert choose_cut(network, example, 0.1) in found
