"""The text of docs/results.md."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.attacks import ATTACKS
from benchmarks.data import DATASETS
from benchmarks.detectors import DETECTORS, TITLES
from benchmarks.records import Record
from benchmarks.report import tuning
from benchmarks.report.cells import Cells, attacks_of, auroc, auroc_masked, by_attack, cells, later, scales, title, tpr, tpr_of_all, trained, within
from benchmarks.report.tables import (
    shown,
    table_at_one_rate,
    table_of,
    table_of_costs,
    table_of_later,
    table_of_promises,
    table_of_reasons,
    table_of_rivals,
    table_of_suspects,
    weak,
)
from benchmarks.train import MIN_ASR, MOST_LOST

FIRST = list(ATTACKS)[:8]  # a design was to be settled on these, and to meet the others once
# Of these networks every attack is wanted: the first are kept in git, the full scale needs a GPU.
SMALL = ("resnet20",)
FULL = ("resnet18_cifar", "vgg16_bn_cifar", "mobilenet_v2_cifar")
PICTURES = {"heat": "TPR by attack and detector", "roc": "ROC curves", "cost": "Cost against TPR"}


def attempts(suspects: Sequence[Record]) -> list[str]:
    """For each suspect that fails the gate, or did so at first: with what it was tried, and what came of it."""
    lines = []
    for record in suspects:
        tried = [*record.get("tried", []), *([] if record["passes_gate"] else [record])]
        if tried:
            outcome = "passes now" if record["passes_gate"] else "fails"
            which = f"{trained(record)} on {record['dataset']}, {record['architecture']}"
            lines.append(f"- {which}, {outcome}. Without success: {'; '.join(map(attempt, tried))}.")
    return lines


def attempt(tried: Record) -> str:
    recipe = tried["recipe"]
    how = f"{recipe['epochs']} epochs at {recipe['lr']}, {tried['rate']:.0%} poisoned" if recipe["epochs"] else "put into the clean network"
    return f"{how}: ASR {tried['asr']:.3f}, accuracy {tried['clean_accuracy']:.3f}"


def not_trained(suspects: Sequence[Record], scale: tuple[str, str]) -> str:
    """Which attacks have no suspect at this scale."""
    there = {record["attack"] for record in within(suspects, scale)}
    missing = [title(attack) for attack in ATTACKS if attack not in there]
    return f"On {scale[0]}, {scale[1]}, not trained yet: {', '.join(missing) or 'none'}. What is not trained has no part in any mean."


def not_evaluated(suspects: Sequence[Record], found: Sequence[Record], scale: tuple[str, str]) -> str:
    """Which suspects that pass the gate lack the record of a detector."""
    tried = {(record["attack"], record["detector"]) for record in within(found, scale) if not record["suspect_seed"]}
    passing = [record["attack"] for record in within(suspects, scale) if record["passes_gate"] and not record.get("seed")]
    missing = [attack for attack in passing if any((attack, detector) not in tried for detector in DETECTORS)]
    return f"Trained, but not evaluated yet with every detector: {', '.join(map(title, missing)) or 'none'}."


def not_committed(found: Sequence[Record]) -> list[str]:
    """How many records nobody can check out the code of; nothing where there are none."""
    dirty = [record for record in found if record["commit"].endswith("-dirty")]
    if not dirty:
        return []
    names = ", ".join(dict.fromkeys(TITLES[record["detector"]] for record in dirty))
    told = f"{len(dirty)} of {len(found)} records, of {names}, were made while something was not committed (their commit ends in -dirty):"
    return [told, "the code that made them cannot be checked out.", ""]


def not_run(suspects: Sequence[Record]) -> str:
    """Which networks of the full scale have no suspect at all."""
    there = {(record["dataset"], record["architecture"]) for record in suspects}
    missing = [f"{architecture} on {dataset}" for dataset in DATASETS for architecture in FULL if (dataset, architecture) not in there]
    return f"The full scale needs a GPU. Not run yet: {', '.join(missing) or 'none'}."


def summary(grouped: Cells, detector: str) -> str:
    """The means over attacks, in a line."""
    found = []
    for what, figure in {"AUROC": auroc, "AUROC masked": auroc_masked, "TPR at 1% FPR": tpr}.items():
        values = list(by_attack(grouped, detector, figure).values())
        found.append(f"{what} mean {shown(float(np.mean(values)))}, worst {shown(min(values))}" if values else f"{what} -")
    return f"{detector} over {len(attacks_of(grouped))} attacks: {'; '.join(found)}"


def by_half(grouped: Cells) -> str:
    """What `auto` does on the first half of the suite's list and on the second, which were to be told apart."""
    values = by_attack(grouped, "auto", tpr)
    halves = {"1 to 8": [values[each] for each in values if each in FIRST], "9 to 17": [values[each] for each in values if each not in FIRST]}
    told = [
        f"of {len(half)} of the attacks {name} {shown(float(np.mean(half)))} on average and {shown(min(half))} at worst"
        for name, half in halves.items()
        if half
    ]
    return f"`auto` catches {', '.join(told) or 'nothing that was measured'} ([what it was chosen on](#what-the-score-was-chosen-on))."


def told_at_one_rate(grouped: Cells) -> list[str]:
    """Where another detector is ahead, how much of it is its threshold's draw."""
    if not (table := table_at_one_rate(grouped)):
        return []
    return [
        "Each threshold realises another rate than the 1% that it aims at. For who is ahead there, the rates, and the TPR of all triggered images at the",
        "thresholds that reject 1% of the very images reported:",
        *("", *table, ""),
    ]


def page(found: Sequence[Record], suspects: Sequence[Record], promises: Sequence[Record], planted: Sequence[Record] = (), few: Sequence[Record] = ()) -> str:
    """docs/results.md, from the records of the evaluation, the zoo, the promise, the canaries and small clean sets."""
    gated = f"an ASR of at least {MIN_ASR:.0%} and at most {MOST_LOST:.0%} of accuracy lost against the clean model of the zoo"
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks.report` from the records under `benchmarks/results/evaluation`; a test checks that they agree.",
        "`python -m benchmarks.evaluate` makes the records, from the suspects in `benchmarks/zoo`, which `python -m benchmarks.train` makes; `--json` prints a",
        "new one beside the one that is kept. By default all suspects of ResNet-20 are evaluated with every detector, seed 0; `auto` was also run with",
        "`--detector auto --seed 1 --seed 2`, and so was `paper` where it came near. The other sections name their commands. A suspect is trained with the",
        "`--architecture`, `--attack`, `--seed`, `--rate`, `--epochs`, `--lr`, `--batch` and `--optimizer` that its record in `benchmarks/zoo` has, and with",
        "`--warm` where that says so.",
        "",
        "All detectors calibrate on the same 2,000 clean test images, of which 800 set the threshold and decide nothing else; all figures are of other test",
        "images, which are the same for every calibration. The guard is calibrated as a user would: from the checkpoint's file and the clean set's, with",
        "nothing told beside, with the budget `quick`, which plants no canaries. `paper` has the constants that were published for CIFAR-10 with every data",
        "set: those for GTSRB were found by knowing which one it is. It trains with 1,200 images, where the paper had 2,000 beside those of the threshold.",
        "",
        "What nearly repeats a validation image of its class trains no guard: of the 1,200 others 178 in GTSRB (seed 0), and one in CIFAR-10. Other detectors",
        "are fitted to all of them.",
        "",
        "`auto` changed since some of its records were made. Of the present one are those of ResNet-20, VGG-11, MobileNetV3, ConvNeXt, ResNet-10-T and the ViT",
        "of 32x32 images, the promise, small clean sets and canaries; small sets of seed 0 are from before thresholds lay lower by what rounding moves a score",
        "by. In the other records, of a GPU, the auxiliary is not compared with the suspect ([decision",
        "17](decisions/0017-the-auxiliary-is-compared-with-the-suspect.md)), distances have no spread of each class ([decision",
        "16](decisions/0016-a-distance-counts-by-what-is-usual-for-its-class.md)), there are three experts instead of two, the auxiliary is asked about a",
        "tenth of clean images instead of 3%, and it is trained for ten epochs instead of six. Twelve evaluations shared that GPU, and searched for kernels",
        "anew for each number of images: its times are nothing to rely on.",
        "",
        *not_committed(found),
        "SCALE-UP's score has six levels a class, since it counts at how many of five amplifications the prediction stays: mostly more than 1% of clean images",
        "share the most suspicious one, so that no threshold rejects as few, and its TPR is 0 where its AUROC is not.",
        "",
        "AUROC masked is of clean images that the suspect gets right and triggered ones that fool it, as the paper reports it. Figures are means over as many",
        "calibrations as the last row of each table says.",
        "",
        "Three records are not kept, and so what is said of them here is told by hand. Of another ConvNeXt, trained for seven epochs and seven more",
        "(accuracy 0.814, ASR 0.977), the present `auto` catches 74.3% of what fools it, at a realised FPR of 0.90%: nearly all that it rejects of clean",
        "images is what the suspect itself gets wrong, and the suspect's many errors take up the target ([own-errors](checks.md#own-errors)). Of another",
        "ResNet-10-T, whose backdoor works on 90% of images only, an earlier one caught 88% of those that it works on; and of MobileNetV3's images 90%",
        "while the preprocessing was found to crop what it does not: small images that are enlarged a little are no longer tried with a crop. The seconds",
        "of these networks' calibrations are no measure: other work ran beside them.",
        "",
        "Where we know that a detector or an attack is not its authors': STRIP superimposes 32 images, not 100; TED looks behind blocks, at maps averaged over",
        "4x4 fields, which saw more here than their way; Mahalanobis has neither an ensemble of layers nor noise on its inputs. WaNet has as many noise images",
        "as triggered ones, ISSBA a small encoder of 16 bits, and TrojanNN retrains on training images, not on ones that were reverse-engineered.",
        "",
        "Not stood beside yet: TED++ and token masking (PSBD), which are reported to be the strongest of their kinds.",
        "",
        "## What the score was chosen on",
        "",
        "The score of `auto` was chosen by what candidates catch, several times. [Decision 4](decisions/0004-auto-adds-evidence-up.md) looked at the two",
        "example suspects alone. With its score CIFAR-10's 14 attacks that had no part in it were run: 0.995 on average and 0.962 at worst (WaNet), of attacks",
        "9 to 17 of the list 0.980 at worst (BPP). Since then nothing here is unseen. [Decision 9](decisions/0009-distances-at-several-places-and-a-gate.md)",
        "came of GTSRB, where that score caught 78% on average; it was chosen on four of its attacks and seven of CIFAR-10's first eight, and brought BPP to",
        "0.996; with [decision 1](decisions/0001-experts-are-tails-on-the-suspects-trunk.md) experts, gate and epochs were then made fewer, by suspects that",
        "are not caught whole. Decisions [16](decisions/0016-a-distance-counts-by-what-is-usual-for-its-class.md) (which began with a ResNet-10-T) and",
        "[17](decisions/0017-the-auxiliary-is-compared-with-the-suspect.md) were judged on nearly all suspects of ResNet-20, on the very images that are",
        "reported here. So these tables say what the design was made to catch. Less of it was chosen by the test images of the first table on",
        "[canaries](#what-canaries-are-worth), and nothing by suspects that were trained when it was settled, each evaluated once:",
        *("", *table_of_later(later(found))),
        "",
        "Decision 17 also looked at two suspects of FT on GTSRB that were not kept: the one here may be like them.",
        "",
        "## Suspects",
        "",
        f"A suspect counts with {gated}. Weights were measured in half precision; those of ResNet-20 are kept in git, of the others the records have the hash.",
        "The clean model is of the same recipe, but for the attacks that go on from it: WaNet, BPP and Dynamic train for twelve more epochs, FT, TrojanNN and",
        "SRA change it, and suspects of other families mostly began with it, too (`warm` in their records). A clean model that was trained as long might have",
        "been better by a point or two, so that of these the gate says little about accuracy.",
        "",
        *table_of_suspects(suspects),
        *("", "Those that failed at first, or still do:", "", *attempts(suspects)),
        *(
            line
            for scale in scales(suspects)
            if scale[1] in SMALL + FULL  # of other networks a suspect or two shows that they work, not how each attack fares
            for line in ("", not_trained(suspects, scale), not_evaluated(suspects, found, scale))
        ),
        *(
            "",
            not_run(suspects),
            "The same two commands run it, with `--architecture`. There is no suspect of 224x224 images: the suite has no such data set yet.",
        ),
    ]
    for dataset, architecture in scales(found):
        grouped = cells(found, (dataset, architecture))
        if not attacks_of(grouped):
            continue  # its suspects fail the gate
        name = f"{dataset}-{architecture.replace('/', '-')}"
        lines += [
            *("", f"## {dataset}, {architecture}", ""),
            "TPR at 1% FPR: the share of triggered images that fool the suspect and are rejected, at a threshold that all clean validation images set.",
            *("", *table_of(grouped, tpr), ""),
            *(by_half(grouped), ""),
            "The same, of all triggered images, whether they fool the suspect or not:",
            *("", *table_of(grouped, tpr_of_all), ""),
            "AUROC, of all clean and all triggered images:",
            *("", *table_of(grouped, auroc), ""),
            "AUROC as the paper reports it, of clean images that the suspect gets right and triggered ones that fool it:",
            *("", *table_of(grouped, auroc_masked), ""),
            "Where another detector stops more than `auto` does, by the first table:",
            *("", *table_of_rivals(grouped), ""),
            *told_at_one_rate(grouped),
            "What it costs, over the attacks above and the clean model; times only of detectors that were measured where `auto` was, which is calibrated with",
            "the budget `quick`:",
            *("", *table_of_costs(grouped), ""),
            *(f"![{what}](plots/{name}-{kind}.svg)" for kind, what in PICTURES.items()),
        ]
        if short := weak(grouped):
            lines += [
                *("", f"The published recipe stays under an AUROC of 0.97, masked, on {len(short)} of {len(attacks_of(grouped))} attacks.", ""),
                "x and y are the expert's and the auxiliary's confidence in the suspect's prediction, here their medians. With so few clean images the",
                "recipe's one epoch at 1e-4 is ten steps of Adam: the expert still says what the suspect says, and all rests on the auxiliary.",
                *("", *table_of_reasons(grouped, short), ""),
                f"![x against y](plots/{name}-xy.svg)",
            ]
    if promises:
        lines += [
            *("", "## The promised rate of false rejections", ""),
            "Written by `python -m benchmarks.promise`. 1,000 times, n clean test images drawn at random set the threshold, and 1,000 others are judged by it.",
            "Promised is an interval in which the rate among the next 1,000 images lies with 90% probability. It is kept if nine draws in ten lie in it;",
            "by chance alone, 200 of them scatter by two points and more. What is drawn at random is like what set the threshold: this tells whether the",
            "arithmetic and the scores, which may tie, keep the promise, not whether tomorrow's images are like the clean set, nor what several images of one",
            "scene cost ([repeated-images](checks.md#repeated-images)).",
            *("", *table_of_promises(promises)),
        ]
    lines += [*tuning.canaries(planted), *tuning.few_images(few)]
    return "\n".join(lines) + "\n"
