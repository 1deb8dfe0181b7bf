"""The service does what its OpenAPI description says: thousands of requests made from it, by schemathesis."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]
SUPPORT = Path(__file__).parents[2] / "support"


def walk(service: Any, tmp_path: Path, *options: str) -> None:
    command = [
        *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
        *("--config-file", str(SUPPORT / "schemathesis.toml")),
        *("run", f"{service.url}/openapi.json", "--checks", "all", "--no-color"),
        # In its place stands the check of the hooks: a request may have the right form and name what is not there.
        *("--exclude-checks", "positive_data_acceptance"),
        *options,
    ]
    environment = {**os.environ, "DUQUANT_URL": service.url, "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert service.http.get("/healthz").status_code == 200


def test_with_a_key_every_answer_is_as_described(unlimited_service: Any, tmp_path: Path) -> None:
    unlimited_service.finished_job()
    key = ("--header", f"Authorization: Bearer {unlimited_service.token}")
    walk(unlimited_service, tmp_path, "--phases", "examples,coverage,fuzzing,stateful", *key)


def test_without_a_key_every_answer_is_as_described(unlimited_service: Any, tmp_path: Path) -> None:
    walk(unlimited_service, tmp_path, "--phases", "examples,fuzzing")
