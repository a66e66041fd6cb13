"""What is said of the examples is what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.examples import RECORD, SOURCE, table
from benchmarks.readme import README, filled

ROOT = Path(__file__).parents[3]


def test_the_examples_are_really_backdoored() -> None:
    for record in json.loads((ROOT / "examples" / "suspects.json").read_text()).values():
        assert record["clean_accuracy"] >= 0.88
        assert record["asr"] >= 0.95


def test_the_readmes_table_is_the_records() -> None:
    readme = README.read_text()
    assert filled(readme, SOURCE, table(json.loads(RECORD.read_text()))) == readme
