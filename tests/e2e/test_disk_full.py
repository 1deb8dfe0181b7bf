"""A full disk, for real: a file system of a few hundred kilobytes, mounted in a namespace of the child's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_disk import needs_mount
from support.tiny_models import make_tiny_model, tiny_text

pytestmark = pytest.mark.e2e


@needs_mount
def test_a_full_disk_ends_quantize_with_one_line_and_leaves_nothing_behind(tmp_path: Path):
    model = make_tiny_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(), encoding="utf-8")
    small = tmp_path / "small"
    small.mkdir()
    command = [sys.executable, "-m", "client.main", "quantize", str(model), "--recipe", "duquant-fast"]
    command += ["--calibration", str(text), "--samples", "4", "--seq-len", "64", "--out", str(small / "out"), "--json"]
    script = f'mount -t tmpfs -o size=600k tmpfs "{small}" && "$@"; status=$?; ls -A "{small}" >&2; exit $status'
    ended = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert ended.returncode == 1, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("duquant: error: ")]
    assert len(errors) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "no space" in (ended.stderr + ended.stdout).lower() or "full" in (ended.stderr + ended.stdout).lower()
    for line in ended.stdout.splitlines():
        json.loads(line)
    assert "out" not in ended.stderr.splitlines()[-1].split(), "a half-made artifact stays behind"
