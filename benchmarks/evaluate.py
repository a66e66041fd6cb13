"""How good one guard is at one attack: `python -m benchmarks.evaluate --bundle var/guards/demo/1 --attack badnet`.

On the CIFAR-10 test images that are neither in the example clean set nor among its samples. The threshold is the bundle's own, set on the clean set:
no image that is reported had a part in it. Figures are unmasked (all clean images, all triggered ones); `paper_masked` are over the clean images that
the suspect gets right and the triggered ones that fool it, as the paper reports them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.attacks import ATTACKS, Attack, stamp
from benchmarks.data import cifar10
from benchmarks.make_examples import CLEAN_SET, SAMPLES
from models import bundle
from models.bundle import Bundle


def evaluate(guarded: Bundle, attack: Attack, images: Tensor, labels: Tensor, device: torch.device) -> dict[str, Any]:
    """All figures for uint8 images [N, 3, H, W] that the calibration never saw."""
    guarded.guard.to(device)
    threshold = guarded.description.threshold.value
    eligible = attack.eligible(labels)
    target = attack.relabel(labels[eligible])
    clean = guarded.guard.judge(images)
    triggered = guarded.guard.judge(stamp(attack, images[eligible]))
    right, fooled = clean.prediction == labels, triggered.prediction == target
    rejected, caught = clean.score < threshold, triggered.score < threshold
    return {
        "clean_images": len(labels),
        "triggered_images": int(eligible.sum()),
        "clean_accuracy": share(right),
        "guarded_accuracy": share(right & ~rejected),
        "asr": share(fooled),
        "remaining_asr": share(fooled & ~caught),
        "auroc": auroc(clean.score, triggered.score),
        "tpr": share(caught),
        "realised_fpr": share(rejected),
        "target_fpr": guarded.description.threshold.target_fpr,
        "fpr_interval": guarded.description.threshold.interval,
        "paper_masked": {
            "auroc": auroc(clean.score[right], triggered.score[fooled]),
            "tpr": share(caught[fooled]),
            "realised_fpr": share(rejected[right]),
        },
    }


def share(values: Tensor) -> float:
    return round(values.double().mean().item(), 4)


def auroc(clean: Tensor, triggered: Tensor) -> float:
    """Low scores are suspicious, so clean images are the positives."""
    truth = torch.cat([torch.ones(len(clean)), torch.zeros(len(triggered))])
    return round(float(roc_auc_score(truth, torch.cat([clean, triggered]))), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="the folder of one version of a guard")
    parser.add_argument("--attack", choices=list(ATTACKS), required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=10_000 - CLEAN_SET - SAMPLES, help="at most so many test images")
    args = parser.parse_args()
    _, test = cifar10()
    order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))  # as make_examples draws
    rows = order[CLEAN_SET + SAMPLES :][: args.images]
    guarded = bundle.read(args.bundle)
    figures = evaluate(guarded, ATTACKS[args.attack](), test.images[rows], test.labels[rows], torch.device(args.device))
    print(json.dumps({"attack": args.attack, "preset": guarded.description.preset, "bundle_id": guarded.bundle_id, **figures}, indent=1))


if __name__ == "__main__":
    main()
