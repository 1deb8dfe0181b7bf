"""Check and measure the GPU kernels: one run of under 8 minutes, one JSON file.

    python benchmarks/gpu.py                       everything, to benchmarks/results/gpu.json
    python benchmarks/gpu.py --dry-run --out FILE  the same steps on the CPU, tiny, in Triton's interpreter

Needs torch with CUDA, Triton, transformers, safetensors, numpy and jaxtyping, and no other package. Nothing is timed
before all kernels have equalled the reference. Exit status: 0 done; 1 a kernel is wrong, or a section failed (the file
says which); 3 there is no CUDA device, torch or Triton: nothing was done.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NOTHING_DONE = 3
BUDGET_S = 420.0
"""No section is begun after this; what was measured is written. A section takes up to half a minute."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; the times mean nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--only", action="append", help="sections to run (by their first word); all by default")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    for folder in (HERE, HERE.parent):
        sys.path.insert(0, str(folder))
    try:
        import torch
        import triton  # noqa: F401
    except ModuleNotFoundError as err:
        print(
            f"this Python has no {err.name}: nothing measured (name another: make bench-gpu PYTHON=...)",
            file=sys.stderr,
        )
        return NOTHING_DONE
    if not arguments.dry_run and not torch.cuda.is_available():
        print(
            "no CUDA device here: nothing measured (a walk through the script on the CPU: --dry-run)", file=sys.stderr
        )
        return NOTHING_DONE
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    report = run(device, arguments.only)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['seconds']} s -> {arguments.out}")
    return 1 if report["failures"] else 0


def run(device: Any, only: list[str] | None) -> dict[str, Any]:
    """Run the sections and return the report; a section that fails costs the others nothing."""
    import gpu_goals
    import torch

    from duquant.evaluation.timing import Harness

    started = time.monotonic()
    report: dict[str, Any] = {**describe(device), "is_dry_run": device.type == "cpu", "failures": {}, "skipped": []}
    harness = Harness(device)
    with torch.no_grad():
        for name, section in sections(harness):
            if only and name.split()[0] not in only:
                continue
            if time.monotonic() - started > BUDGET_S:
                report["skipped"].append(name)
                continue
            begun = time.monotonic()
            try:
                rows = section()
            except Exception as err:  # noqa: BLE001  # the machine is lent: keep what the other sections measure
                report["failures"][name] = "".join(traceback.format_exception(err))[-4000:]
                print(f"{name}: {type(err).__name__}: {str(err)[:300]}", flush=True)
                if name == "gates":
                    break
                continue
            report.setdefault(name.split()[0], []).extend(rows if isinstance(rows, list) else [rows])
            print(f"{name}: {time.monotonic() - begun:.1f} s", flush=True)
            if harness.is_gpu:
                torch.cuda.empty_cache()
    report["goals"] = gpu_goals.goals(report)
    report["seconds"] = round(time.monotonic() - started, 1)
    for row in report["goals"]:
        print(f"{row['goal']:66} {row['measured']!s:>8}  must {row['must']:>6}  aim {row['aim']:>6}")
    return report


def sections(harness: Any) -> list[tuple[str, Callable[[], Any]]]:
    """Return (name, function) in order of worth: what comes last may fall to the time limit."""
    import gpu_sections as do
    from gpu_gates import gates
    from gpu_operands import LLAMA2_7B, LLAMA2_70B, TINY

    if not harness.is_gpu:
        return [
            ("gates", lambda: gates(harness, [TINY], (66,), only=("down",))),
            ("ceilings", lambda: do.ceilings(harness)),
            ("linear decode", lambda: do.linears(harness, TINY, 1, is_sweep=True, only=("o",))),
            ("linear prefill", lambda: do.linears(harness, TINY, 257, is_sweep=True, only=("o",))),
            ("transform", lambda: do.transforms(harness, TINY, 66, widths=(TINY.mlp,))),
            ("attention", lambda: do.attention(harness, TINY, 2, 70)),
            ("layer prefill", lambda: do.layers(harness, TINY, 1, 66, 0, kinds=("bf16", "duquant"))),
            ("layer decode", lambda: do.layers(harness, TINY, 2, 0, 40, kinds=("bf16", "duquant"))),
        ]
    small, large = LLAMA2_7B, LLAMA2_70B
    return [
        ("gates", lambda: gates(harness, [small, large], (1, 16, 65, 300))),
        ("ceilings", lambda: do.ceilings(harness)),
        ("layer prefill 7b", lambda: do.layers(harness, small, 1, 2048, 0)),
        ("layer decode 7b", lambda: do.layers(harness, small, 1, 0, 2048)),
        ("layer decode 7b 64", lambda: do.layers(harness, small, 64, 0, 2048)),
        ("layer prefill 70b", lambda: do.layers(harness, large, 1, 2048, 0)),
        ("layer decode 70b", lambda: do.layers(harness, large, 1, 0, 2048)),
        ("linear decode 7b", lambda: do.linears(harness, small, 1, is_sweep=True)),
        ("linear prefill 7b", lambda: do.linears(harness, small, 2048, is_sweep=True)),
        ("linear decode 70b", lambda: do.linears(harness, large, 1, is_sweep=False)),
        ("transform 7b 1", lambda: do.transforms(harness, small, 1)),
        ("transform 7b 2048", lambda: do.transforms(harness, small, 2048)),
        ("attention 7b 64", lambda: do.attention(harness, small, 64, 2048)),
        ("attention 70b 16", lambda: do.attention(harness, large, 16, 8192)),
        ("layer decode 7b 16", lambda: do.layers(harness, small, 16, 0, 2048)),
        ("layer decode 70b 64", lambda: do.layers(harness, large, 64, 0, 2048)),
        ("linear prefill 70b", lambda: do.linears(harness, large, 2048, is_sweep=False)),
        ("linear 7b 16", lambda: do.linears(harness, small, 16, is_sweep=False)),
        ("linear 7b 64", lambda: do.linears(harness, small, 64, is_sweep=True)),
        ("transform 70b 2048", lambda: do.transforms(harness, large, 2048)),
        ("transform 7b 64", lambda: do.transforms(harness, small, 64)),
        ("linear 7b 256", lambda: do.linears(harness, small, 256, is_sweep=True)),
    ]


def describe(device: Any) -> dict[str, Any]:
    """Return the facts about this run."""
    import torch
    from machine import describe as describe_machine

    facts = describe_machine()
    facts["command"] = " ".join(["python", *sys.argv])
    facts["versions"]["triton"] = importlib.metadata.version("triton")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    else:
        facts["gpu"] = {"name": f"none: {platform.machine()} in Triton's interpreter"}
    return facts


if __name__ == "__main__":
    sys.exit(main())
