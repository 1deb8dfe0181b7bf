"""Services by name, and which address and key a command uses."""

import io
import json
import stat
from pathlib import Path

import pytest

from client.connection import locate
from client.errors import BadInputError
from client.home import load_secrets, write_address
from client.main import run


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DUQUANT_URL", "DUQUANT_API_KEY", "DUQUANT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DUQUANT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DUQUANT_CONFIG", str(tmp_path / "duquant" / "config.yaml"))
    return tmp_path / "duquant" / "config.yaml"


def profile(*arguments: str) -> None:
    assert run(["profile", *arguments]) == 0


def test_profiles_are_kept_where_only_the_owner_reads_them(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile("set", "lab", "--url", "https://lab.example/", "--key", "dq_live_0123456789")
    profile("set", "home", "--url", "http://127.0.0.1:8000")
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    profile("list", "--json")
    out = capsys.readouterr().out
    assert "0123456789" not in out
    assert [(item["name"], item["is_default"]) for item in json.loads(out)["items"]] == [("lab", True), ("home", False)]
    profile("use", "home")
    assert locate() == ("http://127.0.0.1:8000", None)
    profile("remove", "home")
    assert locate() == ("http://127.0.0.1:8000", None)
    assert locate(profile="lab") == ("https://lab.example", "dq_live_0123456789")


def test_a_key_can_come_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("dq_live_secret\n"))
    profile("set", "lab", "--url", "https://lab.example", "--key", "-")
    assert locate() == ("https://lab.example", "dq_live_secret")


def test_no_key_on_stdin_is_an_error_and_saves_nothing(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A `pass show` that fails in front of the pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(["profile", "set", "lab", "--url", "https://lab.example", "--key", "-"]) == 2
    assert "found no key" in capsys.readouterr().err
    assert not config.exists()


def test_the_order_is_option_profile_environment_default_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = load_secrets(tmp_path / "home")
    write_address(tmp_path / "home", "http://127.0.0.1:8123", "http://127.0.0.1:8124")
    assert locate() == ("http://127.0.0.1:8123", secrets.api_key)
    profile("set", "lab", "--url", "https://lab.example", "--key", "lab-key")
    profile("set", "far", "--url", "https://far.example", "--key", "far-key")
    assert locate() == ("https://lab.example", "lab-key")
    monkeypatch.setenv("DUQUANT_PROFILE", "far")
    assert locate() == ("https://far.example", "far-key")
    monkeypatch.setenv("DUQUANT_URL", "https://env.example")
    assert locate() == ("https://env.example", None)
    monkeypatch.setenv("DUQUANT_API_KEY", "env-key")
    assert locate() == ("https://env.example", "env-key")
    assert locate(profile="lab") == ("https://lab.example", "lab-key")
    assert locate(url="https://option.example") == ("https://option.example", "env-key")
    assert locate(key="option-key", profile="far") == ("https://far.example", "option-key")


@pytest.mark.parametrize("url", ["https://elsewhere.example", "https://lab.example.evil.example"])
def test_a_stored_key_never_goes_to_another_address(url: str) -> None:
    profile("set", "lab", "--url", "https://lab.example", "--key", "lab-key")
    assert locate(url=url) == (url, None)
    assert locate(url=url, profile="lab") == (url, None)


def test_a_file_with_keys_that_others_can_read_is_refused(config: Path) -> None:
    profile("set", "lab", "--url", "https://lab.example", "--key", "lab-key")
    config.chmod(0o644)
    with pytest.raises(BadInputError, match="chmod 600"):
        locate()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("profiles: {lab: {url: x, kee: y}}", "kee"),
        ("[x]", "profile file"),
        ("profiles: [", "cannot read"),
        ("profiles: {lab: {url: 3}}", "text"),
        ("default: lab", "no profile 'lab'"),
    ],
)
def test_a_wrong_file_is_one_line(config: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    config.parent.mkdir()
    config.write_text(text)
    config.chmod(0o600)
    assert run(["job", "list"]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_an_unknown_profile_and_a_wrong_url_are_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["job", "list", "--profile", "absent"]) == 2
    assert "absent" in capsys.readouterr().err
    assert run(["profile", "set", "x", "--url", "lab.example"]) == 2
    assert run(["profile", "use", "absent"]) == 2
