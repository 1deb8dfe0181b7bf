"""The client's parts that need no service."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import sse
from client.connection import connect
from client.download import safe_target
from client.errors import BadInputError
from client.home import load_secrets, locked, write_address
from client.main import run
from client.models import parse_model
from infra.keys import is_well_formed


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "a/../b", "", ".", "a//b", "./a", "a\\b", "C:x", "a\0b", ".duquant-partial/x"],
)
def test_names_that_could_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError):
        safe_target(tmp_path, name)


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "folder").symlink_to("/tmp")
    (out / "file").symlink_to("/etc/passwd")
    for name in ("folder/x", "file"):
        with pytest.raises(BadInputError):
            safe_target(out, name)
    assert safe_target(out, "config.json") == out / "config.json"


@given(st.text(max_size=30))
def test_whatever_the_name_the_target_is_inside(name: str) -> None:
    out = Path("/nonexistent/out")
    try:
        target = safe_target(out, name)
    except BadInputError:
        return
    assert Path(os.path.normpath(target)).is_relative_to(out)
    assert target != out


def test_models_are_read_from_text() -> None:
    assert parse_model("demo:smollm2-135m") == {"source": "demo", "name": "smollm2-135m", "revision": None}
    assert parse_model("hub:a/b@c0ffee")["revision"] == "c0ffee"
    for text in ("smollm2", "ftp:x", "local:", ""):
        with pytest.raises(BadInputError):
            parse_model(text)


def test_events_are_read_as_they_are_written() -> None:
    lines = [
        "retry: 3000",
        "",
        ": keep-alive",
        "",
        "id: 4",
        "event: a",
        'data: {"x":',
        "data: 1}",
        "",
        "event: cut",
        "data: {",
    ]
    assert list(sse.parse(lines)) == [sse.ServerSentEvent("a", "4", {"x": 1})]


def test_secrets_are_made_once_and_only_the_owner_can_read_them(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = load_secrets(home)
    assert load_secrets(home) == first
    assert stat.S_IMODE((home / "secrets.json").stat().st_mode) == 0o600
    assert is_well_formed(first.api_key)
    assert len({first.api_key, first.key_pepper, first.s3_access_key, first.s3_secret_key}) == 4


def test_damaged_secrets_are_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "secrets.json").write_text("{")
    with pytest.raises(BadInputError, match="damaged"):
        load_secrets(tmp_path)


def test_a_home_is_used_by_one_at_a_time(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from client.home import locked\nwith locked(Path(sys.argv[1])): pass"
    )
    with locked(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60
        )
    assert "another `duquant up` runs" in done.stderr
    with locked(tmp_path):
        pass


def test_the_embedded_key_goes_to_the_embedded_service_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUQUANT_HOME", str(tmp_path))
    monkeypatch.delenv("DUQUANT_API_KEY", raising=False)
    load_secrets(tmp_path)
    write_address(tmp_path, "http://127.0.0.1:8123", "http://127.0.0.1:8124")
    with connect(None, None) as client:
        assert client.url == "http://127.0.0.1:8123"
    with connect("http://127.0.0.1:8123/", None):
        pass
    with pytest.raises(BadInputError, match="API key"):
        connect("http://elsewhere.example", None)


def test_recipes_are_listed_and_shown_as_recipe_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipe", "list", "--json"]) == 0
    names = [item["name"] for item in json.loads(capsys.readouterr().out)["items"]]
    for name in names:
        assert run(["recipe", "show", name]) == 0
        path = tmp_path / f"{name}.json"
        path.write_text(capsys.readouterr().out)
        assert run(["recipe", "show", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ('{"wieght": {}}', "wieght"),
        ('{"weight": {"bits": 5}}', "weight.bits"),
        ('{"weight": {"bits": "4"}}', "weight.bits"),
        ("[]", "JSON object"),
        ("{", "no JSON"),
    ],
)
def test_a_wrong_recipe_file_is_one_line_that_names_the_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, words: str
) -> None:
    (tmp_path / "r.json").write_text(recipe)
    arguments = ["quantize", "demo:smollm2-135m", "--recipe", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")]
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert words in err


def test_force_replaces_artifacts_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for force in ([], ["--force"]):
        assert run(["quantize", "demo:smollm2-135m", "--out", str(tmp_path), *force]) == 2
    assert "not an artifact" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "/absent"],
        ["eval", "demo:smollm2-135m", "--text", "/absent.txt"],
        ["eval", "demo:smollm2-135m", "--text", "builtin:absent"],
        ["eval", "demo:smollm2-135m", "--text", "none"],
        ["eval", "demo:smollm2-135m", "--tasks", "/absent.yaml"],
        ["eval", "demo:smollm2-135m", "--tasks", "../piqa"],
        ["eval", "demo:smollm2-135m", "--tasks", "piqa", "--tasks", "piqa"],
        ["generate", "/absent"],
        ["quantize", "demo:smollm2-135m", "--out", "x", "--calibration", "/absent.txt"],
        ["quantize", "demo:smollm2-135m", "--out", "x", "--samples", "0"],
        ["quantize", "demo:smollm2-135m", "--out", "x", "--recipe", "duqant"],
        ["recipe", "show", "duqant"],
        ["up", "--model-root", "/absent"],
        ["up", "--port", "0"],
    ],
)
def test_bad_local_input_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(arguments) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert len(out.err.strip().splitlines()) == 1


def test_verify_without_a_manifest_is_a_failed_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
