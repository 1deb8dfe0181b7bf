"""The API process stays light, and so does the start of the command line."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["service.app", "client.app"])
def test_importing_loads_no_heavy_library(module: str) -> None:
    program = (
        f"import sys, {module}; print([m for m in ('torch', 'ray', 'transformers', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
