"""The command `badexpert`. It starts the same processes as the service does, and prints what they say for people."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from calibration.config import CalibrationConfig, InspectionConfig
from models.errors import Problem
from models.registry import Registry
from service import child
from service.printed import print_evaluation, print_inspection, print_result
from service.priority import put_back
from service.settings import Settings, own_architectures
from service.unseen import hide

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="A backdoor filter in front of an image classifier.")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="print the version and exit", is_eager=True)] = False) -> None:
    if version:
        typer.echo(f"badexpert {metadata.version('badexpert')}")
        raise typer.Exit


DataDir = Annotated[Path, typer.Option(envvar="BADEXPERT_DATA_DIR", help="where guards, jobs and uploads are kept")]
Device = Annotated[str, typer.Option(envvar="BADEXPERT_DEVICE", help="auto, cpu, cuda ...")]
Architecture = Annotated[str | None, typer.Option(help="found from the checkpoint where not given; package.module:factory for one of your own")]
NumClasses = Annotated[int | None, typer.Option(help="read off the checkpoint; refused where the two disagree")]
Classes = Annotated[str | None, typer.Option(help="class names in the order of the suspect's outputs, separated by commas; one that has a comma in quotes")]
CHECKPOINT = "the suspect: safetensors, a file of torch.save, or a folder or zip as timm and transformers write it"
CLEAN_SET = "clean labelled images: a folder, zip or tar with one folder a class, Parquet, WebDataset, safetensors or npz"


def fail(message: str, status: int = 1) -> typer.Exit:
    """Print why on standard error; raise what it returns."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="red", markup=False)
    return typer.Exit(status)


@app.command()
def calibrate(
    checkpoint: Annotated[Path, typer.Option(help=CHECKPOINT)],
    clean_set: Annotated[Path, typer.Option(help=CLEAN_SET)],
    name: Annotated[str, typer.Option(help="the guard's name; a known one gets a further version")],
    validation_set: Annotated[Path | None, typer.Option(help="clean images for the threshold alone; else a part of the clean set")] = None,
    architecture: Architecture = None,
    num_classes: NumClasses = None,
    preset: Annotated[str, typer.Option(help="auto finds its own settings; paper is the published recipe")] = "auto",
    budget: Annotated[str, typer.Option(help="of auto: quick, standard or thorough; quick plants no canaries")] = "standard",
    target_fpr: Annotated[float, typer.Option(help="share of clean images that may be rejected")] = 0.01,
    seed: Annotated[int, typer.Option(help="the same seed gives the same weights and bundle id, on a GPU with most networks")] = 0,
    classes: Classes = None,
    data_dir: DataDir = Path("var"),
    device: Device = "auto",
    activate: Annotated[bool, typer.Option("--activate", help="serve the new version from the next start of the server on")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Make a guard out of a suspect checkpoint and a clean set. Stopped, and begun again, it goes on behind its last finished stage."""
    fields: dict[str, Any] = {"name": name, "architecture": architecture, "preset": preset, "budget": budget, "target_fpr": target_fpr}
    config = _config(CalibrationConfig, **fields, seed=seed, num_classes=num_classes, classes=_names(classes))
    _check_exist(checkpoint, clean_set, validation_set)
    try:
        registry = Registry(data_dir / "guards")
    except OSError as error:
        raise fail(f"The data directory {data_dir} cannot be written ({error.strerror}); choose another with --data-dir.") from None
    files = {"checkpoint": checkpoint, "clean_set": clean_set, "validation_set": validation_set}
    event = _ask("calibrate", config, as_json, **files, data_dir=data_dir, device=device, unfinished=data_dir / "unfinished" / name)
    if activate:
        try:
            registry.activate(event["guard"], event["version"])
        except Problem as problem:
            raise fail(problem.detail) from None
    print_result(event, data_dir, activate, as_json)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help=CHECKPOINT)],
    clean_set: Annotated[Path | None, typer.Option(help=f"{CLEAN_SET}; its preprocessing and accuracy are found with them")] = None,
    architecture: Architecture = None,
    num_classes: NumClasses = None,
    classes: Classes = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print everything that was found as JSON")] = False,
) -> None:
    """Say what a checkpoint is: format, architecture, classes, preprocessing, accuracy, and what is suspicious about it."""
    config = _config(InspectionConfig, architecture=architecture, num_classes=num_classes, classes=_names(classes))
    _check_exist(checkpoint, clean_set)
    event = _ask("inspect", config, as_json, checkpoint=checkpoint, clean_set=clean_set, device=device)
    found = event["inspection"]
    if as_json:
        typer.echo(json.dumps({**found, "process": event["process"]}, indent=1))
    else:
        print_inspection(found)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help=CHECKPOINT)],
    out: Annotated[Path, typer.Argument(help="the safetensors file to write")],
    force: Annotated[bool, typer.Option("--force", help="replace a file that is there")] = False,
) -> None:
    """Write the weights of a checkpoint, bit for bit, as safetensors: nothing of what else was in the file."""
    _check_exist(checkpoint)
    if out.is_dir():
        raise fail(f"{out} is a folder; name the file in it that is to be written.")
    if out.exists() and not force:
        raise fail(f"{out} exists; replace it with --force.")
    if not out.parent.is_dir():
        raise fail(f"The folder {out.parent} does not exist.")
    if not os.access(out.parent, os.W_OK):
        raise fail(f"The folder {out.parent} may not be written to.")
    event = _ask("convert", None, False, checkpoint=checkpoint, out=out)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Wrote {event['tensors']:,} tensors to {out}.", markup=False)
    for note in event["notes"]:
        console.print(note, markup=False)


@app.command()
def evaluate(
    guard: Annotated[str, typer.Argument(help="the guard's name")],
    clean_set: Annotated[Path, typer.Option(help="clean labelled images that its calibration did not see, in any form that a clean set may have")],
    triggered_set: Annotated[Path, typer.Option(help="images with your own trigger, under their true labels")],
    target_class: Annotated[str | None, typer.Option(help="the class that the trigger should give; without it any wrong class counts")] = None,
    version: Annotated[int | None, typer.Option(help="[default: the active one, or the newest]")] = None,
    architecture: Annotated[str | None, typer.Option(help="package.module:factory, for a guard of an architecture of your own")] = None,
    data_dir: DataDir = Path("var"),
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Measure a guard on your own images: how many triggered ones it stops, and how many clean ones it loses."""
    _check_exist(clean_set, triggered_set)
    folder, target_fpr = _version_of(guard, version, data_dir)
    sets: dict[str, Path] = {"clean_set": clean_set, "triggered_set": triggered_set}
    config = _config(InspectionConfig, architecture=architecture)
    asked = {"target_class": target_class, "target_fpr": None if target_fpr is None else str(target_fpr), "device": device}
    event = _ask("evaluate", config, as_json, bundle=folder, **sets, **asked)
    found = event["evaluation"]
    if as_json:
        typer.echo(json.dumps({"guard": guard, "version": int(folder.name), **found, "process": event["process"]}, indent=1))
        return
    print_evaluation(guard, folder.name, found)


def _version_of(guard: str, version: int | None, data_dir: Path) -> tuple[Path, float | None]:
    """The folder of the version that is asked for, and the target FPR that is in force where it is not the one of its calibration."""
    if not (data_dir / "guards").is_dir():
        raise fail(f"There are no guards in {data_dir}; name another folder with --data-dir.")
    try:
        registry = Registry(data_dir / "guards")
        state = registry.state(guard)
        chosen = version if version is not None else state.active or max(registry.versions(guard))
        return registry.folder(guard, chosen), state.target_fpr if chosen == state.active else None
    except Problem as problem:
        known = ", ".join(registry.guards()) or "none"
        raise fail(f"{problem.detail} The guards in {data_dir} are: {known}; name another folder with --data-dir.") from None
    except OSError as error:
        raise fail(f"The data directory {data_dir} cannot be used ({error.strerror}).") from None


C = TypeVar("C", bound=InspectionConfig)


def _config(kind: type[C], **fields: Any) -> C:
    """The configuration, or the end of the command with a message on the wrong options."""
    try:
        if ":" in (fields["architecture"] or ""):
            from models import architectures  # imports torch

            architectures.admit(fields["architecture"])
        return kind(**fields)
    except ValidationError as error:
        raise fail("\n".join(f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors())) from None
    except Problem as problem:
        raise fail(f"--architecture: {problem.detail}") from None


def _names(classes: str | None) -> list[str] | None:
    return [name.strip() for name in next(csv.reader([classes], skipinitialspace=True))] if classes else None


def _check_exist(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.exists():
            raise fail(f"{path} does not exist.")


def _ask(action: str, config: InspectionConfig | None, as_json: bool, **options: Path | str | None) -> dict[str, Any]:
    """Run an action of `python -m calibration`; returns its result, or ends the command with its problem."""
    architecture = (config and config.architecture) or ""
    own = list(dict.fromkeys([*([architecture] if ":" in architecture else []), *own_architectures(os.environ.get("BADEXPERT_ARCHITECTURES", ""))]))
    command = child.command(action, None if config is None else config.model_dump_json(), own, **options)
    try:
        event = _run(command, quiet=as_json)
    except KeyboardInterrupt:
        raise fail("Stopped." + (" The same command goes on behind the last finished stage." if action == "calibrate" else ""), 130) from None
    if event["event"] == "problem":
        if as_json:
            typer.echo(json.dumps(event, indent=1))
        raise fail(f"{event['title']} ({event['code']}): {event['detail']}")
    return event


def _run(command: list[str], quiet: bool) -> dict[str, Any]:
    """Run a calibration process with a progress bar on standard error; returns its last event."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TextColumn("{task.fields[eta]}"))
    hide()
    last: dict[str, Any] | None = None
    with (
        Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child.environment()) as process,
    ):
        put_back(process.pid, leads=False)
        task = bar.add_task("starting", total=1.0, eta="")
        assert process.stdout is not None  # asked for above
        try:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "progress":
                    eta = "" if event["eta_seconds"] is None else f"about {event['eta_seconds']:.0f} s left"
                    bar.update(task, description=event["stage"], completed=event["fraction"], eta=eta)
                else:
                    last = event
        except KeyboardInterrupt:
            process.terminate()  # a terminal tells it, too, but who stops this process alone does not
            process.wait()
            raise
    if last is None:
        problem = child.without_a_word(process.returncode, "what it said last stands above")
        last = {"event": "problem", "code": problem.code, "title": problem.title, "detail": problem.detail}
    return last


@app.command()
def serve(
    data_dir: Annotated[Path | None, typer.Option(help="where guards, jobs and uploads are kept [default: var]")] = None,
    host: Annotated[str | None, typer.Option(help="any but loopback needs tokens [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one [default: 8080]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda ... [default: auto]")] = None,
) -> None:
    """Serve all active guards over HTTP. Further settings are environment variables: see docs/reference/settings.md."""
    from service.server import CannotStart  # imports torch and the whole service: not for `--help`
    from service.server import serve as run

    options: dict[str, Any] = {"data_dir": data_dir, "host": host, "port": port, "device": device}
    try:
        settings = Settings(**{key: value for key, value in options.items() if value is not None})
    except ValidationError as error:
        given = {key for key, value in options.items() if value is not None}
        raise fail("Cannot start: " + "; ".join(_wrong_setting(item, given) for item in error.errors()), 78) from None
    hide()
    try:
        run(settings)
    except CannotStart as reason:
        raise fail(f"Cannot start: {reason}") from None


def _wrong_setting(error: Mapping[str, Any], given: Collection[str]) -> str:
    """What is wrong, and with what: an option, where one was given, or a variable."""
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    field = str(error["loc"][0])
    name = f"--{field.replace('_', '-')}" if field in given else f"BADEXPERT_{field.upper()}"
    return f"{name}: {error['msg']}"


@app.command()
def demo(
    examples: Annotated[Path, typer.Option(help="the folder with the example suspects and images")] = Path("examples"),
    data_dir: Annotated[Path | None, typer.Option(help="where the demo's guards are kept; else a temporary folder that stays")] = None,
    device: Device = "auto",
) -> None:
    """Guard two really backdoored classifiers over HTTP, and show what passes and what does not."""
    from service.demo import BrokenPromise
    from service.demo import run as run_demo

    try:
        run_demo(examples, data_dir, device)
    except BrokenPromise as reason:
        raise fail(f"The demo failed: {reason}") from None


def main() -> None:
    """The console script."""
    app()
