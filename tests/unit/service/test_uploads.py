"""What becomes of the files of an upload that could be read."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from service.errors import QueueFull
from tests.support import MULTIPART, Client, form, make_service, part, serving

FORM = form(part("config", b'{"name": "new"}', None), part("checkpoint", b"x"), part("clean_set", b"x"))


async def nothing_wrong(*_: object) -> None:
    pass


def uploaded(client: Client) -> httpx.Response:
    return client("POST", "/v1/calibrations", [("Content-Type", MULTIPART)], FORM)


@pytest.mark.parametrize(
    ("end", "kept"), [(QueueFull(), False), (asyncio.CancelledError(), True)], ids=["which is refused leaves no files", "which may be there keeps its files"]
)
def test_a_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException, kept: bool) -> None:
    async def ended(*_: object) -> None:
        raise end

    with serving(make_service(tmp_path)) as client:
        monkeypatch.setattr(client.service.worker, "check", nothing_wrong)
        monkeypatch.setattr(client.service.jobs, "add", ended)
        with suppress(asyncio.CancelledError):
            assert uploaded(client).status_code == 429
        assert [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "uploads").iterdir()] == [["checkpoint", "clean_set"]] * kept


def test_what_is_acknowledged_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, fsync = list[str](), os.fsync

    def noted(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    with serving(make_service(tmp_path)) as client:
        monkeypatch.setattr(client.service.worker, "check", nothing_wrong)
        monkeypatch.setattr(os, "fsync", noted)
        job = uploaded(client).json()["id"]
    assert sorted(flushed[:2]) == ["checkpoint", "clean_set"]
    assert flushed[2:4] == [job, "uploads"]


def test_an_optional_file_that_a_form_sends_empty_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = form(part("config", b'{"name": "new"}', None), part("checkpoint", b"x"), part("checkpoint_config", b"", None), part("clean_set", b"x"))
    lacking = form(part("config", b'{"name": "new"}', None), part("checkpoint", b"", None), part("clean_set", b"x"))
    with serving(make_service(tmp_path)) as client:
        monkeypatch.setattr(client.service.worker, "check", nothing_wrong)
        answer, refused = (client("POST", "/v1/calibrations", [("Content-Type", MULTIPART)], body) for body in (sent, lacking))
        assert answer.status_code == 202
        assert sorted(path.name for path in (tmp_path / "uploads" / answer.json()["id"]).iterdir()) == ["checkpoint", "clean_set"]
        assert (refused.status_code, refused.json()["code"], refused.json()["detail"]) == (422, "upload_missing", "The upload lacks `checkpoint`.")
