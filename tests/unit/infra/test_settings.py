"""Settings come from the environment, and say what is wrong without showing a value."""

from pathlib import Path

import pytest

from infra.errors import SettingsError
from infra.settings import DatabaseSettings, InfraSettings

CANARY = "canary-11aa"
NEEDED = {"S3_ACCESS_KEY": "key", "S3_SECRET_KEY": CANARY, "KEY_PEPPER": CANARY}


def load(monkeypatch: pytest.MonkeyPatch, **values: str) -> InfraSettings:
    for name, value in values.items():
        monkeypatch.setenv(f"DUQUANT_{name}", value)
    return InfraSettings.load()


def test_the_database_lives_at_home_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = load(monkeypatch, **NEEDED, HOME=str(tmp_path))
    assert settings.database_url == f"sqlite:///{tmp_path}/duquant.db"
    settings = load(monkeypatch, DATABASE_URL="postgresql://db/x")
    assert settings.database_url == "postgresql://db/x"


def test_without_a_home_the_users_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUQUANT_HOME", raising=False)
    settings = load(monkeypatch, **NEEDED)
    assert settings.home == Path.home() / ".local" / "share" / "duquant"
    assert settings.database_url == f"sqlite:///{settings.home}/duquant.db"


def test_roots_are_a_search_path_or_a_json_list(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, **NEEDED, MODEL_ROOTS="/a:/b", TEXT_ROOTS='["/c"]')
    assert settings.model_roots == (Path("/a"), Path("/b"))
    assert settings.text_roots == (Path("/c"),)
    assert load(monkeypatch, MODEL_ROOTS="").model_roots == ()


def test_missing_secrets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NEEDED:
        monkeypatch.delenv(f"DUQUANT_{name}", raising=False)
    with pytest.raises(SettingsError, match="DUQUANT_S3_ACCESS_KEY") as caught:
        InfraSettings.load()
    assert "DUQUANT_KEY_PEPPER" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("LOG_LEVEL", CANARY), ("ALLOW_HUB", CANARY), ("MODEL_ROOTS", "[" + CANARY)]
)
def test_malformed_values_are_named_and_not_shown(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"DUQUANT_{name}") as caught:
        load(monkeypatch, **NEEDED, **{name: value})
    assert CANARY not in str(caught.value)


def test_secrets_do_not_show_in_a_print(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, **NEEDED, DATABASE_URL=f"postgresql://u:{CANARY}@db/x")
    assert CANARY not in repr(settings) + str(settings)
    assert settings.s3_secret_key.get_secret_value() == CANARY


def test_migrating_needs_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NEEDED:
        monkeypatch.delenv(f"DUQUANT_{name}", raising=False)
    monkeypatch.setenv("DUQUANT_HOME", str(tmp_path))
    assert DatabaseSettings.load().home == tmp_path
