"""Whatever a server says is a JSON object a line, and nobody waits for whoever reads it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from service.logs import WAITING, Log

TALK = """
import logging, sys, warnings
import structlog
from service import logs

lines = logs.configure()
late = logging.getLogger("brought.late")
late.addHandler(logging.StreamHandler())
late.propagate = False
logs.adopt()
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
lines.flush(10)
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


UNREAD = """
import structlog
from service import logs

lines = logs.configure()
for number in range(2 * logs.WAITING):
    structlog.get_logger().info("said", number=number)
print("said it all", flush=True)
lines.flush(0.1)
"""


def test_x25_a_process_whose_log_nobody_reads_goes_on_and_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", UNREAD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "said it all\n"
            assert process.wait(60) == 0
        finally:
            process.kill()


def record(number: int) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": json.dumps({"event": "said", "number": number, "padding": "x" * 200})})


def test_x25_lines_that_do_not_fit_are_counted_and_all_others_are_in_order() -> None:
    reading, writing = os.pipe()
    log = Log(writing)
    log.start()
    said = 4 * WAITING  # more than the pipe and the queue take
    for number in range(said):
        log.waiting.handle(record(number))
    log.flush(0.01)  # in vain, but not for ever
    read: list[bytes] = []

    def read_all() -> None:
        with open(reading, "rb") as lines:
            read.extend(lines)

    reader = threading.Thread(target=read_all)
    reader.start()
    log.flush(60)
    log.waiting.handle(record(said))
    log.stop()
    os.close(writing)
    reader.join()
    found = [json.loads(line) for line in read]
    (told,) = (place for place, entry in enumerate(found) if entry["event"] == "log_lines_lost")
    assert found[told]["level"] == "warning"
    assert WAITING <= told < said
    assert [entry["number"] for entry in found if entry["event"] == "said"] == [*range(told), said]
    assert found[told]["lost"] == said - told


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_lines_that_could_not_be_written_are_counted_once_others_can(tmp_path: Path) -> None:
    writing = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    full = os.open("/dev/full", os.O_WRONLY)
    log = Log(full)
    for number in range(3):
        log.handle(record(number))
    os.dup2(writing, full)
    log.handle(record(3))
    os.close(full)
    os.close(writing)
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(entry["event"], entry.get("number"), entry.get("lost")) for entry in events] == [("said", 3, None), ("log_lines_lost", None, 3)]
