"""Write docs/results.md, its plots, docs/performance.md and the README's tables from the records: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks import canaries, examples, few_images, promise, records, waiting, zoo
from benchmarks.detectors import PRESETS
from benchmarks.readme import README, filled
from benchmarks.report.cells import attacks_of, cells, scales
from benchmarks.report.page import page, summary
from benchmarks.report.performance import performance
from benchmarks.report.plots import confidences, costs, curves, heat
from benchmarks.report.tables import table_of_detectors, table_of_scales, weak
from benchmarks.serving import activations, engine, http

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE, PERFORMANCE, PLOTS = DOCS / "results.md", DOCS / "performance.md", DOCS / "plots"
SOURCE, README_SCALE = "benchmarks/results/evaluation", ("cifar10", "resnet20")
BY_NETWORK = f"{SOURCE}, by network"


def readme(text: str, found: Sequence[records.Record]) -> str:
    """The README with the tables that these records give."""
    tables = {
        SOURCE: table_of_detectors(cells(found, README_SCALE)),
        BY_NETWORK: table_of_scales(found),
        examples.SOURCE: examples.table(records.listed(examples.RECORD)),
    }
    for source, lines in tables.items():
        text = filled(text, source, lines)
    return text


def texts(readme_now: str) -> dict[Path, str]:
    """All that is text: what each file is by the records, whatever it says now (of the README that which is not a table stays)."""
    found, listed = records.read(), records.listed
    return {
        PAGE: page(found, zoo.records(), listed(promise.RESULTS), listed(canaries.RESULTS), listed(few_images.RESULTS)),
        PERFORMANCE: performance(listed(engine.RECORD), listed(http.RECORD), listed(activations.RECORD), listed(waiting.RECORD)),
        README: readme(readme_now, found),
    }


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__).parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "badexpert"  # the same records give the same files
    found = records.read()
    for path, text in texts(README.read_text()).items():
        path.write_text(text)
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
            figure.savefig(PLOTS / f"{dataset}-{architecture.replace('/', '-')}-{kind}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
