"""What Prometheus sees is bounded, and there from the start."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs
from torch import Tensor

from models.errors import ImageProblem, Problem, all_problems
from models.preprocessing import decode
from service.engine import Engine, LiveGuard, Outcome
from service.errors import Overloaded
from service.metrics import IMAGE_OUTCOMES, NAMES, Metrics
from tests.support import MULTIPART, REJECTS_ALL, Client, form, make_registry, make_service, part, png, serving

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


def images(client: Client) -> dict[str, float]:
    """The outcomes of images that there were, and how often."""
    found = {name.split("'")[3]: value for name, value in series(client).items() if name.startswith("badexpert_images_total")}
    assert set(found) == set(IMAGE_OUTCOMES)
    return {outcome: count for outcome, count in found.items() if count}


def batch(client: Client, *images: bytes, guard: str = "cifar") -> Any:
    return client("POST", f"/v1/guards/{guard}/predict-batch", [("Content-Type", MULTIPART)], form(*(part("image", data) for data in images)))


def test_each_image_is_counted_once_by_what_became_of_it_alone_or_in_a_batch(client: Client) -> None:
    assert images(client) == {}
    client.predict(png())
    client.predict(png()[:100])
    assert images(client) == {"accepted": 1, "image_undecodable": 1}
    answer = batch(client, png(), b"", png(1, 1), b"GIF89a" + bytes(20), png())
    assert [item["problem"] and item["problem"]["code"] for item in answer.json()["items"]] == [
        *(None, "image_undecodable", "image_too_small", "image_format", None)
    ]
    assert images(client) == {"accepted": 3, "image_undecodable": 2, "image_too_small": 1, "image_format": 1}
    client("POST", "/v1/guards/cifar/predict", [("Content-Type", "image/png"), ("X-Deadline-Ms", "0")], png())
    assert images(client)["deadline_exceeded"] == 1


def test_rejected_images_are_counted_as_such(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, registry=make_registry(tmp_path, scores=REJECTS_ALL))) as client:
        batch(client, png(), png())
        client.predict(png())
        assert images(client) == {"rejected": 3}


def test_requests_without_an_image_and_unknown_guards_add_no_series(client: Client) -> None:
    for number in range(10):
        batch(client, png(), guard=f"nobody-{number}")
        client("POST", f"/v1/guards/nobody-{number}/predict", [("Content-Type", "image/png")], png())
    batch(client)
    client.predict(b"")
    assert images(client) == {}
    client.service.metrics.count_image("of the caller's own making")
    assert images(client) == {"internal": 1}


def test_every_problem_that_can_end_an_image_is_an_outcome() -> None:
    codes = {kind.code for kind in all_problems()}
    assert set(IMAGE_OUTCOMES) - codes == {"accepted", "rejected", "abandoned"}
    assert {kind.code for kind in all_problems(ImageProblem)} | {Problem.code, Overloaded.code} <= set(IMAGE_OUTCOMES)


class Nothing(Engine):
    """Computes scores that are none."""

    def run(self, live: LiveGuard, pixels: list[Tensor]) -> list[Outcome]:
        return [replace(outcome, score=math.nan) for outcome in super().run(live, pixels)]


def test_server_errors_within_a_batch_are_counted_for_each_image_and_logged_once(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, Nothing)) as client, capture_logs() as logs:
        answer = batch(client, png(), png()[:100], png())
        assert answer.status_code == 200
        assert images(client) == {"score_not_finite": 2, "image_undecodable": 1}
    failures = [entry for entry in logs if entry["event"] == "request_failed"]
    assert [(entry["request_id"], entry["code"], entry["images"]) for entry in failures] == [(answer.headers["x-request-id"], "score_not_finite", 2)]


def test_p4_what_nobody_foresaw_about_one_image_leaves_the_others_of_its_batch_their_answers(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes, *others: Any) -> Image.Image:
        if data == png(seed=13):
            raise MemoryError("secret")
        return decode(data, *others)

    monkeypatch.setattr("service.images.decode", broken)
    with capture_logs() as logs:
        answer = batch(client, png(), png(seed=13), png())
    assert [item["problem"] and item["problem"]["code"] for item in answer.json()["items"]] == [None, "internal", None]
    assert images(client) == {"accepted": 2, "internal": 1}
    assert "secret" not in answer.text
    assert {"unforeseen", "request_failed"} == {entry["event"] for entry in logs}


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
        rejections = [name for name, value in found.items() if name.startswith("badexpert_rejections_total") and value]
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
    assert b'badexpert_calibrations_total{outcome="failed"} 0.0' in second.render()
