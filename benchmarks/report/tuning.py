"""What the results page says of canaries and of the number of clean images."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy.stats import spearmanr

from benchmarks.canaries import CHOOSING, chosen_within
from benchmarks.records import Record
from benchmarks.report.tables import row
from calibration.canary import KINDS
from calibration.recipes import AutoRecipe
from calibration.search import Setting

NEAR = 0.02  # of the best setting of the grid


def canaries(found: Sequence[Record]) -> list[str]:
    """The section on canaries."""
    if not found:
        return []
    lines = [
        *("", "## What canaries are worth", ""),
        "Written by `python -m benchmarks.canaries`. A calibration plants backdoors in a copy of the suspect and chooses its settings by how well a guard of",
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
    real = [record["real"] for record in found]
    lines = []
    for budget in CHOOSING:
        chosen = [_real_of(record, chosen_within(record["tried"], budget)) for record in found]
        near = sum(value >= _best(record) - NEAR for value, record in zip(chosen, found, strict=True))
        lines.append(f"With the budget `{budget}` canaries choose a setting within 2 points of the best of the whole grid for {near} of {len(found)} suspects.")
    near = sum(_default(record) >= _best(record) - NEAR for record in found)
    lines.append(f"The default is there for {near}.")
    powers = [[each["power"] for each in record["canaries"] if each["power"] is not None] for record in found]
    known = [(values, value) for values, value in zip(powers, real, strict=True) if values]
    for title, summary in (("least", min), ("mean", statistics.mean)):
        of_canaries, of_attacks = [summary(values) for values, _ in known], [value for _, value in known]
        if len(set(of_canaries)) > 1 and len(set(of_attacks)) > 1:  # else there is nothing to rank
            rank = spearmanr(of_canaries, of_attacks).statistic
            lines.append(f"The {title} power over the kinds has a rank correlation of {rank:+.2f} with the real TPR.")
    optimism = statistics.mean(statistics.mean(values) - value for values, value in known)
    lines.append(f"On average power is {abs(optimism):.3f} {'above' if optimism > 0 else 'below'} the real TPR.")
    return lines


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
