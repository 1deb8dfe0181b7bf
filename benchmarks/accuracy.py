"""The accuracy table: model x recipe x seed, in benchmarks/results/accuracy.json, docs/results/accuracy.md and .svg.

    python benchmarks/accuracy.py                             # measures the rows that are missing, then writes the page
    python benchmarks/accuracy.py --recipe duquant-best --seed 0 --seed 1 --seed 2
    python benchmarks/accuracy.py --page                      # only writes the page and the picture from the JSON file

Every finished row is written at once, so an interrupted run goes on where it was. A row is measured again when its
recipe, its texts or the algorithm's version are others than those it was measured with. Texts: see quantize.py; without
WikiText-2 nothing is measured. Where piqa-valid.jsonl lies beside them, rows get PIQA, zero-shot, and where Debian's
package fortunes is installed, the perplexity on a text that nothing was tuned on. A row from before stays without them,
since its artifact is gone, unless --fill has it made again.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import options
import unseen_text
from accuracy_page import write_page
from accuracy_rows import FP, Row
from machine import RESULTS, data_folder
from quantize import find_texts, text_name
from row_file import RowFile, evaluate, quantized

from duquant.config import ALGORITHM_VERSION, PRESETS, preset

OUT = RESULTS / "accuracy.json"
MODELS = ("demo:smollm2-135m", "demo:gemma3-270m")
PIQA = data_folder() / "piqa-valid.jsonl"
UNSEEN_WINDOWS = 8
REFUSED = (("demo:gemma3-270m", "spinquant"),)
"""No rows: this model's norms act on what is added to the residual stream, so the stream cannot be rotated."""


def main() -> None:
    """Measure what is missing and write everything that follows from it."""
    arguments = _parse()
    table = RowFile(
        OUT,
        place=("model", "recipe", "seed"),
        identity=("recipe_digest", "algorithm_version", "calibration", "evaluation"),
    )
    if not arguments.page:
        calibration, evaluation = find_texts()
        if calibration.startswith("builtin:"):
            raise SystemExit("the table is measured on WikiText-2 only, and it is not here")
        is_here = {"piqa": PIQA.is_file(), "unseen": bool(unseen_text.quotations())}
        wanted = [part for part in arguments.fill or () if is_here[part]]
        table.measure(
            _planned(arguments, calibration, evaluation),
            lambda plan: _measure(plan, calibration, evaluation, arguments.questions),
            lacks=lambda row: " and ".join(part for part in wanted if part not in row),
        )
    write_page(table.read())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", type=options.model, help=f"repeat for more; default: {', '.join(MODELS)}"
    )
    parser.add_argument("--recipe", action="append", choices=list(PRESETS), help="repeat for more; default: all")
    parser.add_argument("--seed", action="append", type=options.seed, help="repeat for more; default: 0, 1 and 2")
    parser.add_argument("--samples", type=options.count, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=options.count, default=2048)
    parser.add_argument("--windows", type=options.count, default=16, help="evaluation windows")
    parser.add_argument("--questions", type=options.count, help="questions of PIQA; default: all 1,838")
    parser.add_argument(
        "--fill", action="append", choices=("piqa", "unseen"), help="measure rows without it again; repeat for more"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing")
    return parser.parse_args()


def _planned(arguments: argparse.Namespace, calibration: str, evaluation: str) -> Iterator[Row]:
    """Yield what identifies each row. All recipes of a seed come before the next seed: the thin table is soon there."""
    evaluated = {"text": text_name(evaluation), "seq_len": arguments.seq_len, "windows": arguments.windows}
    calibrated = {"text": text_name(calibration), "seq_len": arguments.seq_len, "samples": arguments.samples}
    for model in arguments.model or MODELS:
        yield {"model": model, "recipe": FP, "seed": 0, "evaluation": evaluated}
        for seed in arguments.seed or (0, 1, 2):
            for name in arguments.recipe or PRESETS:
                if (model, name) in REFUSED:
                    print(f"{model} {name}: the recipe refuses the model", flush=True)
                    continue
                yield {
                    "model": model,
                    "recipe": name,
                    "seed": seed,
                    "recipe_digest": preset(name).digest(),
                    "algorithm_version": ALGORITHM_VERSION,
                    "calibration": calibrated,
                    "evaluation": evaluated,
                }


def _measure(plan: Row, calibration: str, evaluation: str, questions: int | None) -> Row:
    if plan["recipe"] == FP:
        return {**_evaluate(plan["model"], evaluation, plan, questions), "bits_per_weight": 16.0}
    recipe = replace(preset(plan["recipe"]), seed=plan["seed"])
    with quantized(plan["model"], recipe, calibration, plan["calibration"]) as (artifact, cost):
        return {**_evaluate(artifact, evaluation, plan, questions), **cost}


def _evaluate(model: str, text: str, plan: Row, questions: int | None) -> Row:
    """Return perplexity, PIQA's scores and the perplexity on the unseen text, each where it is here."""
    tasks = ["--tasks", str(PIQA)] if PIQA.is_file() else []
    if tasks and questions is not None:
        tasks += ["--limit", str(questions)]
    found = evaluate(model, text, plan["evaluation"], *tasks)
    if not math.isfinite(found["perplexity"]):
        raise SystemExit(f"the perplexity of {model} is {found['perplexity']}")
    scores = {"piqa": found["tasks"][PIQA.stem]} if tasks else {}
    return {"perplexity": found["perplexity"], **scores, **_evaluate_unseen(model, plan["evaluation"]["seq_len"])}


def _evaluate_unseen(model: str, seq_len: int) -> Row:
    text = unseen_text.quotations()
    if not text:
        return {}
    sizes = {"seq_len": seq_len, "windows": UNSEEN_WINDOWS}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "unseen.txt"
        file.write_text(text, encoding="utf-8")
        found = evaluate(model, str(file), sizes)
    return {"unseen": {"text": unseen_text.NAME, **sizes, "perplexity": found["perplexity"]}}


if __name__ == "__main__":
    main()
