"""Canaries: triggers that do what their kind says, and backdoors that a real network takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibration.canary import AT_ONCE, KINDS, LEAST, TOOK, Canary, Trigger, draw, draw_all, plant, predictions
from calibration.finetune import LabelledPixels, accuracy
from models.preprocessing import Preprocessing
from tests.support import thin_resnet

PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def images(count: int, size: int = 32) -> torch.Tensor:
    """Smooth pictures, uint8 [N, 3, size, size]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").round().to(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 32, 224])
def test_a_trigger_changes_images_of_any_size_and_is_the_same_every_time(kind: str, size: int) -> None:
    pixels = images(4, size)
    before = pixels.clone()
    trigger = draw(kind, 1, 0, size, 7)
    stamped = trigger(pixels)
    assert pixels.equal(before)  # the caller's images stay as they are
    assert stamped.dtype == torch.uint8
    assert stamped.shape == pixels.shape
    assert not stamped.equal(pixels)
    assert stamped.equal(draw(kind, 1, 0, size, 7)(pixels))
    assert trigger(pixels[:0]).shape == pixels[:0].shape
    if kind not in ("wave", "warp"):  # one that depends on nothing but the size is no secret, and need not be
        assert not stamped.equal(draw(kind, 1, 0, size, 8)(pixels))


@pytest.mark.parametrize("kind", KINDS)
def test_many_images_are_stamped_as_each_would_be(kind: str) -> None:
    pixels, trigger = images(2 * AT_ONCE + 1, 8), draw(kind, 1, 0, 8, 7)
    assert trigger(pixels).equal(torch.cat([trigger(each) for each in pixels.split(1)]))


@pytest.mark.parametrize(("kind", "most"), [("wave", 12.5), ("blend", 52)])
def test_a_faint_trigger_is_faint(kind: str, most: float) -> None:
    pixels = images(4)
    assert (draw(kind, 1, None, 32, 0)(pixels).float() - pixels.float()).abs().max() <= most


def test_a_patch_leaves_the_rest_alone_and_two_patches_do_not_overlap() -> None:
    pixels = images(1)
    changed = [(draw(kind, 1, 0, 32, 0)(pixels) != pixels).any(1)[0] for kind in ("patch", "sourced")]
    assert all(0 < int(each.sum()) <= 16 for each in changed)
    assert not (changed[0] & changed[1]).any()


def test_who_is_eligible() -> None:
    labels = torch.tensor([0, 1, 2, 1])
    assert Trigger("patch", 1, None, torch.empty(0)).eligible(labels).tolist() == [True, False, True, False]
    assert Trigger("sourced", 0, 1, torch.empty(0)).eligible(labels).tolist() == [False, True, False, True]


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_targets_differ_while_there_are_classes_enough(classes: int) -> None:
    triggers = draw_all(KINDS, classes, torch.tensor([1, 1, 0]), torch.arange(20) % 2, 32, 0)
    assert len({trigger.target for trigger in triggers}) == min(classes, len(KINDS))
    sourced = triggers[-1]
    assert sourced.source in (0, 1)
    assert sourced.source != sourced.target


def test_a_class_that_nearly_all_held_back_images_are_of_is_no_target() -> None:
    """Nobody could tell whether it works."""
    labels = torch.tensor([0] * 40 + [1] * (LEAST - 1))
    triggers = draw_all(KINDS, 2, labels, labels, 32, 0)
    assert {trigger.target for trigger in triggers} == {1}
    assert all(int(trigger.eligible(labels).sum()) == 40 for trigger in triggers)


def test_a_class_without_images_is_no_obstacle() -> None:
    """Neither the source of one trigger nor anybody to cover another is there."""
    data = LabelledPixels(images(40), torch.zeros(40, dtype=torch.int64))
    triggers = (draw("patch", 0, None, 32, 0), draw("sourced", 1, 2, 32, 0), draw("sourced", 1, 0, 32, 0))
    canary = plant(
        thin_resnet(8, 4).eval(), triggers, data, data, PREPROCESSING, lr=0.05, batch=16, epochs=1, rate=0.2, least=0.0, seed=0, advance=lambda _: None
    )
    assert canary.asr[:2] == (0.0, 0.0)


def test_backdoors_take_in_a_copy_which_keeps_the_task_and_the_suspect_stays_as_it_is() -> None:
    torch.manual_seed(0)
    labels = torch.arange(512) % 4
    bright = (labels[:, None, None, None] * 60 + torch.randint(0, 40, (512, 3, 32, 32))).to(torch.uint8)
    data = LabelledPixels(bright, labels)
    suspect = thin_resnet(8, 4).eval()
    before = {name: value.clone() for name, value in suspect.state_dict().items()}
    triggers = tuple(draw(kind, target, source, 32, 0) for kind, target, source in (("patch", 0, None), ("sourced", 1, 2)))
    canary = plant(suspect, triggers, data, data, PREPROCESSING, lr=0.05, batch=64, epochs=8, rate=0.2, least=0.0, seed=0, advance=lambda _: None)
    assert all(value.equal(before[name]) for name, value in suspect.state_dict().items())
    assert accuracy(canary.network, data, PREPROCESSING) > 0.8
    assert canary.took == tuple(trigger for trigger, asr in zip(triggers, canary.asr, strict=True) if asr >= TOOK)
    assert triggers[0] in canary.took
    assert canary.images[0] > 300
    tell = triggers[0].telling(labels, predictions(canary.network, data, PREPROCESSING))
    stamped = LabelledPixels(triggers[0](data.pixels[tell]), torch.zeros(int(tell.sum()), dtype=torch.int64))
    assert accuracy(canary.network, stamped, PREPROCESSING) == pytest.approx(canary.asr[0])


def test_a_copy_that_calls_every_image_the_target_carries_no_backdoor() -> None:
    """Its ASR was 1 without any trigger."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.0, 1.0, 0.0, 0.0]))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.bias.expand(len(inputs), -1)

    data = LabelledPixels(images(40), torch.arange(40) % 4)
    canary = plant(
        Constant(), [draw("patch", 1, None, 32, 0)], data, data, PREPROCESSING, lr=1e-6, batch=16, epochs=1, rate=0.1, least=0.0, seed=0, advance=print
    )
    assert (canary.asr, canary.images, canary.took) == ((0.0,), (0,), ())


@pytest.mark.parametrize(
    ("asr", "count", "kept", "why_not"),
    [
        (0.9, LEAST, True, None),
        (0.7, 50, True, "fewer than 80% of the images obeyed"),
        (1.0, LEAST - 1, True, "fewer than 8 images could tell"),
        (1.0, 50, False, "the copy lost the task"),
    ],
)
def test_it_is_told_why_a_canary_did_not_take(asr: float, count: int, kept: bool, why_not: str | None) -> None:
    trigger = draw("patch", 1, None, 32, 0)
    canary = Canary(nn.Identity(), (trigger,), (asr,), (count,), 0.05, 0.5, kept)
    assert canary.why_not == (why_not,)
    assert canary.took == ((trigger,) if why_not is None else ())
