"""What layers are calibrated on: perplexity and seconds by input_mode, in benchmarks/results/input-modes.json.

    python benchmarks/input_modes.py                                     # measures the rows that are missing
    python benchmarks/input_modes.py --recipe duquant-best --mode fp --mode quantized --mode fp+1
    python benchmarks/input_modes.py --samples 4 --seq-len 256 --windows 2 --out /tmp/small.json

A mode is an input_mode, with +N for N refinement passes. Recipes are calibrated on the first half of WikiText-2 valid;
every row has the perplexity on its other half, which modes are chosen by, and on the test text, which is only reported.
Every finished row is written at once, so an interrupted run goes on where it was. Texts: see quantize.py; without
WikiText-2 nothing is measured. `make docs` then writes docs/results/input-modes.md.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import RESULTS, describe, load_average
from quantize import find_texts, run_duquant, text_name

from duquant.calibration.text import read_text
from duquant.config import ALGORITHM_VERSION, DEFAULT_PRESET, PRESETS, Recipe, TextSource, preset

OUT = RESULTS / "input-modes.json"
MODEL = "demo:smollm2-135m"
MODES = ("fp", "quantized", "staged:2", "staged:4", "staged:8", "fp+1")
_IDENTITY = ("model", "recipe", "recipe_digest", "algorithm_version", "calibration", "evaluation")


def main() -> None:
    """Measure what is missing."""
    arguments = _parse()
    out = Path(arguments.out)
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    valid, test = find_texts()
    if valid.startswith("builtin:"):
        raise SystemExit("the modes are measured on WikiText-2 only, and it is not here")
    with tempfile.TemporaryDirectory() as folder:
        texts = {"test": test, **_halves(valid, Path(folder))}
        for planned in _planned(arguments, valid, test):
            if any(_identity(row) == _identity(planned) for row in rows):
                print(f"{_label(planned)}: measured before", flush=True)
                continue
            measured = {**planned, **_measure(planned, texts)}
            rows = [row for row in rows if _place(row) != _place(measured)] + [measured]
            out.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
            scores = ", ".join(f"{text} {measured['perplexity'][text]:.3f}" for text in measured["perplexity"])
            print(f"{_label(measured)}: perplexity {scores}; {measured.get('calibration_seconds', 0)} s", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--recipe", action="append", choices=list(PRESETS), help=f"repeat for more; default: {DEFAULT_PRESET}"
    )
    parser.add_argument("--mode", action="append", help=f"repeat for more; default: {', '.join(MODES)}")
    parser.add_argument("--seed", action="append", type=int, help="repeat for more; default: 0")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of each text")
    parser.add_argument("--out", default=str(OUT))
    return parser.parse_args()


def recipe_in(name: str, mode: str, seed: int) -> Recipe:
    """Return a preset in a mode, MODE or MODE+PASSES."""
    input_mode, _, passes = mode.partition("+")
    return replace(preset(name), input_mode=input_mode, refine_passes=int(passes or 0), seed=seed)


def _halves(text: str, folder: Path) -> dict[str, str]:
    """Write the halves of a text into files; return these by what they are for."""
    found = {}
    for use, part in (("calibration", "calibration"), ("valid", "evaluation")):
        half = TextSource(kind="file", name=text, part=part)  # type: ignore[arg-type]  # both are parts
        (folder / f"{use}.txt").write_text(read_text(half), encoding="utf-8")
        found[use] = str(folder / f"{use}.txt")
    return found


def _planned(arguments: argparse.Namespace, valid: str, test: str) -> Iterator[dict[str, Any]]:
    """Yield what identifies each row; the unquantized model comes first."""
    seq_len = arguments.seq_len
    evaluated = {"valid": text_name(valid), "test": text_name(test), "seq_len": seq_len, "windows": arguments.windows}
    yield {"model": arguments.model, "recipe": None, "mode": None, "seed": 0, "evaluation": evaluated}
    for name in arguments.recipe or [DEFAULT_PRESET]:
        for seed in arguments.seed or [0]:
            for mode in arguments.mode or MODES:
                yield {
                    "model": arguments.model,
                    "recipe": name,
                    "mode": mode,
                    "seed": seed,
                    "recipe_digest": recipe_in(name, mode, seed).digest(),
                    "algorithm_version": ALGORITHM_VERSION,
                    "calibration": {"text": text_name(valid), "seq_len": seq_len, "samples": arguments.samples},
                    "evaluation": evaluated,
                }


def _identity(row: dict[str, Any]) -> str:
    return json.dumps([row.get(key) for key in _IDENTITY], sort_keys=True)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["recipe"], row["mode"], row["seed"]


def _label(row: dict[str, Any]) -> str:
    return f"{row['model']} {row['recipe']} {row['mode']} seed {row['seed']}" if row["recipe"] else row["model"]


def _measure(planned: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    facts = {**describe(), "command": shlex.join(["python", "benchmarks/input_modes.py", *sys.argv[1:]])}
    facts["load_at_start"] = load_average()
    if planned["recipe"] is None:
        return {**facts, "perplexity": _perplexities(planned["model"], planned, texts)}
    recipe, sizes = recipe_in(planned["recipe"], planned["mode"], planned["seed"]), planned["calibration"]
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "recipe.json", Path(folder) / "artifact"
        file.write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
        made = run_duquant(
            *("quantize", planned["model"], "--recipe", str(file), "--calibration", texts["calibration"]),
            *("--samples", str(sizes["samples"]), "--seq-len", str(sizes["seq_len"]), "--out", str(out)),
        )
        found = _perplexities(str(out), planned, texts)
    return {
        **facts,
        "layers": made["layers"],
        "perplexity": found,
        "calibration_seconds": round(made["seconds"], 1),
        "peak_rss_bytes": made["peak_rss_bytes"],
    }


def _perplexities(model: str, planned: dict[str, Any], texts: dict[str, str]) -> dict[str, float]:
    sizes = planned["evaluation"]
    size_options = ("--seq-len", str(sizes["seq_len"]), "--windows", str(sizes["windows"]))
    return {
        use: run_duquant("eval", model, "--text", texts[use], *size_options)["perplexity"] for use in ("valid", "test")
    }


if __name__ == "__main__":
    main()
