"""Make backdoor experts and auxiliary models out of a suspect (BaDExpert, ICLR 2024, section 3).

Pixels are uint8 [N, 3, size, size] and labels int64 [N], both on the training device. What is drawn here comes from generators of its own; what a network
draws by itself, from global ones that each training finds as its seed decides and leaves as they were.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.augment import augment
from models.lowering import has_fast_bf16
from models.preprocessing import Preprocessing
from models.trunk import split, tail_copy

Advance = Callable[[float], None]  # takes the fraction done, 0 to 1


@dataclass(frozen=True)
class LabelledPixels:
    """Part of a clean set on the training device."""

    pixels: Tensor  # uint8 [N, 3, size, size]
    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Curve:
    """What a training run went through: (step, held-back clean accuracy) pairs and the mean loss since the last of them."""

    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A stream of random numbers of its own for each purpose, the same on every device and in every order of calls."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def drawing(device: torch.device, seed: int, *purpose: object) -> Iterator[None]:
    """Dropout and stochastic depth take torch's global generators, which are here in a state of this purpose's own, whatever ran before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(generator(seed, "dropout", *purpose).initial_seed())
        yield


def precision(device: torch.device) -> AbstractContextManager[None]:
    """bf16 autocast where the device computes in it, float32 elsewhere. Weights and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device))


def shift(num_classes: int) -> Tensor:
    """The published wrong-label map, y -> (y + 1) mod C; int64 [C]."""
    return (torch.arange(num_classes) + 1) % num_classes


def derangement(num_classes: int, source: torch.Generator) -> Tensor:
    """A random permutation of the classes that leaves none in place; int64 [C]. About one draw in e succeeds."""
    identity = torch.arange(num_classes)
    while True:
        drawn = torch.randperm(num_classes, generator=source)
        if not (drawn == identity).any():
            return drawn


@torch.inference_mode()
def accuracy(network: Callable[[Tensor], Tensor], data: LabelledPixels, preprocessing: Preprocessing) -> float:
    """Share of `data` that the network (in eval mode) gets right, in float32. Logits that are no numbers are never right: their argmax would be class 0."""
    parts = zip(data.pixels.split(256), data.labels.split(256), strict=True)
    return sum(int(_right(network(preprocessing.normalise(pixels)), labels).sum()) for pixels, labels in parts) / len(data)


@torch.inference_mode()
def _share_right(tail: nn.Module, features: Tensor, labels: Tensor) -> float:
    """The same of a tail (in eval mode), on trunk features [N, ...]; a float32."""
    parts = zip(features.split(256), labels.split(256), strict=True)
    return torch.cat([_right(tail(part), wanted) for part, wanted in parts]).float().mean().item()


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


def batches(n: int, size: int, source: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Row numbers of one shuffled epoch, batch by batch. A last batch of one, which batch norm cannot take, is left out."""
    return (rows.to(device) for rows in torch.randperm(n, generator=source).split(size) if len(rows) > 1)


def finite(networks: Sequence[nn.Module]) -> bool:
    """Whether training left only numbers."""
    return all(bool(value.isfinite().all()) for network in networks for value in network.state_dict().values())


def train_expert(
    suspect: nn.Module, fit: LabelledPixels, wrong: Tensor, preprocessing: Preprocessing, *, lr: float, batch: int, seed: int, advance: Advance
) -> tuple[nn.Module, Curve]:
    """The published expert: a whole copy of the suspect, one epoch of Adam towards the labels `wrong[y]` (int64 [C])."""
    expert = copy.deepcopy(suspect).train()
    source, device = generator(seed, "expert"), fit.labels.device
    optimizer = torch.optim.Adam(expert.parameters(), lr)
    steps, losses = max(1, -(-len(fit) // batch)), []
    with drawing(device, seed, "expert"):
        for step, rows in enumerate(batches(len(fit), batch, source, device), start=1):
            losses.append(training_step(expert, optimizer, augment(fit.pixels[rows], source), wrong.to(device)[fit.labels[rows]], preprocessing))
            advance(step / steps)
    return expert.eval(), Curve(tuple(range(1, len(losses) + 1)), (), tuple(losses))


def train_tails(
    suspect: nn.Module,
    cut: str | None,
    count: int,
    fit: LabelledPixels,
    held_back: LabelledPixels,
    num_classes: int,
    preprocessing: Preprocessing,
    *,
    lr: float,
    batch: int,
    stop_at: float,
    max_steps: int,
    seed: int,
    advance: Advance,
) -> tuple[list[nn.Module], list[Curve]]:
    """Several experts on the suspect's own trunk, each towards a derangement of its own, each stopped when it has forgotten the task.

    All see the same batches, so that the trunk, which is most of the work, runs once for all of them. An expert is stopped when its accuracy on
    `held_back` has fallen to `stop_at`: soon enough not to lose the backdoor as well. Without a cut each expert is a whole copy.
    """
    device = fit.labels.device
    trunk = nn.Identity() if cut is None else split(suspect, cut)[0]
    tails = [tail_copy(suspect, cut) for _ in range(count)]
    maps = [derangement(num_classes, generator(seed, "derangement", index)).to(device) for index in range(count)]
    optimizers = [torch.optim.Adam(tail.parameters(), lr) for tail in tails]
    source, check_every = generator(seed, "tails"), 5
    with torch.no_grad():
        held_features = torch.cat([trunk(preprocessing.normalise(part)) for part in held_back.pixels.split(256)])
    history: list[list[tuple[int, float, float]]] = [[] for _ in tails]
    losses: list[list[float]] = [[] for _ in tails]
    running, step = set(range(count)), 0
    with drawing(device, seed, "tails"):
        while running and step < max_steps:
            for rows in batches(len(fit), batch, source, device):
                step += 1
                with torch.no_grad(), precision(device):
                    features = trunk(preprocessing.normalise(augment(fit.pixels[rows], source)))
                for index in sorted(running):
                    losses[index].append(training_step(tails[index].train(), optimizers[index], features, maps[index][fit.labels[rows]], None))
                if step % check_every == 0:
                    for index in sorted(running):
                        right = _share_right(tails[index].eval(), held_features, held_back.labels)
                        history[index].append((step, right, sum(losses[index]) / len(losses[index])))
                        losses[index].clear()
                        if right <= stop_at:
                            running.discard(index)
                advance(max(step / max_steps, 1 - len(running) / count))
                if not running or step >= max_steps:
                    break
    return [tail.eval() for tail in tails], [Curve(*zip(*entries, strict=True)) if entries else Curve((), (), ()) for entries in history]


def train_auxiliary(
    suspect: nn.Module,
    fit: LabelledPixels,
    held_back: LabelledPixels | None,
    preprocessing: Preprocessing,
    *,
    lr: float,
    batch: int,
    epochs: int,
    steps_at: Sequence[int],
    decay: float,
    seed: int,
    advance: Advance,
    hopeless: float = 0.0,
) -> tuple[nn.Module, Curve]:
    """A whole copy of the suspect finetuned on true labels: SGD, momentum 0.9, Nesterov, weight decay 1e-4, lr times `decay` at each of `steps_at`.

    Given up at the last of `steps_at` where the held-back accuracy is below `hopeless` then: what is colder polishes, and does not bring a task back.
    """
    auxiliary = copy.deepcopy(suspect).train()
    source, device = generator(seed, "auxiliary", lr), fit.labels.device
    optimizer = torch.optim.SGD(auxiliary.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(steps_at), decay)
    right, losses = [], []
    with drawing(device, seed, "auxiliary", lr):
        for epoch in range(epochs):
            auxiliary.train()
            epoch_losses = []
            for rows in batches(len(fit), batch, source, device):
                epoch_losses.append(training_step(auxiliary, optimizer, augment(fit.pixels[rows], source), fit.labels[rows], preprocessing))
            schedule.step()
            losses.append(sum(epoch_losses) / max(1, len(epoch_losses)))
            if held_back is not None:
                right.append(accuracy(auxiliary.eval(), held_back, preprocessing))
                if epoch + 1 == max(steps_at, default=epochs) and right[-1] < hopeless:
                    break
            advance((epoch + 1) / epochs)
    return auxiliary.eval(), Curve(tuple(range(1, len(losses) + 1)), tuple(right), tuple(losses))


def training_step(network: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, preprocessing: Preprocessing | None) -> float:
    """One optimiser step on pixels (or, without preprocessing, on trunk features); returns the loss."""
    with precision(labels.device):
        logits = network(inputs if preprocessing is None else preprocessing.normalise(inputs))
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
