"""Triggers change what they should and nothing else; what is said of the examples is what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.attacks import ATTACKS, poison, stamp
from benchmarks.examples import RECORD, with_table

ROOT = Path(__file__).parents[3]


def images(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 32, 32), generator=source, dtype=torch.uint8), torch.arange(n) % 10


def test_badnet_changes_nine_pixels() -> None:
    before, _ = images()
    changed = (stamp(ATTACKS["badnet"](), before) != before).any(1)
    assert changed[:, 28:31, 28:31].float().mean() > 0.9
    changed[:, 28:31, 28:31] = False
    assert not changed.any()


def test_blend_is_faint_and_everywhere() -> None:
    before, _ = images()
    difference = (stamp(ATTACKS["blend"](), before).float() - before.float()).abs()
    assert difference.max() <= 0.2 * 255 + 1
    assert (difference > 0).float().mean() > 0.9


@pytest.mark.parametrize("name", list(ATTACKS))
def test_poisoning_touches_the_share_it_was_asked_for_and_never_the_target_class(name: str) -> None:
    before, labels = images(400)
    result = poison(ATTACKS[name](), before, labels, 0.05, seed=1)
    assert int(result.touched.sum()) == 20
    assert (labels[result.touched] != 0).all()
    assert (result.labels[result.touched] == 0).all()
    assert torch.equal(result.labels[~result.touched], labels[~result.touched])
    assert torch.equal(result.images[~result.touched], before[~result.touched])
    again = poison(ATTACKS[name](), before, labels, 0.05, seed=1)
    assert torch.equal(again.images, result.images)


def test_more_poison_than_there_are_images_is_refused() -> None:
    before, labels = images()
    with pytest.raises(ValueError, match="can poison 36 images"):
        poison(ATTACKS["badnet"](), before, labels, 0.95, seed=0)


def test_the_examples_are_really_backdoored() -> None:
    for record in json.loads((ROOT / "examples" / "suspects.json").read_text()).values():
        assert record["clean_accuracy"] >= 0.88
        assert record["asr"] >= 0.95


def test_the_readmes_table_is_the_records() -> None:
    readme = (ROOT / "README.md").read_text()
    assert with_table(readme, json.loads(RECORD.read_text())) == readme
