"""Cutting real networks of every family at every place where they can be cut."""

from __future__ import annotations

import pytest
import torch

from models import architectures
from models.trunk import choose_cut, cuts, split, tail_copy

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


def test_an_unknown_cut_is_refused() -> None:
    with pytest.raises(KeyError):
        split(architectures.get("resnet20").build(10), "nowhere")
