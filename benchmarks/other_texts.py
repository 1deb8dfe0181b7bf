"""How recipes do on text of another kind than the calibration's: benchmarks/results/other-texts.json.

    python benchmarks/other_texts.py                                     # measures the rows that are missing
    python benchmarks/other_texts.py --recipe duquant-gptq --damp 0.01 --damp 0.3
    python benchmarks/other_texts.py --recipe duquant-best --mix conversation=0.5 --mix conversation=0.33,builtin=0.33
    python benchmarks/other_texts.py --samples 4 --seq-len 256 --windows 1 --out /tmp/small.json

Recipes are calibrated on the first half of WikiText-2 valid. Every row has the perplexity on its other half, which is
of the same kind, on the text that ships with Python (what help() prints), which is not, and on PIQA's questions with
their right answers. GPTQ's damping is tried, and chosen by the first two; PIQA is only reported. So are
mixtures: a part of the windows of the text that ships with Python (of its other half), a part of
builtin:conversations, a part that the model writes itself. Every finished row is written at once, so an interrupted run
goes on where it was. `make docs` then writes docs/results/other-texts.md.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import options
from machine import RESULTS, data_folder
from quantize import find_texts, text_name
from row_file import Row, RowFile, perplexities, quantized

from duquant.calibration.text import read_text
from duquant.config import ALGORITHM_VERSION, PRESETS, Recipe, TextSource, preset, with_calibration

OUT = RESULTS / "other-texts.json"
MODEL = "demo:smollm2-135m"
RECIPES = (
    "rtn",
    "quarot",
    "duquant",
    "duquant-lwc",
    "duquant-fast",
    "duquant-gptq",
    "duquant-best",
    "duquant-distilled",
)
DAMPED = ("duquant-gptq", "duquant-best")
DAMPS = (0.01, 0.1, 0.3, 1.0)
SHARES = ("builtin_share", "conversation_share", "self_share")
MIXED = "duquant-best"
MIXES: tuple[Mapping[str, float], ...] = (
    {"builtin_share": 0.5},
    {"conversation_share": 0.5},
    {"self_share": 0.5},
    {"builtin_share": 0.33, "conversation_share": 0.33},
    {"builtin_share": 0.33, "self_share": 0.33},
)
"""Parts of the calibration's windows that are of other texts."""
PIQA = "piqa-valid.jsonl"


def main() -> None:
    """Measure what is missing."""
    arguments = _parse()
    valid, _ = find_texts()
    piqa = data_folder() / PIQA
    if valid.startswith("builtin:") or not piqa.is_file():
        raise SystemExit(f"measured with WikiText-2 and {PIQA}, and not both are in {data_folder()}")
    table = RowFile(
        Path(arguments.out),
        place=("model", "recipe", "damp", "mix"),
        identity=("recipe_digest", "algorithm_version", "calibration", "evaluation"),
    )
    with tempfile.TemporaryDirectory() as folder:
        texts = _texts(valid, piqa, Path(folder))
        calibration = texts.pop("calibration")
        table.measure(_planned(arguments, text_name(valid)), lambda plan: _measure(plan, calibration, texts))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=options.model, default=MODEL)
    parser.add_argument(
        "--recipe", action="append", choices=list(PRESETS), help=f"repeat for more; default: {', '.join(RECIPES)}"
    )
    parser.add_argument("--damp", action="append", type=_damp, help=f"repeat for more; default: {DAMPS} of {DAMPED}")
    parser.add_argument(
        "--mix", action="append", type=_mix, help=f"as builtin=0.33,self=0.33; default: {len(MIXES)} ones of {MIXED}"
    )
    parser.add_argument("--samples", type=options.count, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=options.count, default=2048)
    parser.add_argument("--windows", type=options.count, default=4, help="evaluation windows of each text")
    parser.add_argument("--out", default=str(OUT))
    return parser.parse_args()


def _mix(text: str) -> Mapping[str, float]:
    """Read shares of other texts; nothing stands for none."""
    shares = {}
    for part in filter(None, text.split(",")):
        name, _, share = part.partition("=")
        try:
            shares[f"{name}_share"] = float(share)
        except ValueError as err:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=SHARE, such as builtin=0.5") from err
    if unknown := shares.keys() - set(SHARES):
        names = ", ".join(name.removesuffix("_share") for name in SHARES)
        raise argparse.ArgumentTypeError(f"there is no {min(unknown).removesuffix('_share')!r}; there is: {names}")
    with options.told():
        variant(MIXED, mix=shares)
    return shares


def _damp(text: str) -> float:
    with options.told():
        variant(MIXED, damp=float(text))
    return float(text)


def variant(name: str, damp: float | None = None, mix: Mapping[str, float] | None = None) -> Recipe:
    """Return a preset, with another damping and with these shares of other texts alone, where these are given."""
    recipe = preset(name)
    if damp is not None:
        recipe = replace(recipe, weight=replace(recipe.weight, damp=damp))
    if mix is not None:
        recipe = with_calibration(recipe, **{**dict.fromkeys(SHARES, 0.0), **mix})
    return recipe


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


def _planned(arguments: argparse.Namespace, valid: str) -> Iterator[Row]:
    """Yield what identifies each row; the unquantized model comes first."""
    evaluated = {"texts": [valid, "pydoc-topics", PIQA], "seq_len": arguments.seq_len, "windows": arguments.windows}
    yield {"model": arguments.model, "recipe": None, "damp": None, "evaluation": evaluated}
    for name in arguments.recipe or RECIPES:
        variants: list[tuple[float | None, Mapping[str, float] | None]] = []
        if arguments.mix or (name == MIXED and not arguments.damp):
            variants += [(None, mix) for mix in arguments.mix or MIXES]
        if arguments.damp or not arguments.mix:
            variants += [(damp, None) for damp in arguments.damp or (DAMPS if name in DAMPED else (None,))]
        for damp, mix in variants:
            recipe = variant(name, damp, mix)
            shares = {name: share for name in SHARES if (share := getattr(recipe.calibration, name))}
            yield {
                "model": arguments.model,
                "recipe": name,
                "damp": damp,
                "mix": shares or None,
                "recipe_digest": recipe.digest(),
                "algorithm_version": ALGORITHM_VERSION,
                "calibration": {"text": valid, "seq_len": arguments.seq_len, "samples": arguments.samples},
                "evaluation": evaluated,
            }


def _measure(plan: Row, calibration: str, texts: dict[str, str]) -> Row:
    if plan["recipe"] is None:
        return {"perplexity": perplexities(plan["model"], texts, plan["evaluation"])}
    recipe = variant(plan["recipe"], plan["damp"], plan["mix"])
    with quantized(plan["model"], recipe, calibration, plan["calibration"]) as (artifact, cost):
        return {**cost, "perplexity": perplexities(artifact, texts, plan["evaluation"])}


if __name__ == "__main__":
    main()
