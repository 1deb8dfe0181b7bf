"""Log lines are JSON on standard error, and secrets never reach them."""

import errno
import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from pydantic import SecretStr

from infra.errors import (
    DatabaseUnusable,
    InfraError,
    SettingsError,
    StartupError,
    StorageRefused,
    TransientError,
)
from infra.keys import new_token
from infra.logging import fail_with, setup_logging

CANARY = "canary-4f1d9c"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, config = root.handlers, root.level, structlog.get_config()
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.configure(**config)
    structlog.contextvars.clear_contextvars()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_an_event_is_one_json_line_with_its_context(capsys: pytest.CaptureFixture[str]) -> None:
    log = setup_logging("workers")
    with structlog.contextvars.bound_contextvars(job_id="job_1", layer=3):
        log.info("layer_quantized", mse=0.5, seconds=2.0)
    (line,) = lines(capsys)
    assert line.pop("timestamp")
    assert line == {
        "event": "layer_quantized",
        "level": "info",
        "process": "workers",
        "job_id": "job_1",
        "layer": 3,
        "mse": 0.5,
        "seconds": 2.0,
    }


def test_the_standard_librarys_records_look_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("workers")
    with structlog.contextvars.bound_contextvars(job_id="job_1"):
        logging.getLogger("duquant.pipeline").warning("slow layer %d", 3)
    (line,) = lines(capsys)
    assert (line["event"], line["level"], line["job_id"]) == ("slow layer 3", "warning", "job_1")


def test_the_level_is_kept_and_chatty_libraries_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    log = setup_logging("service", level="DEBUG")
    log.debug("seen")
    logging.getLogger("botocore.auth").debug("CanonicalRequest")
    assert [line["event"] for line in lines(capsys)] == ["seen"]
    log = setup_logging("service", level="ERROR")
    log.warning("not seen")
    assert lines(capsys) == []


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_no_secret_reaches_a_log_line(capsys: pytest.CaptureFixture[str], fmt: str) -> None:
    log = setup_logging("service", fmt=fmt, secrets=(SecretStr(CANARY),))
    token = new_token()
    log.info("by_name", secret_key="hunter-x1", password="hunter-x2", headers={"Authorization": "hunter-x3"})
    log.info("nested", items=[{"api_key": "hunter-x4", "deep": ({"cookie": "hunter-x5"},)}])
    log.info("by_value", text=f"before {CANARY} after", items=[CANARY], key=token)
    log.info("by_type", value=SecretStr("hunter-x6"), raw=b"hunter-x7")
    log.info("webhook", text="signed with whsec_aHVudGVyLXgxMQ+/==")
    log.info("by_shape", url="postgresql://alice:hunter-x8@db/duquant", header="Bearer hunter-x9")
    log.info("presigned", url="https://s3/b/k?X-Amz-Credential=hunter-x10%2Fa&X-Amz-Signature=abcdef0123456789&x=1")
    logging.getLogger("other").error("token %s and %s", token, CANARY)
    try:
        raise ValueError(f"wrong key {token} {CANARY}")
    except ValueError:
        log.exception("crashed")
    output = capsys.readouterr().err
    assert output.count("***") >= 12
    for secret in (CANARY, token, "hunter-x", "aHVudGVyLXgxMQ", "abcdef0123456789"):
        assert secret not in output
    assert "before" in output
    assert "alice" not in output
    assert "crashed" in output
    assert "wrong key" in output


class FullDisk(io.StringIO):
    def write(self, _text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_line_that_cannot_be_written_fails_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = io.StringIO()
    gone.close()
    for stream in (FullDisk(), gone):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", stream)
            setup_logging("service").error("lost")


def test_numbers_and_harmless_names_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("service").info("tokenized", tokens=2048, token_count=7, missing=None, done=True)
    (line,) = lines(capsys)
    assert (line["tokens"], line["token_count"], line["missing"], line["done"]) == (2048, 7, None, True)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SettingsError("no"), 2),
        (TransientError("no"), 5),
        (DatabaseUnusable("no"), 5),
        (StorageRefused("no"), 5),
        (StartupError("no"), 1),
    ],
)
def test_the_exit_status_tells_bad_settings_from_a_part_that_is_down(error: InfraError, status: int) -> None:
    with pytest.raises(SystemExit) as caught:
        fail_with(error)
    assert caught.value.code == status


def test_a_process_ends_with_one_line_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    token = new_token()
    with pytest.raises(SystemExit) as caught:
        fail_with(InfraError(f"no database with {token}"))
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: no database with ***\n"
