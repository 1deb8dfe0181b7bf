"""`duquant quantize | eval | generate` on input that is wrong: one line that names it, and nothing is lost."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.broken_models import fill, only_pickle, shard_of, truncate
from support.tiny_models import make_tiny_model, tiny_text

from client.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK
from client.main import run


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), shard_size="60KB")


@pytest.fixture
def model(good_model: Path, tmp_path: Path) -> Path:
    """A sharded model that the test may damage."""
    shutil.copytree(good_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny_text(), encoding="utf-8")
    return path


def quantize(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    command = ["quantize", str(model), "--recipe", "rtn", "--calibration", str(text), "--out", str(out)]
    return [*command, "--samples", "2", "--seq-len", "32", "--device", "cpu", "--threads", "1", "--json", *more]


def evaluate(model: Path, text: Path) -> list[str]:
    sizes = ["--seq-len", "32", "--windows", "1", "--device", "cpu", "--threads", "1"]
    return ["eval", str(model), "--text", str(text), *sizes, "--json"]


def error_of(said: str) -> str:
    """Return the one error line; beside it there may be notes about the phase."""
    lines = said.strip().splitlines()
    assert "Traceback" not in said
    assert all(line.endswith(" ...") for line in lines[:-1]), said
    assert lines[-1].startswith("duquant: error: "), said
    return lines[-1]


def test_the_input_mode_is_an_option(model: Path, text: Path, tmp_path: Path) -> None:
    assert run(quantize(model, text, tmp_path / "out", "--input-mode", "staged:2", "--refine-passes", "1")) == EXIT_OK
    recipe = json.loads((tmp_path / "out" / "manifest.json").read_text())["recipe"]
    assert (recipe["input_mode"], recipe["refine_passes"]) == ("staged:2", 1)


def test_an_input_mode_that_does_not_exist_is_named(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(quantize(model, text, tmp_path / "out", "--input-mode", "staged:0")) == EXIT_BAD_INPUT
    assert "input_mode is 'staged:0'" in error_of(capsys.readouterr().err)


def other_architecture(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))


MLP = "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "architecture": (other_architecture, ("model_type 'gpt2' is not supported",)),
    "missing": (
        lambda model: [file.unlink() for file in model.glob("*.safetensors*")],
        ("model has no model.safetensors",),
    ),
    "missing shard": (lambda model: shard_of(model, MLP).unlink(), (".safetensors is missing", "index")),
    "truncated": (lambda model: truncate(shard_of(model, "lm_head.weight")), (".safetensors is truncated",)),
    "pickle": (only_pickle, ("pytorch_model.bin", "convert")),
}
NOT_FINITE: dict[str, tuple[str, float, str]] = {
    "NaN in weights": (MLP, float("nan"), f"{MLP} holds NaN or Inf"),
    "Inf in embeddings": ("model.embed_tokens.weight", float("inf"), "model.embed_tokens.weight holds NaN or Inf"),
    "Inf in activations": (MLP, 3e38, "layer 1: activations at site mlp_out are NaN or Inf"),
}


@pytest.mark.parametrize("command", [quantize, evaluate])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_cannot_be_used_is_one_line_that_names_it(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, command: Any
) -> None:
    break_it, words = DAMAGES[damage]
    break_it(model)
    more = (tmp_path / "out",) if command is quantize else ()
    assert run(command(model, text, *more)) == EXIT_BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    for word in words:
        assert word in error_of(said.err)
    assert not (model / "exploded").exists(), "a pickle was loaded"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt"}


@pytest.mark.parametrize("place", NOT_FINITE)
def test_numbers_that_are_not_finite_are_named_and_leave_no_artifact(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    tensor, value, words = NOT_FINITE[place]
    fill(model, tensor, value)
    assert run(quantize(model, text, tmp_path / "out")) == EXIT_BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    assert words in error_of(said.err)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt"}


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_a_perplexity_that_is_no_number_is_an_error(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    fill(model, MLP, value)
    assert run(evaluate(model, text)) == EXIT_BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    assert "outputs are NaN, Inf" in error_of(said.err)
    assert str(model) in error_of(said.err)


@pytest.mark.parametrize("content", ["", " \n\n", "too short"])
def test_a_text_that_is_empty_or_too_short_is_named(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    text.write_text(content, encoding="utf-8")
    for command in (quantize(model, text, tmp_path / "out"), evaluate(model, text)):
        assert run(command) == EXIT_BAD_INPUT
        said = capsys.readouterr()
        assert said.out == ""
        assert str(text) in error_of(said.err)
        assert ("9 tokens" if content.strip() else "is empty") in error_of(said.err)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt"}


def test_a_failed_replacement_keeps_the_old_artifact(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(quantize(model, text, out)) == EXIT_OK
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    fill(model, MLP, float("nan"))
    capsys.readouterr()
    assert run(quantize(model, text, out, "--force")) == EXIT_BAD_INPUT
    assert MLP in error_of(capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt", "out"}
    damaged = out / "model-layer-0001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    for command in (["generate", str(out), "--max-new-tokens", "1"], evaluate(out, text)):
        assert run(command) == EXIT_FAILED
        assert damaged.name in error_of(capsys.readouterr().err)


def test_a_process_ends_with_one_line_too(model: Path, text: Path, tmp_path: Path) -> None:
    only_pickle(model)
    command = [sys.executable, "-m", "client.main", *quantize(model, text, tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (EXIT_BAD_INPUT, "")
    assert "pytorch_model.bin" in error_of(ended.stderr)


@pytest.fixture(autouse=True)
def _same_threads() -> Any:
    """The commands set the number of threads for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


QUESTIONS = '{"goal": "Open a jar", "sol1": "turn the lid", "sol2": "eat it", "label": 0}\n' * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tasks_and_a_report_come_with_the_perplexity(
    good_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jars = tmp_path / "jars.jsonl"
    jars.write_text(QUESTIONS)
    more = ["--tasks", str(jars), "--limit", "2", "--report", str(tmp_path / "report")]
    assert run([*evaluate(good_model, text), *more]) == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert found["windows"] == 1
    assert found["perplexity"] > 1
    assert (found["tasks"]["jars"]["samples"], found["tasks"]["jars"]["num_fewshot"]) == (2, 0)
    assert {file.name for file in (tmp_path / "report").iterdir()} == {
        "report.html", "perplexity.svg", "perplexity.png", "tasks.svg", "tasks.png"
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_was_measured_is_said_before_the_error_of_a_task(
    good_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\ndoc_to_text: !function utils.prompt\n")
    assert run([*evaluate(good_model, text), "--tasks", str(broken)]) == EXIT_BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    before, error = said.err.strip().splitlines()[-2:]
    assert json.loads(before.removeprefix("measured before the error: "))["perplexity"] > 1
    assert error.startswith("duquant: error: ")
    assert f"task file {broken}" in error
    assert "!function run code and are not allowed" in error
