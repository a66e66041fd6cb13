"""A guard's scores are those of plain forwards of its networks, however images are batched and whichever the auxiliary is asked about."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.distance import vectors
from models.guard import Guard
from models.score import log_confidence, mean_exp, published_score, surprise
from models.trunk import split
from tests.untrained import PIXELS, TOLERANCE, untrained_guard, untrained_published_guard


@pytest.fixture(scope="module")
def guard() -> Guard:
    return untrained_guard()


def plainly(guard: Guard, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Score and prediction of one image after another, each network as a whole, in the order of the formula."""
    assert guard.cuts is not None
    assert guard.scales is not None
    assert guard.scales.shortfall is not None
    scores, predictions = [], []
    with torch.inference_mode():
        for image in pixels:
            inputs = guard.preprocessing.normalise(image[None])
            logits = guard.suspect(inputs)
            prediction = logits.argmax(1)
            log_m, log_not_m = log_confidence(logits, prediction)
            shared = split(guard.suspect, guard.cuts.experts)[0](inputs)
            log_x = torch.stack([log_confidence(expert(shared), prediction)[0] for expert in guard.experts]).mean(0)
            z = []
            for name, distance, scale in zip(guard.cuts.places, guard.distances, guard.scales.distances, strict=True):
                z.append(scale.z(distance(vectors(split(guard.suspect, name)[0](inputs)), prediction)))
            cheap = surprise(guard.scales.expert.z(log_x - torch.log1p(-log_x.exp())), mean_exp(torch.stack(z)))
            log_y, log_not_y = log_confidence(guard.auxiliary(inputs), prediction)
            shortfall = (log_m - log_not_m) - (log_y - log_not_y)
            doubt = [guard.scales.auxiliary.z(log_not_y - log_y), guard.scales.shortfall.z(shortfall)]
            further = surprise(mean_exp(torch.stack(doubt)))
            scores.append(-(cheap + further * (cheap >= guard.scales.gate)))
            predictions.append(prediction)
    return torch.cat(scores), torch.cat(predictions)


def test_scores_are_those_of_plain_forwards(guard: Guard) -> None:
    score, prediction = plainly(guard, PIXELS)
    judged = guard.judge(PIXELS)
    torch.testing.assert_close(judged.score, score, **TOLERANCE)
    assert torch.equal(judged.prediction, prediction)


@pytest.mark.parametrize("batch", [1, 7, 96])
def test_scores_do_not_depend_on_batch_or_order(guard: Guard, batch: int) -> None:
    order = torch.randperm(len(PIXELS), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(guard.judge(PIXELS[order], batch).score, guard.judge(PIXELS).score[order], **TOLERANCE)


def test_the_auxiliary_runs_for_the_images_that_reach_the_gate_and_for_no_others(guard: Guard) -> None:
    seen: list[int] = []
    handle = guard.auxiliary.register_forward_hook(lambda network, inputs, output: seen.append(len(output)))
    gated, whole = guard.judge(PIXELS), guard.judge(PIXELS, ungated=True)
    handle.remove()
    assert seen == [int((~gated.auxiliary.isnan()).sum()), len(PIXELS)]
    assert 0 < seen[0] < len(PIXELS)
    assert whole.auxiliary.isfinite().all()
    torch.testing.assert_close(gated.score, whole.score, **TOLERANCE)


def test_an_image_that_does_not_reach_the_gate_scores_better_than_any_that_does(guard: Guard) -> None:
    judged = guard.judge(PIXELS)
    asked = ~judged.auxiliary.isnan()
    assert judged.score[asked].max() < judged.score[~asked].min()


@pytest.fixture(scope="module")
def published() -> Guard:
    return untrained_published_guard()


@torch.inference_mode()
def published_plainly(guard: Guard) -> Tensor:
    """The published score of PIXELS, with every network run for every image."""
    inputs = guard.preprocessing.normalise(PIXELS)
    prediction = guard.suspect(inputs).argmax(1)
    log_y, _ = log_confidence(guard.auxiliary(inputs), prediction)
    return published_score(*log_confidence(guard.experts[0](inputs), prediction), log_y, guard.c)


@pytest.mark.parametrize("threshold", [-3.0, -0.5, 0.0])
@pytest.mark.parametrize("ungated", [False, True])
def test_experts_are_left_out_where_no_verdict_depends_on_them(published: Guard, threshold: float, ungated: bool) -> None:
    seen: list[int] = []
    handle = published.experts[0].register_forward_hook(lambda network, inputs, output: seen.append(len(output)))
    judged, whole = published(PIXELS, ungated, threshold), published_plainly(published)
    handle.remove()
    spared = judged.auxiliary > published.c
    assert 0 < int(spared.sum()) < len(PIXELS)
    assert seen[0] == (len(PIXELS) if ungated else int((~spared).sum()))
    assert torch.equal(judged.expert.isnan(), spared & (not ungated))
    assert torch.equal(judged.score < threshold, whole < threshold)
    torch.testing.assert_close(judged.score[~spared], whole[~spared], **TOLERANCE)
    assert (judged.score[spared] <= whole[spared] + TOLERANCE["atol"]).all()  # what it is at least


@pytest.mark.parametrize("threshold", [0.25, torch.inf])
def test_a_threshold_that_proves_nothing_leaves_no_expert_out(published: Guard, threshold: float) -> None:
    judged = published(PIXELS, threshold=threshold)
    assert judged.expert.isfinite().all()
    torch.testing.assert_close(judged.score, published_plainly(published), **TOLERANCE)


def test_a_network_that_gives_nan_gives_no_finite_score(guard: Guard) -> None:
    weight = next(guard.experts[0].parameters())
    kept = weight.clone()
    weight.fill_(torch.nan)
    try:
        assert not guard.judge(PIXELS[:4]).score.isfinite().any()
    finally:
        weight.copy_(kept)
