"""`python -m calibration`: one calibration as a process of its own, as the service and the command line start it.

Standard output carries one JSON object a line: {"event": "progress", ...} while it runs, and last either {"event": "result", ...} or
{"event": "problem", "status", "code", "title", "detail"}. Exit status 0 for a result, 1 for a problem with the input, 70 for our own fault.
Untrusted files are read here and not in the server: whatever a hostile one does to memory or time, it does to this process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch is imported: deterministic cuBLAS needs its workspace fixed.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from calibration.config import CalibrationConfig
from calibration.pipeline import Inputs, calibrate, check
from models.errors import OutOfMemory, Problem
from models.registry import Registry


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m calibration", description="Run one calibration and print its events as JSON lines.")
    parser.add_argument("--config", required=True, help="a CalibrationConfig as JSON")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--clean-set", type=Path, required=True)
    parser.add_argument("--validation-set", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--job", help="kept in the bundle's record")
    parser.add_argument("--check-only", action="store_true", help="read the files as a calibration would, and stop")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the uploaded images
    if sys.platform == "linux":
        _die_with_parent()
    try:
        config = CalibrationConfig.model_validate_json(args.config)
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
        if device.type == "cuda":  # on a CPU all that is used here is deterministic, and saying so imports for seconds
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        inputs = Inputs(args.checkpoint, args.clean_set, args.validation_set)
        if args.check_only:
            check(config, inputs)
            return 0
        registry = Registry(args.data_dir / "guards")
        result = calibrate(config, inputs, registry, device, lambda progress: _say("progress", asdict(progress)), {"job": args.job})
    except Problem as problem:
        _say_problem(problem)
        return 1
    except (MemoryError, torch.OutOfMemoryError):
        _say_problem(OutOfMemory())
        return 1
    except Exception:  # noqa: BLE001 - the last line must be an event whatever happened; the trace goes to the log
        traceback.print_exc()
        _say_problem(Problem())
        return 70
    _say("result", asdict(result))
    return 0


def _say(event: str, value: dict[str, Any]) -> None:
    print(json.dumps({"event": event, **value}), flush=True)  # noqa: T201


def _say_problem(problem: Problem) -> None:
    _say("problem", {"status": problem.status, "code": problem.code, "title": problem.title, "detail": problem.detail})


def _die_with_parent() -> None:
    """Ask the kernel to end this process when the one that started it ends: a calibration that nobody waits for must not hold a GPU."""
    import ctypes
    import signal

    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main())
