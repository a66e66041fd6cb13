"""A suspect is a network that answers images with logits; what is anything else is refused before it costs anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from calibration.suspect import _as_other, _sizes, read_suspect
from models import architectures
from models.errors import CheckpointMismatch

OWN = """
from torch import nn

class Network(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images):
        return self.head(images.mean((2, 3)))

class Pair(Network):
    def forward(self, images):
        return super().forward(images), images

class Named(Network):
    def forward(self, images):
        return {"logits": super().forward(images)}

class Map(Network):
    def forward(self, images):
        return images

class Small(Network):
    def forward(self, images):
        return self.head(images.flatten(1)[:, : 3 * 32 * 32].view(-1, 3, 32 * 32).mean(2)) if images.shape[2] == 32 else self.head(images)

class Inside(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.model = Network(num_classes)

    def forward(self, images):
        return self.model(images)

class Broken(Network):
    def forward(self, images):
        raise KeyError("layer4")
"""


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "operators_answers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("models.architectures.catalogue._admitted", {})
    monkeypatch.setattr("models.architectures.catalogue._get", architectures.get.__globals__["_get"].__wrapped__)  # keeps none of these
    sys.modules.pop("operators_answers", None)
    save_file({f"head.{name}": value for name, value in nn.Linear(3, 5).state_dict().items()}, tmp_path / "own.safetensors")
    return tmp_path / "own.safetensors"


@pytest.mark.parametrize(
    ("network", "said"),
    [("Pair", "an image with tuple"), ("Named", "an image with dict"), ("Map", r"shape \[1, 3, 224, 224\], where"), ("Broken", "takes no image of")],
)
def test_a_network_that_gives_no_logits_is_refused(checkpoint: Path, network: str, said: str) -> None:
    name = architectures.admit(f"operators_answers:{network}")
    with pytest.raises(CheckpointMismatch, match=said):
        read_suspect(checkpoint, name, None, torch.device("cpu"))


def test_one_that_takes_another_size_than_the_usual_is_taken_with_that(checkpoint: Path) -> None:
    suspect = read_suspect(checkpoint, architectures.admit("operators_answers:Small"), None, torch.device("cpu"))
    assert (suspect.architecture.size, suspect.size) == (224, 32)
    assert _sizes(suspect, None) == [32]


def test_one_that_does_is_taken(checkpoint: Path) -> None:
    name = architectures.admit("operators_answers:Network")
    assert read_suspect(checkpoint, name, None, torch.device("cpu")).num_classes == 5


def test_another_network_of_the_same_weights_is_tried_at_its_own_size(tmp_path: Path) -> None:
    save_file(architectures.get("timm/tf_efficientnet_b2").build(4).state_dict(), tmp_path / "suspect.safetensors")
    suspect = read_suspect(tmp_path / "suspect.safetensors", None, None, torch.device("cpu"))
    sizes = {each.architecture.name: _sizes(each, None)[0] for each in (suspect, *(_as_other(suspect, other, torch.device("cpu")) for other in suspect.others))}
    assert sizes["timm/efficientnet_b2"] == 256
    assert sizes["timm/tf_efficientnet_b2"] == 260


@pytest.mark.parametrize("prefix", ["model.", "module.model.", ""])
@pytest.mark.parametrize("named", [True, False])
def test_an_own_network_may_lie_in_an_attribute_that_is_called_like_a_wrapper(checkpoint: Path, prefix: str, named: bool) -> None:
    head = nn.Linear(3, 5)
    save_file({f"{prefix}head.{name}": value for name, value in head.state_dict().items()}, checkpoint)
    architectures.admit("operators_answers:Inside")
    suspect = read_suspect(checkpoint, "operators_answers:Inside" if named else None, None, torch.device("cpu"))
    assert torch.equal(suspect.network.state_dict()["model.head.weight"], head.weight)
