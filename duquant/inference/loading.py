"""load(), save() and generate_text()."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import duquant.inference.hf  # noqa: F401  # registers the quantizer
from duquant.artifact.layout import EXTRA_SHARD, INDEX, layer_shard
from duquant.artifact.manifest import read_manifest
from duquant.artifact.shards import write_index, write_shard
from duquant.artifact.verify import require_intact
from duquant.errors import ArtifactError
from duquant.models.building import one_at_a_time
from duquant.models.devices import resolve_device
from duquant.models.families import architecture_of


def load(path: str | Path, *, device: str = "cpu", check_hashes: bool = True) -> tuple[Any, Any]:
    """Return (model, tokenizer) of an artifact, weights packed in memory.

    Args:
        path: the artifact's directory.
        device: where to put it; "auto" spreads it over the devices with accelerate.
        check_hashes: compare every file with the manifest first.

    Raises:
        ArtifactError: the directory is no artifact, was changed, or does not fill the model completely.
        ConfigError, KernelUnavailableError: there is no such device.
    """
    directory = Path(path)
    target = device if device == "auto" else str(resolve_device(device))
    manifest = read_manifest(directory)
    if check_hashes:
        require_intact(directory)
    with one_at_a_time():
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.bfloat16,
            device_map=None if target == "cpu" else target,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
    # transformers only warns about tensors that are not there and leaves random values in their place.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            names = ", ".join(str(name) for name in sorted(info[problem])[:3])
            raise ArtifactError(f"{directory}: {problem.replace('_', ' ')} while loading: {names}")
    model.eval()
    model.duquant_manifest = manifest
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    return model, tokenizer


def save(model: Any, path: str | Path) -> None:
    """Write a loaded model's shards and index again: the same files, byte for byte, as it was loaded from.

    `model.save_pretrained` works too; it cuts the shards its own way.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    architecture = architecture_of(model.config.to_dict())
    grouped: dict[str, dict[str, torch.Tensor]] = {EXTRA_SHARD: {}}
    tied = bool(model.config.tie_word_embeddings)
    for name, tensor in model.state_dict().items():
        if tied and name == architecture.head:
            continue
        rest = name.removeprefix(f"{architecture.layers_prefix}.")
        file = EXTRA_SHARD if rest == name else layer_shard(int(rest.split(".", 1)[0]))
        grouped.setdefault(file, {})[name] = tensor
    shards = [write_shard(directory / file, tensors) for file, tensors in sorted(grouped.items())]
    # The extra shard is listed first, as when the artifact was made.
    write_index(directory, sorted(shards, key=lambda shard: (shard.name != EXTRA_SHARD, shard.name)))
    assert (directory / INDEX).exists()


@torch.no_grad()
def generate_text(
    path: str | Path, prompt: str, *, max_new_tokens: int = 40, seed: int | None = None, device: str = "cpu"
) -> str:
    """Return the continuation of a prompt: greedy, or sampled when a seed is given. Chat models get their template.

    Raises:
        ArtifactError: see `load`.
    """
    model, tokenizer = load(path, device=device)
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        # transformers samples from the global generator; there is no argument for another.
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()
