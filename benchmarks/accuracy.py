"""The accuracy table: model x recipe x seed, in benchmarks/results/accuracy.json, docs/results/accuracy.md and .svg.

    python benchmarks/accuracy.py                             # measures the rows that are missing, then writes the page
    python benchmarks/accuracy.py --recipe duquant-best --seed 0 --seed 1 --seed 2
    python benchmarks/accuracy.py --page                      # only writes the page and the picture from the JSON file

Every finished row is written at once, so an interrupted run goes on where it was. A row is measured again when its
recipe, its texts or the algorithm's version are others than those it was measured with. Texts: see quantize.py; without
WikiText-2 nothing is measured. Where piqa-valid.jsonl lies beside them, rows get PIQA, zero-shot. A row from before
stays without it, since its artifact is gone, unless --fill-piqa has it made again.
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accuracy_page import write_page
from accuracy_rows import FP
from machine import RESULTS, data_folder, describe, load_average
from quantize import find_texts, run_duquant, text_name

from duquant.config import ALGORITHM_VERSION, PRESETS, preset

OUT = RESULTS / "accuracy.json"
MODELS = ("demo:smollm2-135m", "demo:gemma3-270m")
PIQA = data_folder() / "piqa-valid.jsonl"


def main() -> None:
    """Measure what is missing and write everything that follows from it."""
    arguments = _parse()
    rows: list[dict[str, Any]] = json.loads(OUT.read_text(encoding="utf-8"))["rows"] if OUT.exists() else []
    if not arguments.page:
        calibration, evaluation = find_texts()
        if calibration.startswith("builtin:"):
            raise SystemExit("the table is measured on WikiText-2 only, and it is not here")
        for planned in _planned(arguments, calibration, evaluation):
            before = next((row for row in rows if _identity(row) == _identity(planned)), None)
            if before is not None and ("piqa" in before or not arguments.fill_piqa or not PIQA.is_file()):
                without = "" if "piqa" in before else ", without PIQA (--fill-piqa measures it again)"
                print(f"{_label(planned)}: measured before{without}", flush=True)
                continue
            measured = {**planned, **_measure(planned, calibration, evaluation, arguments.questions)}
            # What the row replaces is an older measurement of the same place in the table.
            rows = [row for row in rows if _place(row) != _place(measured)] + [measured]
            OUT.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
            piqa = f", PIQA {measured['piqa']['acc_norm']:.4f}" if "piqa" in measured else ""
            print(f"{_label(measured)}: perplexity {measured['perplexity']:.3f}{piqa}", flush=True)
    write_page(rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"repeat for more; default: {', '.join(MODELS)}")
    parser.add_argument("--recipe", action="append", choices=list(PRESETS), help="repeat for more; default: all")
    parser.add_argument("--seed", action="append", type=int, help="repeat for more; default: 0, 1 and 2")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows")
    parser.add_argument("--questions", type=int, help="questions of PIQA; default: all 1,838")
    parser.add_argument("--fill-piqa", action="store_true", help="measure rows without PIQA again")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    return parser.parse_args()


def _planned(arguments: argparse.Namespace, calibration: str, evaluation: str) -> Iterator[dict[str, Any]]:
    """Yield what identifies each row. All recipes of a seed come before the next seed: the thin table is soon there."""
    evaluated = {"text": text_name(evaluation), "seq_len": arguments.seq_len, "windows": arguments.windows}
    calibrated = {"text": text_name(calibration), "seq_len": arguments.seq_len, "samples": arguments.samples}
    for model in arguments.model or MODELS:
        yield {"model": model, "recipe": FP, "seed": 0, "evaluation": evaluated}
        for seed in arguments.seed or (0, 1, 2):
            for name in arguments.recipe or PRESETS:
                yield {
                    "model": model,
                    "recipe": name,
                    "seed": seed,
                    "recipe_digest": preset(name).digest(),
                    "algorithm_version": ALGORITHM_VERSION,
                    "calibration": calibrated,
                    "evaluation": evaluated,
                }


def _place(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["model"], row["recipe"], row["seed"]


def _identity(row: dict[str, Any]) -> str:
    keys = ("recipe_digest", "algorithm_version", "calibration", "evaluation")
    return json.dumps([_place(row), [row.get(key) for key in keys]], sort_keys=True)


def _label(row: dict[str, Any]) -> str:
    return f"{row['model']} {row['recipe']} seed {row['seed']}"


def _measure(planned: dict[str, Any], calibration: str, evaluation: str, questions: int | None) -> dict[str, Any]:
    facts = {**describe(), "command": shlex.join(["python", "benchmarks/accuracy.py", *sys.argv[1:]])}
    load = load_average()
    if planned["recipe"] == FP:
        found = _evaluate(planned["model"], evaluation, planned, questions)
        return {**facts, "load_at_start": load, **found, "bits_per_weight": 16.0}
    recipe = replace(preset(planned["recipe"]), seed=planned["seed"])
    sizes = planned["calibration"]
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "recipe.json", Path(folder) / "artifact"
        file.write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
        made = run_duquant(
            *("quantize", planned["model"], "--recipe", str(file), "--calibration", calibration),
            *("--samples", str(sizes["samples"]), "--seq-len", str(sizes["seq_len"]), "--out", str(out)),
        )
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        found = _evaluate(str(out), evaluation, planned, questions)
    return {
        **facts,
        "load_at_start": load,
        **found,
        "bits_per_weight": manifest["summary"]["bits_per_weight"],
        "calibration_seconds": round(made["seconds"], 1),
        "peak_rss_bytes": made["peak_rss_bytes"],
    }


def _evaluate(model: str, text: str, planned: dict[str, Any], questions: int | None) -> dict[str, Any]:
    """Return perplexity, and PIQA's scores where its questions are here."""
    sizes = planned["evaluation"]
    tasks = ["--tasks", str(PIQA)] if PIQA.is_file() else []
    if tasks and questions is not None:
        tasks += ["--limit", str(questions)]
    found = run_duquant(
        *("eval", model, "--text", text, "--seq-len", str(sizes["seq_len"]), "--windows", str(sizes["windows"])),
        *tasks,
    )
    if not math.isfinite(found["perplexity"]):
        raise SystemExit(f"the perplexity of {model} is {found['perplexity']}")
    return {"perplexity": found["perplexity"], **({"piqa": found["tasks"][PIQA.stem]} if tasks else {})}


if __name__ == "__main__":
    main()
