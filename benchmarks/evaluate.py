"""How many attacked images each detector stops: `python -m benchmarks.evaluate --attack wanet --detector all`.

For each suspect of the zoo that the arguments name and for each detector: calibrate on clean test images, set thresholds on a part of them that decides
nothing else, and score other test images, clean and triggered. All detectors get the same images; no image that is reported had a part in anything before.
Each result is a record (benchmarks/records.py); `--json` prints it beside the one in git.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.attacks import ATTACKS, stamp
from benchmarks.data import DATASETS, Split, divide, test_images
from benchmarks.detectors import DETECTORS, OTHERS, PRESETS, Detector, NotApplicable, Observed
from benchmarks.detectors.guard import BadExpertGuard
from benchmarks.zoo import ROOT, Entry, Suspect, entries, load
from benchmarks.zoo import records as trained
from calibration.figures import Scored, figures, roc
from models.errors import Problem

TARGETS = (0.01, 0.05)
RATES = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of the ROC curves in the plots
MOST_TRIGGERED, SHOWN = 1000, 150  # triggered images that are reported, and points of the plots of x against y
AGREES = 0.02  # a rerun may differ so much in what the suspect answers; in AUROC by what its detector says


def evaluate(suspect: Suspect, detector: Detector, test: Split, seed: int, device: torch.device) -> records.Record:
    """One record. The clean model has no triggered images: its clean ones alone are scored."""
    dataset, parts = DATASETS[suspect.entry.dataset], divide(test.to(device), seed)
    reported = parts.reported
    network = suspect.network.eval().to(device).to(memory_format=torch.channels_last)
    observed = Observed(network, dataset.preprocessing, dataset.num_classes, suspect.entry.architecture)
    record: records.Record = {**_about(suspect), "detector": detector.name, "seed": seed, **records.circumstances(device)}
    began = time.monotonic()
    try:
        found = detector.fit(observed, parts.fit, parts.validation, seed)
    except NotApplicable as problem:
        return {**record, "not_applicable": str(problem)}
    except Problem as problem:  # our own calibration refuses: a result, too
        return {**record, "not_applicable": f"{problem.code}: {problem.detail}"}
    fitted = time.monotonic()
    thresholds_from = detector.score(parts.validation.pixels)
    scoring = time.monotonic()
    scores = detector.score(reported.images)
    milliseconds = 1000 * (time.monotonic() - scoring) / len(reported.labels)
    clean = Scored(scores, observed.logits(reported.images).argmax(1).cpu(), reported.labels.cpu())
    attacked = triggered(suspect, reported)
    answers = observed.logits(attacked.images).argmax(1).cpu() if len(attacked.labels) else attacked.labels.cpu()
    attack = Scored(detector.score(attacked.images) if len(attacked.labels) else torch.empty(0).double(), answers, attacked.labels.cpu())
    return {
        **record,
        **{"passes": detector.passes, "milliseconds": round(milliseconds, 3), "fit_seconds": round(fitted - began, 1)},
        **{"seconds": round(time.monotonic() - began, 1), "found": found},
        **figures(clean, attack, thresholds_from, TARGETS),
        "roc": roc(clean.score, attack.score, RATES) if len(attack.score) else None,
        "xy": _xy(detector, reported.images, attacked.images) if isinstance(detector, BadExpertGuard) else None,
    }


def triggered(suspect: Suspect, reported: Split) -> Split:
    """Those of the images that the attacker would use, with the trigger and the label that the attacker wants; none for the clean model."""
    if suspect.attack is None:
        return reported[slice(0)]
    attack = suspect.attack.to(reported.images.device)
    eligible = reported[attack.eligible(reported.labels)][slice(MOST_TRIGGERED)]
    return Split(stamp(attack, eligible.images), attack.relabel(eligible.labels))


def _about(suspect: Suspect) -> dict[str, Any]:
    which = suspect.entry
    cell = {"dataset": which.dataset, "architecture": which.architecture, "attack": which.attack, "suspect_seed": which.seed}
    return {**cell, "gated": suspect.passes_gate, "weights_sha256": suspect.sha256}


def _xy(detector: BadExpertGuard, clean: torch.Tensor, attacked: torch.Tensor) -> dict[str, Any]:
    """The experts' and the auxiliary's confidence for some images, to look at."""
    found = {}
    for name, images in (("clean", clean[:SHOWN]), ("triggered", attacked[:SHOWN])):
        pairs = detector.confidences(images) if len(images) else ()
        found[name] = [[round(value, 3) for value in values.tolist()] for values in pairs]
    return found


def compared(record: records.Record, root: Path = records.RESULTS) -> records.Record:
    """The record with what git has for the same cell, and whether they agree."""
    known = records.recorded(record, root)
    if known is None:
        return {**record, "recorded": None}
    names = [name for name in ("auroc", "asr", "clean_accuracy") if record.get(name) is not None]
    allowed = {"auroc": DETECTORS[record["detector"]]().repeats}
    same = [known.get(name) is not None and abs(record[name] - known[name]) <= allowed.get(name, AGREES) for name in names]
    agrees = all(same) if same else record.get("not_applicable") == known.get("not_applicable")
    return {**record, "recorded": {"commit": known["commit"], **{name: known.get(name) for name in (*names, "at")}}, "agrees": agrees}


def listing(zoo: Path = ROOT) -> dict[str, Any]:
    """What there is."""
    suspects = entries(zoo)
    return {
        "attacks": list(ATTACKS),
        "datasets": list(DATASETS),
        "architectures": list(dict.fromkeys(record["architecture"] for record in trained(zoo))),
        "detectors": [detector.name for detector in OTHERS],
        "presets": list(PRESETS),
        "suspects": [suspect.stem for suspect in suspects],
    }


def chosen(args: argparse.Namespace) -> list[Entry]:
    suspects = [suspect for suspect in entries(args.zoo) if suspect.architecture == args.architecture and suspect.seed == args.suspect_seed]
    found = [suspect for suspect in suspects if args.dataset in ("all", suspect.dataset) and args.attack in ("all", suspect.attack)]
    if not found:
        raise SystemExit(f"The zoo has no {args.dataset}/{args.architecture}/{args.attack}; it has {', '.join(suspect.stem for suspect in entries(args.zoo))}.")
    return found


def available(names: set[str], required: bool) -> set[str]:
    """Those of these data sets that can be had; one that cannot ends the program where it is required, and is told and left out where not."""
    found = set()
    for name in sorted(names):
        try:
            test_images(name)
            found.add(name)
        except RuntimeError as problem:
            if required:
                raise SystemExit(str(problem)) from problem
            print(f"Left out: {problem}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class Cell:
    """One result to be had."""

    entry: Entry
    zoo: Path
    detector: str
    seed: int
    device: str


def run(cell: Cell) -> records.Record:
    """Its record, whatever process this is."""
    suspect, device = load(cell.entry, cell.zoo), torch.device(cell.device)
    suspect.take_threads(device)
    return evaluate(suspect, DETECTORS[cell.detector](), test_images(cell.entry.dataset), cell.seed, device)


@contextmanager
def workers(count: int) -> Iterator[Callable[..., Iterator[records.Record]]]:
    """A `map` over so many processes, with results in order; small networks gain nothing from a second thread, and everything from a second process."""
    if count == 1:
        yield map
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="what attacks, data sets, architectures, detectors and suspects there are")
    parser.add_argument("--dataset", choices=["all", *DATASETS], default="all")
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--attack", choices=["all", "clean", *ATTACKS], default="all")
    parser.add_argument("--detector", choices=["all", "others", *DETECTORS], default="all")
    parser.add_argument("--seed", type=int, action="append", help="of the calibration; may be repeated (default: 0)")
    parser.add_argument("--suspect-seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core, and one for a GPU)")
    parser.add_argument("--zoo", type=Path, default=ROOT)
    parser.add_argument("--json", action="store_true", help="print whole records, each beside the one in git; change none")
    args = parser.parse_args()
    if args.list:
        print(json.dumps(listing(args.zoo), indent=1))
        return 0
    detectors = {"all": list(DETECTORS), "others": [detector.name for detector in OTHERS]}.get(args.detector, [args.detector])
    suspects = chosen(args)
    there = available({which.dataset for which in suspects}, required=args.dataset != "all")
    cells = [Cell(which, args.zoo, name, seed, args.device) for which in suspects if which.dataset in there for name in detectors for seed in args.seed or [0]]
    with workers(args.jobs or (1 if args.device != "cpu" else len(os.sched_getaffinity(0)))) as each:
        for record in each(run, cells):
            if args.json:
                print(json.dumps(compared(record)), flush=True)
            else:
                records.put(record)
                print(_line(record), flush=True)
    return 0


def _line(record: records.Record) -> str:
    about = f"{record['dataset']} {record['architecture']} {record['attack']:<12} {record['detector']:<11} seed {record['seed']}"
    if "not_applicable" in record:
        return f"{about}  not applicable: {record['not_applicable']}"
    at = record["at"]["0.01"]
    figures = f"AUROC {record['auroc']}  TPR {at['tpr']} (of fooling {at['tpr_masked']})  FPR {at['realised_fpr']}  ASR left {at['remaining_asr']}"
    return f"{about}  {figures}  {record['seconds']} s"


if __name__ == "__main__":
    sys.exit(main())
