"""What is evaluated: an artifact, or an unquantized model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from duquant.artifact.layout import MANIFEST
from duquant.calibration.text import load_tokenizer
from duquant.config import Recipe
from duquant.inference import load
from duquant.models.building import one_at_a_time
from duquant.models.devices import resolve_device
from duquant.models.references import resolve_model
from duquant.models.source import SourceCheckpoint


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory."""

    model: Any
    tokenizer: Any
    path: Path
    recipe: Recipe | None
    """The artifact's; none for an unquantized model."""

    @property
    def device(self) -> torch.device:
        """Return where it is (its first part, when it is spread over devices)."""
        return torch.device(self.model.device)

    @property
    def parameter_bytes(self) -> int:
        """Return the bytes of all parameters in memory."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def load_for_evaluation(
    model: str, *, device: str = "auto", threads: int | None = None, allow_hub: bool = False
) -> LoadedModel:
    """Load an artifact's directory, or an unquantized model in bfloat16.

    Args:
        model: a directory, or another reference of duquant.models.references.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads from now on, in this process; none leaves them as they are.
        allow_hub: let models come from the hub.

    Raises:
        DuQuantError: there is no such device, or the model cannot be used.
    """
    if threads:
        torch.set_num_threads(threads)
    target = resolve_device(device)
    path = resolve_model(model, allow_hub=allow_hub)
    if (path / MANIFEST).exists():
        loaded, tokenizer = load(path, device=str(target))
        return LoadedModel(loaded, tokenizer, path, loaded.duquant_manifest.recipe)
    SourceCheckpoint(path)
    tokenizer = load_tokenizer(path)
    with one_at_a_time():
        loaded = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    loaded.to(target)
    loaded.eval()
    return LoadedModel(loaded, tokenizer, path, None)
