"""Which architecture a state dict belongs to, and what is said where it belongs to none."""

from __future__ import annotations

import pytest
import torch

from models import architectures
from models.errors import CheckpointMismatch, ConfigInvalid


@pytest.mark.parametrize("name", list(architectures.ARCHITECTURES))
@pytest.mark.parametrize("num_classes", [2, 43])
def test_each_architecture_is_recognised_by_its_own_keys_and_shapes(name: str, num_classes: int) -> None:
    with torch.device("meta"):
        state = architectures.get(name).build(num_classes).state_dict()
    found = architectures.identify(state)
    assert (found.architecture.name, found.num_classes) == (name, num_classes)


def test_the_weights_arrive_unchanged() -> None:
    torch.manual_seed(0)
    network = architectures.get("resnet20").build(10).eval()
    rebuilt = architectures.instantiate("resnet20", 10, network.state_dict())
    inputs = torch.randn(2, 3, 32, 32)
    assert all(torch.equal(value, rebuilt.state_dict()[key]) for key, value in network.state_dict().items())
    with torch.inference_mode():
        torch.testing.assert_close(rebuilt(inputs), network(inputs), rtol=1e-5, atol=1e-5)


def test_batch_counters_may_be_missing() -> None:
    state = {key: value for key, value in architectures.get("resnet20").build(10).state_dict().items() if "num_batches" not in key}
    assert architectures.identify(state).architecture.name == "resnet20"
    architectures.instantiate("resnet20", 10, state)


def test_a_missing_key_is_named() -> None:
    state = architectures.get("resnet20").build(10).state_dict()
    del state["layer2.1.conv1.weight"]
    with pytest.raises(CheckpointMismatch, match=r"Closest is resnet20: layer2\.1\.conv1\.weight is missing"):
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
        architectures.get("../../etc/passwd")
