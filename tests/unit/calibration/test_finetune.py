"""Experts and auxiliaries out of small real networks: what is trained, what is left alone, and that a seed decides everything."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import StochasticDepth

from calibration import finetune
from calibration.augment import crop_flip, resized_crop_flip
from calibration.canary import plant
from calibration.finetune import LabelledPixels, accuracy, batches, derangement, generator, shift, train_auxiliary, train_expert, train_tails
from models import architectures
from models.preprocessing import Preprocessing
from models.trunk import choose_cut, tail_copy

CPU = torch.device("cpu")
PLAIN = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def material(n: int = 64) -> tuple[torch.nn.Module, LabelledPixels]:
    """A resnet20 with random weights, and images whose class is their brightness: learnt in a few steps."""
    torch.manual_seed(0)
    labels = torch.arange(n) % 4
    pixels = (labels[:, None, None, None] * 60 + torch.randint(0, 40, (n, 3, 32, 32))).to(torch.uint8)
    return architectures.get("resnet20").build(4).eval(), LabelledPixels(pixels, labels)


@given(classes=st.integers(2, 60), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_a_derangement_moves_every_class_and_loses_none(classes: int, seed: int) -> None:
    drawn = derangement(classes, generator(seed, "test"))
    assert sorted(drawn.tolist()) == list(range(classes))
    assert not (drawn == torch.arange(classes)).any()


def test_the_published_map_is_the_next_class() -> None:
    assert shift(4).tolist() == [1, 2, 3, 0]


@given(n=st.integers(2, 300), size=st.integers(2, 64))
@settings(deadline=None)
def test_no_batch_has_a_single_image(n: int, size: int) -> None:
    rows = [len(part) for part in batches(n, size, generator(0), CPU)]
    assert min(rows) > 1
    assert sum(rows) >= n - 1


@pytest.mark.parametrize("view", [crop_flip, resized_crop_flip])
def test_augmentation_keeps_shape_and_type_and_follows_its_generator(view) -> None:  # type: ignore[no-untyped-def]
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    first, second, other = (view(images, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_shift_moves_the_picture_and_pads_with_black() -> None:
    images = torch.full((64, 1, 8, 8), 200, dtype=torch.uint8)
    views = crop_flip(images, generator(0), pad=2)
    assert set(views.unique().tolist()) == {0, 200}
    assert (views[:, :, 2:6, 2:6] == 200).all()  # nothing that was inside by more than the pad is lost


def test_training_an_auxiliary_learns_the_task_and_leaves_the_suspect_alone() -> None:
    suspect, data = material()
    before = {key: value.clone() for key, value in suspect.state_dict().items()}
    auxiliary, curve = train_auxiliary(suspect, data, data, PLAIN, lr=0.05, batch=16, epochs=6, steps_at=(4,), decay=0.1, seed=0, advance=lambda _: None)
    assert curve.accuracy[-1] > 0.9
    assert accuracy(auxiliary, data, PLAIN) == curve.accuracy[-1]
    assert all(torch.equal(before[key], value) for key, value in suspect.state_dict().items())
    assert not suspect.training


def test_an_auxiliary_that_has_lost_the_task_before_its_coldest_part_is_given_up() -> None:
    suspect, data = material()
    fixed = {"batch": 16, "epochs": 6, "steps_at": (4,), "decay": 0.1, "seed": 0, "advance": lambda _: None}
    _, lost = train_auxiliary(suspect, data, data, PLAIN, lr=1e-6, hopeless=0.9, **fixed)  # type: ignore[arg-type]
    _, kept = train_auxiliary(suspect, data, data, PLAIN, lr=0.05, hopeless=0.1, **fixed)  # type: ignore[arg-type]
    assert lost.steps == (1, 2, 3, 4)
    assert kept.steps == (1, 2, 3, 4, 5, 6)


def test_the_published_expert_takes_one_epoch_towards_the_wrong_labels() -> None:
    suspect, data = material()
    _, curve = train_expert(suspect, data, shift(4), PLAIN, lr=1e-3, batch=16, seed=0, advance=lambda _: None)
    assert curve.steps == (1, 2, 3, 4)


def test_tails_stop_when_they_have_forgotten_the_task() -> None:
    suspect, data = material()
    trained, _ = train_auxiliary(suspect, data, None, PLAIN, lr=0.05, batch=16, epochs=6, steps_at=(4,), decay=0.1, seed=0, advance=lambda _: None)
    cut = choose_cut(trained, PLAIN.normalise(data.pixels[:1]), 0.1).name
    tails, curves = train_tails(trained, cut, 2, data, data, 4, PLAIN, lr=3e-3, batch=16, stop_at=0.2, max_steps=200, seed=0, advance=lambda _: None)
    assert len(tails) == 2
    for curve in curves:
        assert curve.accuracy[-1] <= 0.2
        assert all(value > 0.2 for value in curve.accuracy[:-1])


def test_a_large_held_back_part_goes_through_a_tail_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    suspect, data = material(600)
    sizes: list[int] = []

    def watched(network: nn.Module, cut: str | None) -> nn.Module:
        tail = tail_copy(network, cut)
        tail.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        return tail

    monkeypatch.setattr(finetune, "tail_copy", watched)
    (tail,), (curve,) = train_tails(suspect, None, 1, data, data, 4, PLAIN, lr=1e-4, batch=16, stop_at=0.0, max_steps=5, seed=0, advance=lambda _: None)
    assert sizes == [16] * 5 + [256, 256, 88]
    assert curve.accuracy == pytest.approx((accuracy(tail, data, PLAIN),))


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    suspect, data = material()
    cut = choose_cut(suspect, PLAIN.normalise(data.pixels[:1]), 0.1).name

    def tails(seed: int) -> list[torch.Tensor]:
        made, _ = train_tails(suspect, cut, 2, data, data, 4, PLAIN, lr=1e-3, batch=16, stop_at=0.0, max_steps=10, seed=seed, advance=lambda _: None)
        return [value for tail in made for value in tail.state_dict().values()]

    torch.rand(5)  # the global random state must not matter
    assert all(torch.equal(a, b) for a, b in zip(tails(3), tails(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tails(3), tails(4), strict=True))


DROPPING = nn.Sequential(nn.Conv2d(3, 4, 3, 4), StochasticDepth(0.5, "row"), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 4)).eval()


def dropping_tails(cut: str | None, data: LabelledPixels) -> list[nn.Module]:
    return train_tails(DROPPING, cut, 2, data, data, 4, PLAIN, lr=1e-3, batch=16, stop_at=0.0, max_steps=5, seed=0, advance=lambda _: None)[0]


@pytest.mark.parametrize(
    "train",
    [
        lambda data: [train_expert(DROPPING, data, shift(4), PLAIN, lr=1e-3, batch=16, seed=0, advance=lambda _: None)[0]],
        partial(dropping_tails, None),
        partial(dropping_tails, "_2"),
        lambda data: [train_auxiliary(DROPPING, data, data, PLAIN, lr=0.01, batch=16, epochs=1, steps_at=(), decay=1, seed=0, advance=lambda _: None)[0]],
        lambda data: [plant(DROPPING, [], data, data, PLAIN, lr=0.01, batch=16, epochs=1, rate=0.1, least=0, seed=0, advance=lambda _: None).network],
    ],
    ids=["expert", "whole tails", "tails", "auxiliary", "canaries"],
)
def test_what_a_network_drops_at_random_is_the_same_whatever_ran_before(train: Callable[[LabelledPixels], list[nn.Module]]) -> None:
    """Dropout and stochastic depth draw from torch's global generator, which nobody else finds moved."""
    _, data = material()
    made = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        made.append([value for network in train(data) for value in network.state_dict().values()])
        assert torch.get_rng_state().equal(before)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_who_answers_no_numbers_is_never_right() -> None:
    """Also not about class 0, which is where argmax finds the largest of no numbers: a network that diverged would have learned a trigger, or the task."""
    data = LabelledPixels(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 0, 0, 0, 1]))

    def answering(*logits: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: torch.tensor(logits).expand(len(images), -1)

    assert accuracy(answering(1.0, 0.0), data, Preprocessing()) == 5 / 6
    assert accuracy(answering(torch.nan, torch.nan), data, Preprocessing()) == 0.0
    assert accuracy(answering(torch.nan, 0.0), data, Preprocessing()) == 0.0
