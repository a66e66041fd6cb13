"""Rows D13, D14, G11, P2 and P11 of the abuse catalogue: versions that cannot be served, removed or activated, and guards without one."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.registry import Registry
from service.app import LOADERS
from service.engine import Engine, LiveGuard
from service.jobs import Jobs
from tests.abuse.calls import ACTIVE, GUARD, PREDICT, UPLOAD, row
from tests.support import ACCEPTS_ALL, MULTIPART, Client, assert_problem, form, make_registry, make_service, part, png, publish, serving


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return make_registry(tmp_path)


def break_weights(folder: Path) -> None:
    data = bytearray((folder / "auxiliary.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "auxiliary.safetensors").write_bytes(data)


def future_schema(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["content"]["schema"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "spoil",
    [
        row("D13: without a manifest", lambda folder: (folder / "manifest.json").unlink()),
        row("D13: without a weight file", lambda folder: (folder / "experts.safetensors").unlink()),
        row("D13: with a file too many", lambda folder: (folder / "extra").touch()),
        row("D13: with a changed weight", break_weights),
        row("D13: of a future schema", future_schema),
    ],
)
def test_p11_a_version_that_cannot_be_served_does_not_become_active(tmp_path: Path, registry: Registry, spoil: Callable[[Path], None]) -> None:
    spoil(registry.folder("cifar", publish(registry, seed=5)))
    with serving(make_service(tmp_path, registry=registry)) as client:
        before = client.predict(png()).json()["bundle_id"]
        assert_problem(client.json("PUT", ACTIVE, '{"version": 2}'), 409, "bundle_not_ready")
        assert client("GET", GUARD).json()["active"] == 1
        assert client.predict(png()).json()["bundle_id"] == before


def test_d13_an_unknown_version_is_not_found(client: Client) -> None:
    assert_problem(client.json("PUT", ACTIVE, '{"version": 2}'), 404, "not_found")


def test_p11_a_target_that_was_changed_is_in_the_way_of_no_other_version(tmp_path: Path, registry: Registry) -> None:
    publish(registry, images=20)  # too few for the target that is in force then
    with serving(make_service(tmp_path, registry=registry)) as client:
        assert client.json("PATCH", GUARD, '{"target_fpr": 0.01}').json()["served"]["target_fpr"] == 0.01
        activated = client.json("PUT", ACTIVE, '{"version": 2}').json()
        (calibrated,) = (version for version in activated["versions"] if version["version"] == 2)
        assert activated["target_fpr"] == activated["served"]["target_fpr"] == calibrated["target_fpr"]
        assert activated["served"]["fpr_interval"] == calibrated["fpr_interval"]
        assert client.predict(png()).json()["version"] == 2


def test_a_target_that_was_changed_is_told_with_its_interval_and_can_be_taken_back(client: Client) -> None:
    before = client("GET", GUARD).json()
    changed = client.json("PATCH", GUARD, '{"target_fpr": 0.01}').json()
    assert changed["served"]["target_fpr"] == 0.01
    assert changed["served"]["fpr_interval"] != before["served"]["fpr_interval"]
    assert client.json("PATCH", GUARD, '{"mode": "shadow"}').json()["target_fpr"] == 0.01
    back = client.json("PATCH", GUARD, '{"mode": "enforce", "target_fpr": null}').json()
    assert back == before


def test_a_guard_can_be_taken_out_of_service_and_deleted(tmp_path: Path, registry: Registry) -> None:
    with serving(make_service(tmp_path, registry=registry)) as client:
        assert client("DELETE", ACTIVE).status_code == 204
        view = client("GET", GUARD).json()
        assert (view["active"], view["serving"], view["served"]) == (None, False, None)
        assert_problem(client.predict(png()), 503, "no_active_bundle")
        assert client("DELETE", GUARD + "/versions/1").status_code == 204
        assert_problem(client("GET", GUARD), 404, "not_found")
        assert_problem(client("DELETE", ACTIVE), 404, "not_found")


def test_a_target_is_not_checked_against_one_version_and_kept_for_another(tmp_path: Path, registry: Registry) -> None:
    publish(registry, images=20)
    with serving(make_service(tmp_path, registry=registry)) as client:
        registry.activate("cifar", 2)  # as `calibrate --activate` does beside a running server
        assert_problem(client.json("PATCH", GUARD, '{"target_fpr": 0.01}'), 409, "conflict")
        assert registry.state("cifar").target_fpr is None
        assert client.json("PUT", ACTIVE, '{"version": 1}').status_code == 200
        assert client.json("PATCH", GUARD, '{"target_fpr": 0.01}').status_code == 200


def test_a_guard_that_could_not_be_loaded_and_was_taken_out_of_service_is_in_nobodys_way(tmp_path: Path, registry: Registry) -> None:
    break_weights(tmp_path / "guards" / "cifar" / "1")
    with serving(make_service(tmp_path, registry=registry)) as client:
        assert "cifar" in assert_problem(client("GET", "/readyz"), 503, "not_ready")["detail"]
        assert client("DELETE", ACTIVE).status_code == 204
        assert client("DELETE", GUARD + "/versions/1").status_code == 204
        assert client("GET", "/readyz").json() == {"status": "ready", "guards": [], "unavailable": {}}


def test_the_metrics_tell_of_no_guard_that_is_out_of_service(tmp_path: Path, registry: Registry) -> None:
    with serving(make_service(tmp_path, registry=registry)) as client:
        assert 'badexpert_target_fpr_ratio{guard="cifar"}' in client("GET", "/metrics").text
        client("DELETE", ACTIVE)
        assert 'badexpert_target_fpr_ratio{guard="cifar"}' not in client("GET", "/metrics").text


def test_p2_after_a_swap_everything_in_an_answer_is_of_the_new_bundle(tmp_path: Path, registry: Registry) -> None:
    publish(registry, seed=5)
    with serving(make_service(tmp_path, registry=registry)) as client:
        bundles = {version["version"]: version["bundle_id"] for version in client("GET", GUARD).json()["versions"]}
        for version in (2, 1):  # forward, and back
            assert client.json("PUT", ACTIVE, f'{{"version": {version}}}').json()["active"] == version
            answer = client.predict(png()).json()
            assert (answer["version"], answer["bundle_id"]) == (version, bundles[version])


def test_x7_a_registry_that_may_not_be_written_serves_and_says_what_to_do(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, seed=5)

    def read_only(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with serving(make_service(tmp_path, registry=registry)) as client:
        monkeypatch.setattr("models.registry.open", read_only, raising=False)
        for method, target, body in (("PUT", ACTIVE, '{"version": 2}'), ("PATCH", GUARD, '{"mode": "shadow"}'), ("DELETE", GUARD + "/versions/2", "")):
            problem = assert_problem(client.json(method, target, body), 507, "storage_unwritable")
            assert "mount it for writing" in problem["detail"]
        assert client.predict(png()).json()["version"] == 1


def test_g9_activations_that_wait_for_each_other_leave_threads_for_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go, load = threading.Event(), threading.Event(), Engine._load

    def slow(engine: Engine, guard: str, version: int) -> LiveGuard:
        loading.set()
        go.wait(60)
        return load(engine, guard, version)

    with serving(make_service(tmp_path)) as client:
        monkeypatch.setattr(Engine, "_load", slow)

        async def beside_activations() -> None:
            json_type = [("Content-Type", "application/json")]
            activations = [asyncio.create_task(client.call("PUT", ACTIVE, json_type, b'{"version": 1}')) for _ in range(2 * LOADERS)]
            while not loading.is_set():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            try:
                listed = await asyncio.wait_for(client.call("GET", "/v1/guards"), 20)
            finally:
                go.set()
            assert listed.status_code == 200
            assert {(await activation).status_code for activation in activations} == {200}

        client.runner.run(beside_activations())


def test_d14_the_active_version_cannot_be_deleted_and_another_can(tmp_path: Path, registry: Registry) -> None:
    publish(registry)
    with serving(make_service(tmp_path, registry=registry)) as client:
        assert_problem(client("DELETE", GUARD + "/versions/1"), 409, "conflict")
        assert client("DELETE", GUARD + "/versions/2").status_code == 204
        assert [version["version"] for version in client("GET", GUARD).json()["versions"]] == [1]


def test_d14_of_two_that_delete_a_version_at_once_one_is_told_that_it_is_gone(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry)
    lock, both = fcntl.flock, threading.Barrier(2, timeout=30)

    def lock_together(file: Any, operation: int) -> None:
        both.wait()  # both have looked at whatever is looked at before
        lock(file, operation)

    with serving(make_service(tmp_path, registry=registry)) as client:
        monkeypatch.setattr(fcntl, "flock", lock_together)

        async def delete_twice() -> list[httpx.Response]:
            return await asyncio.gather(*(client.call("DELETE", GUARD + "/versions/2") for _ in range(2)))

        done, late = sorted(client.runner.run(delete_twice()), key=lambda answer: answer.status_code)
        assert done.status_code == 204
        assert_problem(late, 404, "not_found")
        assert registry.versions("cifar") == [1]


def test_d14_what_a_calibration_made_is_not_taken_for_a_later_version_when_it_was_deleted(tmp_path: Path, registry: Registry) -> None:
    publish(registry, seed=5)
    with serving(make_service(tmp_path, registry=registry)) as client:

        async def prepare(jobs: Jobs) -> None:
            await jobs.add("finished", {"name": "cifar"}, "digest", None)
            await jobs.claim()
            await jobs.end("finished", "succeeded", {"guard": "cifar", "version": 2, "bundle_id": "b", "report": {"seed": 5}})

        client.runner.run(prepare(client.service.jobs))
        report = client("GET", UPLOAD + "/finished/report")
        assert (report.status_code, report.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert client("DELETE", GUARD + "/versions/2").status_code == 204
        assert publish(registry, seed=6) == 3
        body = assert_problem(client("GET", UPLOAD + "/finished/report"), 404, "not_found")
        assert "Version 2 of guard cifar was deleted" in body["detail"]
        assert client("GET", UPLOAD + "/finished/report?format=json").json() == {"seed": 5}
        version = client("GET", UPLOAD + "/finished").json()["result"]["version"]
        assert_problem(client.json("PUT", ACTIVE, f'{{"version": {version}}}'), 404, "not_found")
        assert client("GET", GUARD).json()["active"] == 1


def test_d14_a_job_that_has_ended_cannot_be_cancelled_and_a_cancelled_one_can_again(tmp_path: Path) -> None:
    with serving(make_service(tmp_path)) as client:

        async def prepare(jobs: Jobs) -> None:
            for job_id in ("finished", "waiting"):
                await jobs.add(job_id, {"name": "cifar"}, "digest", None)
            await jobs.claim()
            await jobs.end("finished", "failed", {"status": 422, "code": "suspect_model_useless", "title": "t", "detail": "d"})

        client.runner.run(prepare(client.service.jobs))
        assert_problem(client("DELETE", UPLOAD + "/finished"), 409, "conflict")
        for _ in range(2):
            answer = client("DELETE", UPLOAD + "/waiting")
            assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
        assert_problem(client("GET", UPLOAD + "/finished/report"), 409, "conflict")
        assert client("GET", UPLOAD + "/finished").json()["problem"]["code"] == "suspect_model_useless"
        metrics = client("GET", "/metrics").text
        assert 'badexpert_calibrations_total{outcome="cancelled"} 1.0' in metrics


def test_g11_a_guard_without_an_active_version_serves_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "guards")
    publish(registry)
    with serving(make_service(tmp_path, registry=registry)) as client:
        assert_problem(client.predict(png()), 503, "no_active_bundle")
        assert_problem(client("POST", PREDICT + "-batch", [("Content-Type", MULTIPART)], form(part("image", png()))), 503, "no_active_bundle")
        assert_problem(client.json("PATCH", GUARD, '{"target_fpr": 0.1}'), 409, "conflict")
        assert client("GET", "/readyz").json()["guards"] == []
        assert client.json("PUT", ACTIVE, '{"version": 1}').json()["serving"] is True
        client.assert_serves()


@pytest.mark.parametrize(
    "spoil",
    [
        row("whose active version is damaged", lambda home: break_weights(home / "1")),
        row("whose active version is gone", lambda home: shutil.rmtree(home / "1")),
        row("whose state is damaged", lambda home: (home / "state.json").write_text("{")),
        row("whose target the active version cannot promise", lambda home: (home / "state.json").write_text('{"active": 1, "target_fpr": 0.0001}')),
    ],
)
def test_g11_a_guard_does_not_keep_the_server_from_starting(tmp_path: Path, registry: Registry, spoil: Callable[[Path], None]) -> None:
    publish(registry)
    registry.activate("other", publish(registry, "other", scores=ACCEPTS_ALL))
    spoil(tmp_path / "guards" / "cifar")
    with serving(make_service(tmp_path, registry=registry)) as client:
        ready = client("GET", "/readyz").json()
        assert (ready["guards"], list(ready["unavailable"])) == (["other"], ["cifar"])
        assert_problem(client.predict(png()), 503, "no_active_bundle")
        assert client("POST", "/v1/guards/other/predict", [("Content-Type", "image/png")], png()).status_code == 200
        assert {guard["name"] for guard in client("GET", "/v1/guards").json()["guards"]} == {"cifar", "other"}


def test_g11_activation_mends_a_damaged_state(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "guards" / "cifar" / "state.json").write_text("{")
    with serving(make_service(tmp_path, registry=registry)) as client:
        assert client.json("PUT", ACTIVE, '{"version": 1}').json()["serving"] is True
        client.assert_serves()


def test_p9_with_no_guard_that_could_be_loaded_the_server_is_not_ready_until_one_is_activated(tmp_path: Path, registry: Registry) -> None:
    publish(registry)
    publish(registry, "never-activated")
    break_weights(registry.folder("cifar", 1))
    with serving(make_service(tmp_path, registry=registry)) as client:
        said = assert_problem(client("GET", "/readyz"), 503, "not_ready")["detail"]
        assert "cifar: " in said and "never-activated" not in said
        assert "badexpert_ready 0.0" in client("GET", "/metrics").text
        assert client("GET", "/livez").status_code == 200
        assert_problem(client.predict(png()), 503, "no_active_bundle")
        assert client.json("PUT", ACTIVE, '{"version": 2}').status_code == 200  # what mends it is answered
        assert client("GET", "/readyz").json() == {"status": "ready", "guards": ["cifar"], "unavailable": {}}
        client.assert_serves()


def test_p9_a_guard_that_is_mended_is_no_longer_called_unavailable_and_one_that_is_not_still_is(tmp_path: Path, registry: Registry) -> None:
    for guard in ("other", "third"):
        registry.activate(guard, publish(registry, guard))
    for guard in ("cifar", "third"):
        (tmp_path / "guards" / guard / "state.json").write_text("{")
    with serving(make_service(tmp_path, registry=registry)) as client:
        client.json("PUT", ACTIVE, '{"version": 1}')
        ready = client("GET", "/readyz").json()
        assert (ready["guards"], list(ready["unavailable"])) == (["cifar", "other"], ["third"])


def test_p9_a_server_that_was_given_no_guard_yet_is_ready_for_its_first(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, registry=Registry(tmp_path / "guards"))) as client:
        assert client("GET", "/readyz").json() == {"status": "ready", "guards": [], "unavailable": {}}


def test_the_view_tells_what_is_served_where_what_was_decided_cannot_be_read(tmp_path: Path, registry: Registry) -> None:
    with serving(make_service(tmp_path, registry=registry)) as client:
        client.json("PATCH", GUARD, '{"mode": "shadow"}')
        view = client("GET", GUARD).json()
        assert (view["active"], view["mode"], view["served"]["version"], view["served"]["mode"]) == (1, "shadow", 1, "shadow")
        (tmp_path / "guards" / "cifar" / "state.json").write_text("{")
        view = client("GET", GUARD).json()
        assert (view["active"], view["mode"], view["serving"]) == (None, None, True)
        answer = client.predict(png()).json()
        assert {name: view["served"][name] for name in ("version", "bundle_id", "mode")} == {name: answer[name] for name in ("version", "bundle_id", "mode")}
        assert answer["mode"] == "shadow"


def test_the_view_tells_what_is_served_where_another_process_activated_a_version(tmp_path: Path, registry: Registry) -> None:
    publish(registry, seed=5)
    with serving(make_service(tmp_path, registry=registry)) as client:
        registry.activate("cifar", 2)  # as `calibrate --activate` does beside a running server
        view, answer = client("GET", GUARD).json(), client.predict(png()).json()
        assert (view["active"], view["served"]["version"], answer["version"]) == (2, 1, 1)
        view = client.json("PUT", ACTIVE, '{"version": 2}').json()
        assert (view["active"], view["served"]["version"], client.predict(png()).json()["version"]) == (2, 2, 2)


def test_the_view_of_a_guard_that_is_not_served_says_so(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "guards")
    publish(registry)
    with serving(make_service(tmp_path, registry=registry)) as client:
        view = client("GET", GUARD).json()
        assert (view["active"], view["mode"], view["serving"], view["served"]) == (None, "enforce", False, None)
