"""Our service beside other serving frameworks, over HTTP: `python -m benchmarks.serving.http`.

The same example suspect, one after another on the same machine: our guard behind our service; the naive guard of three whole networks, and the suspect alone,
behind mosec, LitServe and Ray Serve. For each the knee is found: the rate of an open-loop load up to which 99% are answered within 100 ms; then it gets
five times that rate. Our service is also watched while nothing is asked. Then ours and the best peer of each way are measured again, turn by turn, since a
knee is worth no more than the minute in which it was found. The peers need environments of their own, with nothing of ours installed:

    python -m benchmarks.serving.http --install .peers

`--record` writes benchmarks/results/http.json, where each machine has one record.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, median_low
from typing import Any

import httpx

from benchmarks import records
from benchmarks.serving.load import knee, load, request

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "benchmarks" / "results" / "http.json"
PEERS = {"mosec": "mosec==0.9.8", "litserve": "litserve==0.2.19", "ray": "ray[serve]==2.60.0"}
RAW = {"mosec": "/inference", "ray": "/"}  # where those are called that take an image as it is
P99, GOOD, STORM = 0.1, 1.0, 5.0  # seconds at the knee, seconds that an answer in a storm may take, how much more than the knee a storm is
FIGURES = ("knee", "p50_ms", "p99_ms", "storm_goodput", "storm_share", "idle_cpu")


@dataclass(frozen=True)
class Contender:
    """One server under test."""

    name: str
    way: str  # guard, naive, alone
    workers: int


def install(folder: Path) -> None:
    """An environment a peer. What computes (torch) is taken from the environment that runs this, so that all have the same."""
    for name, requirement in PEERS.items():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        subprocess.run([str(folder / name / "bin" / "python"), "-m", "pip", "install", "--quiet", requirement], check=True)


def command(contender: Contender, port: int, data_dir: Path, peers: Path) -> tuple[list[str], dict[str, str]]:
    """What starts it, and its environment."""
    if contender.way == "guard":
        return [sys.executable, "-m", "service", "serve", "--data-dir", str(data_dir), "--port", str(port), "--device", "cpu"], dict(os.environ)
    python = peers / contender.name / "bin" / "python"
    # Behind the peer's own packages come ours, for torch and for the networks.
    own = next((peers / contender.name / "lib").glob("python*/site-packages"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(own), sysconfig.get_paths()["purelib"]]),
        "BUNDLE": str(data_dir / "guards" / "demo" / "1"),
        "WAY": contender.way,
        "WORKERS": str(contender.workers),
        "PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    options = ["--port", str(port), "--log-level", "error"] if contender.name == "mosec" else []
    return [str(python), "-m", f"benchmarks.serving.peers.{contender.name}_app", *options], environment


def call(contender: Contender, image: bytes) -> tuple[str, dict[str, str], bytes]:
    """Path, headers and body with which it is asked about an image; ours is told, as its callers can, how long an answer is worth waiting for."""
    if contender.way == "guard":
        return "/v1/guards/demo/predict", {"Content-Type": "image/png", "X-Deadline-Ms": str(round(1000 * GOOD))}, image
    if contender.name in RAW:
        return RAW[contender.name], {"Content-Type": "image/png"}, image
    return "/predict", {"Content-Type": "application/json"}, json.dumps({"image": base64.b64encode(image).decode()}).encode()


@contextmanager
def running(contender: Contender, image: bytes, data_dir: Path, peers: Path) -> Iterator[tuple[int, int]]:
    """Its port and process number, from its first right answer on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    line, environment = command(contender, port, data_dir, peers)
    process = subprocess.Popen(line, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_for(port, call(contender, image), process)
        yield port, process.pid
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(port: int, asked: tuple[str, dict[str, str], bytes], process: subprocess.Popen[bytes]) -> None:
    path, headers, body = asked
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SystemExit(f"A server ended before it answered (status {process.returncode}): {process.args!r}")
        try:
            if httpx.post(f"http://127.0.0.1:{port}{path}", content=body, headers=headers, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise SystemExit(f"A server did not answer within two minutes: {process.args!r}")


def measure(contender: Contender, images: list[bytes], data_dir: Path, peers: Path, seconds: float, start: float) -> dict[str, Any]:
    """Its knee, and what is left of it in a storm."""
    with running(contender, images[0], data_dir, peers) as (port, pid):
        requests = [request(*call(contender, image), port) for image in images]
        load(port, requests, start, 2.0)  # warm
        idle = idle_cpu(pid, 5.0) if contender.way == "guard" else None
        best = knee(port, requests, P99, seconds, start)
        storm = load(port, requests, STORM * max(best.rate, start), seconds)
    answered = len(best.seconds) / seconds
    return {
        **vars(contender),
        "knee": round(best.rate, 1),
        "p50_ms": round(1000 * best.percentile(0.5), 1),
        "p99_ms": round(1000 * best.percentile(0.99), 1),
        "storm_goodput": round(storm.within(GOOD) / seconds, 1),
        "storm_share": round(storm.within(GOOD) / seconds / answered, 3) if answered else None,
        "storm_others": dict(storm.others),
        **({} if idle is None else {"idle_cpu": round(idle, 4)}),
    }


def idle_cpu(pid: int, seconds: float) -> float:
    """Share of one core that a process takes while nothing is asked of it."""

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    time.sleep(1.0)
    before = ticks()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def calibrated(data_dir: Path) -> None:
    """The example suspect's guard, active, made anew."""
    examples = ROOT / "examples"
    files = ["--checkpoint", str(examples / "suspect_badnet.safetensors"), "--clean-set", str(examples / "clean_set.zip")]
    line = [sys.executable, "-m", "service", "calibrate", *files, "--name", "demo", "--budget", "quick", "--activate", "--data-dir", str(data_dir), "--json"]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.http", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="make the peers' environments, and end")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="where they are (default: .peers)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--start", type=float, default=100.0, help="the first rate that is tried")
    parser.add_argument("--rounds", type=int, default=3, help="how often ours and the best peers are measured")
    parser.add_argument("--only", action="append", help="guard, mosec, litserve or ray; may be repeated")
    parser.add_argument("--json", action="store_true", help="the whole record")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/http.json, in place of an earlier one on the same hardware")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: at least one")
    if args.install:
        install(args.install)
        return
    contenders = [Contender("badexpert", "guard", 1)]
    cores = len(os.sched_getaffinity(0))
    contenders += [Contender(name, way, workers) for name in PEERS for way in ("naive", "alone") for workers in sorted({1, cores})]
    wanted = [each for each in contenders if not args.only or each.name in args.only or each.way in args.only]
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(ROOT / "examples" / "samples.zip") as samples:
        images = [samples.read(name) for name in samples.namelist() if name.startswith("clean/")][:200]
        calibrated(Path(folder))
        runs: dict[Contender, list[dict[str, Any]]] = {each: [] for each in wanted}
        for turn in range(args.rounds):
            for contender in wanted if turn == 0 else leading(runs):
                runs[contender].append(measure(contender, images, Path(folder), args.peers.absolute(), args.seconds, args.start))
                if not args.json:
                    print(json.dumps(runs[contender][-1]), flush=True)
    found = [settled(each) for each in runs.values()]
    import torch

    record = {"servers": found, **compared(found), **records.circumstances(torch.device("cpu"))}
    if args.json:
        print(json.dumps(record, indent=1))
    if args.record:
        records.enlist(RECORD, [record], "hardware")


def leading(runs: Mapping[Contender, Sequence[Mapping[str, Any]]]) -> list[Contender]:
    """Of each way the contender whose first knee was the highest."""
    return [max((each for each in runs if each.way == way), key=lambda each: float(runs[each][0]["knee"])) for way in dict.fromkeys(each.way for each in runs)]


def settled(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One contender's runs as one: of each figure the median (of an even number the lower of the two in the middle), and of the knee all, by round."""
    figures = {name: [run[name] for run in runs if run[name] is not None] for name in FIGURES if name in runs[0]}
    return {**runs[0], **{name: median_low(values) for name, values in figures.items() if values}, "knees": [run["knee"] for run in runs]}


def compared(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Our knee against that of the best peer, naive and alone: the median over the rounds that measured both."""
    best = {way: max((each for each in found if each["way"] == way), key=lambda each: float(each["knee"]), default=None) for way in ("guard", "naive", "alone")}
    shares = {}
    for way in ("naive", "alone"):
        if (ours := best["guard"]) and (theirs := best[way]):
            rounds = [mine / peer for mine, peer in zip(ours["knees"], theirs["knees"], strict=False) if peer]
            if rounds:
                shares[f"of_best_{way}"] = round(median(rounds), 3)
    return shares


if __name__ == "__main__":
    main()
