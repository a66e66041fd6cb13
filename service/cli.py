"""The command `badexpert`: calibrate, serve, demo. It starts the same processes as the service does, and prints what they say for people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from calibration.config import CalibrationConfig
from models.errors import Problem
from models.registry import Registry
from service.settings import Settings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="A backdoor filter in front of an image classifier.")
DataDir = Annotated[Path, typer.Option(help="where guards, jobs and uploads are kept")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda ...")]


def fail(message: str, status: int = 1) -> typer.Exit:
    """Print why on standard error; raise what it returns."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="red", markup=False)
    return typer.Exit(status)


@app.command()
def calibrate(
    checkpoint: Annotated[Path, typer.Option(help="the suspect: safetensors, or a torch zip archive of tensors")],
    clean_set: Annotated[Path, typer.Option(help="clean labelled images: a zip or folder with one folder a class")],
    name: Annotated[str, typer.Option(help="the guard's name; a known one gets a further version")],
    validation_set: Annotated[Path | None, typer.Option(help="clean images for the threshold alone; else a part of the clean set")] = None,
    architecture: Annotated[str | None, typer.Option(help="found from the checkpoint where not given")] = None,
    preset: Annotated[str, typer.Option(help="auto finds its own settings; paper is the published recipe")] = "auto",
    target_fpr: Annotated[float, typer.Option(help="share of clean images that may be rejected")] = 0.01,
    seed: Annotated[int, typer.Option(help="the same seed gives the same bundle, byte for byte")] = 0,
    classes: Annotated[str | None, typer.Option(help="comma-separated class names in the order of the suspect's outputs")] = None,
    data_dir: DataDir = Path("var"),
    device: Device = "auto",
    activate: Annotated[bool, typer.Option("--activate", help="serve the new version from the next start of the server on")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Make a guard out of a suspect checkpoint and a clean set."""
    fields: dict[str, Any] = {"name": name, "architecture": architecture, "preset": preset, "target_fpr": target_fpr, "seed": seed}
    try:
        config = CalibrationConfig(**fields, classes=classes.split(",") if classes else None)
    except ValidationError as error:
        raise fail("\n".join(f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg']}" for item in error.errors())) from None
    for label, path in (("checkpoint", checkpoint), ("clean set", clean_set), ("validation set", validation_set)):
        if path is not None and not path.exists():
            raise fail(f"The {label} {path} does not exist.")
    try:
        registry = Registry(data_dir / "guards")
    except OSError as error:
        raise fail(f"The data directory {data_dir} cannot be written ({error.strerror}); choose another with --data-dir.") from None
    command = [sys.executable, "-m", "calibration", "--config", config.model_dump_json(), "--checkpoint", str(checkpoint)]
    command += ["--clean-set", str(clean_set), "--data-dir", str(data_dir), "--device", device]
    if validation_set is not None:
        command += ["--validation-set", str(validation_set)]
    event = _run(command, quiet=as_json)
    if event["event"] == "problem":
        if as_json:
            typer.echo(json.dumps(event, indent=1))
        raise fail(f"{event['title']} ({event['code']}): {event['detail']}")
    if activate:
        try:
            registry.activate(event["guard"], event["version"])
        except Problem as problem:
            raise fail(problem.detail) from None
    _print_result(event, data_dir, activate, as_json)


def _run(command: list[str], quiet: bool) -> dict[str, Any]:
    """Run a calibration process with a progress bar on standard error; returns its last event."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TextColumn("{task.fields[eta]}"))
    last: dict[str, Any] = {"event": "problem", "code": "internal", "title": "Internal error", "detail": "The calibration process ended unexpectedly."}
    with (
        Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child,
    ):
        task = bar.add_task("starting", total=1.0, eta="")
        assert child.stdout is not None  # asked for above
        for line in child.stdout:
            event = json.loads(line)
            if event["event"] == "progress":
                eta = "" if event["eta_seconds"] is None else f"about {event['eta_seconds']:.0f} s left"
                bar.update(task, description=event["stage"], completed=event["fraction"], eta=eta)
            else:
                last = event
    return last


def _print_result(event: dict[str, Any], data_dir: Path, active: bool, as_json: bool) -> None:
    report = event["report"]
    promise = report["promise"]
    folder = data_dir / "guards" / event["guard"] / str(event["version"])
    if as_json:
        result = {
            "guard": event["guard"],
            "version": event["version"],
            "bundle_id": event["bundle_id"],
            "preset": report["preset"],
            "architecture": report["architecture"],
            "target_fpr": promise["target_fpr"],
            "fpr_interval": promise["interval"],
            "validation_images": promise["n"],
            "threshold": promise["value"],
            "clean_accuracy": report["clean_accuracy"],
            "stage_seconds": report["stage_seconds"],
            "warnings": report["warnings"],
            "active": active,
            "bundle": str(folder),
        }
        typer.echo(json.dumps(result, indent=1))
        return
    accuracy, (low, high) = report["clean_accuracy"], promise["interval"]
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Guard {event['guard']}, version {event['version']} ({report['architecture']}, preset {report['preset']})")
    console.print(f"Promise          rejects {promise['target_fpr']:.2%} of clean images; 90% interval {low:.2%} to {high:.2%}")
    console.print(f"Clean accuracy   suspect {accuracy['suspect']:.1%}, auxiliary {accuracy['auxiliary']:.1%}", end="")
    console.print(f", expert {', '.join(f'{value:.1%}' for value in accuracy['experts'])}")
    for warning in report["warnings"]:
        console.print(f"Warning          {warning['code']}: {warning['detail']}", style="yellow", markup=False)
    console.print(f"Report           {folder / 'report.html'}")
    if not active:
        console.print("Not active yet: activate it over HTTP (PUT /v1/guards/.../active), or calibrate with --activate.")


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
        lines = [".".join(map(str, item["loc"])) + ": " + item["msg"] if item["loc"] else item["msg"].removeprefix("Value error, ") for item in error.errors()]
        raise fail("Cannot start: " + "; ".join(lines), 78) from None
    try:
        run(settings)
    except CannotStart as reason:
        raise fail(f"Cannot start: {reason}") from None


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
