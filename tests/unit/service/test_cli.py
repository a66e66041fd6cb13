"""What the command line says of itself, of wrong options, and where somebody stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from service import cli
from tests.support import make_registry, publish

EXAMPLES = Path(__file__).parent.parent.parent.parent / "examples"
SUSPECT, CLEAN_SET = str(EXAMPLES / "suspect_badnet.safetensors"), str(EXAMPLES / "clean_set.zip")
CALIBRATE = ["calibrate", "--checkpoint", SUSPECT, "--clean-set", CLEAN_SET, "--name", "demo"]


def test_it_tells_its_version() -> None:
    done = CliRunner().invoke(cli.app, ["--version"])
    assert (done.exit_code, done.stdout.split()[0]) == (0, "badexpert")
    assert done.stdout.split()[1][0].isdigit()


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["convert", SUSPECT, str(tmp_path), "--force"])
    assert done.exit_code == 1
    assert "is a folder; name the file" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(("arguments", "said"), [(CALIBRATE, "goes on behind the last finished stage"), (["inspect", SUSPECT], "Stopped.")])
def test_who_stops_it_is_told_what_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str) -> None:
    def stopped(command: list[str], quiet: bool) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stopped)
    done = CliRunner().invoke(cli.app, [*arguments, *(["--data-dir", str(tmp_path)] if arguments is CALIBRATE else [])])
    assert done.exit_code == 130
    assert said in done.stderr
    assert "Traceback" not in done.output


def test_the_process_that_it_started_ends_without_a_trace(tmp_path: Path) -> None:
    options = [f"--checkpoint={SUSPECT}", f"--clean-set={CLEAN_SET}", '--config={"name": "demo", "budget": "quick"}', f"--data-dir={tmp_path}", "--device=cpu"]
    command = [sys.executable, "-m", "calibration", "calibrate", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        while '"stage": "expert"' not in child.stdout.readline():
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert (child.wait(60), child.stderr.read()) == (130, "")


def test_a_wrong_setting_is_named_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BADEXPERT_THREADS", "none")
    done = CliRunner().invoke(cli.app, ["serve", "--port", "70000"])
    assert done.exit_code == 78
    assert "--port: Input should be less" in done.stderr
    assert "BADEXPERT_THREADS: Input should be a valid integer" in done.stderr


def test_what_is_calibrated_goes_where_the_server_looks_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = []

    def stopped(command: list[str], quiet: bool) -> Any:
        found.extend(word for word in command if str(tmp_path) in word)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stopped)
    monkeypatch.setenv("BADEXPERT_DATA_DIR", str(tmp_path / "guards-and-jobs"))
    CliRunner().invoke(cli.app, CALIBRATE)
    assert f"--data-dir={tmp_path / 'guards-and-jobs'}" in found


def test_what_reads_hostile_files_has_no_token_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BADEXPERT_ADMIN_TOKEN", "badexpert_predict_token", "Badexpert_Metrics_Token_File"):
        monkeypatch.setenv(name, "some-secret")
    monkeypatch.setenv("BADEXPERT_DEVICE", "cpu")
    tell = "import json, os; print(json.dumps({'event': 'result', 'names': [name for name in os.environ if name.upper().startswith('BADEXPERT_')]}))"
    assert cli._run([sys.executable, "-c", tell], quiet=True)["names"] == ["BADEXPERT_DEVICE"]


def test_class_names_with_commas_are_given_in_quotes_as_the_suggestion_has_them() -> None:
    assert cli._names('cat, "zebra, plane" ,dog') == ["cat", "zebra, plane", "dog"]


def test_own_architectures_of_the_environment_are_known_to_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def stopped(command: list[str], quiet: bool) -> Any:
        started.extend(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stopped)
    monkeypatch.setenv("BADEXPERT_ARCHITECTURES", "mine:build, other:make")
    CliRunner().invoke(cli.app, ["inspect", SUSPECT])
    assert {"--admit=mine:build", "--admit=other:make"} <= set(started)


FORGETFUL = """
import os, signal, time
from calibration.__main__ import end_when_interrupted

class Finalizer:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

end_when_interrupted()
Finalizer()
time.sleep(60)
"""


CHATTY = """
from torch import nn

class Network(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images):
        print("5")
        return self.head(images.mean((2, 3)))
"""


def test_whatever_else_it_prints_is_no_event(tmp_path: Path) -> None:
    (tmp_path / "chatty.py").write_text(CHATTY)
    save_file({"head.weight": torch.eye(4, 3), "head.bias": torch.ones(4)}, tmp_path / "suspect.safetensors")
    options = ["--admit=chatty:Network", '--config={"architecture": "chatty:Network"}', f"--checkpoint={tmp_path / 'suspect.safetensors'}"]
    command = [sys.executable, "-m", "calibration", "inspect", *options]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent.parent.parent)])
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": path})
    (event,) = map(json.loads, done.stdout.splitlines())
    assert (event["event"], event["inspection"]["num_classes"]) == ("result", 4)
    assert set(done.stderr.splitlines()) == {"5"}


def test_an_interrupt_that_a_finalizer_swallows_ends_it_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", FORGETFUL], capture_output=True, text=True, timeout=50)
    assert "Exception ignored" in done.stderr  # it was swallowed
    assert done.returncode == 130


def test_blanks_around_class_names_are_nobodys() -> None:
    assert cli._names("cat, dog ,night owl") == ["cat", "dog", "night owl"]
    assert cli._names(None) is None


def test_a_changed_target_is_that_of_the_active_version(tmp_path: Path) -> None:
    registry = make_registry(tmp_path)
    publish(registry)
    registry.configure("cifar", target_fpr=0.1)
    home = registry.folder("cifar", 1).parent
    assert cli._version_of("cifar", None, tmp_path) == (home / "1", 0.1)
    assert cli._version_of("cifar", 2, tmp_path) == (home / "2", None)
