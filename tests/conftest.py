"""Real inputs that several tests share: a part of the example clean set, and one guard calibrated from it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from calibration.config import CalibrationConfig
from calibration.material import Inputs
from calibration.pipeline import Result, calibrate
from calibration.progress import Progress
from models.guard import Guard
from models.program import serving
from models.registry import Registry
from service import engine

# The same examples every time, however slow or busy the machine is.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fixed")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="session", autouse=True)
def _each_program_is_made_once() -> Iterator[None]:
    """A guard that an engine of this process has served is served by the same program again: to make and to choose one takes seconds, in hundreds of tests.

    A test that changes its weights takes a guard of its own.
    """
    made: dict[tuple[str, ...], nn.Module] = {}

    def serving_once(guard: Guard, images: Tensor, threads: int, most: int, faithful: Callable[[nn.Module], bool]) -> nn.Module:
        weights = hashlib.sha256()
        for value in guard.state_dict().values():
            weights.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        key = (weights.hexdigest(), repr(guard), repr((guard.cuts, guard.scales, guard.c, guard.preprocessing)), str(threads))
        if key not in made:
            made[key] = serving(guard, images, threads, most, faithful)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "serving", serving_once)
        yield


@pytest.fixture(scope="session")
def small_clean_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 of the 2,000 example images: quick, and enough to promise 5% with some room."""
    path = tmp_path_factory.mktemp("clean") / "clean_set.zip"
    with zipfile.ZipFile(EXAMPLES / "clean_set.zip") as whole, zipfile.ZipFile(path, "w") as part:
        for name in sorted(whole.namelist())[::5]:
            part.writestr(name, whole.read(name))
    return path


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory, small_clean_set: Path) -> tuple[Path, Result]:
    """A data directory with version 1 of the guard `planes`, made by the `auto` preset; not active. All workers of a run share it: leave it as it is."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    data_dir, made, unfinished = shared / "calibrated", shared / "calibrated.pickle", shared / "unfinished"

    def keep(progress: Progress) -> None:
        if progress.stage == "threshold":
            shutil.copytree(unfinished, shared / "stopped", dirs_exist_ok=True)

    with open(shared / "calibrated.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes first makes it, whoever else needs it waits
        if not made.exists():
            inputs = Inputs(EXAMPLES / "suspect_badnet.safetensors", small_clean_set)
            result = calibrate(
                CalibrationConfig(name="planes", target_fpr=0.05), inputs, Registry(data_dir / "guards"), torch.device("cpu"), keep, unfinished=unfinished
            )
            made.write_bytes(pickle.dumps(result))
    found: Result = pickle.loads(made.read_bytes())
    return data_dir, found


@pytest.fixture
def unfinished(calibrated: tuple[Path, Result], tmp_path: Path) -> Path:
    """What the calibration of `calibrated` had kept once its networks were trained, in a folder of the test's own."""
    return Path(shutil.copytree(calibrated[0].parent / "stopped", tmp_path / "unfinished"))
