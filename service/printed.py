"""What the command line shows of a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console


def print_result(event: dict[str, Any], data_dir: Path, active: bool, as_json: bool) -> None:
    """Of a calibration."""
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
            "canaries": report["canaries"],
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
    expected = promise["rank"] / (promise["n"] + 1)
    console.print(f"Promise          rejects {low:.2%} to {high:.2%} of clean images, with 90% probability", end="")
    console.print(f" (target {promise['target_fpr']:.2%}; guards with {promise['n']} validation images reject {expected:.2%} on average)")
    console.print(f"Clean accuracy   suspect {accuracy['suspect']:.1%}, behind the guard {accuracy['guarded']:.1%}", end="")
    console.print(f", auxiliary {accuracy['auxiliary']:.1%}, expert {', '.join(f'{value:.1%}' for value in accuracy['experts'])}")
    if report["canaries"]:
        caught = ", ".join(f"{each['kind']} {each['power']:.0%}" for each in report["canaries"] if each["power"] is not None)
        console.print(f"Canaries         caught of what was planted in a copy: {caught or 'nothing that counts'}")
    for warning in report["warnings"]:
        console.print(f"Warning          {warning['code']}: {warning['detail']}", style="yellow", markup=False)
    console.print(f"Report           {folder / 'report.html'}")
    if not active:
        console.print("Not active yet: activate it over HTTP (PUT /v1/guards/.../active), or calibrate with --activate.")


def print_inspection(found: dict[str, Any]) -> None:
    """Of a checkpoint, and of the clean set where there was one."""
    console = Console(highlight=False, soft_wrap=True)

    def line(title: str, text: str, style: str | None = None) -> None:
        console.print(f"{title:<16} {text}", markup=False, style=style)

    line("Format", ", ".join(filter(None, (found["format"], found["made_by"], found["source"]))))
    same = f"; the same network as {', '.join(found['equivalent'])}" if found["equivalent"] else ""
    line("Architecture", f"{found['architecture']} ({found['library']}{same})")
    line(
        "Classes",
        f"{found['num_classes']:,}" + (f": {', '.join(found['classes'][:10])}" + (" ..." if found["num_classes"] > 10 else "") if found["classes"] else ""),
    )
    line("Weights", f"{found['parameters']:,} parameters in {found['tensors']:,} tensors ({', '.join(found['dtypes'])})")
    if found["preprocessing"] is None:
        line("Preprocessing", "not in the checkpoint; it is found with --clean-set")
    else:
        line("Preprocessing", f"{found['preprocessing_text']} (from the {found['preprocessing_from']})")
    if found["accuracy"] is not None:
        line("Accuracy", f"{found['accuracy']:.1%} of {found['accuracy_images']:,} clean images")
        close = found["candidates"][1] if len(found["candidates"]) > 1 and not found["preprocessing_clear"] else None
        if close is not None:
            line("", f"not clearly better than {close['normalisation']} ({close['accuracy']:.1%} right, {-close['evidence']:.1f} nats behind)")
    for note in found["notes"]:
        line("Note", note)
    for warning in found["warnings"]:
        line("Warning", f"{warning['code']}: {warning['detail']}", "yellow")


def print_evaluation(guard: str, version: str, found: dict[str, Any]) -> None:
    """Of a guard, on images of one's own."""
    console = Console(highlight=False, soft_wrap=True)
    low, high = found["promised_interval"]
    fewest, most = found["rejections_expected"]
    console.print(f"Guard {guard}, version {version}: {found['clean_images']:,} clean and {found['triggered_images']:,} triggered images")
    console.print(f"Promise          rejects {low:.2%} to {high:.2%} of clean images, with 90% probability (target {found['target_fpr']:.2%})")
    console.print(f"Rejected         {found['rejected']} of the clean images; {fewest} to {most} are to be expected of so many")
    console.print(f"Clean accuracy   {found['clean_accuracy']:.1%} without the guard, {found['clean_accuracy'] - found['accuracy_lost']:.1%} with it")
    console.print(f"Caught           {found['tpr']:.1%} of the triggered images (AUROC {found['auroc']:.4f})")
    console.print(f"Attack success   {found['asr']:.1%} without the guard, {found['remaining_asr']:.1%} with it")
    for warning in found["warnings"]:
        console.print(f"Warning          {warning}", style="yellow", markup=False)
