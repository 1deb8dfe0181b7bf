"""The GPU part of docs/results/kernels.md, from benchmarks/results/gpu.json."""

import sys
from pathlib import Path
from typing import Any

from measured_rows import figures_table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_goals import goals  # noqa: E402  # lies beside the benchmark that needs nothing of the project's packages

Report = dict[str, Any]
_NOT_MEASURED = """No GPU has been at hand yet, so nothing is measured here. `make bench-gpu` checks and measures
everything in under 8 minutes and writes the figures; the tests walk through it on the CPU.
"""


def section(report: Report | None) -> str:
    """Return the part as text; without a report of a real GPU, all goals stand there as not measured."""
    if report is None or report["is_dry_run"]:
        return f"{_NOT_MEASURED}\n{_goals(goals({}))}"
    parts = [_head(report), _goals(report["goals"]), _ceilings(report), _layers(report), _linears(report)]
    parts += [_transforms(report), _attention(report)]
    return "\n".join(part for part in parts if part)


def _us(times: dict[str, dict[str, float]], name: str) -> str:
    value = times.get(name)
    return "-" if value is None else f"{value['us']:.1f} ({value['p20_us']:.1f} to {value['p80_us']:.1f})"


def _ratio(times: dict[str, dict[str, float]], slow: str, fast: str) -> str:
    return f"{times[slow]['us'] / times[fast]['us']:.2f}x" if slow in times and fast in times else "-"


def _head(report: Report) -> str:
    gpu, versions = report["gpu"], report["versions"]
    words = (
        f"{gpu['name']}, torch {versions['torch']}, Triton {versions['triton']}, {report['date']}, commit "
        f"{report['commit'][:7]}, {report['seconds']} s. Command: `{report['command']}`. Times in µs: medians of two "
        "interleaved runs, 20th to 80th percentile in brackets, from CUDA graphs, caches cold.\n"
    )
    if report["failures"] or report["skipped"]:
        words += (
            f"\nFailed: {', '.join(report['failures']) or 'none'}. Skipped: {', '.join(report['skipped']) or 'none'}.\n"
        )
    return words


def _goals(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["goal"],
            str(row["must"]),
            str(row["aim"]),
            "not measured" if row["measured"] is None else str(row["measured"]),
        )
        for row in rows
    ]
    return "### GPU goals\n\n" + figures_table(("", "must", "aim", "measured"), cells)


def _ceilings(report: Report) -> str:
    if not report.get("ceilings"):
        return ""
    row = report["ceilings"][0]
    cells = [("copy, TB/s", f"{row['copy_bytes_per_s'] / 1e12:.2f}")]
    cells += [
        (f"{name.removesuffix('_ops_per_s').replace('_', ' ')} product, TOP/s", f"{value / 1e12:.0f}")
        for name, value in sorted(row.items())
        if name.endswith("_ops_per_s")
    ]
    return "### GPU ceilings of the same run\n\n" + figures_table(("", "measured"), cells)


def _layers(report: Report) -> str:
    cells = []
    for row in report.get("layer", ()):
        work = (
            f"prefill {row['prompt']}" if row["prompt"] else f"decode, batch {row['batch']}, context {row['context']}"
        )
        times = row["graph"]
        kinds = (_us(times, kind) for kind in ("bf16", "rtn", "hadamard", "duquant", "duquant-blocks"))
        cells.append((row["model"], work, *kinds, _ratio(times, "bf16", "duquant")))
    head = ("model", "", "bf16", "RTN INT4", "one Hadamard", "DuQuant", "DuQuant, an R each block", "speedup")
    return "### A decoder layer on the GPU\n\n" + figures_table(head, cells) if cells else ""


def _linears(report: Report) -> str:
    cells = []
    for row in report.get("linear", ()):
        times, shape = row["graph"], f"{row['K']} x {row['N']}"
        each = (_us(times, name) for name in ("bf16", "fp8", "int8", "int4"))
        cells.append((row["model"], row["linear"], shape, str(row["M"]), *each, _ratio(times, "bf16", "int4")))
    head = ("model", "linear", "K x N", "M", "bf16", "fp8", "int8", "`int4_linear`", "speedup")
    return "### Products on the GPU\n\n" + figures_table(head, cells) if cells else ""


def _transforms(report: Report) -> str:
    cells = []
    for row in report.get("transform", ()):
        kinds = ("rtn", "hadamard", "duquant", "duquant-blocks", "duquant in plain torch")
        cells.append((row["model"], str(row["H"]), str(row["M"]), *(_us(row["graph"], kind) for kind in kinds)))
    head = ("model", "width", "M", "none", "one Hadamard", "R1 P R2", "R1 P R2, an R each block", "plain torch")
    return "### Transform, rounding and packing on the GPU\n\n" + figures_table(head, cells) if cells else ""


def _attention(report: Report) -> str:
    cells = []
    for row in report.get("attention", ()):
        times = row["graph"]
        size = f"{row['cache_bytes']['bf16'] / row['cache_bytes']['rtn']:.2f}x"
        cells.append(
            (row["model"], str(row["batch"]), str(row["context"]), _us(times, "bf16"), _us(times, "int4"),
             _ratio(times, "bf16", "int4"), size)
        )  # fmt: skip
    head = ("model", "batch", "context", "bf16", "INT4 cache", "speedup", "smaller")
    return "### Attention of one token on the GPU\n\n" + figures_table(head, cells) if cells else ""
