"""The plots of docs/results.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.detectors import DETECTORS, PRESETS, TITLES
from benchmarks.report.cells import Cells, attacks_of, mean, title, tpr


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
