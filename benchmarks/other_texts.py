"""What GPTQ's damping does to text of another kind than the calibration's: benchmarks/results/other-texts.json.

    python benchmarks/other_texts.py                                     # measures the rows that are missing
    python benchmarks/other_texts.py --recipe duquant-gptq --damp 0.01 --damp 0.3
    python benchmarks/other_texts.py --samples 4 --seq-len 256 --windows 1 --out /tmp/small.json

Recipes are calibrated on the first half of WikiText-2 valid. Every row has the perplexity on its other half, which is
of the same kind, on the text that ships with Python (what help() prints), which is not, and on PIQA's questions with
their right answers. The damping is chosen by the first two; PIQA is only reported. Every finished row is written at
once, so an interrupted run goes on where it was. `make docs` then writes docs/results/other-texts.md.
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

from machine import RESULTS, data_folder, describe, load_average
from quantize import find_texts, run_duquant, text_name

from duquant.calibration.text import read_text
from duquant.config import ALGORITHM_VERSION, PRESETS, Recipe, TextSource, preset

OUT = RESULTS / "other-texts.json"
MODEL = "demo:smollm2-135m"
RECIPES = ("duquant-gptq", "duquant-best")
DAMPS = (0.01, 0.1, 0.3, 1.0)
PIQA = "piqa-valid.jsonl"
_IDENTITY = ("model", "recipe", "damp", "recipe_digest", "algorithm_version", "calibration", "evaluation")


def main() -> None:
    """Measure what is missing."""
    arguments = _parse()
    out = Path(arguments.out)
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    valid, _ = find_texts()
    piqa = data_folder() / PIQA
    if valid.startswith("builtin:") or not piqa.is_file():
        raise SystemExit(f"measured with WikiText-2 and {PIQA}, and not both are in {data_folder()}")
    with tempfile.TemporaryDirectory() as folder:
        texts = _texts(valid, piqa, Path(folder))
        for planned in _planned(arguments, text_name(valid)):
            if any(_identity(row) == _identity(planned) for row in rows):
                print(f"{_label(planned)}: measured before", flush=True)
                continue
            measured = {**planned, **_measure(planned, texts)}
            rows = [row for row in rows if _place(row) != _place(measured)] + [measured]
            out.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
            scores = ", ".join(f"{text} {value:.3f}" for text, value in measured["perplexity"].items())
            print(f"{_label(measured)}: perplexity {scores}", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--recipe", action="append", choices=list(PRESETS), help=f"repeat for more; default: {', '.join(RECIPES)}"
    )
    parser.add_argument("--damp", action="append", type=float, help=f"repeat for more; default: {DAMPS}")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4, help="evaluation windows of each text")
    parser.add_argument("--out", default=str(OUT))
    return parser.parse_args()


def damped(name: str, damp: float) -> Recipe:
    """Return a preset with another damping."""
    recipe = preset(name)
    return replace(recipe, weight=replace(recipe.weight, damp=damp))


def questions_with_answers(lines: str) -> str:
    """Return PIQA's questions, each with its right answer, as lm-eval asks them."""
    found = []
    for line in filter(None, lines.split("\n")):
        question = json.loads(line)
        answer = question["sol2" if question["label"] else "sol1"]
        found.append(f"Question: {question['goal']}\nAnswer: {answer}")
    return "\n\n".join(found)


def _texts(valid: str, piqa: Path, folder: Path) -> dict[str, str]:
    """Write the texts into files; return these by what they are for."""
    contents = {
        "calibration": read_text(TextSource(kind="file", name=valid, part="calibration")),
        "same kind": read_text(TextSource(kind="file", name=valid, part="evaluation")),
        "Python's help": read_text(TextSource(part="evaluation")),
        "PIQA": questions_with_answers(piqa.read_text(encoding="utf-8")),
    }
    files = {use: folder / f"{number}.txt" for number, use in enumerate(contents)}
    for use, file in files.items():
        file.write_text(contents[use], encoding="utf-8")
    return {use: str(file) for use, file in files.items()}


def _planned(arguments: argparse.Namespace, valid: str) -> Iterator[dict[str, Any]]:
    """Yield what identifies each row; the unquantized model comes first."""
    evaluated = {"texts": [valid, "pydoc-topics", PIQA], "seq_len": arguments.seq_len, "windows": arguments.windows}
    yield {"model": arguments.model, "recipe": None, "damp": None, "evaluation": evaluated}
    for name in arguments.recipe or RECIPES:
        for damp in arguments.damp or DAMPS:
            yield {
                "model": arguments.model,
                "recipe": name,
                "damp": damp,
                "recipe_digest": damped(name, damp).digest(),
                "algorithm_version": ALGORITHM_VERSION,
                "calibration": {"text": valid, "seq_len": arguments.seq_len, "samples": arguments.samples},
                "evaluation": evaluated,
            }


def _identity(row: dict[str, Any]) -> str:
    return json.dumps([row.get(key) for key in _IDENTITY], sort_keys=True)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["recipe"], row["damp"]


def _label(row: dict[str, Any]) -> str:
    return f"{row['model']} {row['recipe']}, damp {row['damp']:g}" if row["recipe"] else row["model"]


def _measure(planned: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    facts = {**describe(), "command": shlex.join(["python", "benchmarks/other_texts.py", *sys.argv[1:]])}
    facts["load_at_start"] = load_average()
    if planned["recipe"] is None:
        return {**facts, "perplexity": _perplexities(planned["model"], planned, texts)}
    sizes = planned["calibration"]
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "recipe.json", Path(folder) / "artifact"
        file.write_text(json.dumps(damped(planned["recipe"], planned["damp"]).to_dict()), encoding="utf-8")
        run_duquant(
            *("quantize", planned["model"], "--recipe", str(file), "--calibration", texts["calibration"]),
            *("--samples", str(sizes["samples"]), "--seq-len", str(sizes["seq_len"]), "--out", str(out)),
        )
        return {**facts, "perplexity": _perplexities(str(out), planned, texts)}


def _perplexities(model: str, planned: dict[str, Any], texts: dict[str, str]) -> dict[str, float]:
    sizes = planned["evaluation"]
    options = ("--seq-len", str(sizes["seq_len"]), "--windows", str(sizes["windows"]))
    return {
        use: run_duquant("eval", model, "--text", text, *options)["perplexity"]
        for use, text in texts.items()
        if use != "calibration"
    }


if __name__ == "__main__":
    main()
