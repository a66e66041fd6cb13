"""The suspects in git are what their records say, as far as the images in git can tell."""

from __future__ import annotations

import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import records
from benchmarks.attacks import ATTACKS, Recipe, Task, stamp
from benchmarks.data import CIFAR10_CLASSES, DATASETS, Split
from benchmarks.train import measure, train
from benchmarks.zoo import ROOT, Entry, entries, keep, load
from benchmarks.zoo import records as zoo_records
from models.cifar import thin_resnet
from tests.conftest import EXAMPLES


@cache
def cifar10_images(every: int = 8) -> Split:
    """Test images, from the example clean set."""
    with zipfile.ZipFile(EXAMPLES / "clean_set.zip") as archive:
        names = sorted(archive.namelist())[::every]
        pixels = np.stack([np.asarray(Image.open(archive.open(name)).convert("RGB")) for name in names])
    return Split(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([CIFAR10_CLASSES.index(name.split("/")[0]) for name in names]))


@pytest.mark.parametrize(
    "suspect", [suspect for suspect in entries() if suspect.dataset == "cifar10" and suspect.architecture == "resnet20"], ids=lambda s: s.stem
)
def test_accuracy_and_attack_are_as_recorded(suspect: Entry) -> None:
    found = load(suspect)
    figures = measure(found.network, found.attack, cifar10_images(), DATASETS["cifar10"])
    assert figures["clean_accuracy"] == pytest.approx(found.record["clean_accuracy"], abs=0.06)
    if found.attack is not None:
        assert figures["asr"] == pytest.approx(found.record["asr"], abs=0.08 if suspect.attack != "tact" else 0.15)  # of 250 images, or 25


def test_every_record_is_of_the_weights_that_are_kept_or_of_a_suspect_with_a_record() -> None:
    weights = {suspect: load(suspect).sha256 for suspect in entries()}
    trained = {Entry(record["dataset"], record["architecture"], record["attack"], record["seed"]): record for record in zoo_records()}
    for record in records.read():
        suspect = Entry(record["dataset"], record["architecture"], record["attack"], record["suspect_seed"])
        assert record["weights_sha256"] == weights.get(suspect, record["weights_sha256"])
        assert record["gated"] == trained[suspect]["passes_gate"]


def test_the_zoo_is_small() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*.safetensors")) < 25e6


@pytest.mark.parametrize("attack", ["clean", "badnet", "dynamic", "trojannn"])
def test_what_is_kept_comes_back(tmp_path: Path, attack: str) -> None:
    torch.manual_seed(0)
    suspect, network = Entry("cifar10", "resnet20", attack, seed=3), thin_resnet(20, 10)
    trigger = None if attack == "clean" else ATTACKS[attack](Task(), 3)
    record = {"dataset": "cifar10", "architecture": "resnet20", "attack": attack, "seed": 3, "passes_gate": True}
    keep(suspect, network, trigger, tmp_path, record)
    assert entries(tmp_path) == [suspect]
    found = load(suspect, tmp_path)
    assert found.passes_gate
    assert all(found.network.state_dict()[name].equal(value.half().to(value.dtype)) for name, value in network.state_dict().items())
    if trigger is not None and found.attack is not None:
        images = cifar10_images().images[:8]
        difference = stamp(found.attack, images).float() - stamp(trigger.eval(), images).float()
        assert difference.abs().max() <= 1  # half precision


def test_a_suspect_that_is_not_there_is_told_how_to_be_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.train --dataset gtsrb --architecture resnet20 --attack wanet"):
        load(Entry("gtsrb", "resnet20", "wanet"), tmp_path)


def test_training_learns_task_and_trigger() -> None:
    """A small network on few images: whether the loop, with the attack in its batches, goes down, is the same for a seed, and learns the trigger."""
    data = cifar10_images(4)
    told = []
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        network, attack = thin_resnet(8, 10), ATTACKS["ft"](Task())
        train(network, attack, data, DATASETS["cifar10"], Recipe(epochs=6, lr=0.05), 0, lambda epoch, loss: told.append(loss))
        states.append(network.state_dict())
    assert told[5] < told[0]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert measure(network, attack, data, DATASETS["cifar10"])["asr"] > 0.5
