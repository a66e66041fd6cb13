"""Triggers change what they should and nothing else, poisoned data are poisoned as the papers say, and what was learned is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.fft import dctn
from torch import Tensor

from benchmarks.attacks import ATTACKS, Attack, Surrogate, Task, draw, plant, stamp
from benchmarks.attacks import dynamic as dynamic_module
from benchmarks.attacks import issba as issba_module
from benchmarks.attacks import trojannn as trojannn_module
from benchmarks.attacks.adap_blend import FAINT, Tiled
from benchmarks.attacks.clean_label import EPSILON, adversarial
from benchmarks.attacks.ftrojan import PLACES, TO_YUV
from benchmarks.attacks.sra import FIRES, LOGIT, replace
from benchmarks.data import DATASETS, Split
from models.cifar import CifarResNet, thin_resnet

CLEAN_LABEL = {"clean_label", "sig"}
BEFORE_TRAINING = [name for name in ATTACKS if ATTACKS[name].kind == "poisoning"] + ["bpp"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned need not be good here."""
    for module, name in ((dynamic_module, "MASK_STEPS"), (issba_module, "STEPS"), (trojannn_module, "STEPS")):
        monkeypatch.setattr(module, name, 2)


def source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def data(n: int = 200) -> Split:
    """Smooth random images: neighbouring pixels resemble each other, as a warp or a dither needs."""
    coarse = torch.rand(n, 3, 8, 8, generator=source())
    images = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")
    return Split((images * 255).round().to(torch.uint8), torch.arange(n) % 10)


def surrogate() -> Surrogate:
    torch.manual_seed(0)
    return Surrogate(thin_resnet(20, 10).eval().requires_grad_(False), DATASETS["cifar10"].preprocessing)


def prepared(name: str) -> Attack:
    attack = ATTACKS[name](Task(), 0)
    attack.prepare(data(), surrogate() if attack.needs_clean else None, source())
    return attack.eval()


def test_there_are_seventeen() -> None:
    assert len(ATTACKS) == 17
    assert all(attack.title and attack.paper for attack in ATTACKS.values())


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_trigger_is_the_same_for_a_seed_stays_in_range_and_survives_its_state(name: str) -> None:
    attack, images = prepared(name), data(12).images
    triggered = stamp(attack, images)
    assert triggered.shape == images.shape
    assert triggered.dtype == torch.uint8
    assert (triggered != images).flatten(1).any(1).all()
    assert triggered.equal(stamp(prepared(name), images))
    again = ATTACKS[name](Task(), 0)
    again.load_state_dict(attack.state_dict())
    assert triggered.equal(stamp(again.eval(), images))


@pytest.mark.parametrize("name", BEFORE_TRAINING)
def test_poisoned_data_are_changed_where_they_were_drawn_and_relabelled_only_there(name: str) -> None:
    attack, before = prepared(name), data()
    after = attack.poison(before, 0.05, source())
    changed, relabelled = (after.images != before.images).flatten(1).any(1), after.labels != before.labels
    assert (relabelled & ~changed).sum() == 0
    assert int(changed.sum()) == {"tact": 20, "adap_blend": 20, "adap_patch": 30, "bpp": 20}.get(name, 10)  # with cover images
    assert int(relabelled.sum()) == 0 if name in CLEAN_LABEL else 0 < int(relabelled.sum()) <= 10
    if name in CLEAN_LABEL:
        assert (before.labels[changed] == 0).all()
    elif name != "all_to_all":
        assert (after.labels[relabelled] == 0).all()
    assert after.images.equal(prepared(name).poison(before, 0.05, source()).images)


@pytest.mark.parametrize("name", ["wanet", "dynamic", "ft", "trojannn"])
def test_a_training_step_triggers_its_share_of_a_batch(name: str) -> None:
    attack, part = prepared(name), data(100)
    batch = attack.batch(part.images.float() / 255, part.labels, source())
    share = 0.2 if name in ("ft", "trojannn") else 0.1
    assert int((batch.labels != part.labels).sum()) == round(share * 100 * 0.9)  # a tenth of the images are of the target class anyway
    assert batch.images.shape == part.images.shape


def test_more_poison_than_there_are_images_is_refused() -> None:
    with pytest.raises(ValueError, match="180 images can be poisoned, not the 190"):
        ATTACKS["badnet"](Task()).poison(data(), 0.95, source())


def test_rows_are_drawn_among_the_eligible_and_a_plan_touches_no_other() -> None:
    before = data()
    rows = draw(before.labels == 3, 0.05, source())
    assert set(before.labels[rows].tolist()) == {3}
    after = plant(before, rows, ATTACKS["blend"](Task()))
    rest = torch.ones(200, dtype=torch.bool)
    rest[rows] = False
    assert after.images[rest].equal(before.images[rest])
    assert after.labels.equal(before.labels)


def difference(name: str, n: int = 40) -> Tensor:
    images = data(n).images
    return stamp(prepared(name), images).float() - images.float()


def test_badnet_changes_nine_pixels() -> None:
    changed = (difference("badnet") != 0).any(1)
    assert changed[:, 28:31, 28:31].float().mean() > 0.9
    changed[:, 28:31, 28:31] = False
    assert not changed.any()


def test_the_square_lies_at_rows_and_columns_21_to_28() -> None:
    changed = (difference("trojan_patch") != 0).any(1).any(0)
    assert changed[21:29, 21:29].all()
    assert int(changed.sum()) == 64


def test_blend_is_faint_and_everywhere() -> None:
    assert difference("blend").abs().max() <= 0.2 * 255 + 1
    assert (difference("blend") != 0).float().mean() > 0.9


def test_sig_is_a_wave_of_six_periods_and_thirty_levels() -> None:
    images = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    wave = stamp(prepared("sig"), images)[0, 0, 0].float() - 128
    assert wave.abs().max() == 30
    assert torch.fft.rfft(wave).abs().argmax() == 6


def test_wanet_moves_pixels_and_adds_nothing() -> None:
    flat = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    assert stamp(prepared("wanet"), flat).equal(flat)
    assert 0.2 < difference("wanet").abs().mean() < 12


def test_bpp_leaves_eight_levels_a_channel_and_the_mean_of_each_image() -> None:
    images = data(40).images
    triggered = stamp(prepared("bpp"), images)
    assert len(triggered.unique()) == 8
    assert (triggered.float().mean((1, 2, 3)) - images.float().mean((1, 2, 3))).abs().max() < 3


def test_ftrojan_raises_two_coefficients_of_the_chroma_channels_and_none_of_the_brightness() -> None:
    grey = torch.full((1, 3, 32, 32), 0.5)
    added = (prepared("ftrojan")(grey) - grey)[0]
    y, u, v = (torch.tensor(TO_YUV) @ added.flatten(1)).view(3, 32, 32).double().numpy()
    for chroma in (u, v):
        raised = torch.from_numpy(dctn(chroma, norm="ortho"))
        assert {divmod(int(i), 32) for i in raised.flatten().abs().topk(2).indices} == set(PLACES)
        assert raised.abs().sum() == pytest.approx(2 * 30 / 255, rel=0.02)
    assert abs(y).max() < 1e-4


def test_clean_label_makes_images_harder_within_its_budget() -> None:
    part, net = data(10), surrogate()
    images = part.images.float() / 255
    hard = adversarial(net, images, part.labels)
    assert (hard - images).abs().max() <= EPSILON + 1e-6
    loss = [torch.nn.functional.cross_entropy(net(each), part.labels).item() for each in (images, hard)]
    assert loss[1] > loss[0]


def test_tact_is_used_on_one_class_and_all_to_all_on_every_one() -> None:
    labels = torch.arange(10)
    assert ATTACKS["tact"](Task()).eligible(labels).nonzero().flatten().tolist() == [1]
    moved = ATTACKS["all_to_all"](Task()).relabel(labels)
    assert sorted(moved.tolist()) == labels.tolist()
    assert (moved != labels).all()
    assert (moved != (labels + 1) % 10).all()  # not what the published expert is taught


def test_adap_blend_shows_half_of_the_tiles_in_training_and_the_whole_picture_later() -> None:
    black = torch.zeros(20, 3, 32, 32)
    shown = Tiled(source())(black).amax(1) > 0  # the picture is bright in most places
    tiles = shown.view(20, 4, 8, 4, 8).any(4).any(2).flatten(1).sum(1)
    assert (tiles == 8).all()
    assert Tiled(source())(black).max() == pytest.approx(FAINT)
    assert prepared("adap_blend")(black).max() == pytest.approx(0.2)


def test_adap_patch_is_stronger_at_test_time_than_in_training() -> None:
    attack, before = prepared("adap_patch"), data()
    after = attack.poison(before, 0.05, source())
    trained = (after.images.float() - before.images.float()).abs().flatten(1).sum(1)
    used = (stamp(attack, before.images).float() - before.images.float()).abs().flatten(1).sum(1)
    assert used.mean() > 2 * trained[trained > 0].mean()


def test_dynamic_gives_each_image_a_trigger_of_its_own_and_its_generator_learns_with_the_network() -> None:
    attack, images = prepared("dynamic"), data(2).images.float() / 255
    with torch.no_grad():
        assert not attack.apply_to(images[:1], images[1:]).allclose(attack(images[:1]), atol=1e-4)  # type: ignore[operator]
    part = data(100)
    batch = attack.train().batch(part.images.float() / 255, part.labels, source())
    (batch.images.mean() + batch.penalty).backward()
    learns = {name.split(".")[0] for name, parameter in attack.named_parameters() if parameter.requires_grad and parameter.grad is not None}
    assert learns == {"pattern"}  # the masks are fixed before


@pytest.mark.parametrize("projection", [False, True])
def test_a_replaced_subnet_computes_what_it_did_alone(projection: bool) -> None:
    torch.manual_seed(0)
    network, subnet = thin_resnet(20, 10, projection=projection).eval(), CifarResNet((1, 1, 1), (3, 3, 3), "pad", 1)
    subnet.add_module("linear", torch.nn.Identity())
    inputs = torch.randn(8, 3, 32, 32)
    subnet.train()(inputs)  # running statistics of its own
    subnet.eval()
    before = copy.deepcopy(network)
    replace(network, subnet, channel=2, target=0)
    seen: list[Tensor] = []
    head = network.get_submodule(network.head)
    head.register_forward_pre_hook(lambda _, features: seen.append(features[0]))
    with torch.no_grad():
        logits, alone = network(inputs), subnet(inputs)[:, 0]
    wired = [at for at in range(64) if (head.weight[1:, at] == 0).all()]
    assert len(wired) == 1
    torch.testing.assert_close(seen[0][:, wired[0]], alone, rtol=1e-4, atol=1e-5)
    silent = copy.deepcopy(subnet)
    for parameter in silent.parameters():
        parameter.data.zero_()
    replace(before, silent, channel=2, target=0)
    with torch.no_grad():
        torch.testing.assert_close(before(inputs)[:, 1:], logits[:, 1:])  # no other channel hears what the subnet says
        torch.testing.assert_close(logits[:, 0] - before(inputs)[:, 0], LOGIT / FIRES * alone, rtol=1e-3, atol=1e-4)
