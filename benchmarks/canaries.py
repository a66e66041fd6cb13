"""What canaries are worth: `python -m benchmarks.canaries`.

For each suspect of the zoo that passes its gate: canaries are planted in a copy, every setting of the largest search is tried on them, and then on the suspect
itself with the real attack's images, which no calibration ever has. Kept are what the search chose, how often each setting really catches the attack, and the
power that the canaries promised; and of the guards that the canaries chose all figures, of test images that `benchmarks.evaluate` does not report, by which
hardly anything of this program's design was chosen. One JSON record a suspect, in benchmarks/results/canaries.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.data import DATASETS, REPORTED, TARGET, Split, divide, test_images
from benchmarks.detectors.guard import as_files
from benchmarks.evaluate import triggered, workers
from benchmarks.zoo import ROOT, Entry, entries, load
from calibration.config import Budget, CalibrationConfig
from calibration.figures import Scored, figures
from calibration.material import Material, prepare, read
from calibration.recipes import AutoRecipe, auto_recipe
from calibration.resume import Resume
from calibration.search import HOTTEST, STOPS, Setting, choose, make_guards, search
from calibration.workshop import Workshop, choose_cuts
from models.guard import Guard
from models.threshold import conformal_threshold

RESULTS = Path(__file__).parent / "results" / "canaries.json"
BUDGET: Budget = "thorough"
CHOOSING: tuple[Budget, ...] = ("standard", "thorough")  # by canaries


def measure(which: Entry, device: torch.device, zoo: Path = ROOT, budget: Budget = BUDGET) -> dict[str, Any]:
    """The record of one suspect, of seed 0."""
    began, suspect = time.monotonic(), load(which, zoo)
    suspect.take_threads(device)
    parts = divide(test_images(which.dataset).to(device), reported=None)
    known, fresh = parts.reported[slice(REPORTED)], parts.reported[slice(REPORTED, None)]
    config = CalibrationConfig.model_validate({"name": "suspect", "budget": budget, "target_fpr": TARGET})
    with tempfile.TemporaryDirectory() as folder:
        material = prepare(config, read(config, as_files(Path(folder), suspect.network, parts.fit, parts.validation), device), device)
    assert material.held_back is not None  # `auto` has one
    cuts, _ = choose_cuts(material.network, material.preprocessing.normalise(material.fit.pixels[:1]), auto_recipe(TARGET))
    workshop = Workshop(auto_recipe(TARGET), material, material.held_back, cuts, config.seed)
    found = search(workshop, budget, TARGET, Resume(None, ""), lambda _: None)
    searching = time.monotonic() - began
    guards, attacked = make_guards(workshop, material.network, budget), triggered(suspect, known)
    real = {setting: _caught(guard, material, attacked.images, attacked.labels) for setting, guard in guards.items()}
    choices = {each: chosen_within(found.tried, each) for each in CHOOSING}
    of_choices = {choice: _figures(guards[choice], material, fresh, triggered(suspect, fresh)) for choice in set(choices.values())}
    return {
        **{"suspect": which.stem, "weights_sha256": suspect.sha256, "target_fpr": TARGET, "budget": budget, **records.circumstances(device)},
        **{"seconds": round(time.monotonic() - began, 1), "search_seconds": round(searching, 1)},
        **{"chosen": asdict(found.chosen), "canaries": [asdict(each) for each in found.canaries]},
        "tried": [{**each, "real": real[setting]} for each, setting in zip(found.tried, real, strict=True)],
        "real": real[found.chosen],
        "by_budget": {each: of_choices[choice] for each, choice in choices.items()},
    }


def chosen_within(tried: list[dict[str, Any]], budget: Budget) -> Setting:
    """What the same search would have chosen from the grid of a budget."""
    within = [each for each in tried if each["expert_stop"] in STOPS[budget] and each["auxiliary_lr"] in HOTTEST[budget]]
    return choose(within, Setting(AutoRecipe.expert_stop, AutoRecipe.auxiliary_lr))


def _figures(guard: Guard, material: Material, clean: Split, attacked: Split) -> dict[str, Any]:
    """As `benchmarks.evaluate` has them, of other images."""
    kinds = [(guard.judge(images.images), images.labels.cpu()) for images in (clean, attacked)]
    of_clean, of_attacked = (Scored(judged.score, judged.prediction, wanted) for judged, wanted in kinds)
    return figures(of_clean, of_attacked, guard.judge(material.validation.pixels).score, (TARGET,))


def _caught(guard: Guard, material: Material, images: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of attacked images that fool the suspect and are rejected."""
    threshold = conformal_threshold(guard.judge(material.validation.pixels).score, TARGET)
    judged = guard.judge(images)
    fooled = judged.prediction == wanted.cpu()
    return round(threshold.rejects(judged.score[fooled]).double().mean().item(), 4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.canaries", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["all", *DATASETS], default="all")
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--attack", default="all", help="which suspect of the zoo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--zoo", type=Path, default=ROOT)
    parser.add_argument("--json", action="store_true", help="print, and leave the record in git as it is")
    args = parser.parse_args()
    suspects = [
        each
        for each in entries(args.zoo)
        if each.architecture == args.architecture and args.dataset in ("all", each.dataset) and args.attack in ("all", each.attack)
    ]
    suspects = [each for each in suspects if each.attack != "clean" and not each.seed and load(each, args.zoo).passes_gate]
    with workers(args.jobs) as each_of:
        for record in each_of(partial(measure, device=torch.device(args.device), zoo=args.zoo), suspects):
            print(json.dumps(record), flush=True)
            if not args.json:
                records.enlist(RESULTS, [record], "suspect")


if __name__ == "__main__":
    main()
