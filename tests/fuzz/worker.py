"""One libFuzzer process: `python -m tests.fuzz.worker READER FINDINGS [libFuzzer's options] CORPUS`. Started by `python -m tests.fuzz`.

`python -m tests.fuzz.worker READER FILE` reads one file, and shows what it raises.

Exceptions and slow runs are written to FINDINGS, one for each place in our code, and the fuzzing goes on; what libFuzzer itself notices (a
crash, a run that hangs, too much memory) ends the process. It runs in the sandbox of the calibration, so that a reader that opened a socket or
started a program would be found, too.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import atheris

from calibration import sandbox

SLOW_SECONDS = 5.0  # of processor time: the machine may be shared
ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    name, findings = sys.argv[1], Path(sys.argv[2])
    sandbox.enter()
    import numpy  # noqa: F401  # what is imported before the hook is set is not instrumented
    import PIL.Image  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["models", "calibration"]):
        from tests.fuzz.readers import READERS
    reader = READERS[name]
    if findings.is_file():
        reader.run(findings.read_bytes())
        return

    def run(data: bytes) -> None:
        start = time.process_time()
        try:
            reader.run(data)
        except reader.refusal:
            pass
        except BaseException as error:
            record(findings, data, f"{type(error).__name__} at {_place(error)}", traceback.format_exc())
        if (spent := time.process_time() - start) > SLOW_SECONDS:
            record(findings, data, "slow", f"{spent:.1f} s of processor time\n")

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if reader.shake and chance.random() < 0.7:
            with suppress(ValueError, RecursionError, MemoryError):
                return reader.shake(data, chance)[:most]
        mutated = bytes(atheris.Mutate(reader.unpack(data), most))
        return (mutated if chance.random() < 0.1 else reader.mend(mutated))[:most]

    corpus = Path(sys.argv[-1])
    for seed in reader.seeds():
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    own = {"custom_mutator": mutate} if reader.shake or reader.mend is not bytes else {}
    atheris.Setup([sys.argv[0], *sys.argv[3:]], run, **own)
    atheris.Fuzz()


def record(findings: Path, data: bytes, what: str, detail: str) -> None:
    """The input and the story of a finding, once for each `what`."""
    path = findings / hashlib.sha256(what.encode()).hexdigest()[:12]
    if not path.with_suffix(".txt").exists():
        path.with_suffix(".bin").write_bytes(data)
        path.with_suffix(".txt").write_text(f"{what}\n\n{detail}")


def _place(error: BaseException) -> str:
    """The innermost line of our own code."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT) and ".venv" not in frame.filename]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}"


if __name__ == "__main__":
    main()
