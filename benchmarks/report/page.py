"""The text of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.attacks import ATTACKS
from benchmarks.data import DATASETS
from benchmarks.detectors import DETECTORS, TITLES
from benchmarks.records import Record
from benchmarks.report.cells import Cells, attacks_of, auroc, auroc_masked, bootstrap, cells, mean, scales, title, tpr, tpr_of_all, within
from benchmarks.scales import FULL
from benchmarks.train import MIN_ASR, MOST_LOST

PICTURES = {"heat": "TPR by attack and detector", "roc": "ROC curves", "cost": "Cost against TPR"}


def shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table_of_suspects(found: Sequence[Record]) -> list[str]:
    lines = [row("data set", "network", "attack", "poisoned", "ASR", "clean accuracy", "of the clean model", "gate"), row(*["---"] * 8)]
    for record in found:
        reference = record["clean_reference"]
        figures = (shown(record.get("asr")), shown(record["clean_accuracy"]), shown(reference), "passed" if record["passes_gate"] else "**failed**")
        lines.append(row(record["dataset"], record["architecture"], title(record["attack"]), f"{record['rate']:.1%}", *figures))
    return lines


def attempts(suspects: Sequence[Record]) -> list[str]:
    """For each suspect that fails the gate, or did so at first: with what it was tried, and what came of it."""
    lines = []
    for record in suspects:
        tried = [*record.get("tried", []), *([] if record["passes_gate"] else [record])]
        if tried:
            outcome = "passes now" if record["passes_gate"] else "fails"
            lines.append(f"- {title(record['attack'])} on {record['dataset']} {outcome}. Without success: {'; '.join(map(attempt, tried))}.")
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
    tried = {(record["attack"], record["detector"]) for record in within(found, scale)}
    passing = [record["attack"] for record in within(suspects, scale) if record["passes_gate"]]
    missing = [attack for attack in passing if any((attack, detector) not in tried for detector in DETECTORS)]
    return f"Trained, but not evaluated yet with every detector: {', '.join(map(title, missing)) or 'none'}."


def not_run(suspects: Sequence[Record]) -> str:
    """Which networks of the full scale have no suspect at all."""
    there = {(record["dataset"], record["architecture"]) for record in suspects}
    missing = [f"{architecture} on {dataset}" for dataset in DATASETS for architecture in FULL if (dataset, architecture) not in there]
    return f"The full scale needs a GPU. Not run yet: {', '.join(missing) or 'none'}."


def table_of(grouped: Cells, figure: Callable[[Record], float | None]) -> list[str]:
    """Attacks by detectors, with the mean, its bootstrap interval and the worst below, and over how many attacks these are."""
    lines, attacks = [row("attack", *(TITLES[name] for name in DETECTORS)), row(*["---"] * (1 + len(DETECTORS)))], attacks_of(grouped)
    found = {name: [mean(grouped.get((attack, name)), figure) for attack in attacks] for name in DETECTORS}
    lines += [row(title(attack), *(shown(found[name][index]) for name in DETECTORS)) for index, attack in enumerate(attacks)]
    values = {name: [value for value in found[name] if value is not None] for name in DETECTORS}
    lines.append(row("**mean**", *(f"**{shown(float(np.mean(each)))}**" if each else "-" for each in values.values())))
    lines.append(row("90% interval", *("-".join(shown(bound) for bound in bootstrap(each)) if each else "-" for each in values.values())))
    lines.append(row("**worst**", *(f"**{shown(min(each))}**" if each else "-" for each in values.values())))
    lines.append(row("attacks", *(str(len(each)) for each in values.values())))
    return lines


def table_of_costs(grouped: Cells) -> list[str]:
    lines = [
        row("detector", "FPR at 1%", "FPR at 5%", "ASR left at 1%", "accuracy lost at 1%", "passes an image", "ms an image", "seconds to calibrate"),
        row(*["---"] * 8),
    ]
    for name in DETECTORS:
        found = [record for (_, detector), cell in grouped.items() if detector == name for record in cell]
        attacked = [record for record in found if record["attack"] != "clean"]
        figures = (
            shown(mean(found, lambda record: record["at"]["0.01"]["realised_fpr"]), 4),
            shown(mean(found, lambda record: record["at"]["0.05"]["realised_fpr"]), 4),
            shown(mean(attacked, lambda record: record["at"]["0.01"]["remaining_asr"])),
            shown(mean(found, lambda record: record["at"]["0.01"]["accuracy_lost"]), 4),
            shown(mean(found, lambda record: record["passes"]), 2),
            shown(mean(found, lambda record: record["milliseconds"]), 2),
            shown(mean(found, lambda record: record["fit_seconds"]), 0),
        )
        lines.append(row(TITLES[name], *figures))
    return lines


def summary(grouped: Cells, detector: str) -> str:
    """The means over attacks, in a line."""
    found = []
    for what, figure in {"AUROC": auroc, "AUROC masked": auroc_masked, "TPR at 1% FPR": tpr}.items():
        values = [value for attack in attacks_of(grouped) if (value := mean(grouped.get((attack, detector)), figure)) is not None]
        found.append(f"{what} mean {shown(float(np.mean(values)))}, worst {shown(min(values))}" if values else f"{what} -")
    return f"{detector} over {len(attacks_of(grouped))} attacks: {'; '.join(found)}"


def table_of_detectors(grouped: Cells) -> list[str]:
    """The README's: what each detector does over all attacks."""
    lines = [row("detector", "TPR at 1% target, mean", "worst attack", "AUROC, mean", "realised FPR", "passes an image"), row(*["---"] * 6)]
    for name in DETECTORS:
        found = {attack: value for attack in attacks_of(grouped) if (value := mean(grouped.get((attack, name)), tpr)) is not None}
        if not found:
            continue
        worst = min(found, key=lambda attack: found[attack])
        everything = [record for (_, detector), cell in grouped.items() if detector == name for record in cell]
        figures = (
            f"{np.mean(list(found.values())):.1%}",
            f"{found[worst]:.1%} ({title(worst)})",
            shown(mean([record for record in everything if record["attack"] != "clean"], auroc_masked)),
            f"{mean(everything, lambda record: record['at']['0.01']['realised_fpr']) or 0:.2%}",
            f"{mean(everything, lambda record: record['passes']) or 0:.1f}",
        )
        lines.append(row(TITLES[name], *figures))
    return lines


def weak(grouped: Cells, bound: float = 0.97) -> list[str]:
    """Attacks on which the published recipe falls short."""
    return [attack for attack in attacks_of(grouped) if (value := mean(grouped.get((attack, "paper")), auroc_masked)) is not None and value < bound]


def why(points: dict[str, Any]) -> str:
    """What of the published argument fails, from some images' x and y: the expert should forget the task and keep the backdoor, the auxiliary the reverse."""
    agree = {kind: [np.mean(np.asarray(values) >= 0.5) for values in points[kind]] for kind in ("clean", "triggered")}
    (clean_x, clean_y), (triggered_x, triggered_y) = agree["clean"], agree["triggered"]
    found = {
        "the expert has not forgotten the task": clean_x >= 0.5,
        "the expert lost the backdoor, too": triggered_x < 0.7,
        "the auxiliary keeps the backdoor": triggered_y >= 0.3,
        "the auxiliary errs on clean images": clean_y < 0.85,
    }
    return "; ".join(text for text, holds in found.items() if holds) or "clean and triggered images overlap at the edges"


def table_of_reasons(grouped: Cells, attacks: Sequence[str]) -> list[str]:
    """Attack by attack, what the two networks of the published recipe say."""
    lines = [row("attack", "AUROC", "x, clean", "x, triggered", "y, clean", "y, triggered", "why"), row(*["---"] * 7)]
    for attack in attacks:
        points = grouped[attack, "paper"][0]["xy"]
        medians = [shown(float(np.median(points[kind][index])), 2) for index in (0, 1) for kind in ("clean", "triggered")]
        lines.append(row(title(attack), shown(mean(grouped[attack, "paper"], auroc_masked)), *medians, why(points)))
    return lines


def page(found: Sequence[Record], suspects: Sequence[Record]) -> str:
    """docs/results.md."""
    gated = f"an ASR of at least {MIN_ASR:.0%} and at most {MOST_LOST:.0%} of accuracy lost against the clean model of the same recipe"
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks.report` from the records under `benchmarks/results/evaluation`; a test checks that they agree.",
        "`python -m benchmarks.evaluate` makes the records, from the suspects in `benchmarks/zoo`, which `python -m benchmarks.train` makes.",
        "",
        "All detectors calibrate on the same 2,000 clean test images, of which 800 set the threshold and decide nothing else; all figures are of other test",
        "images. The guard is calibrated as a user would: from the checkpoint's file and the clean set's, with nothing told beside. `paper` has the constants",
        "that were published for CIFAR-10 with every data set: those for GTSRB were found by knowing which one it is.",
        "",
        "Not stood beside yet: TED++ and token masking (PSBD), which are reported to be the strongest of their kinds.",
        "",
        "## Suspects",
        "",
        f"A suspect counts with {gated}. Weights are kept, and were measured, in half precision.",
        "",
        *table_of_suspects(suspects),
        *("", "Those that failed at first, or still do:", "", *attempts(suspects)),
        *(line for scale in scales(suspects) for line in ("", not_trained(suspects, scale), not_evaluated(suspects, found, scale))),
        *(
            "",
            not_run(suspects),
            "The same two commands run it, with `--architecture`. There is no suspect of 224x224 images: the suite has no such data set yet.",
        ),
    ]
    for dataset, architecture in scales(found):
        grouped = cells(found, (dataset, architecture))
        name = f"{dataset}-{architecture}"
        lines += [
            *("", f"## {dataset}, {architecture}", ""),
            "TPR at 1% FPR: the share of triggered images that fool the suspect and are rejected, at a threshold that all clean validation images set.",
            *("", *table_of(grouped, tpr), ""),
            "The same, of all triggered images, whether they fool the suspect or not:",
            *("", *table_of(grouped, tpr_of_all), ""),
            "AUROC, of all clean and all triggered images:",
            *("", *table_of(grouped, auroc), ""),
            "AUROC as the paper reports it, of clean images that the suspect gets right and triggered ones that fool it:",
            *("", *table_of(grouped, auroc_masked), ""),
            "What it costs, over the attacks above and the clean model:",
            *("", *table_of_costs(grouped), ""),
            *(f"![{what}](plots/{name}-{kind}.svg)" for kind, what in PICTURES.items() if attacks_of(grouped)),
        ]
        if short := weak(grouped):
            lines += [
                *("", f"The published recipe stays under an AUROC of 0.97, masked, on {len(short)} of {len(attacks_of(grouped))} attacks.", ""),
                "x and y are the expert's and the auxiliary's confidence in the suspect's prediction, here their medians. With so few clean images the",
                "recipe's one epoch at 1e-4 is ten steps of Adam: the expert still says what the suspect says, and all rests on the auxiliary.",
                *("", *table_of_reasons(grouped, short), ""),
                f"![x against y](plots/{name}-xy.svg)",
            ]
    return "\n".join(lines) + "\n"
