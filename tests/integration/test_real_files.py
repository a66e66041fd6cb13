"""Files as the well-known tools write them, written here by those tools: each is understood without being told anything, and its weights arrive bit for bit.

The networks have random weights. Their heads are centred so that all classes occur, and images are labelled by what the network itself says of them
under one preprocessing: that preprocessing is then the right one, as it would be for a trained network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor, nn

from calibration.config import InspectionConfig
from calibration.inspection import inspect
from models.checkpoint import read_checkpoint
from models.cifar import NETWORKS
from models.preprocessing import Preprocessing
from tests.conftest import EXAMPLES

CPU = torch.device("cpu")
CLASSES = 4
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """200 of the example images, 32x32."""
    with zipfile.ZipFile(EXAMPLES / "clean_set.zip") as archive:
        return [Image.open(archive.open(name)).convert("RGB") for name in sorted(archive.namelist())[::10]]


def clean_set(path: Path, images: list[Image.Image], network: Callable[[Tensor], Tensor], head: nn.Linear | nn.Conv2d, right: Preprocessing) -> Path:
    """Centre the head, label the images with what the network says of them, and pack them."""
    inputs = right.normalise(torch.stack([right.pixels(image) for image in images]))
    with torch.inference_mode():
        logits = torch.cat([network(part) for part in inputs.split(50)])
    with torch.no_grad():
        assert head.bias is not None
        head.bias -= logits.mean(0)
    labels = (logits - logits.mean(0)).argmax(1)
    assert len(labels.unique()) == CLASSES
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    safetensors.torch.save_file({"images": pixels, "labels": labels}, path / "clean.safetensors")
    return path / "clean.safetensors"


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def check(file: Path, clean: Path, state: dict[str, Tensor], architecture: str, library: str, right: Preprocessing | None) -> dict[str, Any]:
    """Inspect a file, and compare what is found and read with the truth."""
    read = read_checkpoint(file).tensors
    assert read.keys() == state.keys()
    assert all(read[name].dtype == tensor.dtype and bits(read[name]).equal(bits(tensor)) for name, tensor in state.items())
    found = inspect(InspectionConfig(), file, clean, CPU)
    json.dumps(found)
    assert (found["architecture"], found["library"], found["num_classes"]) == (architecture, library, CLASSES)
    if right is not None:
        assert Preprocessing.from_json(found["preprocessing"]) == right
        assert found["accuracy"] > 0.97
    return found


@pytest.mark.parametrize(
    ("name", "packed"),
    [("resnet18", "pair"), ("mobilenetv3_small_100", "pair"), ("mobilenetv3_small_100", "zip"), ("convnext_atto", "pair"), ("vit_tiny_patch16_224", "zip")],
)
def test_timm(tmp_path: Path, images: list[Image.Image], name: str, packed: str) -> None:
    torch.manual_seed(0)
    # Trained at 64 pixels, as it were: quick, and not what is usual for the name.
    network = timm.create_model(name, num_classes=CLASSES, pretrained_cfg_overlay={"input_size": (3, 64, 64)}, **({"img_size": 64} if "vit" in name else {}))
    network.eval()
    config = timm.data.resolve_data_config(model=network)
    size = config["input_size"][-1]
    right = Preprocessing(size, int(size / config["crop_pct"]), config["interpolation"], mean=config["mean"], std=config["std"])
    clean = clean_set(tmp_path, images[:120], network, network.get_classifier(), right)
    save_for_hf(network, tmp_path / "saved", model_args={"img_size": 64} if "vit" in name else None, safe_serialization=True)
    file = tmp_path / "saved" / "model.safetensors"
    if packed == "zip":
        file = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "saved"))
    check(file, clean, network.state_dict(), name, "timm", right)


def huggingface(kind: str) -> tuple[Any, Any]:
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=CLASSES)
        return transformers.ResNetForImageClassification(config), transformers.ConvNextImageProcessor(
            size={"shortest_edge": 64}, resample=3, image_mean=list(IMAGENET["mean"]), image_std=list(IMAGENET["std"])
        )
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=64, num_labels=CLASSES)
    return transformers.ViTForImageClassification(config), transformers.ViTImageProcessor(size={"height": 64, "width": 64})


@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize("packed", ["folder", "zip"])
def test_transformers(tmp_path: Path, images: list[Image.Image], kind: str, packed: str) -> None:
    torch.manual_seed(0)
    network, processor = huggingface(kind)
    network.eval()
    right = Preprocessing(64, 64, "bilinear", aspect="stretch", **HALF) if kind == "vit" else Preprocessing(64, 73, "bicubic", **IMAGENET)
    head = network.classifier if kind == "vit" else network.classifier[-1]
    clean = clean_set(tmp_path, images, lambda x: network(x).logits, head, right)
    network.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    state = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    file = tmp_path / "saved" if packed == "folder" else Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "saved"))
    check(file, clean, state, type(network).__name__, "transformers", right)


def test_a_claim_is_believed_where_the_labels_tell_nothing_and_that_is_told(tmp_path: Path, images: list[Image.Image]) -> None:
    torch.manual_seed(0)
    network, processor = huggingface("resnet")
    network.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images[:120]]))
    safetensors.torch.save_file({"images": pixels, "labels": torch.arange(120) % CLASSES}, tmp_path / "clean.safetensors")
    found = inspect(InspectionConfig(), tmp_path / "saved", tmp_path / "clean.safetensors", CPU)
    assert Preprocessing.from_json(found["preprocessing"]) == Preprocessing(64, 73, "bicubic", **IMAGENET)
    assert {warning["code"] for warning in found["warnings"]} & {"suspect-model-useless", "clean-set-mislabelled"}


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn", "mobilenet_v2", "vit_b_16"])
def test_state_dicts_of_torchvision(tmp_path: Path, images: list[Image.Image], name: str) -> None:
    """Nothing beside the weights says what they are; their preprocessing is asked for below, of the smallest."""
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(num_classes=CLASSES).eval()
    torch.save(network.state_dict(), tmp_path / "model.pth")
    read = read_checkpoint(tmp_path / "model.pth").tensors
    assert all(bits(read[key]).equal(bits(tensor)) for key, tensor in network.state_dict().items())
    found = inspect(InspectionConfig(), tmp_path / "model.pth", None, CPU)
    assert (found["architecture"], found["library"], found["num_classes"]) == (name, "torchvision", CLASSES)


def test_the_preprocessing_of_a_state_dict_of_torchvision(tmp_path: Path, images: list[Image.Image]) -> None:
    torch.manual_seed(0)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES).eval()
    right = Preprocessing(224, 256, "bilinear", **IMAGENET)
    clean = clean_set(tmp_path, images[:100], network, network.fc, right)
    torch.save(network.state_dict(), tmp_path / "model.pth")
    check(tmp_path / "model.pth", clean, network.state_dict(), "shufflenet_v2_x0_5", "torchvision", right)


class Module(lightning.LightningModule):
    """What people write: the network under a name, hyper-parameters with objects in them."""

    def __init__(self, network: nn.Module, options: argparse.Namespace) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"])
        self.model = network
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.criterion(self.model(images), labels)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


@pytest.fixture(scope="session")
def cifar_suspect() -> tuple[dict[str, Tensor], Path]:
    """A trained network: the example suspect, and its clean set."""
    return safetensors.torch.load_file(EXAMPLES / "suspect_badnet.safetensors"), EXAMPLES / "clean_set.zip"


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders, loggers and warm starts
def test_lightning(tmp_path: Path, cifar_suspect: tuple[dict[str, Tensor], Path]) -> None:
    network = NETWORKS["resnet20"](CLASSES)
    options = argparse.Namespace(lr=0.1, path=Path("data"), dtype=torch.float16)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.randint(0, CLASSES, (8,))), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(Module(network, options), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = inspect(InspectionConfig(), tmp_path / "last.ckpt", None, CPU)
    assert (found["architecture"], found["num_classes"], found["source"]) == ("resnet20", CLASSES, "state_dict")
    assert any("model" in note and "criterion" in note for note in found["notes"])
    read = read_checkpoint(tmp_path / "last.ckpt").tensors
    assert all(bits(read[key]).equal(bits(tensor)) for key, tensor in network.state_dict().items())


def test_backdoorbench(tmp_path: Path, images: list[Image.Image]) -> None:
    """attack_result.pt: numpy scalars, PIL images and a Namespace beside the weights."""
    network = NETWORKS["preact_resnet18"](CLASSES)
    state = nn.DataParallel(network).state_dict()
    result = {
        "model_name": "preactresnet18",
        "num_classes": np.int64(CLASSES).item(),
        "model": state,
        "data_path": "../data",
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        "bd_train": {"bd_data_container": {"data": [(image, np.int64(1), np.array([3])) for image in images[:20]]}, "rate": np.float64(0.1)},
        "bd_test": None,
        "args": argparse.Namespace(attack="badnet", device=torch.device("cpu")),
    }
    torch.save(result, tmp_path / "attack_result.pt")
    found = inspect(InspectionConfig(), tmp_path / "attack_result.pt", None, CPU)
    assert (found["architecture"], found["num_classes"], found["source"], found["warnings"]) == ("preact_resnet18", CLASSES, "model", [])
    read = read_checkpoint(tmp_path / "attack_result.pt")
    assert read.hints == {"model_name": "preactresnet18", "num_classes": CLASSES, "img_size": 32}
    assert all(bits(read.tensors[key]).equal(bits(tensor)) for key, tensor in network.state_dict().items())


def test_a_transformer_of_backdoorbench_behind_a_resize(tmp_path: Path) -> None:
    """Sequential(Resize(224), vit): every key starts with `1.`."""
    network = torchvision.models.vit_b_16(num_classes=CLASSES, image_size=32)
    wrapped = nn.Sequential(torchvision.transforms.Resize(32), network)
    torch.save({"model_name": "vit_b_16", "num_classes": CLASSES, "model": wrapped.state_dict(), "img_size": (32, 32, 3)}, tmp_path / "attack_result.pt")
    found = inspect(InspectionConfig(), tmp_path / "attack_result.pt", None, CPU)
    assert (found["architecture"], found["num_classes"]) == ("vit_b_16", CLASSES)


@pytest.mark.parametrize("name", ["resnet18_cifar", "vgg16_bn_cifar", "mobilenet_v2_cifar", "resnet32", "resnet44_projection", "wide_resnet16_1"])
def test_bare_state_dicts_of_the_research_toolboxes(tmp_path: Path, name: str) -> None:
    network = NETWORKS[name](CLASSES)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    found = inspect(InspectionConfig(), tmp_path / "model.pt", None, CPU)
    assert (found["architecture"], found["library"], found["num_classes"]) == (name, "cifar", CLASSES)


def averaged(network: nn.Module) -> dict[str, Any]:
    return {"state_dict": network.state_dict(), "state_dict_ema": timm.utils.ModelEmaV3(network).module.state_dict(), "epoch": 3, "arch": "resnet20"}


@pytest.mark.parametrize(
    ("wrap", "source"),
    [
        (lambda network: nn.DataParallel(network).state_dict(), None),
        (lambda network: torch.optim.swa_utils.AveragedModel(network).state_dict(), None),
        (lambda network: {"net": nn.DataParallel(network).state_dict(), "acc": 91.2, "epoch": 7}, "net"),
        (averaged, "state_dict"),
        (lambda network: {"model_ema": network.state_dict(), "optimizer": torch.optim.Adam(network.parameters()).state_dict()}, "model_ema"),
    ],
    ids=["DataParallel", "AveragedModel", "training dict", "timm's EMA", "EMA alone"],
)
def test_training_dicts_and_wrappers(
    tmp_path: Path, cifar_suspect: tuple[dict[str, Tensor], Path], wrap: Callable[[nn.Module], dict[str, Any]], source: str | None
) -> None:
    network = NETWORKS["resnet20"](10)
    network.load_state_dict(cifar_suspect[0])
    torch.save(wrap(network), tmp_path / "checkpoint.pth.tar")
    found = inspect(InspectionConfig(), tmp_path / "checkpoint.pth.tar", None, CPU)
    assert (found["architecture"], found["num_classes"], found["source"]) == ("resnet20", 10, source)
    read = read_checkpoint(tmp_path / "checkpoint.pth.tar").tensors
    assert all(bits(read[key]).equal(bits(tensor)) for key, tensor in cifar_suspect[0].items())


def test_the_command_line_inspects_and_converts(tmp_path: Path, cifar_suspect: tuple[dict[str, Tensor], Path]) -> None:
    state, clean = cifar_suspect
    torch.save(
        {"state_dict": {f"module.{key}": tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}}, tmp_path / "half.pth"
    )
    command = [sys.executable, "-m", "service", "inspect", str(tmp_path / "half.pth"), "--clean-set", str(clean), "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout)
    assert (found["architecture"], found["num_classes"], found["source"]) == ("resnet20", 10, "state_dict")
    assert found["dtypes"] == {"float16": 97, "int64": 19}
    assert found["accuracy"] > 0.85
    assert found["process"]["network"] and found["process"]["programs"]
    out = tmp_path / "out.safetensors"
    subprocess.run([sys.executable, "-m", "service", "convert", str(tmp_path / "half.pth"), str(out)], check=True, capture_output=True, timeout=200)
    written = safetensors.torch.load_file(out)
    assert all(bits(written[key]).equal(bits(tensor.half() if tensor.is_floating_point() else tensor)) for key, tensor in state.items())
    again = subprocess.run(
        [sys.executable, "-m", "service", "convert", str(tmp_path / "half.pth"), str(out)], check=False, capture_output=True, text=True, timeout=200
    )
    assert again.returncode == 1 and "--force" in again.stderr
