"""Uploads that are refused before a child process reads anything of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.abuse.calls import UPLOAD, row, unread
from tests.support import MULTIPART, Client, assert_problem, form, make_service, part, serving

CONFIG = part("config", b'{"name": "new"}', None)
CHECKPOINT, CLEAN = part("checkpoint", b"x"), part("clean_set", b"x")


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        row("no multipart", "application/json", b"{}", 415, "media_type"),
        row("no type", "", b"{}", 415, "media_type"),
        row("nothing", MULTIPART, form(), 422, "upload_missing"),
        row("no config", MULTIPART, form(CHECKPOINT, CLEAN), 422, "upload_missing"),
        row("no checkpoint", MULTIPART, form(CONFIG, CLEAN), 422, "upload_missing"),
        row("no clean set", MULTIPART, form(CONFIG, CHECKPOINT), 422, "upload_missing"),
        row("a checkpoint as text", MULTIPART, form(CONFIG, part("checkpoint", b"x", None), CLEAN), 422, "upload_missing"),
        row("an unknown part", MULTIPART, form(CONFIG, CHECKPOINT, CLEAN, part("../evil", b"x")), 422, "unexpected_field"),
        row("a part twice", MULTIPART, form(CONFIG, CHECKPOINT, CHECKPOINT, CLEAN), 422, "unexpected_field"),
        row("never closed", MULTIPART, CONFIG + CHECKPOINT + CLEAN, 400, "multipart_invalid"),
        row("a config of more than 64 KiB", MULTIPART, form(part("config", b" " * 65537, None)), 413, "body_too_large"),
        row("D1: a config that is no JSON", MULTIPART, form(part("config", b"{bad", None), CHECKPOINT, CLEAN), 400, "json_invalid"),
        row("D2: NaN in a config", MULTIPART, form(part("config", b'{"name": "a", "target_fpr": NaN}', None), CHECKPOINT, CLEAN), 422, "config_invalid"),
        row("D7: an unknown key in a config", MULTIPART, form(part("config", b'{"name": "a", "lr": 1}', None), CHECKPOINT, CLEAN), 422, "config_invalid"),
        row("D10: a seed of 2^64", MULTIPART, form(part("config", b'{"name": "a", "seed": 18446744073709551616}'), CHECKPOINT, CLEAN), 422, "config_invalid"),
        row("D10: a seed of -1", MULTIPART, form(part("config", b'{"name": "a", "seed": -1}'), CHECKPOINT, CLEAN), 422, "config_invalid"),
        row("B16: a checkpoint over its cap", MULTIPART, form(CONFIG, part("checkpoint", bytes(1024 * 1024 + 1))), 413, "body_too_large"),
        row(
            "B19: an unknown architecture", MULTIPART, form(part("config", b'{"name": "a", "architecture": "../x"}'), CHECKPOINT, CLEAN), 422, "config_invalid"
        ),
        row("D12: a guard's name that is a path", MULTIPART, form(part("config", b'{"name": "../a"}'), CHECKPOINT, CLEAN), 422, "config_invalid"),
    ],
)
def test_an_upload_is_refused_and_leaves_nothing_behind(client: Client, content_type: str, body: bytes, status: int, code: str) -> None:
    assert_problem(client("POST", UPLOAD, [("Content-Type", content_type)] if content_type else [], body), status, code)


def test_g8_where_no_more_calibrations_may_wait_an_upload_is_refused_unread(tmp_path: Path) -> None:
    with serving(make_service(tmp_path, queued_jobs=1)) as client:
        client.runner.run(client.service.jobs.add("waiting", {"name": "cifar"}, "digest", None))
        response = client("POST", UPLOAD, [("Content-Type", MULTIPART)], form(CONFIG, CHECKPOINT, CLEAN), on_receive=unread)
        assert_problem(response, 429, "queue_full")
