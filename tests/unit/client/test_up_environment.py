"""What `duquant up` hands to the parts."""

from pathlib import Path

import pytest

from client.home import Secrets
from client.up import Executor, Setup, environment


def test_the_parts_get_what_up_decides_and_a_few_settings_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WEBHOOK_NETWORKS", "DATABASE_URL", "S3_PUBLIC_ENDPOINT", "HOST", "KEY_PEPPER"):
        monkeypatch.setenv(f"DUQUANT_{name}", "mine")
    monkeypatch.setenv("OTHER", "kept")
    setup = Setup(
        home=tmp_path, port=1, executor=Executor.LOCAL, workers=1, threads=None, model_roots=(), text_roots=()
    )
    env = environment(setup, Secrets("a", "b", "c", "d"), 2)
    assert (env["DUQUANT_WEBHOOK_NETWORKS"], env["OTHER"]) == ("mine", "kept")
    assert "DUQUANT_DATABASE_URL" not in env
    assert "DUQUANT_S3_PUBLIC_ENDPOINT" not in env
    assert (env["DUQUANT_HOST"], env["DUQUANT_KEY_PEPPER"]) == ("127.0.0.1", "c")
