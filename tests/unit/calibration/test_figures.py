"""The figures of an evaluation, against what they are by definition."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

from calibration.figures import Scored, auroc, figures, roc
from models.errors import FprUnreachable


def scored(score: list[float], prediction: list[int], wanted: list[int]) -> Scored:
    return Scored(torch.tensor(score, dtype=torch.float64), torch.tensor(prediction), torch.tensor(wanted))


def test_auroc_is_scikit_learns_with_ties_too() -> None:
    source = torch.Generator().manual_seed(0)
    clean, triggered = torch.randint(3, 12, (300,), generator=source).double(), torch.randint(0, 8, (200,), generator=source).double()
    truth = torch.cat([torch.ones(300), torch.zeros(200)])
    assert auroc(clean, triggered) == pytest.approx(roc_auc_score(truth, torch.cat([clean, triggered])), abs=1e-5)


def test_every_image_counts_unless_masked() -> None:
    clean = scored([5, 1, 7, 8], [0, 1, 2, 2], [0, 1, 2, 0])  # the last is misclassified, the second rejected
    triggered = scored([1, 1, 9, 9], [0, 0, 0, 3], [0, 0, 0, 0])  # the last does not fool the suspect
    found = figures(clean, triggered, torch.arange(2, 12).double(), (0.1,))
    at = found["at"]["0.1"]
    assert (found["clean_accuracy"], found["asr"]) == (0.75, 0.75)
    assert (at["tpr"], at["tpr_masked"]) == (0.5, 0.6667)
    assert (at["realised_fpr"], at["realised_fpr_masked"]) == (0.25, 0.3333)
    assert (at["remaining_asr"], at["accuracy_lost"]) == (0.25, 0.25)
    assert found["auroc"] == 7 / 16  # the two at 1 beat three of the four clean ones and tie with one, the two at 9 beat none
    assert found["auroc_masked"] == auroc(torch.tensor([5.0, 1, 7]), torch.tensor([1.0, 1, 9]))


def test_a_clean_model_has_no_triggered_images_and_keeps_its_other_figures() -> None:
    found = figures(scored([3.0] * 4, [1] * 4, [1] * 4), scored([], [], []), torch.arange(100).double(), (0.01,))
    assert found["auroc"] is None
    assert found["at"]["0.01"]["tpr"] is None
    assert found["at"]["0.01"]["realised_fpr"] == 0.0


def test_too_few_validation_scores_promise_nothing() -> None:
    with pytest.raises(FprUnreachable):
        figures(scored([1.0], [0], [0]), scored([1.0], [0], [0]), torch.arange(50).double(), (0.01,))


def test_a_curve_rises_with_the_rate() -> None:
    curve = roc(torch.arange(100).double(), torch.arange(0, 50).double() - 5, (0.0, 0.1, 0.5, 1.0))
    assert curve["tpr"] == [0.1, 0.3, 1.0, 1.0]
