"""Time, memory and perplexity of `duquant quantize` on SmolLM2-135M, beside a plain forward pass in the same run.

    python benchmarks/quantize.py                        # what benchmarks/results/quantize-smollm2.json is made with
    python benchmarks/quantize.py --recipe duquant-fast --samples 4 --seq-len 256 --windows 2 --out -

Texts: wikitext2-valid.tokens.txt (calibration) and wikitext2-test.txt (perplexity) in DUQUANT_DATA_DIR, by default
../shared/data. Without them the text that ships with Python is used for both, which compares with nothing published.
"""

import argparse
import json
import math
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import options
from machine import RESULTS, data_folder, describe, load_average

MODEL = "demo:smollm2-135m"
RECIPES = ("rtn", "smoothquant", "duquant", "duquant-fast")
_BUILTIN = "builtin:pydoc-topics"


def main() -> None:
    arguments = _parse()
    if arguments.plain_forward:
        _plain_forward(arguments.calibration, arguments.samples, arguments.seq_len)
        return
    calibration, evaluation = find_texts()
    result: dict[str, Any] = {
        **describe(),
        "command": shlex.join(["python", "benchmarks/quantize.py", *sys.argv[1:]]),
        "model": MODEL,
        "calibration": {"text": text_name(calibration), "samples": arguments.samples, "seq_len": arguments.seq_len},
        "evaluation": {"text": text_name(evaluation), "seq_len": arguments.seq_len, "windows": arguments.windows},
        "load_at_start": load_average(),
    }
    result["plain_forward"] = plain = _measure_plain_forward(calibration, arguments)
    print(f"plain forward pass: {plain['seconds']:.1f} s", flush=True)
    fp = _evaluate(MODEL, evaluation, arguments)
    result["fp"] = {"perplexity": fp["perplexity"], "weight_bytes": fp["model_bytes"]}
    print(f"FP: perplexity {fp['perplexity']:.3f}", flush=True)
    result["recipes"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe in arguments.recipe or RECIPES:
            entry = _measure(recipe, Path(folder) / recipe, calibration, evaluation, arguments)
            entry["ratio_to_plain_forward"] = round(entry["seconds"] / plain["seconds"], 3)
            entry["D"] = round(math.log(entry["perplexity"] / fp["perplexity"]), 4)
            result["recipes"][recipe] = entry
            print(
                f"{recipe}: {entry['seconds']:.1f} s ({entry['ratio_to_plain_forward']:.2f} plain forward passes), "
                f"perplexity {entry['perplexity']:.2f}, D {entry['D']:.3f}",
                flush=True,
            )
    _write(result, arguments.out, is_comparable=not calibration.startswith("builtin:"))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help=f"repeat for more; default: {', '.join(RECIPES)}")
    parser.add_argument("--samples", type=options.count, default=32)
    parser.add_argument("--seq-len", type=options.count, default=2048)
    parser.add_argument("--windows", type=options.count, default=16)
    parser.add_argument("--out", default=str(RESULTS / "quantize-smollm2.json"), help="- prints it")
    parser.add_argument("--plain-forward", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--calibration", help=argparse.SUPPRESS)
    return parser.parse_args()


def find_texts() -> tuple[str, str]:
    """Return the calibration and the evaluation text."""
    folder = data_folder()
    calibration, evaluation = folder / "wikitext2-valid.tokens.txt", folder / "wikitext2-test.txt"
    if calibration.is_file() and evaluation.is_file():
        return str(calibration), str(evaluation)
    print(f"skipped: WikiText-2 is not in {folder} (DUQUANT_DATA_DIR); using {_BUILTIN} instead, and writing no result")
    return f"{_BUILTIN}:calibration", f"{_BUILTIN}:evaluation"


def text_name(text: str) -> str:
    """Return how a text is called in a result."""
    return text if text.startswith("builtin:") else Path(text).name


def run_duquant(*arguments: str) -> dict[str, Any]:
    """Run a command of `duquant` in a process of its own; return the JSON that it prints."""
    command = [sys.executable, "-m", "client.main", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def _evaluate(model: str, text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = ("--seq-len", str(arguments.seq_len), "--windows", str(arguments.windows))
    return run_duquant("eval", model, "--text", text, *sizes)


def _measure(
    recipe: str, out: Path, calibration: str, evaluation: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    sizes = ("--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len))
    made = run_duquant(
        "quantize", MODEL, "--recipe", recipe, "--calibration", calibration, *sizes, "--out", str(out), "--force"
    )
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    evaluated = _evaluate(str(out), evaluation, arguments)
    return {
        "seconds": round(made["seconds"], 2),
        "peak_rss_bytes": made["peak_rss_bytes"],
        "base_rss_bytes": _base_rss_bytes(),
        "perplexity": evaluated["perplexity"],
        "eval_seconds": round(evaluated["seconds"], 2),
        "artifact_bytes": made["size_bytes"],
        "weight_bytes": evaluated["model_bytes"],
        "bits_per_weight": manifest["summary"]["bits_per_weight"],
        "load": load_average(),
    }


def _base_rss_bytes() -> int:
    """Return the memory of a process that has imported what `duquant quantize` imports, and done nothing."""
    code = (
        "import resource, duquant.pipeline, client.app; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def _measure_plain_forward(calibration: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--plain-forward", "--calibration", calibration]
    sizes = ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len)]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the plain forward pass failed:\n{done.stderr[-2000:]}")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def _plain_forward(calibration: str, samples: int, seq_len: int) -> None:
    """Run the unquantized model, without its head, over the windows that calibration sees; print the figures."""
    import torch
    from transformers import AutoModel

    from client.local import parse_text
    from duquant.calibration.text import calibration_windows
    from duquant.config import CalibrationConfig
    from duquant.models.references import resolve_model

    path = resolve_model(MODEL)
    source = parse_text(calibration, default_part="calibration")
    config = CalibrationConfig(source=source, samples=samples, seq_len=seq_len)
    windows = calibration_windows(path, config, seed=0)
    model = AutoModel.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True).eval()
    batch = config.micro_batch
    with torch.no_grad():
        model(input_ids=windows[:1, :16])
        started = time.perf_counter()
        for first in range(0, samples, batch):
            model(input_ids=windows[first : first + batch], use_cache=False)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": round(seconds, 2), "micro_batch": batch, "peak_rss_bytes": peak}))


def _write(result: dict[str, Any], out: str, *, is_comparable: bool) -> None:
    text = json.dumps(result, indent=2) + "\n"
    if out == "-" or not is_comparable:
        print(text, end="")
        return
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(text, encoding="utf-8")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
