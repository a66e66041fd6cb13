"""Records grouped into the cells of a table, attack by detector, and the figures of a cell: means over its seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.attacks import ATTACKS
from benchmarks.records import Record

Cells = dict[tuple[str, str], list[Record]]  # (attack, detector) -> one record a seed
TARGET = "0.01"


def title(attack: str) -> str:
    return "clean model" if attack == "clean" else ATTACKS[attack].title


def trained(suspect: Record) -> str:
    """The title of a suspect of the zoo, with its seed where it is not that of the design."""
    return title(suspect["attack"]) + (f", seed {suspect['seed']}" if suspect.get("seed") else "")


def scales(found: Sequence[Record]) -> list[tuple[str, str]]:
    """Data sets with their architectures, in the order of the records."""
    return list(dict.fromkeys((record["dataset"], record["architecture"]) for record in found))


def within(found: Sequence[Record], scale: tuple[str, str]) -> list[Record]:
    """Those of one data set and architecture."""
    return [record for record in found if (record["dataset"], record["architecture"]) == scale]


def cells(found: Sequence[Record], scale: tuple[str, str]) -> Cells:
    """Records of one data set and architecture whose suspect passes the gate, by attack and detector; those of `later` suspects have a table of their own."""
    grouped: Cells = {}
    for record in within(found, scale):
        if record["gated"] and not record["suspect_seed"]:
            grouped.setdefault((record["attack"], record["detector"]), []).append(record)
    return grouped


def later(found: Sequence[Record]) -> list[Record]:
    """Of suspects that were trained, with other seeds, when the design had been settled on those of seed 0."""
    return [record for record in found if record["suspect_seed"]]


def mean(found: Sequence[Record] | None, figure: Callable[[Record], float | None]) -> float | None:
    """Over seeds; None where nothing was measured or it does not apply."""
    values = [value for record in found or [] if "not_applicable" not in record and (value := figure(record)) is not None]
    return float(np.mean(values)) if values else None


def tpr(record: Record) -> float | None:
    """At 1% FPR, of the triggered images that fool the suspect."""
    value: float | None = record["at"][TARGET]["tpr_masked"]
    return value


def tpr_of_all(record: Record) -> float | None:
    """The same, of all triggered images."""
    value: float | None = record["at"][TARGET]["tpr"]
    return value


def tpr_at_one_rate(record: Record) -> float:
    """The same, at the threshold that rejects 1% of the very images reported, so that no detector gains by what its threshold happened to realise."""
    return float(np.interp(float(TARGET), record["roc"]["fpr"], record["roc"]["tpr"]))


def auroc(record: Record) -> float | None:
    value: float | None = record["auroc"]
    return value


def auroc_masked(record: Record) -> float | None:
    value: float | None = record["auroc_masked"]
    return value


def bootstrap(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """90% interval of the mean over attacks, drawn with replacement."""
    means = np.random.default_rng(0).choice(np.asarray(values), (draws, len(values))).mean(1)
    return float(np.quantile(means, 0.05)), float(np.quantile(means, 0.95))


def attacks_of(grouped: Cells) -> list[str]:
    return [attack for attack in ATTACKS if any(attack == key[0] for key in grouped)]


def by_attack(grouped: Cells, detector: str, figure: Callable[[Record], float | None]) -> dict[str, float]:
    """A detector's figure for each attack that it was tried on and applies to."""
    found = {attack: mean(grouped.get((attack, detector)), figure) for attack in attacks_of(grouped)}
    return {attack: value for attack, value in found.items() if value is not None}
