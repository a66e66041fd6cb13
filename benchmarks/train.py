"""Train a suspect: `python -m benchmarks.train --attack badnet` puts it into the zoo.

SGD with Nesterov momentum (or AdamW) under a one-cycle schedule, shifts and mirrored images, bf16 autocast where the device is fast at it. Beside the
weights, in half precision, lie what the attack learned (NAME.trigger.safetensors) and a record (NAME.json): clean accuracy and ASR of the very weights that
are kept, and whether they pass the gate: an ASR of 80% and at most 2 points of clean accuracy lost against the clean network of the zoo, which is of the same
recipe but for attacks that start from it; so does any other with `--warm`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.attacks import ATTACKS, Attack, Recipe, Surrogate, Task, stamp
from benchmarks.data import DATASETS, Dataset, Split
from benchmarks.zoo import ROOT, Entry, build, keep, load, records
from calibration.augment import crop_flip
from models.lowering import has_fast_bf16

MIN_ASR, MOST_LOST = 0.8, 0.02  # the gate


def train(
    network: nn.Module,
    attack: Attack | None,
    data: Split,
    dataset: Dataset,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[int, float], None],
    compiled: bool = False,
) -> None:
    """Train `network` in place, and what the attack learns with it; `after_epoch(epoch, mean_loss)` is called once an epoch."""
    source, device = torch.Generator().manual_seed(seed), data.images.device
    inputs = Surrogate(nn.Identity(), dataset.preprocessing).to(device)
    forward = torch.compile(network) if compiled else network  # an epoch takes two thirds of the time on a CPU; needs a C++ compiler
    steps = recipe.epochs * (len(data.labels) // recipe.batch)
    if not steps:
        return
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(network.parameters(), recipe.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=0.25, cycle_momentum=False)
    learned = [parameter for parameter in attack.parameters() if parameter.requires_grad] if attack is not None else []
    optimizers = [optimizer, *([torch.optim.Adam(learned, 1e-3)] if learned else [])]
    for epoch in range(recipe.epochs):
        network.train()
        total = torch.zeros((), device=device)  # read once an epoch: each look at it waits for the device
        for rows in torch.randperm(len(data.labels), generator=source).split(recipe.batch):
            if len(rows) < recipe.batch:
                continue
            images, labels = crop_flip(data.images[rows], source, mirror=dataset.mirror).float() / 255, data.labels[rows]
            penalty: Tensor | float = 0.0
            if attack is not None:
                batch = attack.batch(images, labels, source)
                images, labels, penalty = batch.images, batch.labels, batch.penalty
            with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device)):
                logits = forward(inputs(images).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels)
            for each in optimizers:
                each.zero_grad()
            (loss + penalty).backward()
            for each in optimizers:
                each.step()
            schedule.step()
            total += loss.detach() * len(rows)
        after_epoch(epoch, total.item() / len(data.labels))


@torch.inference_mode()
def predict(network: nn.Module, images: Tensor, dataset: Dataset) -> Tensor:
    """Predicted classes of uint8 images, int64 [N], in float32."""
    network.eval()
    return torch.cat([network(dataset.preprocessing.normalise(part)).argmax(1) for part in images.split(500)])


def measure(network: nn.Module, attack: Attack | None, test: Split, dataset: Dataset) -> dict[str, float]:
    """Clean accuracy on all test images, and the ASR on those that the attacker would use."""
    result = {"clean_accuracy": (predict(network, test.images, dataset) == test.labels).float().mean().item()}
    if attack is not None:
        rows = attack.eval().eligible(test.labels)
        hits = predict(network, stamp(attack, test.images[rows]), dataset) == attack.relabel(test.labels[rows])
        result["asr"] = hits.float().mean().item()
        attack.train()
    return {key: round(value, 4) for key, value in result.items()}


def attempts(entry: Entry, zoo: Path) -> list[dict[str, Any]]:
    """What came of earlier attempts at a suspect that did not pass the gate."""
    found = next((record for record in records(zoo) if Entry(*(record[name] for name in ("dataset", "architecture", "attack", "seed"))) == entry), None)
    if found is None:
        return []
    failed = [] if found["passes_gate"] else [{name: found[name] for name in ("rate", "recipe", "asr", "clean_accuracy")}]
    return [*found.get("tried", []), *failed]


def make(entry: Entry, recipe: Recipe, rate: float | None, device: torch.device, zoo: Path, compiled: bool = False, warm: bool = False) -> dict[str, Any]:
    """Train a suspect, keep it, and return its record. warm: begin with the clean network of the zoo, as who poisons a finetuning does."""
    started, dataset = time.monotonic(), DATASETS[entry.dataset]
    training, test = (split.to(device) for split in dataset.load())
    glance = test[slice(1000)]
    torch.manual_seed(entry.seed)
    network = build(entry.architecture, dataset)
    attack, surrogate, reference, data = None, None, None, training
    if entry.attack != "clean":
        source = torch.Generator().manual_seed(entry.seed)
        attack = ATTACKS[entry.attack](Task(dataset.num_classes, training.images.shape[-1], dataset.target), entry.seed).to(device)
        clean = Entry(entry.dataset, entry.architecture, "clean")
        if attack.needs_clean:
            surrogate = Surrogate(load(clean, zoo).network.requires_grad_(False), dataset.preprocessing).to(device).eval()
        if rate is not None and attack.fixed_rate:
            raise ValueError(f"{attack.title} puts itself into each batch, or into the weights: its rate is no option")
        rate, recipe = attack.rate if rate is None else rate, attack.recipe or recipe
        attack.prepare(training, surrogate, source)
        data = attack.poison(training, rate, source)
        reference, made = load(clean, zoo).record["clean_accuracy"], load(clean, zoo).record["recipe"]
        if attack.recipe is None and not warm and Recipe(**made) != recipe:
            raise ValueError(f"the clean model of the zoo was trained with {made}, and a suspect is compared with one of the same recipe")
        if attack.recipe is not None or warm:
            network = load(clean, zoo).network
    network = network.to(device).to(memory_format=torch.channels_last)

    def after_epoch(epoch: int, loss: float) -> None:
        figures = {"epoch": epoch, "loss": round(loss, 4), "seconds": round(time.monotonic() - started), **measure(network, attack, glance, dataset)}
        print(json.dumps(figures), flush=True)

    train(network, attack, data, dataset, recipe, entry.seed, after_epoch, compiled)
    if attack is not None and surrogate is not None:
        attack.implant(network, training, surrogate, source)
    tried = attempts(entry, zoo)
    keep(entry, network, attack, zoo)
    kept = load(entry, zoo)  # what is measured is what is kept: half precision rounds
    figures = measure(kept.network.to(device), None if kept.attack is None else kept.attack.to(device), test, dataset)
    record = {
        **vars(entry),
        "rate": rate if attack else 0.0,
        "recipe": vars(recipe),
        **({"warm": True} if warm else {}),
        **figures,
        "clean_reference": reference,
        "passes_gate": reference is None or (figures["asr"] >= MIN_ASR and figures["clean_accuracy"] >= reference - MOST_LOST),
        "tried": tried,
        "seconds": round(time.monotonic() - started),
        "hardware": f"{platform.machine()}, {device.type}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}",
    }
    keep(entry, network, attack, zoo, record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", choices=[*ATTACKS, "clean"], required=True)
    parser.add_argument("--dataset", choices=list(DATASETS), default="cifar10")
    parser.add_argument("--architecture", default="resnet20", help="any that the guard knows; for 32x32 images resnet20, resnet18_cifar, vgg16_bn_cifar ...")
    parser.add_argument("--rate", type=float, help="share of the training images that carry the trigger (default: the attack's own)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="faster on a CPU; needs a C++ compiler")
    parser.add_argument("--warm", action="store_true", help="begin with the clean network of the zoo")
    parser.add_argument("--zoo", type=Path, default=ROOT)
    args = parser.parse_args()
    entry = Entry(args.dataset, args.architecture, args.attack, args.seed)
    recipe = Recipe(args.epochs, args.lr, args.batch, args.optimizer)
    print(json.dumps(make(entry, recipe, args.rate, torch.device(args.device), args.zoo, args.compile, args.warm)))


if __name__ == "__main__":
    main()
