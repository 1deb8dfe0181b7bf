"""The model card of an artifact, made from its manifest."""

from duquant.artifact.card_measures import measured
from duquant.artifact.manifest import Manifest


def model_card(manifest: Manifest) -> str:
    """Return README.md for an artifact: what it is, how to load it, and the numbers measured so far."""
    recipe, summary, source = manifest.recipe, manifest.summary, manifest.source
    transform = recipe.transform
    rotation = (
        "none" if transform.rotation == "none" else f"{transform.rotation}, blocks of up to {transform.block_size}"
    )
    rows = [
        ("source", f"{source['name']} ({source['model_type']}, {source['layers']} layers)"),
        ("recipe", f"`{recipe.name}`"),
        ("smoothing", "none" if transform.smooth_alpha is None else f"alpha {transform.smooth_alpha}"),
        ("rotation", rotation),
        ("permutation", transform.permutation),
        *([("residual stream", f"rotated: {transform.residual_rotation}")] if transform.rotates_residual else []),
        ("weights", _grid(recipe.weight.bits, recipe.weight.symmetric, recipe.weight.group_size)),
        (
            "activations",
            _grid(recipe.activation.bits, recipe.activation.symmetric, recipe.activation.group_size, "per token"),
        ),
        *([("outlier channels", f"{recipe.outlier_channels} of each site, 8 bits")] if recipe.outlier_channels else []),
        ("KV cache", f"{recipe.kv_cache.bits} bits per token and head"),
        ("bits per quantized weight", f"{summary['bits_per_weight']:.3f}"),
        ("size", f"{summary['size_bytes'] / 1e6:.1f} MB, {summary['size_ratio']:.2f} of the 16-bit model"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: duquant
tags: [duquant, int4, w{recipe.weight.bits}a{recipe.activation.bits}]
---
# {source["name"]}, {recipe.name}

Packed INT{recipe.weight.bits} checkpoint made by duquant. Weights stay packed in memory; activations are quantized
while the model runs.

| | |
| --- | --- |
{table}

## Use

```python
from duquant.inference import load

model, tokenizer = load("PATH")  # checks every file against manifest.json first
```

Plain `AutoModelForCausalLM.from_pretrained` works after `import duquant.inference`. Without that import transformers
does not know the format and fills the linears with random weights after a mere warning.

## Measured

{measured(manifest.evaluation)}

## Files

Every file's SHA-256 is in `manifest.json`; `duquant verify PATH` checks them.
"""


def _grid(bits: int, symmetric: bool, group_size: int | None, granularity: str = "per output channel") -> str:
    if bits == 16:
        return "16 bits"
    where = granularity if group_size is None else f"groups of {group_size}"
    return f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}, {where}"
