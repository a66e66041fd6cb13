"""Both presets on both example suspects: `python -m benchmarks.examples` writes `benchmarks/results/examples.json` and the table in the README.

Calibrates as `badexpert calibrate` does, seed 0, and evaluates on the 7,600 test images that are in no example file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.attacks import ATTACKS, Task, stamp
from benchmarks.data import Split, cifar10
from benchmarks.make_examples import CLEAN_SET, SAMPLES, SUSPECTS
from benchmarks.readme import README, filled
from calibration.config import CalibrationConfig
from calibration.figures import Scored, figures
from calibration.material import Inputs
from calibration.pipeline import calibrate
from models import bundle
from models.bundle import Bundle
from models.registry import Registry

ROOT = Path(__file__).parent.parent
SOURCE = "benchmarks/results/examples.json"
RECORD = ROOT / SOURCE


def table(found: Sequence[records.Record]) -> list[str]:
    """The README's table."""
    lines = [
        "| suspect | preset | TPR at 1% target | realised FPR | AUROC | ASR before | ASR left | accuracy before | accuracy left |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        shares = (r["tpr"], r["realised_fpr"], r["auroc"], r["asr"], r["remaining_asr"], r["clean_accuracy"], r["guarded_accuracy"])
        tpr, fpr, auroc, before, left, accuracy, guarded = shares
        lines.append(f"| {r['attack']} | `{r['preset']}` | {tpr:.1%} | {fpr:.2%} | {auroc:.4f} | {before:.1%} | {left:.1%} | {accuracy:.1%} | {guarded:.1%} |")
    return lines


def measure(guarded: Bundle, suspect: str, reported: Split) -> dict[str, Any]:
    """What the guard does to clean images, and to all of them that the attacker would use; the threshold is the bundle's own."""
    attack, target = ATTACKS[suspect](Task()), guarded.description.threshold.target_fpr
    eligible = reported[attack.eligible(reported.labels)]
    clean, triggered = (guarded.guard.judge(images) for images in (reported.images, stamp(attack, eligible.images)))
    found = figures(
        Scored(clean.score, clean.prediction, reported.labels),
        Scored(triggered.score, triggered.prediction, attack.relabel(eligible.labels)),
        guarded.validation_scores,
        (target,),
    )
    at = found.pop("at")[f"{target:g}"]
    return {**found, **at, "target_fpr": target, "guarded_accuracy": round(found["clean_accuracy"] - at["accuracy_lost"], 4)}


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.examples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    _, test = cifar10()
    rows = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))[CLEAN_SET + SAMPLES :]
    made = []
    for suspect in SUSPECTS:
        for preset in ("auto", "paper"):
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                inputs = Inputs(ROOT / "examples" / f"suspect_{suspect}.safetensors", ROOT / "examples" / "clean_set.zip")
                calibrate(CalibrationConfig(name=suspect, preset=preset), inputs, Registry(Path(folder)), torch.device("cpu"))
                seconds = round(time.monotonic() - began, 1)
                guarded = bundle.read(Path(folder) / suspect / "1")
            measured = measure(guarded, suspect, test[rows])
            about = {"seed": 0, "calibration_seconds": seconds, **records.circumstances(torch.device("cpu"))}
            made.append({"attack": suspect, "preset": preset, **measured, **about})
            print(json.dumps(made[-1]), flush=True)
    records.enlist(RECORD, made, "attack", "preset")
    README.write_text(filled(README.read_text(), SOURCE, table(records.listed(RECORD))))


if __name__ == "__main__":
    main()
