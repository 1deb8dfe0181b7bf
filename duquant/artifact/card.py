"""The model card of an artifact, made from its manifest."""

from duquant.artifact.card_measures import measured
from duquant.artifact.card_recipe import recipe_rows
from duquant.artifact.manifest import Manifest


def model_card(manifest: Manifest) -> str:
    """Return README.md for an artifact: what it is, how to load it, and the numbers measured so far."""
    recipe, summary, source = manifest.recipe, manifest.summary, manifest.source
    rows = [
        ("source", f"{source['name']} ({source['model_type']}, {source['layers']} layers)"),
        (
            "recipe",
            f"`{recipe.name}`, digest `{recipe.digest()[:12]}`, version {manifest.algorithm_version} of the algorithm",
        ),
        *recipe_rows(recipe),
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
