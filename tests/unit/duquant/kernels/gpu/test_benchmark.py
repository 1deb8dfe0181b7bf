"""`make bench-gpu` works at its first run: walked on the CPU, under a Python with almost no packages."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[5]
sys.path.insert(0, str(ROOT / "docs"))
from gpu_results import section  # noqa: E402  # scripts, not a package

ABSENT = (
    "accelerate alembic beartype boto3 datasets fastapi gguf httpx jinja2 opentelemetry prometheus_client psutil "
    "pydantic pydantic_settings ray rich sqlalchemy starlette structlog typer uvicorn yaml"
)
RUN_WITHOUT = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT.split()!r}:
            raise ModuleNotFoundError("absent here: " + name)
sys.meta_path.insert(0, Absent())
sys.argv = ["benchmarks/gpu.py", *sys.argv[1:]]
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_dry_run_walks_the_whole_script_without_the_service_s_packages(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-c", RUN_WITHOUT, "--dry-run", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["is_dry_run"]
    assert report["failures"] == {}
    assert report["skipped"] == []
    assert all(row["measured"] <= row["limit"] for row in report["gates"])
    assert {"gates", "ceilings", "linear", "transform", "attention", "layer"} <= report.keys()
    # Times of an interpreter are no measurements of a goal, and are not published.
    assert all(goal["measured"] is None for goal in report["goals"])
    assert section(report) == section(None)
    assert section(None).count("not measured") == len(report["goals"])
    published = section({**report, "is_dry_run": False})
    for kind in ("### A decoder layer", "### Products", "### Transform", "### Attention"):
        assert kind in published


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_script_says_so_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr
    assert not out.exists()
