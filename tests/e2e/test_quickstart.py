"""Runs the README's quickstart as it stands there."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

README = Path(__file__).parents[2] / "README.md"


def _block(language: str, text: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_quickstart_of_the_readme_works(tmp_path: Path):
    section = README.read_text(encoding="utf-8").split("<!-- quickstart:")[1]
    environment = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    said = ""
    for command in _block("sh", section).strip().splitlines():
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        said = done.stdout
    assert said.strip(), "generate printed nothing"
    script = f"{_block('python', section)}\nprint(type(model).__name__)"
    done = subprocess.run(
        ["python", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr
