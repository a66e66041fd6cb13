"""What a rerun is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import records
from benchmarks.evaluate import compared


def record(detector: str, **changed: Any) -> records.Record:
    cell = {"dataset": "cifar10", "architecture": "resnet20", "attack": "wanet", "suspect_seed": 0, "detector": detector, "seed": 0}
    return {**cell, "commit": "abc", "auroc": 0.9, "asr": 0.9, "clean_accuracy": 0.86, "at": {}, **changed}


@pytest.mark.parametrize(
    ("detector", "changed", "agrees"),
    [
        ("strip", {}, True),
        ("strip", {"auroc": 0.885}, True),
        ("strip", {"auroc": 0.85}, False),
        ("paper", {"auroc": 0.8}, True),  # it trains networks, and hardly settles
        ("paper", {"auroc": 0.75}, False),
        ("auto", {"auroc": 0.875}, True),
        ("auto", {"auroc": 0.86}, False),
        ("paper", {"asr": 0.85}, False),  # what the suspect answers trains nothing
        ("strip", {"clean_accuracy": 0.8}, False),
    ],
)
def test_a_rerun_agrees_within_what_its_detector_allows(tmp_path: Path, detector: str, changed: dict[str, float], agrees: bool) -> None:
    records.put(record(detector), tmp_path)
    found = compared(record(detector, **changed), tmp_path)
    assert found["agrees"] is agrees
    assert found["recorded"]["auroc"] == 0.9


def test_a_cell_without_a_record_says_so(tmp_path: Path) -> None:
    assert compared(record("strip"), tmp_path)["recorded"] is None


def test_a_refusal_agrees_with_the_same_refusal_only(tmp_path: Path) -> None:
    refused = {key: value for key, value in record("scale_up").items() if key not in ("auroc", "asr", "clean_accuracy", "at")}
    records.put({**refused, "not_applicable": "no softmax"}, tmp_path)
    assert compared({**refused, "not_applicable": "no softmax"}, tmp_path)["agrees"]
    assert not compared({**refused, "not_applicable": "another reason"}, tmp_path)["agrees"]
    assert not compared(record("scale_up"), tmp_path)["agrees"]
