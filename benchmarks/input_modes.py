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
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import options
from machine import RESULTS
from quantize import find_texts, text_name
from row_file import Row, RowFile, perplexities, quantized

from duquant.calibration.text import read_text
from duquant.config import ALGORITHM_VERSION, DEFAULT_PRESET, PRESETS, Recipe, TextSource, preset

OUT = RESULTS / "input-modes.json"
MODEL = "demo:smollm2-135m"
MODES = ("fp", "quantized", "staged:2", "staged:4", "staged:8", "fp+1")


def main() -> None:
    """Measure what is missing."""
    arguments = _parse()
    valid, test = find_texts()
    if valid.startswith("builtin:"):
        raise SystemExit("the modes are measured on WikiText-2 only, and it is not here")
    table = RowFile(
        Path(arguments.out),
        place=("model", "recipe", "mode", "seed"),
        identity=("recipe_digest", "algorithm_version", "calibration", "evaluation"),
    )
    with tempfile.TemporaryDirectory() as folder:
        texts = {**_halves(valid, Path(folder)), "test": test}
        calibration = texts.pop("calibration")
        table.measure(_planned(arguments, valid, test), lambda plan: _measure(plan, calibration, texts))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=options.model, default=MODEL)
    parser.add_argument(
        "--recipe", action="append", choices=list(PRESETS), help=f"repeat for more; default: {DEFAULT_PRESET}"
    )
    parser.add_argument("--mode", action="append", type=_mode, help=f"repeat for more; default: {', '.join(MODES)}")
    parser.add_argument("--seed", action="append", type=options.seed, help="repeat for more; default: 0")
    parser.add_argument("--samples", type=options.count, default=16, help="calibration windows")
    parser.add_argument("--seq-len", type=options.count, default=2048)
    parser.add_argument("--windows", type=options.count, default=8, help="evaluation windows of each text")
    parser.add_argument("--out", default=str(OUT))
    return parser.parse_args()


def _mode(text: str) -> str:
    with options.told():
        recipe_in(DEFAULT_PRESET, text, 0)
    return text


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


def _planned(arguments: argparse.Namespace, valid: str, test: str) -> Iterator[Row]:
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


def _measure(plan: Row, calibration: str, texts: dict[str, str]) -> Row:
    if plan["recipe"] is None:
        return {"perplexity": perplexities(plan["model"], texts, plan["evaluation"])}
    recipe = recipe_in(plan["recipe"], plan["mode"], plan["seed"])
    with quantized(plan["model"], recipe, calibration, plan["calibration"]) as (artifact, cost):
        return {**cost, "perplexity": perplexities(artifact, texts, plan["evaluation"])}


if __name__ == "__main__":
    main()
