"""A zoo through the service as it is installed: 2 models with 3 recipes, one of them bound to fail."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_models import make_tiny_model, tiny_text

from client import calls
from client.sdk import Client
from duquant.artifact import read_manifest, verify

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform != "linux", reason="`duquant up` as processes")]

RECIPES = [
    {"name": "plain"},
    {"name": "turned", "transform": {"rotation": "hadamard", "block_size": 16}},
    # 96 channels of one model are two groups; the other model's 212 have no divisor from 8 to 48.
    {"name": "grouped", "weight": {"group_size": 48}},
]
CALIBRATION = {"source": {"kind": "file", "name": "text.txt"}, "samples": 2, "seq_len": 32, "shards": 1}
EVALUATION = {"text": {"kind": "file", "name": "text.txt"}, "seq_len": 32, "windows": 2, "baseline": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two models and a text."""
    shelf = tmp_path / "shelf"
    make_tiny_model(shelf / "zoo" / "fits", hidden_size=96, intermediate_size=192, num_attention_heads=4)
    odd = {"hidden_size": 212, "intermediate_size": 160, "num_attention_heads": 2}
    make_tiny_model(shelf / "zoo" / "odd", **odd)
    (shelf / "text.txt").write_text(tiny_text(), encoding="utf-8")
    return shelf


@pytest.fixture
def service(tmp_path: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """`duquant up` on that folder; what it says of itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DUQUANT_")}
    roots = ["--model-root", str(folder), "--text-root", str(folder)]
    command = [sys.executable, "-m", "client.main", "up", "--home", str(tmp_path / "home"), "--port", str(port)]
    with (tmp_path / "stderr").open("w") as errors:
        process = subprocess.Popen(
            [*command, *roots, "--threads", "1", "--json"], stdout=subprocess.PIPE, stderr=errors, env=environment
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (tmp_path / "stderr").read_text()
        yield json.loads(line)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()


def duquant(service: dict[str, Any], *arguments: str) -> tuple[int, Any, str]:
    """Run a command as a person would; give back its exit code, its data and what it said."""
    options = ["--url", service["url"], "--key", service["api_key"], "-o", "json"]
    done = subprocess.run(
        [sys.executable, "-m", "client.main", *arguments, *options], capture_output=True, text=True, timeout=280
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def _check_numbers(row: dict[str, Any], baseline: dict[str, Any], pulled: Path, folder: Path) -> None:
    """Compare what the service has measured with `duquant eval` on what was pulled, and with its manifest and card."""
    text, sizes = str(folder / "text.txt"), ("--seq-len", "32", "--windows", "2", "--threads", "1")
    command = [sys.executable, "-m", "client.main", "eval", str(pulled), "--text", text, *sizes, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert json.loads(done.stdout)["perplexity"] == row["perplexity"], done.stderr
    (result,) = read_manifest(pulled).evaluation["results"]
    assert (result["perplexity"], result["baseline"]["perplexity"]) == (row["perplexity"], baseline["perplexity"])
    assert f"| {row['perplexity']:.4f} | {baseline['perplexity']:.4f} |" in (pulled / "README.md").read_text()


def test_one_failure_leaves_the_rest_and_what_was_made_is_reused(
    service: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    zoo = {
        "name": "two by three",
        "models": ["local:zoo/*"],
        "recipes": RECIPES,
        "calibration": CALIBRATION,
        "evaluate": EVALUATION,
    }
    file = tmp_path / "zoo.yaml"
    file.write_text(yaml.safe_dump(zoo))
    status, data, said = duquant(service, "batch", "submit", str(file), "--wait")
    assert status == 1, said
    assert "did not succeed" in said
    rows = {(row["model_name"], row["recipe_name"]): row for row in data["rows"]}
    assert len(rows) == 2 * 3 + 2
    failed = rows.pop(("zoo/odd", "grouped"))
    assert (failed["state"], failed["reason"], failed["artifact_id"]) == ("failed", "bad_input", None)
    assert "48" in failed["detail"]
    plain = {model: rows.pop((f"zoo/{model}", "unquantized")) for model in ("fits", "odd")}
    assert all(row["perplexity"] > 1 for row in plain.values())
    assert len(rows) == 5
    for (model, recipe), row in rows.items():
        assert (row["state"], row["evaluation_state"]) == ("succeeded", "succeeded"), (model, recipe, row)
        reference = plain[model.removeprefix("zoo/")]["perplexity"]
        assert row["perplexity_ratio"] == pytest.approx(row["perplexity"] / reference)
        assert row["size_bytes"] > 0
        assert row["tokens_per_second"] > 0

    with Client(service["url"], service["api_key"]) as client:
        (first,) = client.run(calls.list_batches()).items
        assert (first.state, first.jobs.succeeded, first.jobs.failed) == ("partial", 5, 1)
        assert first.evaluations.failed == 1, "nothing to measure"
        best = rows["zoo/fits", "turned"]["artifact_id"]
        client.pull(best, tmp_path / "pulled")
        assert verify(tmp_path / "pulled").ok
        _check_numbers(rows["zoo/fits", "turned"], plain["fits"], tmp_path / "pulled", folder)

        again = client.submit_batch(
            [{"source": "local", "prefix": "zoo/"}], RECIPES, calibration=CALIBRATION, evaluate=EVALUATION
        )
        assert (again.jobs.total, again.reused) == (6, 5)
        ended = client.wait_for_batch(again.id, timeout_s=120)
        assert (ended.jobs.succeeded, ended.jobs.failed) == (5, 1)
        second = {(row["model_name"], row["recipe_name"]): row for row in client.run(calls.batch_table(again.id))}
        assert {key: second[key]["artifact_id"] for key in rows} == {
            key: row["artifact_id"] for key, row in rows.items()
        }
        assert all(second[key]["perplexity"] == row["perplexity"] for key, row in rows.items())
