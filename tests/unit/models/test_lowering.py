"""Networks in the form in which they are served compute what they computed before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models import architectures, lowering
from models.lowering import dtype_of, folded, in_bf16, lowered
from models.trunk import choose_cut, tail_copy


def trained(name: str, classes: int = 7) -> nn.Module:
    """Random weights, and batch norms with statistics as training leaves them."""
    torch.manual_seed(0)
    network = architectures.get(name).build(classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0), (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5)):
                assert value is not None
                value.data.uniform_(low, high)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize(("name", "left"), [("resnet20", 0), ("vgg11_bn", 0), ("mobilenet_v3_small", 0), ("densenet121", 62), ("timm/vit_tiny_patch16_224", 0)])
def test_a_folded_network_computes_the_same_and_the_original_stays_as_it_is(name: str, left: int) -> None:
    network = trained(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    small = folded(network)
    size = 224 if "vit" in name or name == "densenet121" else 64
    inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(small(inputs), network(inputs), rtol=1e-4, atol=1e-4)
    assert norms(small) == left  # a DenseNet has norms in front of its convolutions
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def test_a_tail_is_folded_too_and_takes_weights_again() -> None:
    network = trained("resnet20")
    cut = choose_cut(network, torch.zeros(1, 3, 32, 32), 0.1).name
    one, other = (folded(tail_copy(network, cut)) for _ in range(2))
    assert norms(one) == 0
    for value in other.parameters():
        value.data.zero_()
    other.load_state_dict(one.state_dict())
    shared = torch.randn(2, 64, 8, 8)
    with torch.inference_mode():
        assert torch.equal(one(shared), other(shared))


class Shared(nn.Module):
    """One convolution in two places, with a norm behind only one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(self.convolution(x)))


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x)) if x.sum() > 0 else x


@pytest.mark.parametrize("kind", [Shared, Branching])
def test_what_cannot_be_folded_is_left_alone(kind: type[nn.Module]) -> None:
    network = kind().eval()
    same, inputs = folded(network), torch.rand(1, 3, 4, 4)
    assert norms(same) == 1
    with torch.inference_mode():
        assert torch.equal(same(inputs), network(inputs))


def test_in_bfloat16_norms_keep_their_digits() -> None:
    network = in_bf16(trained("densenet121"))
    assert dtype_of(network) == torch.bfloat16
    assert all(module.weight.dtype == torch.float32 for module in network.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ["resnet20", "densenet121", "timm/vit_tiny_patch16_224"])
def test_a_lowered_network_has_half_the_weights_and_says_nearly_the_same(name: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "has_fast_bf16", lambda _: fast)
    network = trained(name)
    small = lowered(network, torch.device("cpu"))
    assert dtype_of(small) == (torch.bfloat16 if fast else torch.float32)
    inputs = torch.randn(4, 3, *(2 * [32 if name == "resnet20" else 224]), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        mine, its = small(inputs.to(dtype_of(small))).float(), network(inputs)
    assert ((mine - its).abs().max() / its.std()).item() < 0.1
    assert size(small) < 0.55 * size(folded(network))


def test_weights_that_rest_in_bfloat16_are_computed_with_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "has_fast_bf16", lambda _: False)
    small = lowered(trained("resnet20"), torch.device("cpu"))
    same = folded(trained("resnet20"))
    same.load_state_dict(small.state_dict())  # the same names, and numbers that float32 has too
    inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(small(inputs), same(inputs))


def size(network: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())
