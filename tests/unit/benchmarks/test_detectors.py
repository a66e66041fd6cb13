"""Each detector against a figure of its paper or a property that its authors state, on the example suspects and their samples."""

from __future__ import annotations

import zipfile
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.data import CIFAR10_CLASSES, DATASETS
from benchmarks.detectors import DETECTORS, OTHERS, PRESETS, Detector, NotApplicable, Observed
from benchmarks.detectors.ibd_psc import IbdPsc
from benchmarks.detectors.scale_up import ScaleUp
from benchmarks.detectors.ted import Ted
from calibration.figures import auroc
from calibration.finetune import LabelledPixels
from models.cifar import thin_resnet
from models.preprocessing import Preprocessing
from tests.conftest import EXAMPLES


@cache
def suspect(attack: str) -> Observed:
    network = thin_resnet(20, 10)
    network.load_state_dict(load_file(EXAMPLES / f"suspect_{attack}.safetensors"))
    return Observed(network.eval().requires_grad_(False), DATASETS["cifar10"].preprocessing, 10, "resnet20")


@cache
def images(archive: str, folder: str, count: int) -> LabelledPixels:
    """The first `count` images of a shuffled folder of an archive, with their true labels."""
    with zipfile.ZipFile(EXAMPLES / archive) as opened:
        names = sorted(name for name in opened.namelist() if name.startswith(folder))
        names = [names[int(i)] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:count]]
        pixels = np.stack([np.asarray(Image.open(opened.open(name)).convert("RGB")) for name in names])
    return LabelledPixels(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([CIFAR10_CLASSES.index(name.split("/")[-2]) for name in names]))


def fitted(name: str, attack: str) -> Detector:
    clean = images("clean_set.zip", "", 800)
    fit = LabelledPixels(clean.pixels[:600], clean.labels[:600])
    detector = DETECTORS[name]()
    detector.fit(suspect(attack), fit, LabelledPixels(clean.pixels[600:], clean.labels[600:]), 0)
    return detector


def scores(name: str, attack: str) -> tuple[Tensor, Tensor]:
    """Of clean samples and of triggered ones."""
    detector = fitted(name, attack)
    return detector.score(images("samples.zip", "clean/", 150).pixels), detector.score(images("samples.zip", f"{attack}/", 150).pixels)


def test_there_are_seven_others_and_our_two_presets() -> None:
    assert len(OTHERS) == 7
    assert set(DETECTORS) == {*PRESETS, *(detector.name for detector in OTHERS)}


@pytest.mark.parametrize(
    ("name", "attack", "least"),
    [
        ("strip", "badnet", 0.8),  # Gao et al., table 3, report more; the network is small, and so is the trigger
        ("ibd_psc", "badnet", 0.97),  # Hou et al., table 1: AUROC 1.00
        ("beatrix", "badnet", 0.95),  # Ma et al., figure 7
        ("mahalanobis", "badnet", 0.99),
        ("mahalanobis", "blend", 0.95),
        ("ted", "badnet", 0.8),  # Mo et al., table 2
        ("max_softmax", "badnet", 0.6),  # a null baseline: something, and not much
    ],
)
def test_a_detector_sees_what_its_paper_says_it_sees(name: str, attack: str, least: float) -> None:
    clean, triggered = scores(name, attack)
    assert clean.dtype == torch.float64
    assert clean.shape == (150,)
    found = auroc(clean, triggered)
    assert found is not None
    assert found >= least


@pytest.mark.parametrize("name", [detector.name for detector in OTHERS])
def test_a_score_does_not_depend_on_the_other_images(name: str) -> None:
    detector, pixels = fitted(name, "badnet"), images("samples.zip", "clean/", 12).pixels
    together, apart = detector.score(pixels), torch.cat([detector.score(each[None]) for each in pixels])
    torch.testing.assert_close(together, apart, rtol=0.05, atol=0.05)  # bf16, at other batch shapes


class Bright(nn.Module):
    """Calls an image 1 where its first pixel is white, whatever else there is, else by its mean brightness."""

    def forward(self, x: Tensor) -> Tensor:
        white, mean = x[:, 0, 0, 0], x.mean((1, 2, 3))
        return torch.stack([0.9 - mean, torch.where(white > 0.99, 5.0, -1.0), mean - 0.9], 1)


def test_scale_up_rejects_what_amplification_does_not_change() -> None:
    dark = torch.randint(40, 120, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    marked = dark.clone()
    marked[:, :, 0, 0] = 255
    detector, some = ScaleUp(), LabelledPixels(dark, torch.zeros(60).long())
    detector.fit(Observed(Bright(), Preprocessing(8, 8), 3, "bright"), some, some, 0)
    assert detector.score(marked).max() < detector.score(dark).min()


def test_ted_gives_rank_0_to_a_reference_and_the_greatest_ranks_to_triggered_images_in_early_layers() -> None:
    detector = fitted("ted", "badnet")
    assert isinstance(detector, Ted)
    clean, triggered = (detector.ranks(images("samples.zip", folder, 100).pixels) for folder in ("clean/", "badnet/"))
    assert clean.shape[1] == len(detector.references) >= 8
    assert clean[:, -1].mean() < 0.05  # before the head all are among their own class
    assert triggered[:, 1].mean() > clean[:, 1].mean()


def test_a_network_without_batch_norms_is_told_to_be_out_of_reach_of_ibd_psc() -> None:
    some, observed = images("clean_set.zip", "", 10), Observed(Bright(), Preprocessing(), 3, "bright")
    with pytest.raises(NotApplicable, match="batch norms"):
        IbdPsc().fit(observed, some, some, 0)
