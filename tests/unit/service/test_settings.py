"""What the server may be started with: rows F8 and F9."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.settings import Settings

BOTH = {"predict_token": "predict-secret", "admin_token": "admin-secret"}


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"BADEXPERT_{name.upper()}", raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_on_loopback_no_token_is_needed(host: str) -> None:
    assert Settings(host=host).token("admin") is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BADEXPERT_ADMIN_TOKEN_FIEL", "BADEXPERT_ADMIN_TOKEN_FILE"),
        ("BADEXPERT_PREDICT_TOKN", "BADEXPERT_PREDICT_TOKEN"),
        ("badexpert_predict_tokn", "BADEXPERT_PREDICT_TOKEN"),
        ("BADEXPERT_ADMIN_TOKEN_PATH", "BADEXPERT_ADMIN_TOKEN"),
        ("BADEXPERT_DEADLINE_SECOND", "BADEXPERT_DEADLINE_SECONDS"),
    ],
)
def test_f8_a_setting_under_a_misspelt_name_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    monkeypatch.setenv(name, "whatever")
    with pytest.raises(ValidationError, match=f"there is no setting {name.upper()}; {meant}"):
        Settings()


@pytest.mark.parametrize("name", ["BADEXPERT_TOKEN", "BADEXPERT_TOKEN_ADMIN", "BADEXPERT_ADMIN_SECRET", "BADEXPERT_PASSWORD_FILE"])
def test_f8_no_secret_is_passed_over(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "whatever")
    with pytest.raises(ValidationError, match=f"there is no setting {name}; BADEXPERT_"):
        Settings()


@pytest.mark.parametrize("name", ["BADEXPERT_DATA", "BADEXPERT_MEMORY", "BADEXPERT_SERVICE_HOST", "BADEXPERT_PORT_8080_TCP", "BADEXPERT_SERVICE_PORT", "OTHER"])
def test_what_others_call_so_is_their_own(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "whatever")
    assert Settings().port == 8080


def test_the_port_that_kubernetes_makes_up_for_a_service_of_our_name_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BADEXPERT_PORT", "tcp://10.0.0.1:9000")
    assert (Settings().port, Settings(port=9000).port) == (8080, 9000)
    monkeypatch.setenv("BADEXPERT_PORT", "eighty")
    with pytest.raises(ValidationError, match="port"):
        Settings()


@pytest.mark.parametrize("scope", ["predict", "metrics"])
def test_f8_who_may_less_has_no_admin_token(scope: str) -> None:
    with pytest.raises(ValidationError, match=f"the {scope} token is the admin token, too"):
        Settings(**{"predict_token": "predict-secret", "admin_token": "admin-secret", f"{scope}_token": "admin-secret"})
    assert Settings(predict_token="one-for-both", metrics_token="one-for-both", admin_token="admin-secret").token("metrics") == "one-for-both"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "guard.example", "", "127.0.0.1.example"])
@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param({}, id="without tokens"),
        pytest.param({"predict_token": "predict-secret"}, id="without an admin token"),
        pytest.param({"admin_token": "admin-secret"}, id="without a predict token"),
        pytest.param({"metrics_token": "metrics-secret"}, id="with a metrics token alone"),
    ],
)
def test_f8_elsewhere_the_server_does_not_start_without_both_tokens(host: str, tokens: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="needs tokens: set BADEXPERT_PREDICT_TOKEN_FILE and BADEXPERT_ADMIN_TOKEN_FILE"):
        Settings(host=host, **tokens)


def test_elsewhere_it_starts_with_both() -> None:
    assert Settings(host="0.0.0.0", **BOTH).token("predict") == "predict-secret"


def test_f9_white_space_around_the_token_in_a_file_is_trimmed(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("\n admin-secret\r\n")
    assert Settings(admin_token_file=file).token("admin") == "admin-secret"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "shorter than 8", id="F9: an empty file"),
        pytest.param(b" \n\n", "shorter than 8", id="F9: a file of white space"),
        pytest.param(b"1234567\n", "shorter than 8", id="F9: a token of seven characters"),
        pytest.param(b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe", "cannot be read", id="F9: a file that is no text"),
    ],
)
def test_a_token_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ValidationError, match=message):
        Settings(predict_token_file=file)


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_token_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValidationError, match="the admin token file cannot be read"):
        Settings(admin_token_file=tmp_path / name)


def test_an_empty_token_is_refused_and_not_taken_for_none() -> None:
    with pytest.raises(ValidationError, match="the admin token is shorter than 8 characters"):
        Settings(admin_token="")


def test_a_token_and_its_file_are_one_too_many(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("predict-secret")
    with pytest.raises(ValidationError, match="not both"):
        Settings(predict_token="predict-secret", predict_token_file=file)


def test_a_refusal_and_the_settings_themselves_do_not_show_tokens() -> None:
    with pytest.raises(ValidationError) as refusal:
        Settings(host="0.0.0.0", predict_token="predict-secret")
    assert "predict-secret" not in str(refusal.value)
    assert "predict-secret" not in repr(Settings(**BOTH))


def test_the_environment_is_read_under_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BADEXPERT_PORT", "9000")
    monkeypatch.setenv("BADEXPERT_ADMIN_TOKEN", "admin-secret")
    settings = Settings()
    assert (settings.port, settings.token("admin")) == (9000, "admin-secret")


def test_an_option_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BADEXPERT_PORT", "9000")
    assert Settings(port=9001).port == 9001


@pytest.mark.parametrize(
    "wrong",
    [{"port": -1}, {"port": 65536}, {"queue_images": 0}, {"max_batch": 0}, {"deadline_seconds": 0}, {"drain_seconds": -1}, {"threads": 0}, {"prot": 1}],
    ids=lambda wrong: " ".join(f"{name} = {value}" for name, value in wrong.items()),
)
def test_a_setting_out_of_its_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Settings(**wrong)


def test_the_largest_batch_fits_into_the_memory_for_images() -> None:
    assert Settings(image_bytes=2048, batch_images=3, body_bytes=3 * 2048).body_bytes == 6144
    with pytest.raises(ValidationError, match="one predict-batch request may have 6144 bytes of images: make body_bytes no less"):
        Settings(image_bytes=2048, batch_images=3, body_bytes=6143)


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
