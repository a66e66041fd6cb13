"""What Prometheus sees is bounded, and there from the start."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import NAMES, Metrics
from tests.support import REJECTS_ALL, Client, make_registry, make_service, png, serving

REFERENCE = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with serving(make_service(tmp_path)) as client:
        yield client


def series(client: Client) -> dict[str, float]:
    text = client("GET", "/metrics").text
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_e20_10_000_paths_add_no_series(client: Client) -> None:
    client("GET", "/nowhere")
    client("GET", "/v1/guards/nobody")
    series(client)  # that call has series of its own
    before = set(series(client))
    for number in range(5000):
        client("GET", f"/nowhere/{number}")
        client("GET", f"/v1/guards/nobody-{number}")
    assert set(series(client)) == before


def test_p5_methods_of_the_callers_own_making_share_one_series(client: Client) -> None:
    client("BREW", "/nowhere")
    series(client)
    before = set(series(client))
    for number in range(100):
        client(f"BREW{number}", "/nowhere")
    assert set(series(client)) == before


def test_both_verdicts_have_a_series_before_the_first_image(client: Client) -> None:
    found = series(client)
    for verdict in ("accepted", "rejected"):
        assert found[f"badexpert_verdicts_total[('guard', 'cifar'), ('verdict', '{verdict}')]"] == 0


def test_an_accepted_image_is_counted(client: Client) -> None:
    client.predict(png())
    found = series(client)
    assert found["badexpert_verdicts_total[('guard', 'cifar'), ('verdict', 'accepted')]"] == 1
    assert found["badexpert_score_count[('guard', 'cifar')]"] == 1
    assert found["badexpert_batch_images_count[]"] == 1
    assert {stage: found[f"badexpert_stage_seconds_count[('stage', '{stage}')]"] for stage in ("decode", "queue", "forward")} == dict.fromkeys(
        ("decode", "queue", "forward"), 1
    )


def test_a_rejected_image_is_counted_by_the_class_it_would_have_got_and_keeps_no_prediction(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, registry=make_registry(tmp_path, scores=REJECTS_ALL))) as client:
        answer = client.predict(png()).json()
        assert (answer["verdict"], answer["prediction"]) == ("rejected", None)
        found = series(client)
        assert found["badexpert_verdicts_total[('guard', 'cifar'), ('verdict', 'rejected')]"] == 1
        rejections = [name for name in found if name.startswith("badexpert_rejections_total")]
        assert len(rejections) == 1 and re.search(r"\('predicted_class', '[0-9]'\)", rejections[0])


def test_what_is_served_is_told_with_its_promise(client: Client) -> None:
    found = series(client)
    assert found["badexpert_target_fpr_ratio[('guard', 'cifar')]"] == 0.05
    (info,) = (name for name in found if name.startswith("badexpert_guard_info"))
    assert "('mode', 'enforce')" in info and "('version', '1')" in info
    client.json("PATCH", "/v1/guards/cifar", '{"mode": "shadow", "target_fpr": 0.1}')
    found = series(client)
    assert found["badexpert_target_fpr_ratio[('guard', 'cifar')]"] == 0.1
    (info,) = (name for name in found if name.startswith("badexpert_guard_info"))
    assert "('mode', 'shadow')" in info


def test_gauges_tell_of_readiness_and_the_queue(client: Client) -> None:
    found = series(client)
    assert (found["badexpert_ready[]"], found["badexpert_queue_images[]"], found["badexpert_queue_capacity_images[]"]) == (1, 0, 512)
    client.service.health.draining = True
    assert series(client)["badexpert_ready[]"] == 0


def test_every_metric_is_in_the_reference_and_the_reference_has_no_other() -> None:
    assert set(re.findall(r"^\| `(badexpert_[a-z_]+)` \|", REFERENCE.read_text(), re.MULTILINE)) == NAMES


def test_two_services_do_not_share_metrics() -> None:
    first, second = Metrics(), Metrics()
    first.calibrations.labels("failed").inc()
    assert b'badexpert_calibrations_total{outcome="failed"}' not in second.render()
