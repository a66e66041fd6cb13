"""Whether the promised rate of false rejections is kept: `python -m benchmarks.promise`.

A guard is calibrated on the clean set of the evaluation; all test images that trained nothing of it are scored. Then some are drawn at random, which set the
threshold, and others, as many as the promise is about, are judged by it. Counted is how often the rate among these lies in the interval that was promised to
hold with 90%, in the first 200 draws and in a thousand: chance alone makes 200 scatter by two points and more.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.data import DATASETS, Split, divide, test_images
from benchmarks.detectors.guard import BadExpertGuard
from benchmarks.detectors.interface import Observed
from benchmarks.zoo import ROOT, Entry, Suspect, load
from models.threshold import COUNTED, conformal_threshold

RESULTS = Path(__file__).parent / "results" / "promise.json"
SIZES, TARGETS, FEW, DIVISIONS = (200, 500, 2000), (0.005, 0.01, 0.05), 200, 1000


def divided(scores: Tensor, n: int, target: float, divisions: int = DIVISIONS) -> dict[str, Any]:
    """How often the promise was kept where n of the scores, float64 [N], set the threshold and COUNTED others were judged by it."""
    source, rates, told = torch.Generator().manual_seed(n), [], []
    for _ in range(divisions):
        order = torch.randperm(len(scores), generator=source)
        threshold, judged = conformal_threshold(scores[order[:n]], target), scores[order[n : n + COUNTED]]
        rates.append(threshold.rejects(judged).double().mean().item())
        told.append(threshold.interval[0] <= rates[-1] <= threshold.interval[1])
    figures = {"mean_rate": sum(rates) / divisions, "within": sum(told) / divisions, "within_few": sum(told[:FEW]) / FEW}
    about = {"n": n, "target_fpr": target, "judged": len(judged), "divisions": divisions, "interval": [round(bound, 5) for bound in threshold.interval]}
    return {**about, **{name: round(value, 4) for name, value in figures.items()}}


def measure(suspect: Suspect, preset: str, test: Split, device: torch.device) -> dict[str, Any]:
    """The record of one guard, of seed 0."""
    began, dataset = time.monotonic(), DATASETS[suspect.entry.dataset]
    parts = divide(test.to(device), reported=None)
    guard = BadExpertGuard(preset)
    observed = Observed(suspect.network.to(device), dataset.preprocessing, dataset.num_classes, suspect.entry.architecture)
    guard.fit(observed, parts.fit, parts.validation, seed=0)
    scores = guard.score(torch.cat([parts.validation.pixels, parts.reported.images]))
    which = {"suspect": suspect.entry.stem, "weights_sha256": suspect.sha256, "preset": preset, **records.circumstances(device)}
    found = [divided(scores, n, target) for n in SIZES for target in TARGETS]
    return {**which, "seconds": round(time.monotonic() - began, 1), "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.promise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=list(DATASETS), default="cifar10")
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--attack", default="badnet", help="which suspect of the zoo")
    parser.add_argument("--preset", choices=["auto", "paper"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--zoo", type=Path, default=ROOT)
    parser.add_argument("--json", action="store_true", help="print, and leave the record in git as it is")
    args = parser.parse_args()
    suspect = load(Entry(args.dataset, args.architecture, args.attack), args.zoo)
    suspect.take_threads(torch.device(args.device))
    record = measure(suspect, args.preset, test_images(args.dataset), torch.device(args.device))
    if args.json:
        print(json.dumps(record, indent=1))
        return
    records.enlist(RESULTS, [record], "suspect", "preset")
    for each in record["found"]:
        print(json.dumps(each))


if __name__ == "__main__":
    main()
