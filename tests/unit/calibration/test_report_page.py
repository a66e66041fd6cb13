"""What the page of a report says of the search."""

from __future__ import annotations

import re
from typing import Any

from calibration.report import _canaries


def reported(tried: list[dict[str, Any]], chosen: dict[str, float]) -> dict[str, Any]:
    canary = {"kind": "patch", "asr": 0.95, "images": 160, "took": bool(tried), "why_not": "the copy lost the task", "power": 0.9, "fooled": 400}
    return {"canaries": [canary], "canary_copy": {"accuracy": 0.82, "suspect_accuracy": 0.88}, "search": tried, "chosen": chosen}


def test_every_setting_that_was_tried_stands_there_and_which_was_chosen() -> None:
    tried = [{"expert_stop": stop, "auxiliary_lr": lr, "caught": {"patch": stop + lr, "warp": None}} for stop in (0.2, 0.4) for lr in (0.1, 0.03)]
    page = _canaries(reported(tried, {"expert_stop": 0.4, "auxiliary_lr": 0.1}))
    rows = [re.sub("<[^>]*>", " ", row).split() for row in page.split("<tr>")[-4:]]
    assert rows == [
        ["20%", "right", "0.1", "30.0%", "-"],
        ["20%", "right", "0.03", "23.0%", "-"],
        ["40%", "right", "0.1", "50.0%", "-", "chosen"],
        ["40%", "right", "0.03", "43.0%", "-"],
    ]


def test_where_nothing_could_choose_the_default_is_told() -> None:
    page = _canaries(reported([], {"expert_stop": 0.2, "auxiliary_lr": 0.1}))
    assert "does not count: the copy lost the task" in page
    assert "The guard has the default: experts that stop at 20% right, an auxiliary of a learning rate of 0.1 or less." in page
