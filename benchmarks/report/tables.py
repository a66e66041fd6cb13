"""The tables of docs/results.md and of the README, as lines of markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.detectors import DETECTORS, PRESETS, TITLES
from benchmarks.records import Record
from benchmarks.report.cells import TARGET, Cells, attacks_of, auroc_masked, bootstrap, by_attack, cells, mean, scales, title, tpr, tpr_at_one_rate, trained


def shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table_of_suspects(found: Sequence[Record]) -> list[str]:
    lines = [row("data set", "network", "attack", "poisoned", "ASR", "clean accuracy", "of the clean model", "gate"), row(*["---"] * 8)]
    for record in found:
        reference = record["clean_reference"]
        figures = (shown(record.get("asr")), shown(record["clean_accuracy"]), shown(reference), "passed" if record["passes_gate"] else "**failed**")
        lines.append(row(record["dataset"], record["architecture"], trained(record), f"{record['rate']:.1%}", *figures))
    return lines


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
    lines.append(row("calibrations of each", *(_calibrations(grouped, name, attacks) for name in DETECTORS)))
    return lines


def _calibrations(grouped: Cells, detector: str, attacks: Sequence[str]) -> str:
    """How many a figure is the mean of, least and most."""
    counts = sorted({len(grouped[attack, detector]) for attack in attacks if (attack, detector) in grouped})
    return "-" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


STRONGEST = "mahalanobis"
NOISE = 0.01  # of TPR: what is nearer is level


def table_of_rivals(grouped: Cells) -> list[str]:
    """For each other detector, where it stops more than `auto` does."""
    ours = by_attack(grouped, "auto", tpr)
    lines = [row("detector", "attacks in both", "`auto` ahead", "level, within a point", "detector ahead"), row(*["---"] * 5)]
    for name in DETECTORS:
        gains = {attack: ours[attack] - theirs for attack, theirs in by_attack(grouped, name, tpr).items() if attack in ours}
        if name == "auto" or not gains:
            continue
        ahead, behind = sum(gain > NOISE for gain in gains.values()), {attack: -gain for attack, gain in gains.items() if gain < -NOISE}
        told = ", ".join(f"{title(attack)} (by {gain:.3f})" for attack, gain in behind.items()) or "none"
        lines.append(row(TITLES[name], str(len(gains)), str(ahead), str(len(gains) - ahead - len(behind)), told))
    return lines


def table_at_one_rate(grouped: Cells) -> list[str]:
    """Where another detector is ahead: what each thresholds' draw had to do with it. Nothing where none is."""
    ours, lines = by_attack(grouped, "auto", tpr), []
    for name in DETECTORS:
        for attack, theirs in by_attack(grouped, name, tpr).items():
            if attack in ours and theirs > ours[attack] + NOISE:
                cell = [grouped[attack, each] for each in ("auto", name)]
                rates = [shown(mean(each, _realised_fpr), 4) for each in cell]
                lines.append(row(title(attack), TITLES[name], *map(_spread, cell), *rates, *(shown(mean(each, tpr_at_one_rate)) for each in cell)))
    told = ("TPR of what fools, single calibrations: `auto`", "the detector", "realised FPR: `auto`", "the detector")
    head = row("attack", "detector", *told, "TPR of all triggered images where 1% of those reported are rejected: `auto`", "the detector")
    return [head, row(*["---"] * 8), *lines] if lines else []


def _spread(cell: Sequence[Record]) -> str:
    """The least and the greatest TPR over calibrations; where a table compares detectors, there is one at least."""
    values = [value for record in cell if "not_applicable" not in record and (value := tpr(record)) is not None]
    return f"{shown(min(values))} to {shown(max(values))} of {len(values)}"


def _realised_fpr(record: Record) -> float:
    return float(record["at"][TARGET]["realised_fpr"])


def table_of_costs(grouped: Cells) -> list[str]:
    """Times only of detectors that were measured where `auto` was, which is calibrated with the budget `quick`: others are no comparison."""
    machines = {name: {record["hardware"] for (_, detector), cell in grouped.items() if detector == name for record in cell} for name in DETECTORS}
    lines = [
        row("detector", "FPR at 1%", "FPR at 5%", "ASR left at 1%", "accuracy lost at 1%", "at most", "passes an image", "ms an image", "seconds to calibrate"),
        row(*["---"] * 9),
    ]
    for name in DETECTORS:
        found = [record for (_, detector), cell in grouped.items() if detector == name for record in cell]
        attacked = [record for record in found if record["attack"] != "clean"]
        comparable = len(machines[name]) == 1 and machines[name] == machines["auto"]
        figures = (
            shown(mean(found, _realised_fpr), 4),
            shown(mean(found, lambda record: record["at"]["0.05"]["realised_fpr"]), 4),
            shown(mean(attacked, lambda record: record["at"]["0.01"]["remaining_asr"])),
            shown(mean(found, lambda record: record["at"]["0.01"]["accuracy_lost"]), 4),
            shown(max((record["at"]["0.01"]["accuracy_lost"] for record in found if "not_applicable" not in record), default=None), 4),
            shown(mean(found, lambda record: record["passes"]), 2),
            shown(mean(found, lambda record: record["milliseconds"]) if comparable else None, 2),
            shown(mean(found, lambda record: record["fit_seconds"]) if comparable else None, 0),
        )
        lines.append(row(TITLES[name], *figures))
    return lines


def table_of_later(found: Sequence[Record]) -> list[str]:
    """Of suspects that came when the design was settled: what `auto` and the strongest of the others catch."""
    names = ("data set", "network", "attack", "seed", "ASR", "`auto`", "realised FPR", "AUROC masked", TITLES[STRONGEST])
    lines, suspects = [row(*names), row(*["---"] * len(names))], dict[tuple[str, str, str, int], Cells]()
    for record in found:
        if record["gated"]:
            which = (record["dataset"], record["architecture"], record["attack"], record["suspect_seed"])
            suspects.setdefault(which, {}).setdefault((record["attack"], record["detector"]), []).append(record)
    for (dataset, architecture, attack, seed), grouped in suspects.items():
        ours, theirs = grouped.get((attack, "auto")), grouped.get((attack, STRONGEST))
        figures = (mean(ours, lambda record: record["asr"]), mean(ours, tpr), mean(ours, _realised_fpr), mean(ours, auroc_masked), mean(theirs, tpr))
        shares = (shown(value, 4 if index == 2 else 3) for index, value in enumerate(figures))
        lines.append(row(dataset, architecture, title(attack), str(seed), *shares))
    return lines


def table_of_promises(found: Sequence[Record]) -> list[str]:
    """For each guard, number of validation images and target: how often the promise was kept over random divisions."""
    lines = [row("guard", "n", "target", "promised, 90%", "mean rate", "judged", "kept, of 1,000", "of the first 200"), row(*["---"] * 8)]
    for record in found:
        for each in record["found"]:
            low, high = each["interval"]
            rates = (f"{each['target_fpr']:.1%}", f"{low:.2%} to {high:.2%}", f"{each['mean_rate']:.2%}", str(each["judged"]))
            kept = (f"{each['within']:.1%}", f"{each['within_few']:.1%}")
            lines.append(row(f"{record['suspect']}, `{record['preset']}`", str(each["n"]), *rates, *kept))
    return lines


def table_of_detectors(grouped: Cells) -> list[str]:
    """The README's: what each detector does over all attacks."""
    lines = [row("detector", "attacks", "TPR at 1% target, mean", "worst attack", "AUROC masked, mean", "realised FPR", "passes an image"), row(*["---"] * 7)]
    for name in DETECTORS:
        found = by_attack(grouped, name, tpr)
        if not found:
            continue
        worst = min(found, key=lambda attack: found[attack])
        everything = [record for (_, detector), cell in grouped.items() if detector == name for record in cell]
        figures = (
            str(len(found)),
            f"{np.mean(list(found.values())):.1%}",
            f"{found[worst]:.1%} ({title(worst)})",
            shown(float(np.mean(list(by_attack(grouped, name, auroc_masked).values())))),
            f"{mean(everything, _realised_fpr) or 0:.2%}",
            f"{mean(everything, lambda record: record['passes']) or 0:.1f}",
        )
        lines.append(row(TITLES[name], *figures))
    return lines


def table_of_scales(found: Sequence[Record]) -> list[str]:
    """The README's other one: on each data set and network, both presets beside the best of the others."""
    lines = [
        row("data set", "network", "attacks", "`auto`, mean", "worst attack", "realised FPR", "`paper`, mean", "others tried", "best of them, mean"),
        row(*["---"] * 9),
    ]
    for dataset, architecture in scales(found):
        grouped = cells(found, (dataset, architecture))
        by_detector = {name: values for name in DETECTORS if (values := by_attack(grouped, name, tpr))}
        if not (ours := by_detector.get("auto")):
            continue
        worst = min(ours, key=lambda attack: ours[attack])
        means = {name: float(np.mean(list(values.values()))) for name, values in by_detector.items() if set(values) >= set(ours)}
        others = [name for name in means if name not in PRESETS]
        best = max(others, key=means.__getitem__, default=None)
        fpr = mean([record for (_, name), cell in grouped.items() if name == "auto" for record in cell], _realised_fpr)
        told = f"{means[best]:.1%} ({TITLES[best]})" if best else "-"
        paper = f"{means['paper']:.1%}" if "paper" in means else "-"
        figures = (f"{means['auto']:.1%}", f"{ours[worst]:.1%} ({title(worst)})", f"{fpr or 0:.2%}", paper, str(len(others)), told)
        lines.append(row(dataset, architecture, str(len(ours)), *figures))
    return lines


def weak(grouped: Cells, bound: float = 0.97) -> list[str]:
    """Attacks on which the published recipe falls short."""
    return [attack for attack, value in by_attack(grouped, "paper", auroc_masked).items() if value < bound]


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
