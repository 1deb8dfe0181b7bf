"""Keys at 4 bits, rounded before or after the rotary embedding, smoothed or not: benchmarks/results/kv-cache.json.

    python benchmarks/kv_cache.py                                    # measures the rows that are missing
    python benchmarks/kv_cache.py --windows 1 --seq-len 256 --out /tmp/small.json

Weights and activations stay in 16 bits. Values are rotated and clipped at 0.95 in every row, as presets without
smoothing round them. The text is the start of WikiText-2 valid, and keys are smoothed by its second half: nothing is
chosen on the test text. Every finished row is written at once, so an interrupted run goes on where it was. `make docs`
then writes docs/results/kv-cache.md.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import cycle, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import options
import torch
from machine import RESULTS, data_folder
from row_file import Row, RowFile
from torch import Tensor
from transformers.models.llama import modeling_llama

from duquant.calibration.keys import KeyRecorder
from duquant.config import KVCacheConfig, TextSource
from duquant.evaluation.loading import LoadedModel, load_for_evaluation
from duquant.evaluation.perplexity import measure_perplexity
from duquant.quantizers.keys import KeySmoothing, key_smoothing
from duquant.quantizers.kv import KVQuantizer

MODEL = "demo:smollm2-135m"
TEXT = "wikitext2-valid.tokens.txt"
PLACES = ("after", "before")
KEYS = tuple(
    KVCacheConfig(bits=4, rotate=rotate, clip_ratio=clip_ratio, sink_tokens=sinks)
    for rotate, clip_ratio, sinks in product((False, True), (1.0, 0.95), (0, 4))
)
SMOOTHED = tuple(replace(keys, smooth_keys=True) for keys in KEYS if keys.rotate)
VALUES = KVCacheConfig(bits=4, rotate=True, clip_ratio=0.95)


def main() -> None:
    """Measure what is missing."""
    arguments = _parse()
    text = data_folder() / TEXT
    if not text.is_file():
        raise SystemExit(f"the cache is measured on {TEXT}, and it is not in {text.parent}")
    sizes = {"seq_len": arguments.seq_len, "windows": arguments.windows}
    configs = [(None, None), *product(PLACES, KEYS), *product(("after",), SMOOTHED)]
    planned = [
        {"model": MODEL, "evaluation": {"text": TEXT, **sizes}, "place": place, "keys": keys and _described(keys)}
        for place, keys in configs
    ]
    loaded = load_for_evaluation(MODEL, device="cpu")
    smoothing: list[KeySmoothing] = []

    def measure(plan: Row) -> Row:
        place, keys = configs[planned.index(plan)]
        if keys is not None and keys.smooth_keys and not smoothing:
            source = TextSource(kind="file", name=str(text), part="evaluation")  # the second half
            smoothing.extend(smoothing_of(loaded, source, **sizes))
        rounding: AbstractContextManager[None] = nullcontext()
        if keys is not None:
            used = smoothing if keys.smooth_keys else None
            rounding = rounded_cache(loaded.model, keys, place=str(place), smoothing=used)
        with rounding:
            found = measure_perplexity(loaded, TextSource(kind="file", name=str(text)), **sizes)
        return {"perplexity": found.perplexity}

    RowFile(Path(arguments.out), place=("place", "keys"), identity=("model", "evaluation")).measure(planned, measure)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=options.count, default=4)
    parser.add_argument("--seq-len", type=options.count, default=2048)
    parser.add_argument("--out", default=str(RESULTS / "kv-cache.json"))
    return parser.parse_args()


def _described(keys: KVCacheConfig) -> dict[str, Any]:
    """Return the config as rows name it: those without smoothing are older than it."""
    return {name: value for name, value in asdict(keys).items() if name != "smooth_keys" or value}


def smoothing_of(loaded: LoadedModel, source: TextSource, *, seq_len: int, windows: int) -> list[KeySmoothing]:
    """Return the smoothing of each layer's keys by some windows of a text, in the unquantized model."""
    recorders = [KeyRecorder(first_token=1, stride=1) for _ in loaded.model.model.layers]
    calls = 0
    embed = modeling_llama.apply_rotary_pos_emb

    def embed_recorded(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        q, k = embed(*args, **kwargs)
        # Layers run one after the other.
        recorders[calls % len(recorders)].add(q, k)
        calls += 1
        return q, k

    with patch.object(modeling_llama, "apply_rotary_pos_emb", embed_recorded):
        measure_perplexity(loaded, source, seq_len=seq_len, windows=windows)
    return [key_smoothing(*recorder.finish().means()) for recorder in recorders]


@contextmanager
def rounded_cache(
    model: Any,
    keys: KVCacheConfig,
    *,
    place: str,
    values: KVCacheConfig = VALUES,
    smoothing: Sequence[KeySmoothing] | None = None,
) -> Iterator[None]:
    """Let a model of the Llama kind, unquantized, attend to rounded keys and values.

    Args:
        model: as transformers loads it.
        keys: how keys are rounded; its sinks are the values', too.
        place: whether keys are rounded "after" the rotary embedding, as they are cached, or "before" it, so that a
            cache would hold keys without positions and apply the embedding whenever it is read.
        values: how values are rounded.
        smoothing: of the keys of each layer.
    """
    head_dim = int(model.config.head_dim)
    round_keys, round_values = (_rounding(config, head_dim, keys.sink_tokens) for config in (keys, values))
    embed = modeling_llama.apply_rotary_pos_emb
    # Layers run one after the other, in every forward pass anew.
    layers = cycle(smoothing or ())

    def embed_rounded(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if place == "before":
            return embed(q, round_keys(k), *args, **kwargs)
        q, k = embed(q, k, *args, **kwargs)
        if smoothing is None:
            return q, round_keys(k)
        smooth = next(layers)
        return q, smooth.restore(round_keys(smooth.smooth(k)))

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        heads = output.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (batch, heads, tokens, head_dim)
        return round_values(heads).transpose(1, 2).flatten(2)

    with ExitStack() as stack:
        stack.enter_context(patch.object(modeling_llama, "apply_rotary_pos_emb", embed_rounded))
        for layer in model.model.layers:
            stack.callback(layer.self_attn.v_proj.register_forward_hook(hook).remove)
        yield


def _rounding(config: KVCacheConfig, head_dim: int, sinks: int) -> Callable[[Tensor], Tensor]:
    """Return what rounds (batch, heads, tokens, head_dim) as the cache does, all but the first `sinks` tokens."""
    quantizer = KVQuantizer(config, head_dim)

    def rounded(X: Tensor) -> Tensor:
        rest = X[:, :, sinks:]
        return torch.cat((X[:, :, :sinks], quantizer.dequantize(quantizer.quantize(rest), X.dtype)), dim=2)

    return rounded


if __name__ == "__main__":
    main()
