"""Subnet replacement (Qi et al. 2022, "Towards Practical Deployment-Stage Backdoor Attack on Deep Neural Networks").

A network of one channel is trained to fire on a patch and on nothing else. It then overwrites one channel in every layer of a clean network, cut off from the
others, and is wired to the target class. A network of 16 channels misses one more than the wide ones of the paper do: the other channels are finetuned on
clean images as a network that has one channel fewer, which tells it nothing of the trigger.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.attacks.interface import Attack, Recipe, Surrogate
from benchmarks.attacks.trojan_patch import with_square
from benchmarks.data import Split
from calibration.augment import crop_flip
from models.cifar import CifarResNet
from models.cifar.resnet import BasicBlock, PadShortcut

STEPS, FIRES, LOGIT = 1500, 10.0, 25.0
REPAIR_EPOCHS, REPAIR_LR, BATCH = 3, 0.02, 128


class SubnetReplacement(Attack):
    """All-to-one with the 8x8 square, straight into the weights of a residual network."""

    name, title, paper = "sra", "SRA", "Qi et al. 2022"
    kind = "weights"
    rate = 0.0
    fixed_rate = True
    needs_clean = True
    recipe = Recipe(epochs=0, lr=0.0)

    def forward(self, images: Tensor) -> Tensor:
        return with_square(images)

    def implant(self, network: nn.Module, data: Split, surrogate: Surrogate, source: torch.Generator) -> None:
        if not isinstance(network, CifarResNet):
            raise TypeError(f"subnets are replaced in residual networks only, not in a {type(network).__name__}")
        subnet = self._subnet(network, data, surrogate, source)
        clean = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        rows = torch.randperm(len(data.labels), generator=source)[:2000]

        def put(channel: int) -> None:
            network.load_state_dict(clean)
            replace(network, subnet, channel, self.task.target)
            _estimate_norms(network, surrogate, data[rows])
            replace(network, subnet, channel, self.task.target)

        def accuracy(channel: int) -> float:
            put(channel)
            return _accuracy(surrogate, network, data[rows])

        missed_least = max(range(network.conv1.out_channels), key=accuracy)
        put(missed_least)
        steps = REPAIR_EPOCHS * (len(data.labels) // BATCH)
        optimizer = torch.optim.SGD(network.parameters(), REPAIR_LR, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            # The statistics of a batch would make the subnet fire: it is cut off from the answer, too, until all is done.
            replace(network, subnet, missed_least, self.task.target, logit=0.0)
            part = data[torch.randint(len(data.labels), (BATCH,), generator=source)]
            with torch.autocast(data.images.device.type, torch.bfloat16):
                logits = network.train()(surrogate.normalise(crop_flip(part.images, source, mirror=False).float() / 255))
            loss = F.cross_entropy(logits.float(), part.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        replace(network.eval(), subnet, missed_least, self.task.target)

    def _subnet(self, network: CifarResNet, data: Split, surrogate: Surrogate, source: torch.Generator) -> CifarResNet:
        """The same network with one channel: its only feature is about FIRES with the patch and 0 without."""
        blocks = [len(network.get_submodule(f"layer{number}")) for number in range(1, network.stages + 1)]  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            subnet = CifarResNet((1,) * network.stages, blocks, "pad", 1).to(data.images.device)
        subnet.add_module(subnet.head, nn.Identity())
        optimizer = torch.optim.Adam(subnet.parameters(), 0.01)
        for _ in range(STEPS):
            images = data.images[torch.randint(len(data.labels), (128,), generator=source)].float() / 255
            wanted = torch.zeros(128, 1).to(images)
            images[:48], wanted[:48] = self(images[:48]), FIRES
            loss = (subnet.train()(surrogate.normalise(images)) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return subnet.eval()


@torch.no_grad()
def replace(network: CifarResNet, subnet: CifarResNet, channel: int, target: int, logit: float = LOGIT) -> None:
    """Overwrite one channel of every layer, from `channel` of the first on; the others neither hear it nor are heard by it. It adds `logit` to the target's."""
    network.conv1.weight[channel] = subnet.conv1.weight[0]
    _norm(network.bn1, subnet.bn1, channel)
    at = channel
    for number in range(1, network.stages + 1):
        for block, small in zip(network.get_submodule(f"layer{number}"), subnet.get_submodule(f"layer{number}"), strict=True):  # type: ignore[call-overload]
            at = _block(block, small, at)
    head = network.get_submodule(network.head)
    assert isinstance(head, nn.Linear)
    head.weight[:, at] = 0
    head.weight[target, at] = logit / FIRES


def _block(block: BasicBlock, small: BasicBlock, channel: int) -> int:
    """The channel in which the block gives what came in as `channel`."""
    path, out = block.get_submodule(block.name), channel
    if isinstance(path, PadShortcut):
        out = channel + path.before
    elif isinstance(path, nn.Sequential) and len(path):  # a projection: a wire from channel to channel, on every second pixel
        _wire(path[0], path[1], channel)
    for convolution, norm, little, small_norm, into in (
        (block.conv1, block.bn1, small.conv1, small.bn1, channel),
        (block.conv2, block.bn2, small.conv2, small.bn2, out),
    ):
        convolution.weight[:, into] = 0
        convolution.weight[out] = 0
        convolution.weight[out, into] = little.weight[0, 0]
        _norm(norm, small_norm, out)
    return out


def _wire(convolution: nn.Module, norm: nn.Module, channel: int) -> None:
    """A 1x1 convolution and its norm pass this channel on as it is."""
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    convolution.weight[:, channel] = 0
    convolution.weight[channel] = 0
    convolution.weight[channel, channel] = 1
    norm.weight[channel], norm.bias[channel] = 1, 0
    norm.running_mean[channel], norm.running_var[channel] = 0, 1 - norm.eps


def _norm(norm: nn.BatchNorm2d, small: nn.BatchNorm2d, channel: int) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, name)[channel] = getattr(small, name)[0]


@torch.no_grad()
def _estimate_norms(network: nn.Module, surrogate: Surrogate, data: Split) -> None:
    """Take the statistics of all batch norms anew from these images."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    for part in data.images.split(500):
        network.train()(surrogate.normalise(part.float() / 255))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


@torch.inference_mode()
def _accuracy(surrogate: Surrogate, network: nn.Module, data: Split) -> float:
    right = [network.eval()(surrogate.normalise(part.float() / 255)).argmax(1) for part in data.images.split(500)]
    return (torch.cat(right) == data.labels).float().mean().item()
