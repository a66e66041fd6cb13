"""The 32x32 networks against figures published with their sources: tensors, shapes, parameters, multiplications."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from models.cifar import NETWORKS, WideResNet, thin_resnet
from models.cifar.preact import PreActBlock
from models.trunk import choose_cut, cuts, feature_cut, operations, split

# Tensors in the state dict; millions of parameters with 10 classes, to as many digits as are published.
PUBLISHED = {
    "resnet20": (116, "0.27"),
    "resnet32": (188, "0.46"),
    "resnet44": (260, "0.66"),
    "resnet56": (332, "0.85"),
    "resnet20_projection": (128, "0.272474"),
    "resnet32_projection": (200, "0.47"),
    "resnet44_projection": (272, "0.66"),
    "resnet56_projection": (344, "0.855770"),
    "resnet18_cifar": (122, "11.173962"),
    "preact_resnet18": (102, "11.171146"),
    "vgg16_bn_cifar": (97, "15.253578"),
    "mobilenet_v2_cifar": (373, "2.25"),  # 2.36 with 100 classes, less 90 rows of 1280 weights and a bias
    "wide_resnet16_1": (82, "0.2"),
    "wide_resnet28_10": (155, "36.479194"),
}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "resnet20": {"conv1.weight": (16, 3, 3, 3), "layer3.2.bn2.running_var": (64,), "linear.weight": (10, 64)},
    "resnet56_projection": {"layer2.0.downsample.0.weight": (32, 16, 1, 1), "layer3.0.downsample.1.bias": (64,), "fc.weight": (10, 64)},
    "resnet18_cifar": {"conv1.weight": (64, 3, 3, 3), "layer2.0.shortcut.0.weight": (128, 64, 1, 1), "linear.bias": (10,)},
    "preact_resnet18": {"layer1.0.bn1.weight": (64,), "layer4.0.bn1.weight": (256,), "layer2.0.shortcut.0.weight": (128, 64, 1, 1), "linear.bias": (10,)},
    "vgg16_bn_cifar": {"features.0.bias": (64,), "features.40.weight": (512, 512, 3, 3), "classifier.1.weight": (512, 512), "classifier.6.weight": (10, 512)},
    "mobilenet_v2_cifar": {
        "pre.0.weight": (32, 3, 1, 1),
        "stage1.residual.3.weight": (32, 1, 3, 3),
        "stage6.2.residual.0.bias": (960,),
        "conv1.0.weight": (1280, 320, 1, 1),
        "conv2.weight": (10, 1280, 1, 1),
    },
    "wide_resnet28_10": {
        "block1.layer.0.bn1.weight": (16,),
        "block1.layer.0.convShortcut.weight": (160, 16, 1, 1),
        "block3.layer.3.conv2.weight": (640, 640, 3, 3),
        "bn1.weight": (640,),
        "fc.weight": (10, 640),
    },
}
ABSENT = {"resnet56_projection": "layer1.0.downsample", "preact_resnet18": "bn1.", "wide_resnet16_1": "block1.layer.0.convShortcut"}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_tensors_and_parameters_are_as_many_as_published(name: str) -> None:
    tensors, millions = PUBLISHED[name]
    before = torch.get_rng_state()
    with torch.device("meta"):
        network = NETWORKS[name](10)
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    assert torch.equal(torch.get_rng_state(), before)
    assert len(network.state_dict()) == tensors
    digits = len(millions.partition(".")[2])
    assert f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.{digits}f}" == millions


@pytest.mark.parametrize("name", list(SHAPES))
def test_keys_and_shapes_are_those_of_the_toolboxes(name: str) -> None:
    with torch.device("meta"):
        state = NETWORKS[name](10).state_dict()
    assert {key: tuple(state[key].shape) for key in SHAPES[name]} == SHAPES[name]


@pytest.mark.parametrize(("name", "prefix"), ABSENT.items())
def test_what_the_toolboxes_do_not_have_is_absent(name: str, prefix: str) -> None:
    with torch.device("meta"):
        assert not [key for key in NETWORKS[name](10).state_dict() if key.startswith(prefix)]


# Millions of multiply-accumulates of convolutions and linear layers, from the tables of pytorch-cifar-models. Keys do not tell where strides are.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20_projection", 40.81),
        ("resnet32_projection", 69.12),
        ("resnet44_projection", 97.44),
        ("resnet56_projection", 125.75),
        ("vgg16_bn_cifar", 313.73),
    ],
)
def test_multiplications_are_as_many_as_published(name: str, millions: float) -> None:
    assert operations(NETWORKS[name](10), torch.zeros(1, 3, 32, 32)) / 2e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_trunk_and_tail_give_exactly_what_the_network_gives(name: str) -> None:
    torch.manual_seed(0)
    network, inputs = NETWORKS[name](43).eval(), torch.randn(2, 3, 32, 32)
    before_head = feature_cut(network, inputs[:1])
    places = (cuts(network, inputs[:1])[0], choose_cut(network, inputs[:1], 0.1), before_head)
    with torch.inference_mode():
        logits = network(inputs)
        assert logits.shape == (2, 43)
        for trunk, tail in (split(network, place.name) for place in places):
            assert torch.equal(tail(trunk(inputs)), logits)
        features = split(network, before_head.name)[0](inputs).flatten(1)
    head = [parameter for parameter in network.parameters() if parameter.ndim > 1][-1]
    assert features.shape == (2, head.shape[1])


@pytest.mark.parametrize("projection", ["shortcut.0", "convShortcut"])
def test_a_projection_reads_the_normalised_input_and_an_identity_the_raw_one(projection: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 8, 6, 6)
    for channels, stride in ((16, 2), (8, 1)):
        block = PreActBlock(8, channels, stride, projection).eval()  # type: ignore[arg-type]
        torch.nn.init.zeros_(block.conv2.weight)
        expected = F.conv2d(F.relu(block.bn1(inputs)), block.get_parameter(f"{projection}.weight"), stride=2) if stride == 2 else inputs
        torch.testing.assert_close(block(inputs), expected)


def test_the_padded_stem_of_mobilenet_makes_maps_of_34_pixels() -> None:
    network, inputs = NETWORKS["mobilenet_v2_cifar"](10).eval(), torch.zeros(1, 3, 32, 32)
    assert network.get_submodule("pre")(inputs).shape == (1, 32, 34, 34)
    sides = {cut.name: split(network, cut.name)[0](inputs).shape[-1] for cut in cuts(network, inputs) if cut.name.endswith("residual_7")}
    assert sides["stage2_0_residual_7"] == 17 and sides["stage3_0_residual_7"] == 9 and sides["stage7_residual_7"] == 5


def test_a_depth_that_a_family_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"6n\+2"):
        thin_resnet(18, 10)
    with pytest.raises(ValueError, match=r"6n\+4"):
        WideResNet(20, 1, 10)
