"""Kernels compiled for Hopper and Ampere without a GPU: matrix instructions, no spills, shared memory within limits."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[5]
KERNELS = {
    "linear_kernel",
    "split_linear_kernel",
    "planes_kernel",
    "rotate_permute_kernel",
    "quantize_rows_kernel",
    "block_range_kernel",
    "quantize_blocks_kernel",
    "decode_kernel",
    "sink_kernel",
    "combine_kernel",
    "quantize_kv_kernel",
    "dequantize_kv_kernel",
}


def compiled(arch: int, folder: Path) -> list[dict[str, Any]]:
    # A process of its own: in this one kernels may be for the interpreter.
    target = folder / "compiled.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "benchmarks/gpu_compile.py", "--quick", "--arch", str(arch), "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(target.read_text(encoding="utf-8"))
    assert {row["kernel"] for row in rows} == KERNELS
    return rows


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_hopper_kernels_use_int8_wgmma_and_do_not_spill(tmp_path: Path) -> None:
    rows = compiled(90, tmp_path)
    for row in rows:
        assert row["stack_bytes"] == 0
        assert row["shared_bytes"] <= 232_448
        if row["kernel"] in ("linear_kernel", "split_linear_kernel"):
            assert all(name.startswith("wgmma") and name.endswith("s32.s8") for name in row["matrix_instructions"])
            assert row["matrix_instructions"]
        if row["kernel"] in ("rotate_permute_kernel", "quantize_blocks_kernel", "quantize_rows_kernel"):
            assert any("bf16" in name for name in row["matrix_instructions"])
