"""Whether activations leave memory flat: `python -m benchmarks.serving.activations`.

A server of our own with the example suspect's guard. Each activation loads, verifies and compiles the bundle anew and drops the one before; an image is
judged after each. What the process holds (its resident set) is read from /proc, so this needs Linux. The first activations are left out: the allocators
settle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import records
from benchmarks.serving.http import ROOT, Contender, calibrated, call, running

RECORD = ROOT / "benchmarks" / "results" / "activations.json"
SETTLED = 0.25  # of the activations, after which memory should not grow


def resident_mib(pid: int) -> float:
    """What a process holds in memory now."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def measure(activations: int, every: int) -> list[float]:
    """Resident MiB before the first activation and after each `every` of them."""
    contender = Contender("badexpert", "guard", 1)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(ROOT / "examples" / "samples.zip") as samples:
        image = samples.read(next(name for name in samples.namelist() if name.startswith("clean/")))
        calibrated(Path(folder))
        path, headers, body = call(contender, image)
        with running(contender, image, Path(folder), Path()) as (port, pid), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            seen = [resident_mib(pid)]
            for number in range(1, activations + 1):
                client.put("/v1/guards/demo/active", json={"version": 1}).raise_for_status()
                client.post(path, headers=headers, content=body).raise_for_status()
                if number % every == 0:
                    seen.append(resident_mib(pid))
    return seen


def growth(resident: list[float], every: int) -> float:
    """KiB an activation, once settled: the slope of Theil and Sen, which a single jump does not move."""
    late = list(enumerate(resident))[round(SETTLED * len(resident)) :]
    return 1024 * statistics.median((b - a) / (j - i) for i, a in late for j, b in late if i < j) / every


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.activations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="how many activations between two looks at the memory")
    parser.add_argument("--json", action="store_true", help="the whole record")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/activations.json, in place of an earlier one on the same hardware")
    args = parser.parse_args()
    if not 0 < args.every <= args.activations // 4:
        parser.error("--every: from 1 to a quarter of the activations")
    resident = measure(args.activations, args.every)
    record: dict[str, Any] = {
        "activations": args.activations,
        "every": args.every,
        "resident_mib": [round(each, 1) for each in resident],
        "growth_kib": round(growth(resident, args.every), 1),
        **records.circumstances(torch.device("cpu")),
    }
    told = f"{resident[0]:.0f} MiB at first, {resident[-1]:.0f} at last, {record['growth_kib']} KiB an activation"
    print(json.dumps(record, indent=1) if args.json else told)
    if args.record:
        records.enlist(RECORD, [record], "hardware")


if __name__ == "__main__":
    main()
