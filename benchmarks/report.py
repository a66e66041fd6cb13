"""Write docs/results.md and its plots from the records: `python -m benchmarks.report`. Nothing here measures anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks import records, zoo
from benchmarks.attacks import ATTACKS
from benchmarks.detectors import DETECTORS, PRESETS, TITLES
from benchmarks.records import Record
from benchmarks.train import MIN_ASR, MOST_LOST

DOCS = Path(__file__).parent.parent / "docs"
PAGE, PLOTS = DOCS / "results.md", DOCS / "plots"
Cells = dict[tuple[str, str], list[Record]]  # (attack, detector) -> one record a seed
TARGET = "0.01"
PICTURES = {"heat": "TPR by attack and detector", "roc": "ROC curves", "cost": "Cost against TPR"}


def title(attack: str) -> str:
    return "clean model" if attack == "clean" else ATTACKS[attack].title


def scales(found: Sequence[Record]) -> list[tuple[str, str]]:
    """Data sets with their architectures, in the order of the records."""
    return list(dict.fromkeys((record["dataset"], record["architecture"]) for record in found))


def within(found: Sequence[Record], scale: tuple[str, str]) -> list[Record]:
    """Those of one data set and architecture."""
    return [record for record in found if (record["dataset"], record["architecture"]) == scale]


def cells(found: Sequence[Record], scale: tuple[str, str]) -> Cells:
    """Records of one data set and architecture whose suspect passes the gate, by attack and detector."""
    grouped: Cells = {}
    for record in within(found, scale):
        if record["gated"]:
            grouped.setdefault((record["attack"], record["detector"]), []).append(record)
    return grouped


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


def not_trained(suspects: Sequence[Record], scale: tuple[str, str]) -> str:
    """Which attacks have no suspect at this scale."""
    there = {record["attack"] for record in within(suspects, scale)}
    missing = [title(attack) for attack in ATTACKS if attack not in there]
    return f"On {scale[0]}, {scale[1]}, not trained yet: {', '.join(missing) or 'none'}. What is not trained has no part in any mean."


def not_evaluated(suspects: Sequence[Record], found: Sequence[Record], scale: tuple[str, str]) -> str:
    """Which suspects that pass the gate no detector has been tried on."""
    tried = {record["attack"] for record in within(found, scale)}
    missing = [record["attack"] for record in within(suspects, scale) if record["passes_gate"] and record["attack"] not in tried]
    return f"Trained, but not evaluated yet: {', '.join(map(title, missing)) or 'none'}."


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


def weak(grouped: Cells, bound: float = 0.97) -> list[str]:
    """Attacks on which the published recipe falls short."""
    return [attack for attack in attacks_of(grouped) if (value := mean(grouped.get((attack, "paper")), auroc_masked)) is not None and value < bound]


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
        *(line for scale in scales(suspects) for line in ("", not_trained(suspects, scale), not_evaluated(suspects, found, scale))),
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
                "",
                f"The published recipe stays under an AUROC of 0.97, masked, on {', '.join(title(attack) for attack in short)}. "
                "The experts' confidence x in the suspect's prediction against the auxiliary's y:",
                "",
                f"![x against y](plots/{name}-xy.svg)",
            ]
    return "\n".join(lines) + "\n"


# Plots


def heat(grouped: Cells) -> Figure:
    attacks, names = attacks_of(grouped), list(DETECTORS)
    values = np.array([[_nan(mean(grouped.get((attack, name)), tpr)) for name in names] for attack in attacks])
    figure = Figure((1.2 + 0.85 * len(names), 1.2 + 0.34 * len(attacks)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        axes.text(x, y, "-" if math.isnan(value) else f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(names)), [TITLES[name].strip("`") for name in names], rotation=30, ha="right")
    axes.set_yticks(range(len(attacks)), [title(attack) for attack in attacks])
    axes.set_title("TPR at 1% FPR")
    return figure


def curves(grouped: Cells) -> Figure:
    attacks, columns = attacks_of(grouped), 4
    rows = -(-len(attacks) // columns)
    figure = Figure((3 * columns, 2.4 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, attack in zip(panels, [*attacks, *[None] * (rows * columns - len(attacks))], strict=True):
        if attack is None:
            axes.set_axis_off()
            continue
        for index, name in enumerate(DETECTORS):
            cell = [record for record in grouped.get((attack, name), []) if record.get("roc")]
            if cell:
                rates = cell[0]["roc"]["fpr"]
                style = {"linewidth": 2.2, "zorder": 3} if name in PRESETS else {"linewidth": 1, "linestyle": "--"}
                axes.plot(rates, np.mean([record["roc"]["tpr"] for record in cell], axis=0), color=f"C{index}", label=TITLES[name].strip("`"), **style)
        axes.set_xscale("log")
        axes.set_ylim(-0.02, 1.02)
        axes.axvline(0.01, color="0.8", linewidth=0.8)
        axes.set_title(title(attack), fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(DETECTORS), fontsize=8)
    figure.supxlabel("false positive rate", fontsize=9)
    figure.supylabel("true positive rate", fontsize=9)
    return figure


def costs(grouped: Cells) -> Figure:
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for name in DETECTORS:
        found = [record for (attack, detector), cell in grouped.items() if detector == name and attack != "clean" for record in cell]
        x, y = mean(found, lambda record: record["passes"]), mean(found, tpr)
        if x is not None and y is not None:
            axes.plot(x, y, "o" if name in PRESETS else "s", markersize=9 if name in PRESETS else 6)
            axes.annotate(TITLES[name].strip("`"), (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("forward passes of the suspect an image")
    axes.set_ylabel("mean TPR at 1% FPR")
    return figure


def confidences(grouped: Cells, attacks: Sequence[str]) -> Figure:
    columns = 4
    rows = -(-len(attacks) // columns)
    figure = Figure((3 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, attack in zip(panels, [*attacks, *[None] * (rows * columns - len(attacks))], strict=True):
        if attack is None:
            axes.set_axis_off()
            continue
        points: dict[str, Any] = grouped[attack, "paper"][0]["xy"]
        for kind, colour in (("clean", "#1f5fa8"), ("triggered", "#c8641b")):
            axes.plot(*points[kind], ".", color=colour, alpha=0.6, label=kind)
        axes.set_title(title(attack), fontsize=9)
    figure.axes[0].legend(fontsize=8)
    figure.supxlabel("x: the backdoor expert's confidence", fontsize=9)
    figure.supylabel("y: the auxiliary model's", fontsize=9)
    return figure


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "badexpert"  # the same records give the same files
    found = records.read()
    PAGE.write_text(page(found, zoo.records()))
    PLOTS.mkdir(exist_ok=True)
    for dataset, architecture in scales(found):
        grouped = cells(found, (dataset, architecture))
        if not attacks_of(grouped):
            continue
        for name in PRESETS:
            print(f"{dataset}, {architecture}: {summary(grouped, name)}")
        plots = {"heat": heat(grouped), "roc": curves(grouped), "cost": costs(grouped)}
        if short := weak(grouped):
            plots["xy"] = confidences(grouped, short)
        for kind, figure in plots.items():
            figure.savefig(PLOTS / f"{dataset}-{architecture}-{kind}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
