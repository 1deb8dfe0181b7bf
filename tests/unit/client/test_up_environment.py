"""What `duquant up` hands to the parts."""

from pathlib import Path

import pytest

from client.home import Secrets, private_files
from client.main import run
from client.up import Executor, Setup, environment


def test_the_parts_get_what_up_decides_and_a_few_settings_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WEBHOOK_NETWORKS", "ALLOW_HUB", "DATABASE_URL", "S3_PUBLIC_ENDPOINT", "HOST", "KEY_PEPPER"):
        monkeypatch.setenv(f"DUQUANT_{name}", "mine")
    monkeypatch.setenv("OTHER", "kept")
    setup = Setup(
        home=tmp_path, port=1, executor=Executor.LOCAL, workers=1, threads=None, model_roots=(), text_roots=()
    )
    env = environment(setup, Secrets("a", "b", "c", "d"), 2)
    assert (env["DUQUANT_WEBHOOK_NETWORKS"], env["OTHER"]) == ("mine", "kept")
    assert env["DUQUANT_ALLOW_HUB"] == "mine"
    assert "DUQUANT_DATABASE_URL" not in env
    assert "DUQUANT_S3_PUBLIC_ENDPOINT" not in env
    assert (env["DUQUANT_HOST"], env["DUQUANT_KEY_PEPPER"]) == ("127.0.0.1", "c")


def test_files_of_a_home_that_others_may_enter_are_for_its_owner_only(tmp_path: Path) -> None:
    (tmp_path / "duquant.db").touch(0o644)
    (tmp_path / "logs").mkdir(0o755)
    (tmp_path / "mine.txt").touch()
    theirs = (tmp_path / "mine.txt").stat().st_mode
    with private_files(tmp_path):
        (tmp_path / "duquant.db-wal").touch()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert (modes["duquant.db"], modes["duquant.db-wal"], modes["logs"]) == (0o600, 0o600, 0o700)
    assert (tmp_path / "mine.txt").stat().st_mode == theirs
    (tmp_path / "after").touch()
    assert (tmp_path / "after").stat().st_mode == theirs, "the process has its own umask again"


def test_the_collector_wants_a_service_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for home in (tmp_path, tmp_path / "absent"):
        assert run(["gc", "--home", str(home)]) == 5
        assert "no `duquant up` runs" in capsys.readouterr().err
