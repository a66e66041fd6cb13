"""What a user waits for: `python -m benchmarks.waiting` records it; docs/performance.md shows it.

Seconds of a whole `badexpert calibrate` on the example for the published recipe and each budget of `auto`, and their ratio to the published one. Then, with
that very `paper` guard served by a real process, the latency of one image over HTTP beside the bare three forwards of a batch of one in this process: in turn,
a block of requests and a block of forwards, so that a drift of the machine falls on both and neither runs on the other's caches. The server's own forward
times tell what HTTP, decoding and queueing add apart from what the same forwards cost in a process that sleeps between requests.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image

from benchmarks import records
from models import bundle
from models.parallel import cpu_threads

BLOCK = 25
ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
RECORD = ROOT / "benchmarks" / "results" / "waiting.json"


def calibrate(data_dir: str, name: str, device: str) -> dict[str, Any]:
    """One calibration through the command line, timed from outside: `paper`, or `auto` with a budget."""
    preset = ["--preset", "paper"] if name == "paper" else ["--budget", name]
    began = time.perf_counter()
    command = [sys.executable, "-m", "service", "calibrate", "--checkpoint", str(EXAMPLES / "suspect_badnet.safetensors"), "--name", name]
    command += ["--clean-set", str(EXAMPLES / "clean_set.zip"), *preset, "--data-dir", data_dir, "--device", device, "--activate", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 1), "stage_seconds": json.loads(done.stdout)["stage_seconds"]}


def latency(data_dir: str, device: str, requests: int) -> dict[str, float]:
    """Median milliseconds of one image, over HTTP and as bare forwards."""
    with zipfile.ZipFile(EXAMPLES / "samples.zip") as archive:
        images = [archive.read(name) for name in sorted(archive.namelist()) if name.startswith("clean/")]
    guarded = bundle.read(Path(data_dir) / "guards" / "paper" / "1")
    guarded.guard.to(device)
    torch.set_num_threads(cpu_threads(guarded.guard.suspect, guarded.description.preprocessing.size))  # as the server does
    command = [sys.executable, "-m", "service", "serve", "--data-dir", data_dir, "--port", "0", "--device", device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            assert found is not None
            over_http, bare = [], []
            with httpx.Client(base_url=found[0], timeout=60, transport=httpx.HTTPTransport(retries=20)) as client:
                for block in range(requests // BLOCK + 1):
                    for turn in range(BLOCK):
                        began = time.perf_counter()
                        answer = client.post("/v1/guards/paper/predict", content=images[turn], headers={"Content-Type": "image/png"})
                        over_http.append((time.perf_counter() - began, block))
                        answer.raise_for_status()
                    for turn in range(BLOCK):
                        pixels = guarded.description.preprocessing.pixels(Image.open(io.BytesIO(images[turn])).convert("RGB"))[None].to(device)
                        began = time.perf_counter()
                        guarded.guard(pixels).cpu()
                        bare.append((time.perf_counter() - began, block))
                metrics = client.get("/metrics").text
        finally:
            server.send_signal(signal.SIGTERM)
    http, forwards = (statistics.median(seconds for seconds, block in times if block) * 1000 for times in (over_http, bare))  # the first block warms up
    total, count = (float(re.search(rf'stage_seconds_{what}{{stage="forward"}} (\S+)', metrics)[1]) for what in ("sum", "count"))  # type: ignore[index]
    return {
        "http_ms": round(http, 2),
        "server_forwards_ms": round(total / count * 1000, 2),
        "added_to_server_forwards_ms": round(http - total / count * 1000, 2),
        "bare_three_forwards_ms": round(forwards, 2),
        "added_to_bare_forwards_ms": round(http - forwards, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print, and leave the record as it is")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as data_dir, tempfile.TemporaryDirectory() as first:
        calibrate(first, "quick", args.device)  # not counted: it reads code and images from the disk for all that follow
        made = {name: calibrate(data_dir, name, args.device) for name in ("paper", "quick", "standard", "thorough")}
        record = {
            "calibrate": {name: {**each, "of_paper": round(each["seconds"] / made["paper"]["seconds"], 2)} for name, each in made.items()},
            "predict_batch_1": latency(data_dir, args.device, args.requests),
            "device": args.device,
            **records.circumstances(torch.device(args.device)),
        }
    print(json.dumps(record, indent=1))
    if not args.json:
        records.enlist(RECORD, [record], "device")


if __name__ == "__main__":
    main()
