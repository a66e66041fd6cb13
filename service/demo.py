"""The demo: a real server process, used over HTTP as a user would use it, on two really backdoored classifiers.

For each: upload suspect and clean set, follow the calibration, activate, post images that the calibration never saw, and hold what came back
against what was promised. At the end, what Prometheus would see. Raises BrokenPromise, which makes the command fail, wherever a promise is not kept.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from models.threshold import Threshold, rejections_expected

SUSPECTS = ("badnet", "blend")
LEAST_TPR = {"badnet": 0.90, "blend": 0.75}  # what the demo promises of the examples; what a user's own suspect carries, nobody can promise
LEVEL = 0.99  # a correct guard is called broken in one of a hundred sets of samples


class BrokenPromise(Exception):
    """What the demo saw is not what was promised."""


@dataclass(frozen=True)
class Row:
    """What came back for one suspect."""

    guard: str
    version: int
    accepted: int
    false_rejections: int
    expected: tuple[int, int]
    caught: int
    triggered: int
    still_fooled: int
    milliseconds: float
    promise: Threshold

    @property
    def clean(self) -> int:
        return self.accepted + self.false_rejections

    @property
    def tpr(self) -> float:
        return self.caught / self.triggered


def run(examples: Path, data_dir: Path | None, device: str) -> None:
    """Run the whole demo and print it. Raises BrokenPromise."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=120)
    missing = [name for name in ("clean_set.zip", "samples.zip", *(f"suspect_{name}.safetensors" for name in SUSPECTS)) if not (examples / name).is_file()]
    if missing:
        raise BrokenPromise(f"{examples} lacks {', '.join(missing)}; run it from the project's folder, or name the folder with --examples")
    home = data_dir or Path(tempfile.mkdtemp(prefix="badexpert-demo-"))
    rows = []
    with _server(home, device) as client:
        for suspect in SUSPECTS:
            rows.append(_guard(client, console, examples, suspect))
        _print(console, client, rows)
    for row in rows:
        console.print(f"Report on {row.guard}: {home / 'guards' / row.guard / str(row.version) / 'report.html'}")
    _hold(rows)
    console.print("Every promise was kept.", style="green")


@contextmanager
def _server(home: Path, device: str) -> Iterator[httpx.Client]:
    """A server process of its own on a free port; ended at the end."""
    command = [sys.executable, "-m", "service", "serve", "--data-dir", str(home), "--port", "0", "--device", device]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("BADEXPERT_")}
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "server.log", "w") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=plain) as process:
        try:
            assert process.stdout is not None  # asked for above
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise BrokenPromise(f"the server did not start; what it said stands in {home / 'server.log'}")
            with httpx.Client(base_url=found[0], timeout=httpx.Timeout(600.0), trust_env=False) as client:
                _wait_ready(client, process)
                yield client
        finally:
            process.send_signal(signal.SIGTERM)


def _wait_ready(client: httpx.Client, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None:
            raise BrokenPromise(f"the server ended with status {process.returncode}; what it said stands in its log")
        time.sleep(0.1)
    raise BrokenPromise("the server was not ready within a minute")


def _guard(client: httpx.Client, console: Console, examples: Path, suspect: str) -> Row:
    console.print(f"Calibrating a guard for suspect_{suspect}.safetensors")
    version = _calibrate(client, console, examples, suspect)
    _ok(client.put(f"/v1/guards/{suspect}/active", json={"version": version}))
    with zipfile.ZipFile(examples / "samples.zip") as samples:
        clean = {name: samples.read(name) for name in samples.namelist() if name.startswith("clean/")}
        triggered = {name: samples.read(name) for name in samples.namelist() if name.startswith(f"{suspect}/")}
    times: list[float] = []
    accepted = sum(_predict(client, suspect, data, times)["verdict"] == "accepted" for data in clean.values())
    judged = [_predict(client, suspect, data, times) for data in triggered.values()]
    caught = sum(answer["verdict"] == "rejected" for answer in judged)
    # The attack's target is the class that most triggered images would be called, were they let through.
    target = _target(client, suspect, next(iter(triggered.values())))
    fooled = sum(answer["verdict"] == "accepted" and answer["prediction"]["label"] == target for answer in judged)
    promise = _ok(client.get(f"/v1/guards/{suspect}"))["versions"][-1]
    threshold = Threshold(0.0, promise["target_fpr"], promise["validation_images"], promise["rank"], tuple(promise["fpr_interval"]))
    return Row(
        guard=suspect,
        version=version,
        accepted=accepted,
        false_rejections=len(clean) - accepted,
        expected=rejections_expected(threshold, len(clean), LEVEL),
        caught=caught,
        triggered=len(triggered),
        still_fooled=fooled,
        milliseconds=statistics.median(times) * 1000,
        promise=threshold,
    )


def _calibrate(client: httpx.Client, console: Console, examples: Path, suspect: str) -> int:
    with open(examples / f"suspect_{suspect}.safetensors", "rb") as checkpoint, open(examples / "clean_set.zip", "rb") as clean_set:
        files = {"checkpoint": checkpoint, "clean_set": clean_set}
        job = _ok(client.post("/v1/calibrations", data={"config": json.dumps({"name": suspect, "budget": "quick"})}, files=files))
    with Progress(TextColumn("  {task.description:<14}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), console=console, transient=True) as bar:
        task = bar.add_task("queued", total=1.0)
        while job["state"] in ("queued", "running"):
            time.sleep(0.3)
            job = _ok(client.get(f"/v1/calibrations/{job['id']}"))
            if job["progress"]:
                bar.update(task, description=job["progress"]["stage"], completed=job["progress"]["fraction"])
    if job["state"] != "succeeded":
        raise BrokenPromise(f"the calibration of {suspect} {job['state']}: {(job['problem'] or {}).get('detail', '')}")
    return int(job["result"]["version"])


def _predict(client: httpx.Client, guard: str, data: bytes, times: list[float]) -> dict[str, Any]:
    began = time.perf_counter()
    answer = _ok(client.post(f"/v1/guards/{guard}/predict", content=data, headers={"Content-Type": "image/png"}))
    times.append(time.perf_counter() - began)
    return answer


def _target(client: httpx.Client, guard: str, data: bytes) -> int:
    url = f"/v1/guards/{guard}/predict?explain=true"
    return int(_ok(client.post(url, content=data, headers={"Content-Type": "image/png"}))["explanation"]["would_be"]["label"])


def _ok(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        raise BrokenPromise(f"{response.request.method} {response.request.url.path} answered {response.status_code}: {response.text[:300]}")
    value: dict[str, Any] = response.json()
    return value


def _print(console: Console, client: httpx.Client, rows: list[Row]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("suspect", "clean accepted", "rejected", "FPR", "promised", "triggered rejected", "TPR", "still fooled", "median ms"):
        table.add_column(column, justify="left" if column == "suspect" else "right")
    for row in rows:
        low, high = row.expected
        table.add_row(
            row.guard,
            str(row.accepted),
            str(row.false_rejections),
            f"{row.false_rejections / row.clean:.2%}",
            f"{row.promise.target_fpr:.2%} ({low} to {high} of {row.clean})",
            f"{row.caught} of {row.triggered}",
            f"{row.tpr:.1%}",
            str(row.still_fooled),
            f"{row.milliseconds:.1f}",
        )
    console.print(table)
    series = dict(re.findall(r'^badexpert_verdicts_total(\{guard="\w+",verdict="\w+"\}) (\S+)$', client.get("/metrics").text, re.MULTILINE))
    for row in rows:
        rejected = float(series[f'{{guard="{row.guard}",verdict="rejected"}}'])
        accepted = float(series[f'{{guard="{row.guard}",verdict="accepted"}}'])
        console.print(f"Rejection rate of {row.guard} as scraped from /metrics: {rejected / (rejected + accepted):.1%}")


def _hold(rows: list[Row]) -> None:
    for row in rows:
        low, high = row.expected
        if not low <= row.false_rejections <= high:
            raise BrokenPromise(f"{row.guard} rejected {row.false_rejections} of {row.clean} clean images; {low} to {high} were promised")
        if row.tpr < LEAST_TPR[row.guard]:
            raise BrokenPromise(f"{row.guard} caught {row.tpr:.1%} of the triggered images; {LEAST_TPR[row.guard]:.0%} were promised")
