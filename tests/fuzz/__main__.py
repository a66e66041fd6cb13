"""`python -m tests.fuzz READER --seconds 600`: coverage-guided fuzzing of one reader, or of `all`; one JSON line each comes out.

libFuzzer ends its process for good at a crash, a hang or too much memory; another is started then, until the time is over.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

READERS = (
    *("safetensors", "torch-zip", "pickle", "pickle-in-zip", "package", "sidecar", "image"),
    *("set-zip", "set-tar", "set-tar-gz", "set-webdataset", "set-parquet", "set-safetensors", "set-npz", "set-csv", "set-jsonl"),
)
MOST_BYTES = 16 * 1024  # of an input
RSS_MIB = 2048
HANG_SECONDS = 60  # on the wall; slow runs are told by their processor time, in the worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("reader", choices=("all", *READERS))
    parser.add_argument("--seconds", type=float, default=600.0, help="of processor time, a reader: the machine may be shared")
    parser.add_argument("--corpus", type=Path, default=Path("var/fuzz"), help="corpora, findings and logs, a folder a reader; kept")
    args = parser.parse_args()
    found = 0
    for reader in READERS if args.reader == "all" else (args.reader,):
        result = fuzz(reader, args.seconds, args.corpus / reader)
        print(json.dumps(result), flush=True)
        found += len(result["findings"])
    return min(found, 1)


def fuzz(reader: str, seconds: float, folder: Path) -> dict[str, Any]:
    corpus, findings = folder / "corpus", folder / "findings"
    for path in (corpus, findings):
        path.mkdir(parents=True, exist_ok=True)
    start, begun, executions, coverage, processes = time.monotonic(), _processor_seconds(), 0, 0, 0
    while (left := seconds - (_processor_seconds() - begun)) > 0:
        options = [f"-max_total_time={max(1, round(left))}", f"-max_len={MOST_BYTES}", f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={RSS_MIB}"]
        options += [f"-artifact_prefix={findings}/", "-print_final_stats=1"]
        command = [sys.executable, "-m", "tests.fuzz.worker", reader, str(findings), *options, str(corpus)]
        worker = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", env={**os.environ, "OMP_NUM_THREADS": "1"})
        (folder / f"log-{processes}").write_text(worker.stdout + worker.stderr)
        ran = [int(number) for number in re.findall(r"^(?:#|stat::number_of_executed_units: )(\d+)", worker.stderr, re.MULTILINE)]
        if not ran or (worker.returncode and "Test unit written to" not in worker.stderr):
            raise SystemExit(f"{reader} could not be fuzzed:\n{worker.stderr[-2000:]}")
        executions, processes = executions + max(ran), processes + 1
        coverage = max([coverage, *map(int, re.findall(r" cov: (\d+)", worker.stderr))])
    return {
        **{"reader": reader, "date": datetime.now(UTC).date().isoformat(), "seconds": round(time.monotonic() - start)},
        **{"processor_seconds": round(_processor_seconds() - begun), "executions": executions},
        **{"coverage": coverage, "corpus": len(list(corpus.iterdir())), "processes": processes},
        "findings": sorted(path.name for path in findings.iterdir() if path.suffix != ".txt"),
    }


def _processor_seconds() -> float:
    """What the ended child processes have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
