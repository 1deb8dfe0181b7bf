"""Model references that name nothing usable."""

from pathlib import Path

import pytest

from duquant.errors import SourceError, UnsupportedModelError
from duquant.models.references import resolve_model


def test_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_missing_directory_is_named_with_the_other_forms() -> None:
    with pytest.raises(SourceError, match=r"no model directory 'no/such/model' .*demo:smollm2-135m"):
        resolve_model("no/such/model")


def test_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="no model directory"):
        resolve_model(str(tmp_path / "file"))


def test_unknown_demo_model_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no demo model 'gpt5'; there is: smollm2-135m"):
        resolve_model("demo:gpt5", cache=tmp_path)


def test_hub_is_switched_off_by_default(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="switched off"):
        resolve_model("hub:owner/name", cache=tmp_path)


def test_converted_demo_model_is_taken_from_the_cache(tmp_path: Path) -> None:
    target = tmp_path / "demo" / "smollm2-135m"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    assert resolve_model("demo:smollm2-135m", cache=tmp_path) == target
