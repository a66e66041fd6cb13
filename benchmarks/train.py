"""Train a suspect: `python -m benchmarks.train --attack badnet --out suspect.safetensors`.

SGD with Nesterov momentum under a one-cycle schedule, flip and crop, bf16 autocast: a CIFAR-10 ResNet-20 reaches about 90% in 15 epochs, half an
hour of one CPU core. Beside the weights it writes a JSON record: clean accuracy, ASR, seed, seconds, hardware.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.attacks import ATTACKS, Attack, poison, stamp
from benchmarks.data import Split, cifar10
from calibration.augment import crop_flip
from models.cifar import resnet18, thin_resnet

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
NETWORKS = {"resnet20": lambda: thin_resnet(20, 10), "resnet18_cifar": lambda: resnet18(10)}


def normalise(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> float32, CIFAR mean and standard deviation, channels last."""
    mean, std = (torch.tensor(v, device=images.device)[None, :, None, None] for v in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def train(network: nn.Module, data: Split, epochs: int, lr: float, seed: int, device: torch.device, after_epoch: Callable[[int, float], None]) -> None:
    """Train `network` in place; `after_epoch(epoch, mean_loss)` is called once an epoch."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = data.images.to(device), data.labels.to(device)
    batch = 128
    steps = epochs * (len(labels) // batch)
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.25, cycle_momentum=False)
    for epoch in range(epochs):
        network.train()
        order = torch.randperm(len(labels), generator=generator)
        total = 0.0
        for rows in order.split(batch):
            if len(rows) < batch:
                continue
            rows = rows.to(device)
            inputs = normalise(crop_flip(images[rows], generator))
            with torch.autocast(device.type, torch.bfloat16):
                logits = network(inputs)
            loss = F.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        after_epoch(epoch, total / len(labels))


@torch.inference_mode()
def predict(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Predicted classes, int64 [N], in float32."""
    network.eval()
    return torch.cat([network(normalise(part.to(device))).argmax(1).cpu() for part in images.split(500)])


def measure(network: nn.Module, attack: Attack | None, test: Split, device: torch.device) -> dict[str, float]:
    """Clean accuracy on all test images, and the ASR on those that the attack would change."""
    result = {"clean_accuracy": (predict(network, test.images, device) == test.labels).float().mean().item()}
    if attack is not None:
        rows = attack.eligible(test.labels)
        hits = predict(network, stamp(attack, test.images[rows]), device) == attack.relabel(test.labels[rows])
        result["asr"] = hits.float().mean().item()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", choices=[*ATTACKS, "clean"], required=True)
    parser.add_argument("--architecture", choices=list(NETWORKS), default="resnet20")
    parser.add_argument("--rate", type=float, default=0.01, help="share of the training images that carry the trigger")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    started = time.monotonic()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    network = NETWORKS[args.architecture]().to(device).to(memory_format=torch.channels_last)
    clean, test = cifar10()
    attack = None if args.attack == "clean" else ATTACKS[args.attack]()
    data = clean
    if attack is not None:
        poisoned = poison(attack, clean.images, clean.labels, args.rate, args.seed)
        data = Split(poisoned.images, poisoned.labels)
    glance = Split(test.images[:1000], test.labels[:1000])

    def after_epoch(epoch: int, loss: float) -> None:
        figures = {"epoch": epoch, "loss": loss, "seconds": time.monotonic() - started, **measure(network, attack, glance, device)}
        print(json.dumps({key: round(value, 4) for key, value in figures.items()}), flush=True)

    train(network, data, args.epochs, args.lr, args.seed, device, after_epoch)
    record = {
        "attack": args.attack,
        "architecture": args.architecture,
        "dataset": "cifar10",
        "rate": args.rate if attack else 0.0,
        "epochs": args.epochs,
        "lr": args.lr,
        "seed": args.seed,
        **{key: round(value, 4) for key, value in measure(network, attack, test, device).items()},
        "seconds": round(time.monotonic() - started),
        "hardware": f"{platform.machine()}, {device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(weights, args.out)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
