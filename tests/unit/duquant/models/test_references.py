"""Model references that name nothing usable."""

import os
import subprocess
import sys
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


def test_a_hub_that_does_not_answer_is_an_error_that_says_so(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its address once, when it is imported."""
    code = (
        "import sys, pathlib\n"
        "from duquant.errors import SourceError\n"
        "from duquant.models.references import resolve_model\n"
        "try: resolve_model('hub:owner/name', cache=pathlib.Path(sys.argv[1]), allow_hub=True)\n"
        "except SourceError as error: print(error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "cannot fetch owner/name from the hub" in done.stdout
    assert "Connection refused" in done.stdout


def test_converted_demo_model_is_taken_from_the_cache(tmp_path: Path) -> None:
    target = tmp_path / "demo" / "smollm2-135m"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    assert resolve_model("demo:smollm2-135m", cache=tmp_path) == target
