"""The CPU kernels beside torch's own, checked before they are timed, with the machine's ceilings from the same run.

    python benchmarks/cpu_kernels.py                                  # makes benchmarks/results/kernels-cpu.json
    python benchmarks/cpu_kernels.py --rounds 3 --size 1024 --out -   # a quick look

Every contender runs once in each round, in turn, so that what slows the machine down slows all of them. Weights are as
many copies as do not fit the last-level cache: a model's next layer is never in it. One thread.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, describe, load_average
from torch import Tensor

from duquant import kernels
from duquant.config import ActivationConfig, TransformConfig
from duquant.evaluation.subjects import Load, model_call
from duquant.evaluation.timing import ceilings, interleaved
from duquant.kernels import LinearWeight, PackedWeight, PreparedTransform
from duquant.kernels.cpu import CpuBackend
from duquant.kernels.cpu.library import library
from duquant.quantizers.packing import pack, unpack
from duquant.transforms.site import SiteTransform, search_transform

MODEL = "demo:smollm2-135m"
TOKENS = (1, 4, 16, 64, 256)
TRANSFORM_TOKENS = (1, 16, 256)
DECODE_BATCHES = (16, 64)
DTYPE = torch.bfloat16
_CACHE_BYTES = 110_000_000


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        **describe(),
        "command": shlex.join(["python", "benchmarks/cpu_kernels.py", *sys.argv[1:]]),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "instruction_set": library().isa,
        "load_at_start": load_average(),
    }
    result["checked"] = gate(arguments.size)
    result["ceilings"] = ceilings(torch.device("cpu"), rounds=max(3, arguments.rounds // 3))
    print(f"ceilings (GB/s, GFLOP/s): {result['ceilings']['giga_per_second']}", flush=True)
    result["linear"] = linears(arguments.size, arguments.rounds)
    result["transform"] = transforms(arguments.size, arguments.rounds)
    result["model"] = whole_model(arguments.artifact, arguments.rounds)
    result["load_at_end"] = load_average()
    text = json.dumps(result, indent=2) + "\n"
    if arguments.out == "-":
        print(text, end="")
    else:
        Path(arguments.out).write_text(text, encoding="utf-8")
        print(f"written: {arguments.out}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="in and out features of the linear")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--artifact", help="an artifact of SmolLM2-135M; default: one is made")
    parser.add_argument("--out", default=str(RESULTS / "kernels-cpu.json"), help="- prints it")
    return parser.parse_args()


# --- what is timed ---------------------------------------------------------------------------------------------------


def random_weight(size: int) -> PackedWeight:
    """Random codes, scales and zero points: never zeros, whose products cost less power."""
    codes = torch.randint(-8, 8, (size, size), dtype=torch.int8)
    zero_point = torch.randint(-8, 8, (size, 1)).float()
    return PackedWeight(pack(codes, bits=4), torch.rand(size, 1) + 0.5, zero_point, size, 4)


def random_transform(size: int) -> SiteTransform:
    """R1, P, R2 as the default recipe finds them."""
    config = TransformConfig(rotation="hadamard", permutation="zigzag")
    return search_transform(torch.randn(256, size), config, torch.Generator().manual_seed(0))


def prepared(transform: SiteTransform) -> PreparedTransform:
    return kernels.prepare_transform(transform, ActivationConfig(), torch.ones(2))


def gate(size: int) -> list[str]:
    """Refuse to time anything that is wrong. Results are compared with int64 products, in memory that held NaN."""
    checked = []
    W = random_weight(size)
    weight = kernels.prepare_weight([W])
    if not isinstance(weight.backend, CpuBackend):
        raise SystemExit("the CPU kernels do not run here; see `duquant doctor`")
    codes = unpack(W.packed, size, bits=4).long()
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    try:
        for tokens in TOKENS:
            q = kernels.transform_quantize_pack(torch.randn(tokens, size), prepared(SiteTransform()))
            Y = kernels.int4_linear(q, weight)
            left, right = q.codes.long() - q.zero_point.long(), codes - W.zero_point.long()
            expected = (left @ right.T).float() * W.scale.T * q.scale
            if not torch.equal(Y, expected):
                raise SystemExit(f"int4_linear is wrong at {tokens} tokens")
            checked.append(f"int4_linear, {tokens} tokens: every bit as from int64 products")
        X = torch.randn(64, size).bfloat16()
        T = random_transform(size)
        q = kernels.transform_quantize_pack(X, prepared(T))
        exact = T.apply(X.double())
        off = ((q.codes - q.zero_point) * q.scale - exact).abs()
        worst = float((off / q.scale).max())
        # Half a step of rounding, and 2^-8 of the row's range, 15 steps, from bfloat16.
        if not worst <= 0.5 + 15 / 2**8 * 2:
            raise SystemExit(f"transform_quantize_pack is wrong by {worst:.3f} steps")
        checked.append(f"transform_quantize_pack: at most {worst:.3f} steps from the float64 transform")
    finally:
        torch.use_deterministic_algorithms(False)
    return checked


def linears(size: int, rounds: int) -> list[dict[str, Any]]:
    """int4_linear, and a whole DuQuant site (transform, rounding, product), beside bfloat16."""
    copies = _CACHE_BYTES * 3 // 2 // (size * size // 2) + 1
    packed = [kernels.prepare_weight([random_weight(size)]) for _ in range(copies)]
    full = [torch.randn(size, size).bfloat16() for _ in range(max(2, copies // 3))]
    transform, plain = prepared(random_transform(size)), prepared(SiteTransform())
    rows = []
    for tokens in TOKENS:
        X = torch.randn(tokens, size).bfloat16()
        q = kernels.transform_quantize_pack(X, plain)
        # Each contender walks through its own copies.
        one, two, three, other = cycle(packed), cycle(packed), cycle(packed), cycle(full)
        times = interleaved(
            {
                "bfloat16": lambda X=X, ws=other: torch.nn.functional.linear(X, next(ws)),
                "int4_linear": lambda q=q, ws=one: kernels.int4_linear(q, next(ws), dtype=DTYPE),
                "rtn": lambda X=X, ws=two: kernels.transformed_linear(X, plain, next(ws), dtype=DTYPE),
                "duquant": lambda X=X, ws=three: kernels.transformed_linear(X, transform, next(ws), dtype=DTYPE),
            },
            rounds=rounds,
        )
        base = times["bfloat16"]["median_ms"]
        speedup = {name: round(base / value["median_ms"], 2) for name, value in times.items()}
        ours = times["int4_linear"]["median_ms"]
        rows.append(
            {
                "tokens": tokens,
                "size": size,
                "times": times,
                "speedup": speedup,
                "weight_gigabytes_per_second": round(_bytes(packed[0]) / ours / 1e6, 2),
                "giga_operations_per_second": round(2 * tokens * size * size / ours / 1e6, 1),
            }
        )
        print(f"{tokens} tokens: {base:.3f} ms in bfloat16, {ours:.3f} ms in INT4, speedups {speedup}", flush=True)
    return rows


def _bytes(W: LinearWeight) -> int:
    return sum(part.numel() * part.element_size() for part in (W.data, W.scale, W.zero_point, W.weight_sum))


def transforms(size: int, rounds: int) -> list[dict[str, Any]]:
    """Transform, rounding and packing beside rounding and packing alone."""
    transform, plain = prepared(random_transform(size)), prepared(SiteTransform())
    rows = []
    for tokens in TRANSFORM_TOKENS:
        inputs = [torch.randn(tokens, size).bfloat16() for _ in range(8)]
        one, two = cycle(inputs), cycle(inputs)
        times = interleaved(
            {
                "quantize and pack": lambda xs=one: kernels.transform_quantize_pack(next(xs), plain),
                "transform, quantize and pack": lambda xs=two: kernels.transform_quantize_pack(next(xs), transform),
            },
            rounds=rounds * 2,
        )
        alone, both = (value["median_ms"] for value in times.values())
        rows.append({"tokens": tokens, "size": size, "times": times, "ratio": round(both / alone, 2)})
        print(f"{tokens} tokens: transform, quantize and pack / quantize and pack: {both / alone:.2f}", flush=True)
    return rows


# --- the whole model -------------------------------------------------------------------------------------------------


def whole_model(artifact: str | None, rounds: int) -> dict[str, Any]:
    """Decoding and prefill of SmolLM2-135M, INT4 and bfloat16, token by token in turn; bytes of the linears."""
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    from duquant.config import preset, with_calibration
    from duquant.evaluation.contenders import linear_bytes
    from duquant.inference import load
    from duquant.models.references import resolve_model
    from duquant.pipeline import quantize_model

    path = resolve_model(MODEL)
    full = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True).eval()
    with tempfile.TemporaryDirectory() as folder:
        if artifact is None:
            recipe = with_calibration(preset("duquant-fast"), samples=4, seq_len=256, shards=1)
            artifact = str(quantize_model(str(path), Path(folder) / "artifact", recipe, device="cpu").artifact)
        packed, _ = load(artifact)
    prompt = torch.randint(0, full.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    steps = {
        "bfloat16": _decoder(full, prompt, DynamicCache),
        "int4": _decoder(packed, prompt, packed.duquant_new_cache),
    }
    decode = interleaved(
        {name: (lambda s=step: next(s)) for name, step in steps.items()}, rounds=rounds * 3, least_s=0.0
    )
    with torch.inference_mode():
        prefill = interleaved(
            {
                "bfloat16": lambda: full.model(prompt, use_cache=True),
                "int4": lambda: packed.model(prompt, use_cache=True),
            },
            rounds=max(3, rounds // 3),
        )
    result = {
        "model": MODEL,
        "context": prompt.shape[1],
        "batches": [_decode_batch(full, packed, batch, prompt.shape[1], rounds) for batch in DECODE_BATCHES],
        "decode": decode,
        "decode_speedup": round(decode["bfloat16"]["median_ms"] / decode["int4"]["median_ms"], 2),
        "decode_tokens_per_second": {name: round(1e3 / value["median_ms"], 1) for name, value in decode.items()},
        "prefill": prefill,
        "prefill_speedup": round(prefill["bfloat16"]["median_ms"] / prefill["int4"]["median_ms"], 2),
        "linear_bytes": linear_bytes(packed),
    }
    print(f"model: decode {result['decode_speedup']}x, prefill {result['prefill_speedup']}x", flush=True)
    return result


@torch.inference_mode()
def _decode_batch(full: Any, packed: Any, batch: int, context: int, rounds: int) -> dict[str, Any]:
    """One new token for each of `batch` sequences of random states."""
    load = Load("decode", batch=batch, tokens=batch, context=context)
    times = interleaved(
        {"bfloat16": model_call(full, load), "int4": model_call(packed, load)}, rounds=max(3, rounds // 2), least_s=0.0
    )
    return {
        "batch": batch,
        "times": times,
        "tokens_per_second": {name: round(batch / value["median_ms"] * 1e3, 1) for name, value in times.items()},
        "speedup": round(times["bfloat16"]["median_ms"] / times["int4"]["median_ms"], 2),
    }


@torch.inference_mode()
def _decoder(model: Any, prompt: Tensor, new_cache: Callable[[], Any]) -> Iterator[Tensor]:
    """Yield greedy tokens after the prompt, without end."""
    cache = new_cache()
    token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    while True:
        yield token
        with torch.inference_mode():
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)


if __name__ == "__main__":
    main()
