"""`python -m calibration ACTION`: one action as a process of its own, as the service and the command line start it.

Standard output carries one JSON object a line: {"event": "progress", ...} while it runs, and last either {"event": "result", ...} or
{"event": "problem", "status", "code", "title", "detail"}, both with "process": what held this process and the most memory it took, in bytes.
Exit status 0 for a result, 1 for a problem with the input, 70 for our own fault, 130 where it was interrupted.
Untrusted files are read here and not in the server: whatever a hostile one does to memory or time, it does to this process, which is confined first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from calibration import sandbox

_events: TextIO | None = None  # where they are said, if not on standard output
LAST_SECONDS = 3.0  # for an interrupted process to end by itself
Action = Callable[[argparse.Namespace, Callable[[], AbstractContextManager[None]]], dict[str, Any]]


def main(arguments: list[str] | None = None, confine: bool = True) -> int:
    """Run one action; `confine` is False only where a test runs it in its own process."""
    args = _parser().parse_args(arguments)
    confinement = asdict(sandbox.enter()) if confine else {}
    # Before torch is imported, since its libraries read these once. Deterministic cuBLAS needs its workspace fixed. And threads that wait for one another
    # sleep early instead of spinning: beside a busy process a step of training takes two thirds of the time, alone a little more (decision 13).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import torch  # only now: threads that a library starts would not be confined

    from models.errors import OutOfMemory, Problem, TookTooLong
    from models.parallel import usual_threads

    torch.set_num_threads(usual_threads())

    reading = partial(_reading, args) if confine else nullcontext
    result: dict[str, Any] | Problem
    try:
        result, status = _ACTIONS[args.action](args, reading), 0
    except Problem as problem:
        result, status = problem, 1
    except (MemoryError, torch.OutOfMemoryError):
        result, status = OutOfMemory(), 1
    except sandbox.TookTooLong:
        result, status = TookTooLong(), 1
    except Exception:  # noqa: BLE001 - the last line must be an event whatever happened; the trace goes to the log
        traceback.print_exc()
        result, status = Problem(), 70
    process = {**confinement, "peak_memory": sandbox.peak_memory()}
    if isinstance(result, Problem):
        _say("problem", {"status": result.status, "code": result.code, "title": result.title, "detail": result.detail, "process": process})
    else:
        _say("result", {**result, "process": process})
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m calibration", description="Run one action and print its events as JSON lines.")
    parser.add_argument("action", choices=list(_ACTIONS))
    parser.add_argument("--config", default="{}", help="a CalibrationConfig or an InspectionConfig as JSON")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--clean-set", type=Path)
    parser.add_argument("--validation-set", type=Path)
    parser.add_argument("--bundle", type=Path, help="the folder of the version that is evaluated")
    parser.add_argument("--triggered-set", type=Path)
    parser.add_argument("--target-class")
    parser.add_argument("--target-fpr", type=float)
    parser.add_argument("--out", type=Path, help="where a conversion is written")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--unfinished", type=Path, help="a folder for what finished stages made, to go on from if the calibration is stopped")
    parser.add_argument("--job", help="kept in the bundle's record")
    parser.add_argument("--admit", action="append", default=[], metavar="PACKAGE.MODULE:FACTORY", help="an architecture of the operator's")
    return parser


def _calibrate(args: argparse.Namespace, reading: Callable[[], AbstractContextManager[None]]) -> dict[str, Any]:
    from calibration.config import CalibrationConfig
    from calibration.material import Inputs
    from calibration.pipeline import calibrate
    from models.registry import Registry

    _admit(args)
    os.environ.setdefault("MPLCONFIGDIR", str(args.data_dir / "matplotlib"))  # what it keeps of fonts, else in the home directory
    config = CalibrationConfig.model_validate_json(args.config)
    inputs = Inputs(args.checkpoint, args.clean_set, args.validation_set)
    registry = Registry(args.data_dir / "guards")
    emit = lambda progress: _say("progress", asdict(progress))  # noqa: E731
    return asdict(calibrate(config, inputs, registry, _device(args), emit, {"job": args.job}, reading, args.unfinished))


def _check(args: argparse.Namespace, reading: Callable[[], AbstractContextManager[None]]) -> dict[str, Any]:
    import torch

    from calibration.config import CalibrationConfig
    from calibration.material import Inputs, read

    _admit(args)
    with reading():
        read(CalibrationConfig.model_validate_json(args.config), Inputs(args.checkpoint, args.clean_set, args.validation_set), torch.device("cpu"))
    return {}


def _inspect(args: argparse.Namespace, reading: Callable[[], AbstractContextManager[None]]) -> dict[str, Any]:
    from calibration.config import InspectionConfig
    from calibration.inspection import inspect

    _admit(args)
    with reading():
        return {"inspection": inspect(InspectionConfig.model_validate_json(args.config), args.checkpoint, args.clean_set, _device(args))}


def _convert(args: argparse.Namespace, reading: Callable[[], AbstractContextManager[None]]) -> dict[str, Any]:
    from calibration.inspection import convert

    with reading():
        return convert(args.checkpoint, args.out)


def _evaluate(args: argparse.Namespace, reading: Callable[[], AbstractContextManager[None]]) -> dict[str, Any]:
    from calibration.evaluation import evaluate_guard

    _admit(args)
    sets = args.clean_set, args.triggered_set
    return {"evaluation": evaluate_guard(args.bundle, *sets, args.target_class, args.target_fpr, _device(args), reading)}


_ACTIONS: dict[str, Action] = {"calibrate": _calibrate, "check": _check, "inspect": _inspect, "convert": _convert, "evaluate": _evaluate}


def _admit(args: argparse.Namespace) -> None:
    from models import architectures

    for reference in args.admit:
        architectures.admit(reference)


def _device(args: argparse.Namespace) -> Any:
    import torch

    from models.device import find_device

    device = find_device(args.device)
    if device.type == "cuda":  # on a CPU all that is used here is deterministic, and saying so imports for seconds
        torch.use_deterministic_algorithms(True, warn_only=True)  # as far as it can be: the gradient of VGG's adaptive pooling cannot
        torch.backends.cudnn.benchmark = False
    return device


def _reading(args: argparse.Namespace) -> AbstractContextManager[None]:
    files = [path for path in (args.checkpoint, args.clean_set, args.validation_set, args.triggered_set) if path is not None]
    limits = sandbox.Limits()
    return sandbox.reading(None if _device(args).type == "cuda" else limits.memory_for(*files), limits.cpu_seconds)


def _say(event: str, value: dict[str, Any]) -> None:
    print(json.dumps({"event": event, **value}), file=_events, flush=True)


def end_when_interrupted() -> None:
    """From now on SIGINT ends this process with status 130, after LAST_SECONDS at the latest.

    It is raised as KeyboardInterrupt, as usual; but where Python happens to run a finalizer, that is printed and forgotten.
    """

    def end(*_: object) -> None:
        last = threading.Timer(LAST_SECONDS, os._exit, [130])
        last.daemon = True
        last.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, end)


def keep_events_apart() -> None:
    """From now on standard output has the events alone: what else this process prints, such as a network of the operator's own, goes to standard error."""
    global _events
    _events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


if __name__ == "__main__":
    end_when_interrupted()
    keep_events_apart()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # whoever asked for it knows
