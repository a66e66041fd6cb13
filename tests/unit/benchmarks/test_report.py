"""The results page is what the records say, and an aggregate is what it is called."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks import records
from benchmarks.canaries import chosen_within
from benchmarks.detectors import DETECTORS
from benchmarks.evaluate import listing, workers
from benchmarks.readme import README
from benchmarks.report.__main__ import README_SCALE, texts
from benchmarks.report.cells import bootstrap, cells, later, tpr
from benchmarks.report.page import attempts, by_half, not_committed, not_evaluated
from benchmarks.report.performance import by_round, over_calibrations, over_http
from benchmarks.report.tables import (
    table_at_one_rate,
    table_of,
    table_of_detectors,
    table_of_later,
    table_of_promises,
    table_of_rivals,
    table_of_scales,
    weak,
    why,
)
from benchmarks.report.tuning import canaries as section
from benchmarks.report.tuning import few_images as small_sets
from calibration.canary import KINDS
from calibration.search import HOTTEST, STOPS


def record(attack: str, detector: str, value: float, seed: int = 0, gated: bool = True) -> dict[str, Any]:
    at = {"tpr": value, "tpr_masked": value, "realised_fpr": 0.01, "remaining_asr": 1 - value, "accuracy_lost": 0.01}
    about = {"dataset": "cifar10", "architecture": "resnet20", "attack": attack, "suspect_seed": 0, "detector": detector, "seed": seed, "gated": gated}
    return {**about, "auroc": value, "auroc_masked": value, "at": {"0.01": at, "0.05": at}, "passes": 1, "milliseconds": 1.0, "fit_seconds": 1.0}


def test_pages_and_the_readmes_tables_are_written_from_the_records() -> None:
    for path, text in texts(README.read_text()).items():
        assert path.read_text() == text, path.name


def test_rows_are_means_over_seeds_of_suspects_that_pass_the_gate() -> None:
    found = [record("badnet", "auto", 0.9), record("badnet", "auto", 0.8, seed=1), record("sig", "auto", 0.5), record("wanet", "auto", 0.0, gated=False)]
    lines = table_of(cells(found, ("cifar10", "resnet20")), tpr)
    assert lines[2].startswith("| BadNet | 0.850 | - |")
    assert lines[3].startswith("| SIG | 0.500 |")
    assert lines[4].startswith("| **mean** | **0.675** | - |")
    assert lines[6].startswith("| **worst** | **0.500** |")
    assert lines[7].startswith("| attacks | 2 | 0 |")


def test_a_suspect_that_no_detector_was_tried_on_is_named() -> None:
    about = {"dataset": "cifar10", "architecture": "resnet20"}
    suspects = [{**about, "attack": attack, "passes_gate": passes} for attack, passes in (("badnet", True), ("sig", True), ("wanet", False))]
    found = [record("badnet", detector, 0.9) for detector in DETECTORS]
    assert not_evaluated(suspects, found, ("cifar10", "resnet20")) == "Trained, but not evaluated yet with every detector: SIG."
    assert not_evaluated(suspects, found[1:], ("cifar10", "resnet20")) == "Trained, but not evaluated yet with every detector: BadNet, SIG."


def test_what_failed_the_gate_is_told_with_what_was_tried() -> None:
    about = {"dataset": "cifar10", "architecture": "resnet20", "recipe": {"epochs": 8, "lr": 0.2}, "rate": 0.1, "asr": 0.7, "clean_accuracy": 0.8}
    earlier = {name: about[name] for name in ("recipe", "rate", "asr", "clean_accuracy")}
    suspects = [
        {**about, "attack": "badnet", "passes_gate": True},
        {**about, "attack": "sig", "passes_gate": True, "tried": [earlier]},
        {**about, "attack": "wanet", "passes_gate": False, "asr": 0.75, "tried": [earlier]},
    ]
    once = "8 epochs at 0.2, 10% poisoned: ASR 0.700, accuracy 0.800"
    assert attempts(suspects) == [
        f"- SIG on cifar10, resnet20, passes now. Without success: {once}.",
        f"- WaNet on cifar10, resnet20, fails. Without success: {once}; {once.replace('0.700', '0.750')}.",
    ]


def test_it_is_told_which_of_the_two_networks_let_an_attack_through() -> None:
    blind = {"clean": [[0.9, 1.0], [0.9, 0.8]], "triggered": [[1.0, 1.0], [0.9, 0.1]]}
    assert why(blind) == "the expert has not forgotten the task; the auxiliary keeps the backdoor"
    deaf = {"clean": [[0.1, 0.2], [0.9, 0.1]], "triggered": [[0.1, 0.2], [0.1, 0.1]]}
    assert why(deaf) == "the expert lost the backdoor, too; the auxiliary errs on clean images"
    assert why({"clean": [[0.1], [0.9]], "triggered": [[0.9], [0.1]]}) == "clean and triggered images overlap at the edges"


def test_what_does_not_apply_is_no_figure() -> None:
    found = [{**record("badnet", "ibd_psc", 0.9), "not_applicable": "no batch norms"}, record("badnet", "paper", 0.96)]
    grouped = cells(found, ("cifar10", "resnet20"))
    assert "| - | - |" in table_of(grouped, tpr)[2]
    assert weak(grouped) == ["badnet"]


def test_an_interval_holds_the_mean_and_shrinks_to_it() -> None:
    low, high = bootstrap([0.5, 0.7, 0.9, 1.0])
    assert 0.5 < low < 0.775 < high < 1
    assert bootstrap([0.8, 0.8]) == pytest.approx((0.8, 0.8))


def test_the_list_names_what_there_is() -> None:
    found = listing()
    assert len(found["attacks"]) == 17
    assert found["datasets"] == ["cifar10", "gtsrb"]
    assert len(found["detectors"]) == 7
    assert found["presets"] == ["auto", "paper"]
    assert "resnet20" in found["architectures"]


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_the_order_of_the_cells_whatever_process_they_are_from(count: int) -> None:
    with workers(count) as each:
        assert list(each(hex, range(20))) == [hex(number) for number in range(20)]


def test_a_record_replaces_that_of_its_cell_alone(tmp_path: Any) -> None:
    for each in (record("badnet", "auto", 0.9), record("badnet", "paper", 0.7), record("badnet", "auto", 0.8)):
        records.put(each, tmp_path)
    assert sorted((each["detector"], each["auroc"]) for each in records.read(tmp_path)) == [("auto", 0.8), ("paper", 0.7)]
    assert records.recorded(record("badnet", "paper", 0.0), tmp_path)["auroc"] == 0.7  # type: ignore[index]
    assert records.recorded(record("badnet", "paper", 0.0, seed=1), tmp_path) is None


def test_a_list_keeps_one_record_of_a_cell_the_later_one_in_the_order_of_cells(tmp_path: Any) -> None:
    path = tmp_path / "list.json"
    assert records.listed(path) == []
    records.enlist(path, [{"network": "b", "size": 64, "rate": 1}, {"network": "b", "size": 8, "rate": 2}], "network", "size")
    records.enlist(path, [{"network": "a", "size": 8, "rate": 3}, {"network": "b", "size": 64, "rate": 4}], "network", "size")
    assert [(each["network"], each["size"], each["rate"]) for each in records.listed(path)] == [("a", 8, 3), ("b", 8, 2), ("b", 64, 4)]


def test_a_list_keeps_the_records_of_all_who_write_at_once(tmp_path: Any) -> None:
    path = tmp_path / "list.json"
    with ThreadPoolExecutor(8) as pool:
        for written in [pool.submit(records.enlist, path, [{"network": f"{number:02}"}], "network") for number in range(64)]:
            written.result()
    assert [each["network"] for each in records.listed(path)] == [f"{number:02}" for number in range(64)]


def test_where_another_detector_is_ahead_is_told_by_attack() -> None:
    ours, theirs = {"badnet": 1.0, "sig": 0.9, "wanet": 0.9, "blend": 0.5}, {"badnet": 0.2, "sig": 0.905, "wanet": 0.95}
    found = [record(attack, name, value) for name, values in (("auto", ours), ("strip", theirs)) for attack, value in values.items()]
    lines = table_of_rivals(cells(found, ("cifar10", "resnet20")))
    assert lines[2:] == ["| STRIP | 3 | 1 | 1 | WaNet (by 0.050) |"]  # nothing is said of Blend, where only one has a figure


def test_who_is_ahead_is_compared_at_one_rate_of_false_rejections() -> None:
    roc = {"auto": {"fpr": [0.0, 0.01, 1.0], "tpr": [0.5, 0.93, 1.0]}, "strip": {"fpr": [0.0, 0.02, 1.0], "tpr": [0.9, 0.96, 1.0]}}
    found = [{**record("wanet", name, value), "roc": roc[name]} for name, value in (("auto", 0.9), ("strip", 0.95))]
    assert table_at_one_rate(cells(found, ("cifar10", "resnet20")))[2:] == [
        "| WaNet | STRIP | 0.900 to 0.900 of 1 | 0.950 to 0.950 of 1 | 0.0100 | 0.0100 | 0.930 | 0.930 |"
    ]
    assert table_at_one_rate(cells(found[:1], ("cifar10", "resnet20"))) == []


def test_a_promise_is_shown_with_what_was_kept_of_it() -> None:
    found = {"n": 200, "target_fpr": 0.01, "interval": [0.002, 0.024], "mean_rate": 0.0099, "judged": 8800, "within": 0.912, "within_few": 0.89}
    lines = table_of_promises([{"suspect": "cifar10/resnet20/badnet", "preset": "auto", "found": [found]}])
    assert lines[2:] == ["| cifar10/resnet20/badnet, `auto` | 200 | 1.0% | 0.20% to 2.40% | 0.99% | 8800 | 91.2% | 89.0% |"]


def test_both_halves_of_the_suites_list_are_told_apart() -> None:
    found = [record("badnet", "auto", 1.0), record("wanet", "auto", 0.9), record("tact", "auto", 0.5), record("sra", "auto", 0.7), record("tact", "strip", 0.1)]
    grouped = cells(found, ("cifar10", "resnet20"))
    said = "`auto` catches of 2 of the attacks 1 to 8 0.950 on average and 0.900 at worst, of 2 of the attacks 9 to 17 0.600 on average and 0.500 at worst ("
    assert by_half(grouped).startswith(said)
    assert by_half(cells(found[:1], ("cifar10", "resnet20"))).startswith("`auto` catches of 1 of the attacks 1 to 8 1.000 on average and 1.000 at worst (")
    assert by_half({}).startswith("`auto` catches nothing that was measured (")


def test_suspects_that_came_after_the_design_have_a_table_of_their_own() -> None:
    fresh = [{**record("ft", name, value), "suspect_seed": 1, "asr": 0.99} for name, value in (("auto", 0.9), ("mahalanobis", 0.2))]
    known = [record("ft", "auto", 1.0), {**record("sig", "auto", 0.1, gated=False), "suspect_seed": 1}]
    assert table_of(cells([*fresh, *known], ("cifar10", "resnet20")), tpr)[2].startswith("| FT | 1.000 |")
    again = {**fresh[0], "seed": 1, "at": {"0.01": {**fresh[0]["at"]["0.01"], "tpr_masked": 0.8}}}
    other = {**fresh[1], "architecture": "vgg16_bn_cifar"}
    assert table_of_later(later([*fresh, *known, again, other]))[2:] == [
        "| cifar10 | resnet20 | FT | 1 | 0.990 | 0.850 | 0.0100 | 0.900 | 0.200 |",
        "| cifar10 | vgg16_bn_cifar | FT | 1 | - | - | - | - | 0.200 |",
    ]


def test_records_that_nobody_can_make_again_are_told() -> None:
    found = [{**record("badnet", name, 1.0), "commit": commit} for name, commit in (("ted", "abc-dirty"), ("auto", "abc"))]
    assert " ".join(not_committed(found)).startswith("1 of 2 records, of TED, were made while something was not committed")
    assert not_committed(found[1:]) == []


def test_networks_are_compared_over_the_attacks_that_a_detector_was_tried_on() -> None:
    found = [record(attack, detector, value) for attack, values in {"badnet": (1.0, 0.6, 0.5), "sig": (0.8, 0.4, 0.3)}.items()
             for detector, value in zip(("auto", "paper", "strip"), values, strict=True)]  # fmt: skip
    lines = table_of_scales([*found, record("sig", "beatrix", 0.9)])
    assert lines[2:] == ["| cifar10 | resnet20 | 2 | 90.0% | 80.0% (SIG) | 1.00% | 50.0% | 1 | 40.0% (STRIP) |"]


def test_an_attack_with_more_seeds_weighs_no_more_in_the_readmes_means() -> None:
    found = [record("badnet", "auto", 0.5), record("badnet", "auto", 0.7, seed=1), record("sig", "auto", 1.0)]
    assert table_of_detectors(cells(found, README_SCALE))[2] == "| `auto` | 2 | 80.0% | 60.0% (BadNet) | 0.800 | 1.00% | 1.0 |"


def planted(suspect: str, reals: list[float], worst: list[float]) -> records.Record:
    """A record of canaries: the settings of the largest grid in order, what each really caught, and the canary caught worst with it."""
    grid = [(stop, lr) for stop in STOPS["thorough"] for lr in HOTTEST["thorough"]]
    settings = zip(grid, reals, worst, strict=True)
    tried = [{"expert_stop": stop, "auxiliary_lr": lr, "caught": {"patch": 1.0, "warp": low}, "real": real} for (stop, lr), real, low in settings]
    about = [{"kind": kind, "power": 0.5 if kind == "warp" else None if kind == "sourced" else 1.0} for kind in KINDS]
    chosen = chosen_within(tried, "thorough")
    real = next(each["real"] for each in tried if (each["expert_stop"], each["auxiliary_lr"]) == (chosen.expert_stop, chosen.auxiliary_lr))
    return {"suspect": suspect, "tried": tried, "canaries": about, "real": real}


def test_what_canaries_chose_stands_beside_the_default_and_the_best() -> None:
    default_is_best = planted("a", [0.8, 0.9, 0.8, 0.8, 0.8, 0.8], [0.5] * 6)
    canaries_find_it = planted("b", [1.0, 0.7, 0.7, 0.7, 0.7, 0.7], [0.9, *[0.5] * 5])  # only `thorough` tries the hottest auxiliary
    they_mislead = planted("c", [0.5, 0.9, 0.5, 0.5, 0.6, 0.5], [0.5, 0.5, 0.5, 0.5, 0.9, 0.5])
    lines = section([default_is_best, canaries_find_it, they_mislead])
    table = [line for line in lines if line.startswith(("| a", "| b", "| c", "| **"))]
    assert table == [
        "| a | 0.900 | 0.900 | 0.900 | 1.000 | 1.000 | 0.500 | 1.000 | - |",
        "| b | 1.000 | 0.700 | 1.000 | 1.000 | 1.000 | 0.500 | 1.000 | - |",
        "| c | 0.600 | 0.900 | 0.900 | 1.000 | 1.000 | 0.500 | 1.000 | - |",
        "| **mean** | **0.833** | **0.833** | **0.933** |  |  |  |  |  |",
        "| **worst** | **0.600** | **0.700** | **0.900** |  |  |  |  |  |",
    ]
    text = " ".join(lines)
    assert "`standard` canaries choose a setting within 2 points of the best of the whole grid for 1 of 3 suspects" in text
    assert "`thorough` canaries choose a setting within 2 points of the best of the whole grid for 2 of 3 suspects" in text
    assert "The default is there for 2, and for 0 whatever setting is taken." in text
    assert "On average power is 0.042 above the real TPR; by kind: patch +0.167, blend +0.167, warp -0.333, wave +0.167." in text


def test_what_canaries_chose_is_shown_of_images_that_no_other_table_has() -> None:
    def measured(tpr: float, fpr: float, auroc: float, lost: float) -> dict[str, Any]:
        return {"auroc_masked": auroc, "at": {"0.01": {"tpr_masked": tpr, "realised_fpr": fpr, "accuracy_lost": lost}}}

    settings = [1.0, 0.9, 0.9, 0.9, 0.9, 0.9]
    found = [
        {**planted("cifar10/a", settings, settings), "by_budget": {"standard": measured(0.9, 0.01, 0.99, 0.008), "thorough": measured(1.0, 0.02, 0.99, 0.01)}},
        {**planted("cifar10/b", settings, settings), "by_budget": {"standard": measured(0.7, 0.02, 0.97, 0.004), "thorough": measured(0.8, 0.02, 0.99, 0.01)}},
    ]
    assert [line for line in section(found) if line.startswith(("| cifar10/a | 0.9", "| **cifar10"))] == [
        "| cifar10/a | 0.900 | 1.000 | 0.0100 | 0.9900 | 0.0080 |",
        "| **cifar10, mean** | **0.800** | **0.900** | **0.0150** | **0.9800** | **0.0060** |",
        "| **cifar10, worst** | **0.700** | **0.800** | **0.0200** | **0.9700** | **0.0080** |",
    ]


def test_small_clean_sets_are_shown_by_size() -> None:
    found = [
        {"suspect": "a", "images": 200, "refused": "fpr_unreachable: too few"},
        {"suspect": "a", "images": 1000, "tpr": 0.998, "realised_fpr": 0.0085},
        *({"suspect": "b", "images": 1000, "tpr": tpr, "realised_fpr": 0.01} for tpr in (1.0, 0.5, 0.75)),
    ]
    assert small_sets(found)[-4:] == [
        "| suspect | 200 images | 1,000 images |",
        "| --- | --- | --- |",
        "| a | fpr_unreachable | 0.998 (0.85%) |",
        "| b |  | 0.750, 0.500 to 1.000 of 3 (1.00%) |",
    ]


def test_servers_stand_beside_one_another() -> None:
    server = {"name": "mosec", "way": "naive", "workers": 2, "knee": 143.8, "p50_ms": 30.3, "p99_ms": 67.5, "storm_goodput": 62.0, "storm_share": 0.443}
    ours = {**server, "name": "badexpert", "way": "guard", "workers": 1, "storm_share": None, "idle_cpu": 0.002}
    lines = over_http({"servers": [ours, server], "hardware": "two cores", "commit": "abc1234", "of_best_naive": 2.5, "of_best_alone": 0.94})
    assert "| ours | guard | 1 | 144 | 30 / 68 | 62 | - |" in lines
    assert "| mosec | naive guard | 2 | 144 | 30 / 68 | 62 | 0.44 |" in lines
    assert "0.94 times what the best of them carries with the suspect alone: medians of what each round gives. The others run the" in lines
    assert any(line.endswith("Asked nothing, it takes 0.2% of a core.") for line in lines)
    assert by_round([ours, server]) == []  # as before there were rounds
    (said,) = by_round([{**ours, "knees": [300.0, 400.0]}, {**server, "knees": [143.8]}])
    assert said.endswith(": ours (guard) 300, 400 images/s.")


def test_what_a_user_waits_for_is_told_in_parts_of_the_published_recipe() -> None:
    made = {"quick": {"seconds": 41.2, "of_paper": 0.9}, "paper": {"seconds": 45.8, "of_paper": 1.0}}
    lines = over_calibrations([{"hardware": "two cores", "calibrate": made, "predict_batch_1": {"http_ms": 7.04, "server_forwards_ms": 4.0}}])
    assert "## What a user waits for, two cores" in lines
    assert "| `auto`, budget `quick` | 41 | 0.90 |" in lines
    assert lines[-2].startswith("An image takes 7.0 ms over HTTP, of which 4.0 ms are the networks")
    assert over_calibrations([]) == []
