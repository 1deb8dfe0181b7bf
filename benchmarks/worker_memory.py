"""Peak memory of a layer worker above its own base, beside two layers of weights plus one micro-batch of activations.

    python benchmarks/worker_memory.py                        # writes benchmarks/results/worker-memory.json
    python benchmarks/worker_memory.py --samples 2 --seq-len 256 --hidden 256 --out -

Two models: SmolLM2-135M, whose layers are so small (7 MB) that fixed costs show, and a random Llama with wide layers,
where weights count as they do in real models. Each is measured in a process of its own, which does what a worker does:
sweep and quantize layer after layer, reading and writing files. The base is what that process holds when it has done
one layer over 32 tokens and given free memory back: libraries load their code and make their buffers at first use.

Each model is measured twice. By default glibc keeps freed blocks of up to 32 MB for the next call, which counts as the
process's memory though nobody uses it; with MALLOC_TRIM_THRESHOLD_ set it returns them, which is what the work needs,
at the price of page faults (a sweep of SmolLM2 then takes about half as long again). Linux with glibc only.
"""

import argparse
import ctypes
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import RESULTS, describe, load_average

if TYPE_CHECKING:
    from duquant.config import Recipe

_LAYERS = 4
"""Layers that are done; all are of one size."""
ALLOCATORS = {"keeps_freed_blocks": {}, "returns_freed_blocks": {"MALLOC_TRIM_THRESHOLD_": str(2 << 20)}}
"""Environment variables of the two measurements."""


def main() -> None:
    arguments = _parse()
    if arguments.model:
        print(json.dumps(_measure(arguments)))
        return
    result = {
        **describe(),
        "command": shlex.join(["python", "benchmarks/worker_memory.py", *sys.argv[1:]]),
        "load_at_start": load_average(),
        "models": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "wide"
        _run("--make-wide", str(wide), "--hidden", str(arguments.hidden))
        for name, model in {"smollm2-135m": "demo:smollm2-135m", f"random-llama-{arguments.hidden}": str(wide)}.items():
            sizes = ("--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len))
            for allocator, variables in ALLOCATORS.items():
                printed = _run("--model", model, "--recipe", arguments.recipe, *sizes, variables=variables)
                entry = json.loads(printed.splitlines()[-1])
                result["models"].setdefault(name, {})[allocator] = entry
                above, base, limit = (entry[f"{key}_bytes"] / 1e6 for key in ("above_base", "base", "limit"))
                print(
                    f"{name}, glibc {allocator}: {above:.1f} MB above the base of {base:.0f} MB; limit {limit:.1f} MB"
                )
    text = json.dumps(result, indent=2) + "\n"
    if arguments.out == "-":
        print(text, end="")
    else:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(text, encoding="utf-8")
        print(f"written: {arguments.out}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="duquant-fast")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=2048, help="width of the random model")
    parser.add_argument("--out", default=str(RESULTS / "worker-memory.json"), help="- prints it")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--make-wide", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make_wide:
        _make_wide(Path(arguments.make_wide), arguments.hidden)
        sys.exit()
    return arguments


def _run(*options: str, variables: dict[str, str] | None = None) -> str:
    command = [sys.executable, __file__, *options]
    environment = {**os.environ, **(variables or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{shlex.join(options)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _make_wide(path: Path, hidden: int) -> None:
    """Write a random Llama of two layers with SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from duquant.models.references import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo:smollm2-135m"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 4,
        num_hidden_layers=2,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not report {field}")


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do a worker's steps in this process and watch its high-water mark."""
    from duquant.config import preset, with_calibration
    from duquant.models.devices import resolve_device
    from duquant.models.references import resolve_model
    from duquant.pipeline import ModelRun, plan

    changes = {"samples": arguments.samples, "seq_len": arguments.seq_len}
    recipe = with_calibration(preset(arguments.recipe), **changes)
    path = resolve_model(arguments.model)
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        run = ModelRun(path, recipe, Path(folder) / "work", device=resolve_device("cpu"))
        steps = plan(layers=run.source.layers, shards=run.shards)
        # Tokens and embeddings are made by another process: their size has nothing to do with a layer's.
        _prepare(arguments, Path(folder) / "work")
        shapes = run._skeleton.layer_names(0)
        _warm_up(path, recipe, Path(folder) / "warm")
        base = _settled_memory()
        for step in steps:
            if step.id.kind not in ("sweep", "quantize") or step.id.layer >= _LAYERS:
                continue
            _settled_memory()
            if step.id.kind == "sweep":
                run.sweep(step.id.layer, step.id.shard)
            else:
                run.quantize(step.id.layer, out)
            peaks[step.id.kind] = max(peaks.get(step.id.kind, 0), _memory("VmHWM"))
    layer_bytes = sum(shape.numel() * 2 for shape in shapes.values())
    activations = _activation_bytes(dict(run.source.config), recipe.calibration.micro_batch * arguments.seq_len)
    above = max(peaks.values()) - base
    return {
        "recipe": arguments.recipe,
        "samples": arguments.samples,
        "seq_len": arguments.seq_len,
        "micro_batch": recipe.calibration.micro_batch,
        "base_bytes": base,
        "peak_sweep_bytes": peaks["sweep"],
        "peak_quantize_bytes": peaks["quantize"],
        "above_base_bytes": above,
        "layer_bytes": layer_bytes,
        "micro_batch_activation_bytes": activations,
        "limit_bytes": 2 * layer_bytes + activations,
        "is_within_limit": above <= 2 * layer_bytes + activations,
    }


def _warm_up(model: Path, recipe: "Recipe", folder: Path) -> None:
    """Do layer 0 over one short window, so that everything that is loaded or made once is there."""
    from duquant.config import with_calibration
    from duquant.models.devices import resolve_device
    from duquant.pipeline import ModelRun

    tiny = with_calibration(recipe, samples=1, seq_len=32, shards=1)
    folder.mkdir()
    run = ModelRun(model, tiny, folder, device=resolve_device("cpu"))
    run.tokenize()
    run.embed(0)
    run.sweep(0, 0)
    run.quantize(0, folder)


def _settled_memory() -> int:
    """Give freed memory back to the system, set the high-water mark back to what is held now, and return that."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _memory("VmRSS")


def _prepare(arguments: argparse.Namespace, work: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from duquant.config import preset, with_calibration; "
        "from duquant.models.references import resolve_model; from duquant.pipeline import ModelRun; "
        "from duquant.models.devices import resolve_device; "
        "model, recipe, samples, seq_len, work = sys.argv[1:]; "
        "recipe = with_calibration(preset(recipe), samples=int(samples), seq_len=int(seq_len)); "
        "run = ModelRun(resolve_model(model), recipe, Path(work), device=resolve_device('cpu')); "
        "run.tokenize(); [run.embed(shard) for shard in range(run.shards)]"
    )
    values = [arguments.model, arguments.recipe, str(arguments.samples), str(arguments.seq_len), str(work)]
    subprocess.run([sys.executable, "-c", code, *values], check=True, stdout=subprocess.DEVNULL)


def _activation_bytes(config: dict[str, Any], tokens: int) -> int:
    """Return the bytes of one micro-batch inside a layer, bfloat16.

    The hidden state at four places (in, normed, residual, out), q, k, v, the attention's output, and the MLP's gate, up
    and product.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv = (config.get("num_key_value_heads") or heads) * head_dim
    return int(tokens * 2 * (4 * hidden + 2 * heads * head_dim + 2 * kv + 3 * config["intermediate_size"]))


if __name__ == "__main__":
    main()
