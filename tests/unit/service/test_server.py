"""A server that cannot start says what to do, and whatever one says is a JSON object a line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from service import server
from service.settings import Settings


def test_a_device_that_is_not_there_keeps_it_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_configure_logging", lambda: None)  # which is the whole process's
    with pytest.raises(server.CannotStart, match="'gpu' cannot be used here"):
        server.serve(Settings(device="gpu"))


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ({}, "all programs of this machine may administer"),
        ({"predict_token": "predict-secret"}, "nobody may administer"),
        ({"metrics_token": "metrics-secret"}, "nobody may administer"),
    ],
)
def test_it_says_who_may_administer(tokens: dict[str, Any], said: str) -> None:
    assert server._openness(Settings(**tokens)) == f"; no admin token is set: {said}"
    assert server._openness(Settings(**tokens, admin_token="admin-secret")) == ""


TALK = """
import logging, sys, warnings
import structlog
from service.server import _configure_logging, _log_as_json

_configure_logging()
late = logging.getLogger("brought.late")
late.addHandler(logging.StreamHandler())
late.propagate = False
_log_as_json()
structlog.get_logger().info("of our own", number=1)
logging.getLogger("library").warning('with "quotes", a \\ and\\na second line %s', "x")
logging.getLogger("library").info("nobody asked for this")
logging.getLogger("torch._dynamo").warning("torch has a handler of its own")
late.error("so has this one")
warnings.warn("a warning")
for log in (logging.getLogger("library"), structlog.get_logger()):
    try:
        raise ValueError('a "quoted" value')
    except ValueError:
        log.exception("it failed")
"""


def test_every_line_of_the_log_is_a_json_object_whoever_wrote_it() -> None:
    lines = subprocess.run([sys.executable, "-c", TALK], capture_output=True, text=True, timeout=60, check=True).stderr.splitlines()
    said = [json.loads(line) for line in lines]
    assert [(entry["level"], entry.get("logger")) for entry in said] == [
        ("info", None),
        ("warning", "library"),
        ("warning", "torch._dynamo"),
        ("error", "brought.late"),
        ("warning", "py.warnings"),
        ("error", "library"),
        ("error", None),
    ]
    assert said[1]["event"] == 'with "quotes", a \\ and\na second line x'
    assert "UserWarning: a warning" in said[4]["event"]
    for entry in said[5:]:
        assert entry["event"] == "it failed"
        assert 'ValueError: a "quoted" value' in entry["exception"]
    assert all(entry["timestamp"].endswith("Z") for entry in said)
