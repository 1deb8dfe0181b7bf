"""What the GPU benchmark measures. Every section returns rows for the JSON file."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_operands import (
    BACKEND,
    KINDS,
    Layer,
    Model,
    activation,
    generator,
    packed_weight,
    quantized,
    transform,
)
from torch.nn.functional import linear, scaled_dot_product_attention

from duquant.evaluation.timing import Call, Case, Harness
from duquant.kernels.gpu.configs import LinearConfig, linear_config
from duquant.kernels.gpu.launch import capability
from duquant.kernels.gpu.linear import int4_linear
from duquant.kernels.reference import ReferenceBackend

REFERENCE = ReferenceBackend()
Row = dict[str, Any]


def ceilings(harness: Harness) -> Row:
    """Measure what the GPU does at best: a copy, and products of large square matrices in bf16, fp8 and int8."""
    device, side = harness.device, 8192 if harness.is_gpu else 64
    g = generator(device, 0)
    source = torch.randint(0, 255, (2**31 if harness.is_gpu else 2**12,), dtype=torch.uint8, generator=g, device=device)
    target = torch.empty_like(source)
    A, B = (torch.randn(side, side, generator=g, device=device) for _ in range(2))
    eights = [torch.randint(-128, 128, (side, side), dtype=torch.int8, generator=g, device=device) for _ in range(2)]
    fours = [part >> 4 for part in eights]  # int8 codes of 4-bit size switch fewer bits, and so may clock higher
    ones = torch.ones(side, 1, device=device)
    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "bf16": _bound(torch.mm, A.bfloat16(), B.bfloat16().T),
        "int8": _bound(torch._int_mm, eights[0], eights[1].T),
        "int8_of_4_bit_values": _bound(torch._int_mm, fours[0], fours[1].T),
        "fp8": _bound(
            torch._scaled_mm,
            A.to(torch.float8_e4m3fn),
            B.to(torch.float8_e4m3fn).T,
            scale_a=ones,
            scale_b=ones.T,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ),
    }
    rows, missing = _runnable(calls)
    timings = harness.from_graph([Case(name, [call]) for name, call in rows.items()])
    result: Row = {"side": side, "unavailable": missing, "timings": timings}
    result["copy_bytes_per_s"] = 2 * source.numel() / timings["copy"]["us"] * 1e6
    for name in timings.keys() - {"copy"}:
        result[f"{name}_ops_per_s"] = 2 * side**3 / timings[name]["us"] * 1e6
    return result


def linears(
    harness: Harness, model: Model, tokens: int, *, is_sweep: bool, only: tuple[str, ...] | None = None
) -> list[Row]:
    """Time each product of a layer beside bf16, fp8 and int8; with `is_sweep` also the neighbours of our tiles."""
    rows = []
    for name, (width, out) in model.linears().items():
        if only and name not in only:
            continue
        copies = harness.copies(width * out // 2)
        W = [packed_weight(width, out, harness.device, seed) for seed in range(copies)]
        X = quantized(tokens, width, model.block, harness.device, seed=1)
        chosen = linear_config(tokens, out, width // 2, capability(harness.device))
        configs = {"int4": chosen, **(_neighbours(chosen) if is_sweep else {})}
        calls: dict[str, list[Call]] = {
            label: [_bound(int4_linear, X, each, None, torch.bfloat16, config=config) for each in W]
            for label, config in configs.items()
        }
        calls |= _rivals(tokens, width, out, harness)
        able, missing = _runnable({label: each[0] for label, each in calls.items()})
        cases = [Case(label, calls[label]) for label in able]
        row: Row = {"model": model.name, "linear": name, "K": width, "N": out, "M": tokens, "unavailable": missing}
        row["graph"] = harness.from_graph(cases)
        row["eager"] = harness.eager([case for case in cases if case.name in ("int4", "bf16")])
        row["tiles"] = {label: str(config) for label, config in configs.items()}
        row["best_tiles"] = min(configs.keys() & row["graph"].keys(), key=lambda label: row["graph"][label]["us"])
        rows.append(row)
    return rows


def _neighbours(chosen: LinearConfig) -> dict[str, LinearConfig]:
    """Return variants of tiles that may be faster than the table's."""
    if chosen.split:
        variants = [replace(chosen, split=split) for split in (1, 2, 4, 8) if split != chosen.split]
        variants += [replace(chosen, block_k=64, stages=5), replace(chosen, block_n=128, warps=8)]
    else:
        variants = [
            replace(chosen, unpack_weight=True),
            replace(chosen, block_k=128, stages=2),
            replace(chosen, block_m=128, block_n=128, block_k=64, stages=4),
            replace(chosen, block_m=128, block_n=256),
        ]
    return {f"int4 #{index}": variant for index, variant in enumerate(variants, start=1)}


def _rivals(tokens: int, width: int, out: int, harness: Harness) -> dict[str, list[Call]]:
    """Return the same product in bf16, fp8 (scaled per row and column) and int8 (exact, no scales)."""
    device = harness.device
    g = generator(device, 5)
    X = torch.randn(tokens, width, generator=g, device=device).bfloat16()
    W = [torch.randn(out, width, generator=g, device=device).bfloat16() for _ in range(harness.copies(2 * width * out))]
    # The vendor's 8-bit products want their rows in sixteens.
    padded = max(32, -(-tokens // 16) * 16)
    X8 = torch.randint(-8, 8, (padded, width), dtype=torch.int8, generator=g, device=device)
    W8 = [(each * 3).to(torch.int8) for each in W[: harness.copies(width * out)]]
    XF, WF = X8.to(torch.float8_e4m3fn), [each.to(torch.float8_e4m3fn) for each in W8]
    scale, scales = torch.ones(padded, 1, device=device), torch.ones(1, out, device=device)
    return {
        "bf16": [_bound(linear, X, each) for each in W],
        "int8": [_bound(torch._int_mm, X8, each.T) for each in W8],
        "fp8": [
            _bound(
                torch._scaled_mm,
                XF,
                each.T,
                scale_a=scale,
                scale_b=scales,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            for each in WF
        ],
    }


def transforms(harness: Harness, model: Model, tokens: int, widths: tuple[int, ...] | None = None) -> list[Row]:
    """Time transform, rounding and packing of the two widths of a layer, all kinds beside plain torch."""
    rows = []
    for width in widths or (model.hidden, model.mlp):
        X = [
            activation(tokens, width, harness.device, seed)
            for seed in range(harness.copies(2 * tokens * width, most=8))
        ]
        calls: dict[str, list[Call]] = {}
        for kind in KINDS[1:]:
            prepared = transform(kind, width, model.block, harness.device)
            calls[kind] = [_bound(BACKEND.transform_quantize_pack, each, prepared) for each in X]
        plain = replace(transform("duquant", width, model.block, harness.device), backend=REFERENCE)
        calls["duquant in plain torch"] = [_bound(REFERENCE.transform_quantize_pack, each, plain) for each in X]
        cases = [Case(kind, each) for kind, each in calls.items()]
        rows.append(
            {
                "model": model.name,
                "H": width,
                "M": tokens,
                "least_bytes": tokens * width * 5 // 2,
                "graph": harness.from_graph(cases),
                "eager": harness.eager(cases),
            }
        )
    return rows


def attention(harness: Harness, model: Model, batch: int, context: int) -> Row:
    """Time one token's attention over an INT4 cache beside bf16."""
    layers = {
        kind: Layer(model, kind, harness.device, batch=batch, context=context, seed=1) for kind in ("bf16", "rtn")
    }
    shape = (batch, model.heads, 1, model.head_dim)
    Q = torch.randn(shape, generator=generator(harness.device, 2), device=harness.device).bfloat16()
    scaling, is_grouped = model.head_dim**-0.5, model.heads != model.kv_heads
    full, packed = layers["bf16"], layers["rtn"]
    cases = [
        Case("int4", [_bound(
            BACKEND.int4_kv_attention, Q, packed.keys, packed.values, packed.quantizer, scaling=scaling, mask=None
        )]),
        Case("bf16", [_bound(
            scaled_dot_product_attention, Q, full.keys, full.values, scale=scaling, enable_gqa=is_grouped
        )]),
    ]  # fmt: skip
    return {
        "model": model.name,
        "batch": batch,
        "context": context,
        "cache_bytes": {kind: layer.cache_bytes() for kind, layer in layers.items()},
        "graph": harness.from_graph(cases),
    }


def layers(
    harness: Harness, model: Model, batch: int, prompt: int, context: int, kinds: tuple[str, ...] = KINDS
) -> Row:
    """Time a decoder layer of every kind: a prompt of `prompt` tokens, or one new token of each sequence."""
    device = harness.device
    cases, memory = [], {}
    rows = batch * max(1, prompt)
    X = activation(rows, model.hidden, device, seed=3)
    for kind in kinds:
        before = torch.cuda.memory_allocated(device) if harness.is_gpu else 0
        first = Layer(model, kind, device, batch=batch, context=context, seed=0)
        held = torch.cuda.memory_allocated(device) - before if harness.is_gpu else 0
        copies = harness.copies(first.bytes + first.cache_bytes(), most=2)
        each = [first, *(Layer(model, kind, device, batch=batch, context=context, seed=s) for s in range(1, copies))]
        cases.append(Case(kind, [_bound(layer, X) for layer in each]))
        memory[kind] = {"weights": first.bytes, "cache": first.cache_bytes(), "allocated": held}
    return {
        "model": model.name,
        "batch": batch,
        "prompt": prompt,
        "context": context,
        "bytes": memory,
        "graph": harness.from_graph(cases),
        "eager": harness.eager(cases),
    }


def _bound(function: Callable[..., object], *args: Any, **kwargs: Any) -> Call:
    return lambda: function(*args, **kwargs)


def _runnable(calls: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the calls that run here, and why the others do not: rivals depend on torch, tiles on the GPU."""
    able, missing = {}, {}
    for name, call in calls.items():
        try:
            call()
            able[name] = call
        except Exception as err:  # noqa: BLE001  # tiles too large for this GPU, a product that this torch lacks
            missing[name] = f"{type(err).__name__}: {str(err)[:200]}"
    return able, missing
