"""What the results page says of canaries and of the number of clean images."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy.stats import spearmanr

from benchmarks.canaries import CHOOSING, chosen_within
from benchmarks.records import Record
from benchmarks.report.cells import TARGET
from benchmarks.report.tables import row
from calibration.canary import KINDS
from calibration.recipes import AutoRecipe
from calibration.search import Setting

DIGITS, HIGHER_IS_BETTER = (3, 3, 4, 4, 4), (True, True, False, True, False)  # of TPR twice, FPR, AUROC, accuracy lost
NEAR = 0.02  # of the best setting of the grid


def canaries(found: Sequence[Record]) -> list[str]:
    """The section on canaries."""
    if not found:
        return []
    lines = [
        *("", "## What canaries are worth", ""),
        "Written by `python -m benchmarks.canaries`.",
        *table_of_chosen([record for record in found if "by_budget" in record]),
        "A calibration plants backdoors in a copy of the suspect and chooses its settings by how well a guard of",
        "the copy catches them. Here every setting of the largest grid was tried on the suspect itself, too, with the attack's own images, which no",
        "calibration has: the TPR at 1% FPR of the setting that the canaries chose, of the default, and of the best in the grid; and what was caught of each",
        "planted kind.",
        "",
        row("suspect", "chosen", "default", "best", *(f"planted {kind}" for kind in KINDS)),
        row(*["---"] * (4 + len(KINDS))),
    ]
    for record in found:
        power = {each["kind"]: each["power"] for each in record["canaries"]}
        figures = (record["real"], _default(record), _best(record), *(power[kind] for kind in KINDS))
        lines.append(row(record["suspect"], *("-" if value is None else f"{value:.3f}" for value in figures)))
    columns = ([record["real"] for record in found], [_default(record) for record in found], [_best(record) for record in found])
    for title, summary in (("**mean**", statistics.mean), ("**worst**", min)):
        lines.append(row(title, *(f"**{summary(column):.3f}**" for column in columns), *[""] * len(KINDS)))
    return [*lines, "", *verdict(found)]


def verdict(found: Sequence[Record]) -> list[str]:
    """How often the choice was near the best, and how power on canaries goes with that on real attacks."""
    lines = []
    for budget in CHOOSING:
        chosen = [_real_of(record, chosen_within(record["tried"], budget)) for record in found]
        near = sum(value >= _best(record) - NEAR for value, record in zip(chosen, found, strict=True))
        lines.append(f"With the budget `{budget}` canaries choose a setting within 2 points of the best of the whole grid for {near} of {len(found)} suspects.")
    near = sum(_default(record) >= _best(record) - NEAR for record in found)
    level = sum(min(each["real"] for each in record["tried"]) >= _best(record) - NEAR for record in found)
    lines.append(f"The default is there for {near}, and for {level} whatever setting is taken.")
    datasets = dict.fromkeys(record["suspect"].split("/")[0] for record in found)
    for dataset in datasets:
        lines += _ranked([record for record in found if record["suspect"].startswith(f"{dataset}/")], f" on {dataset}")
    if len(datasets) > 1:
        lines += _ranked(found, "")
    optimism = statistics.mean(statistics.mean(values) - record["real"] for record in found if (values := _powers(record)))
    lines.append(f"On average power is {abs(optimism):.3f} {'above' if optimism > 0 else 'below'} the real TPR; by kind:")
    known = [(each["kind"], each["power"] - record["real"]) for record in found for each in record["canaries"] if each["power"] is not None]
    by_kind = {kind: [more for other, more in known if other == kind] for kind in KINDS}
    lines.append(f"{', '.join(f'{kind} {statistics.mean(values):+.3f}' for kind, values in by_kind.items() if values)}.")
    return lines


def _powers(record: Record) -> list[float]:
    return [each["power"] for each in record["canaries"] if each["power"] is not None]


def _ranked(found: Sequence[Record], where: str) -> list[str]:
    """How power goes with the real TPR by rank, with the chance of as much where nothing connects them."""
    known, lines = [(values, float(record["real"])) for record in found if (values := _powers(record))], []
    for title, summary in (("least", min), ("mean", statistics.mean)):
        of_canaries, of_attacks = [summary(values) for values, _ in known], [value for _, value in known]
        if len(set(of_canaries)) > 1 and len(set(of_attacks)) > 1:  # else there is nothing to rank
            rank = spearmanr(of_canaries, of_attacks)
            told = f"The {title} power over the kinds has a rank correlation of {rank.statistic:+.2f} with the real TPR{where}"
            lines.append(f"{told} ({len(known)} suspects, p {rank.pvalue:.2f}).")
    return lines


def table_of_chosen(found: Sequence[Record]) -> list[str]:
    """What the guards do that canaries chose, by data set and in all."""
    if not found:
        return []
    names = ("suspect", *(f"TPR, `{budget}`" for budget in CHOOSING), "realised FPR", "AUROC masked", "accuracy lost")
    lines = [
        "Canaries choose the settings of a calibration with a budget of `standard`, which is the default, or `thorough`; the tables above are of `quick`,",
        "which has none. This is what the guards catch that canaries chose, each one calibration (seed 0), of the triggered images that fool the suspect, at",
        "1% FPR. It is of test images that the tables above do not report (of CIFAR-10 6,000, of GTSRB 2,315, all that are left); clean ones of them have a",
        "part in the promise below and in the README's examples, 400 may have had one in decision 4, and GTSRB's in decision 16. FPR, AUROC and accuracy are",
        "those of `standard`.",
        *("", row(*names), row(*["---"] * len(names))),
    ]
    columns: dict[str, list[tuple[float, ...]]] = {}
    for record in found:
        caught = [record["by_budget"][budget] for budget in CHOOSING]
        at = [each["at"][TARGET] for each in caught]
        figures = (*(each["tpr_masked"] for each in at), at[0]["realised_fpr"], caught[0]["auroc_masked"], at[0]["accuracy_lost"])
        columns.setdefault(record["suspect"].split("/")[0], []).append(figures)
        lines.append(row(record["suspect"], *map(_figure, figures, DIGITS)))
    for dataset, rows in columns.items():
        values = list(zip(*rows, strict=True))
        worst = [min(column) if higher else max(column) for column, higher in zip(values, HIGHER_IS_BETTER, strict=True)]
        for title, told in (("mean", list(map(statistics.mean, values))), ("worst", worst)):
            lines.append(row(f"**{dataset}, {title}**", *(f"**{_figure(value, digits)}**" for value, digits in zip(told, DIGITS, strict=True))))
    return [*lines, ""]


def _figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def few_images(found: Sequence[Record]) -> list[str]:
    """The section on small clean sets."""
    if not found:
        return []
    sizes = sorted({record["images"] for record in found})
    lines = [
        *("", "## How many clean images are needed", ""),
        "Written by `python -m benchmarks.few_images`: TPR at 1% FPR, and in brackets the realised FPR, with clean sets of so many images, of which the",
        "threshold takes two fifths, and as many as the target needs at least. Of GTSRB's 43 classes 200 images are five each, half of them for the threshold.",
        "Where several calibrations were made, of other images as far as there are so many, it is their median, with the least and the largest TPR behind it:",
        "what so few images teach a guard depends on which they are.",
        "",
        row("suspect", *(f"{size:,} images" for size in sizes)),
        row(*["---"] * (1 + len(sizes))),
    ]
    for suspect in sorted({record["suspect"] for record in found}):
        lines.append(row(suspect, *(_cell([each for each in found if (each["suspect"], each["images"]) == (suspect, size)]) for size in sizes)))
    return lines


def _cell(made: Sequence[Record]) -> str:
    """Of the calibrations of one suspect with so many images."""
    refused = {record["refused"].split(":")[0] for record in made if "refused" in record}
    if refused or not made:
        return ", ".join(sorted(refused))
    rates = [record["tpr"] for record in made]
    spread = f", {min(rates):.3f} to {max(rates):.3f} of {len(rates)}" if len(rates) > 1 else ""
    return f"{statistics.median(rates):.3f}{spread} ({statistics.median(record['realised_fpr'] for record in made):.2%})"


def _real_of(record: Record, setting: Setting) -> float:
    return next(float(each["real"]) for each in record["tried"] if (each["expert_stop"], each["auxiliary_lr"]) == (setting.expert_stop, setting.auxiliary_lr))


def _default(record: Record) -> float:
    return _real_of(record, Setting(AutoRecipe.expert_stop, AutoRecipe.auxiliary_lr))


def _best(record: Record) -> float:
    return max(float(each["real"]) for each in record["tried"])
