"""How many clean images a guard needs: `python -m benchmarks.few_images`.

The same suspects are guarded with clean sets of different sizes, which the calibration divides by itself; what is rejected is counted among the images of the
evaluation. One JSON record a suspect, size and seed, in benchmarks/results/few_images.json. With another seed the calibration is another, and its images are,
as far as there are so many.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import records
from benchmarks.data import DATASETS, TARGET, partition, test_images
from benchmarks.evaluate import triggered
from benchmarks.zoo import ROOT, Entry, load
from calibration.config import CalibrationConfig
from calibration.figures import Scored, figures
from calibration.material import Inputs
from calibration.pipeline import calibrate
from models import bundle
from models.errors import Problem
from models.registry import Registry

RESULTS = Path(__file__).parent / "results" / "few_images.json"
SIZES = (200, 300, 500, 1000, 2000)
SUSPECTS = (("cifar10", "badnet"), ("cifar10", "blend"), ("cifar10", "wanet"), ("cifar10", "adap_blend"), ("gtsrb", "badnet"), ("gtsrb", "adap_blend"))


def measure(which: Entry, size: int, seed: int, device: torch.device, zoo: Path = ROOT) -> dict[str, Any]:
    """The record of one suspect and clean set."""
    began, suspect = time.monotonic(), load(which, zoo)
    suspect.take_threads(device)
    clean_set, reported = partition(test_images(which.dataset))
    rows = (seed * size + torch.arange(size)) % len(clean_set.images)
    record = {"suspect": which.stem, "weights_sha256": suspect.sha256, "images": size, "seed": seed, "target_fpr": TARGET, **records.circumstances(device)}
    config = CalibrationConfig.model_validate({"name": "suspect", "budget": "quick", "target_fpr": TARGET, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        inputs, registry = Inputs(Path(folder, "suspect.safetensors"), Path(folder, "clean.safetensors")), Registry(Path(folder, "guards"))
        save_file({name: value.contiguous() for name, value in suspect.network.state_dict().items()}, inputs.checkpoint)
        save_file({"images": clean_set.images[rows].permute(0, 2, 3, 1).contiguous(), "labels": clean_set.labels[rows]}, inputs.clean_set)
        try:
            result = calibrate(config, inputs, registry, device)
        except Problem as problem:  # a result, too
            return {**record, "refused": f"{problem.code}: {problem.detail}", "seconds": round(time.monotonic() - began, 1)}
        kept = bundle.read(registry.folder("suspect", result.version), device)
    attacked = triggered(suspect, reported)
    clean, attack = (kept.guard.to(device).judge(images.to(device)) for images in (reported.images, attacked.images))
    found = figures(
        Scored(clean.score, clean.prediction, reported.labels), Scored(attack.score, attack.prediction, attacked.labels), kept.validation_scores, (TARGET,)
    )
    at = found["at"][f"{TARGET:g}"]
    shown = {"tpr": at["tpr_masked"], "realised_fpr": at["realised_fpr"], "promised_interval": at["promised_interval"], "auroc": found["auroc_masked"]}
    return {**record, "validation": found["validation_images"], **shown, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["all", *DATASETS], default="all")
    parser.add_argument("--seed", type=int, action="append", help="of the division and the calibration; may be repeated (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print, and leave the record in git as it is")
    args = parser.parse_args()
    suspects = [each for each in SUSPECTS if args.dataset in ("all", each[0])]
    for seed, (dataset, attack), size in product(args.seed or [0], suspects, SIZES):
        record = measure(Entry(dataset, "resnet20", attack), size, seed, torch.device(args.device))
        print(json.dumps(record), flush=True)
        if not args.json:
            records.enlist(RESULTS, [record], "suspect", "images", "seed")


if __name__ == "__main__":
    main()
