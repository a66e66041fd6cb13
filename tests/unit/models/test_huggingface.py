"""Small networks that transformers itself makes and saves, against the same networks as ours."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from models import trunk
from models.architectures import huggingface
from models.errors import CheckpointMismatch

CONFIGS: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32, 64], "depths": [1, 2, 2], "downsample_in_bottleneck": True},
    "vit": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 64},
    "convnext": {"hidden_sizes": [8, 16, 32], "depths": [1, 2, 2], "num_stages": 3, "image_size": 64, "layer_scale_init_value": 0.5},
    "swin": {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "qkv_bias": False},
}
VARIANTS = (
    *CONFIGS.items(),
    ("resnet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic", "downsample_in_first_stage": True}),
    ("vit", {**CONFIGS["vit"], "qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "image_size": 36}),
    ("mobilenet_v2", {"depth_multiplier": 0.25, "tf_padding": False, "output_stride": 8, "first_layer_is_expansion": False, "finegrained_output": False}),
    ("convnext", {**CONFIGS["convnext"], "layer_scale_init_value": 0.0, "patch_size": 2, "hidden_act": "relu"}),
    ("swin", {**CONFIGS["swin"], "use_absolute_embeddings": True, "window_size": 5, "mlp_ratio": 2}),
)
Pair = tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]


def library(kind: str, settings: dict[str, Any]) -> Any:
    """A model of the library with random weights, all of them: position embeddings and running statistics start at zero or one."""
    family = huggingface.FAMILIES[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, family.name)(getattr(transformers, family.config)(**settings, num_labels=7)).eval()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if name.endswith("running_var") else value + 0.1 * torch.randn_like(value))
    return model


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    """The library's model, ours with its weights, and inputs."""
    kind, settings = request.param
    theirs = library(kind, settings)
    options = huggingface.options_of(json.loads(theirs.config.to_json_string()))
    ours = huggingface.build(huggingface.FAMILIES[kind].name, json.loads(json.dumps(options)), 7)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {key: value.shape for key, value in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    size = min(huggingface.size_of(options), 64)
    return theirs, ours, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


every_variant = pytest.mark.parametrize("pair", VARIANTS, indirect=True, ids=[kind for kind, _ in VARIANTS])
every_family = pytest.mark.parametrize("pair", CONFIGS.items(), indirect=True, ids=list(CONFIGS))
every_kind = pytest.mark.parametrize("kind", list(CONFIGS))


@every_variant
@torch.inference_mode()
def test_logits_are_those_of_the_library(pair: Pair) -> None:
    theirs, ours, inputs = pair
    torch.testing.assert_close(ours(inputs), theirs(inputs).logits, rtol=0, atol=1e-6)
    ours.to(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(inputs.contiguous(memory_format=torch.channels_last)), theirs(inputs).logits, rtol=1e-4, atol=1e-5)


@every_family
def test_it_can_be_cut_between_its_blocks(pair: Pair) -> None:
    _, ours, inputs = pair
    found = trunk.cuts(ours, inputs[:1])
    shares = [cut.tail_share for cut in found]
    assert len({round(share, 6) for share in shares}) >= 4
    assert shares == sorted(shares, reverse=True)
    for cut in found:
        first, second = trunk.split(ours, cut.name)
        with torch.inference_mode():
            assert torch.equal(second(first(inputs)), ours(inputs)), cut
    head = next(value for name, value in ours.named_parameters() if name.startswith("classifier") and value.ndim == 2)
    assert trunk.feature_cut(ours, inputs[:1]).tail_share == pytest.approx(2 * head.numel() / trunk.operations(ours, inputs[:1]))


@every_family
def test_a_tail_of_it_learns_apart_from_it(pair: Pair) -> None:
    _, ours, inputs = pair
    before = copy.deepcopy(ours.state_dict())
    cut = trunk.choose_cut(ours, inputs[:1], 0.1).name
    tail = trunk.tail_copy(ours, cut).train()
    features = trunk.split(ours, cut)[0](inputs).detach()
    optimizer = torch.optim.SGD(tail.parameters(), 0.01)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(tail(features), torch.tensor([1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())
    assert set(trunk.tail_copy(ours, cut).state_dict()) == set(tail.state_dict())


@every_family
def test_training_draws_nothing_at_random(pair: Pair) -> None:
    _, ours, inputs = pair
    torch.manual_seed(0)
    first = copy.deepcopy(ours).train()(inputs)
    torch.manual_seed(1)
    assert torch.equal(copy.deepcopy(ours).train()(inputs), first)


@every_kind
def test_a_saved_folder_loads_strictly(kind: str, tmp_path: Path) -> None:
    theirs = library(kind, CONFIGS[kind])
    theirs.save_pretrained(tmp_path)
    options = huggingface.options_of(json.loads((tmp_path / "config.json").read_bytes()))
    with torch.device("meta"):
        ours = huggingface.build(huggingface.FAMILIES[kind].name, options, 7)
    assert all(parameter.is_meta for parameter in ours.parameters())
    tensors = huggingface.rename(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    ours.load_state_dict(tensors, assign=True)
    assert all(torch.equal(value, tensors[key]) for key, value in theirs.state_dict().items())
    assert huggingface.rename(tensors) == tensors


def test_an_old_swin_file_brings_indices_that_are_not_weights() -> None:
    name = "swin.encoder.layers.0.blocks.1.attention.self.relative_position_index"
    assert huggingface.rename({name: 0, "classifier.bias": 1}) == {"classifier.bias": 1}


def test_two_tensors_under_one_name_are_refused() -> None:
    with pytest.raises(CheckpointMismatch, match=r"two tensors for vit\.layers\.0\.attention\.q_proj\.bias"):
        huggingface.rename({"vit.layers.0.attention.q_proj.bias": 0, "vit.encoder.layer.0.attention.attention.query.bias": 1})


@every_kind
def test_defaults_are_those_of_the_library(kind: str) -> None:
    family = huggingface.FAMILIES[kind]
    config = json.loads(getattr(transformers, family.config)().to_json_string())
    assert huggingface.options_of({"model_type": kind}) == {name: config[name] for name in family.options}


@every_kind
def test_what_a_config_says_of_code_is_not_looked_at(kind: str) -> None:
    hostile = {
        "auto_map": {"AutoModel": "evil.Model"},
        "trust_remote_code": True,
        "custom_pipelines": {"x": {"impl": "evil.P"}},
        "_attn_implementation": "evil/x",
    }
    assert huggingface.options_of({"model_type": kind, **hostile}) == huggingface.options_of({"model_type": kind})


HOSTILE: list[tuple[dict[str, object], str]] = [
    ({}, "no model type; .* resnet, vit, mobilenet_v2, convnext, swin"),
    ({"model_type": ["vit"]}, "no model type"),
    ({"model_type": "llama\x1b[31m" + "x" * 1000}, r"the model type llama\?\?31mx+; "),
    ({"model_type": "vit", "num_hidden_layers": 10**9}, "num_hidden_layers in config.json must be a whole number from 1 to 128"),
    ({"model_type": "vit", "num_hidden_layers": True}, "num_hidden_layers"),
    ({"model_type": "vit", "num_hidden_layers": 2.0}, "num_hidden_layers"),
    ({"model_type": "vit", "hidden_size": -1}, "hidden_size"),
    ({"model_type": "vit", "hidden_size": 100}, "number of attention heads"),
    ({"model_type": "vit", "image_size": [224, 256]}, "image_size in config.json must be .* twice the same"),
    ({"model_type": "vit", "image_size": 1024, "patch_size": 2}, "1 to 4,096 patches"),
    ({"model_type": "vit", "image_size": 8, "patch_size": 16}, "1 to 4,096 patches"),
    ({"model_type": "vit", "hidden_act": "__import__('os')"}, "hidden_act in config.json must be one of relu, "),
    ({"model_type": "vit", "hidden_act": None}, "hidden_act"),
    ({"model_type": "vit", "layer_norm_eps": float("nan")}, "layer_norm_eps"),
    ({"model_type": "vit", "layer_norm_eps": "1e-12"}, "layer_norm_eps"),
    ({"model_type": "vit", "qkv_bias": "yes"}, "qkv_bias in config.json must be true or false"),
    ({"model_type": "vit", "num_channels": 1}, "num_channels in config.json must be one of 3"),
    ({"model_type": "vit", "problem_type": "multi_label_classification"}, "another problem"),
    ({"model_type": "resnet", "depths": [1] * 100_000}, "depths in config.json must be a list of 1 to 8"),
    ({"model_type": "resnet", "depths": [3, 4, 6]}, "lists have different lengths"),
    ({"model_type": "resnet", "depths": "3463"}, "depths"),
    ({"model_type": "resnet", "layer_type": {"a": 1}}, "layer_type in config.json must be one of basic, bottleneck"),
    ({"model_type": "convnext", "num_stages": 3}, "lists have different lengths"),
    ({"model_type": "convnext", "hidden_sizes": [2**40] * 4}, "hidden_sizes"),
    ({"model_type": "mobilenet_v2", "output_stride": 4}, "output_stride in config.json must be one of 8, 16, 32"),
    ({"model_type": "mobilenet_v2", "depth_multiplier": 1e30}, "depth_multiplier"),
    ({"model_type": "swin", "window_size": 8}, "window_size is larger"),
    ({"model_type": "swin", "num_heads": [5, 6, 12, 24]}, "number of attention heads"),
    ({"model_type": "swin", "image_size": 226}, "patch_size does not divide image_size"),
]


@pytest.mark.parametrize(("config", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_cannot_be_built_is_refused_in_a_sentence(config: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        huggingface.options_of(config)
    assert caught.value.detail.isprintable()
    assert len(caught.value.detail) < 300
