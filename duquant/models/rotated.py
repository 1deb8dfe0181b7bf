"""A model whose residual stream is rotated, and the values inside each head: the same function, other weights.

With orthogonal R1 (hidden, hidden) the embeddings become E R1, everything that reads the residual stream behind a norm
W diag(gain) R1, and everything that writes to it R1^T W; the norms, whose gains are folded, commute with R1. With R2
(head_dim, head_dim) of a layer, values become v R2 in each head, and o_proj's columns take R2 in each query head.

Reference: SpinQuant, arXiv 2405.16406v4, section 3.1 (R1 and R2); QuaRot, arXiv 2404.00456v2, section 4.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duquant.errors import ScratchError, UnsupportedModelError
from duquant.models.architecture import Architecture, Fold
from duquant.models.source import SourceCheckpoint
from duquant.models.tensor_files import save_tensors
from duquant.transforms.rotation import apply_rotation


@dataclass(frozen=True)
class ResidualRotations:
    """The rotations that are folded into a model's weights."""

    R1: Float64[Tensor, "hidden hidden"]
    """Of the residual stream."""
    R2: Float64[Tensor, "layers head_dim head_dim"]
    """Of the values of each layer, the same in each head."""

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write them; the file appears whole or not at all."""
        save_tensors(path, {"R1": self.R1, "R2": self.R2}, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> tuple["ResidualRotations", dict[str, str]]:
        """Read what `save` wrote.

        Raises:
            ScratchError: the file is missing or broken; a broken one is deleted, so that the next try makes it again.
        """
        try:
            with safe_open(path, framework="pt") as reader:
                return cls(reader.get_tensor("R1"), reader.get_tensor("R2")), dict(reader.metadata() or {})
        except (OSError, SafetensorError) as err:
            if isinstance(err, SafetensorError):
                path.unlink(missing_ok=True)
            raise ScratchError(f"cannot read the rotations of the residual stream, {path}: {err}") from err


def require_rotatable(architecture: Architecture, model_type: str) -> None:
    """Refuse models whose residual stream cannot be rotated.

    Raises:
        UnsupportedModelError: norms act on what is added to it.
    """
    if architecture.has_output_norms:
        raise UnsupportedModelError(
            f"{model_type} has norms on what attention and MLP add to the residual stream: no rotation of it can be "
            "folded; take a recipe with transform.residual_rotation='none'"
        )


def rotate_layer(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    layer: int,
    R1: Float[Tensor, "hidden hidden"] | None = None,
    R2: Float[Tensor, "head_dim head_dim"] | None = None,
) -> dict[str, Tensor]:
    """Return a layer's tensors with the norms' gains, R1 and R2 folded into the linears; computed in the dtype of R1.

    Args:
        tensors: by their names inside the layer. Norms that nothing follows directly (of queries, keys) stay.
        architecture: where sites, norms and values are.
        layer: the layer's index.
        R1: of the residual stream; None folds the gains alone.
        R2: of the values; None leaves them.
    """
    dtype = torch.float32 if R1 is None else R1.dtype
    state = dict(tensors)
    for site in architecture.sites_of(layer):
        weights = [f"{linear}.weight" for linear in site.linears]
        if site.fold.kind == "norm":
            (norm,) = site.fold.into
            gain = state[f"{norm}.weight"].to(dtype) + site.fold.gain_offset
            state[f"{norm}.weight"] = torch.full_like(gain, 1.0 - site.fold.gain_offset)
            for name in (*weights, *site.also_read_by):
                folded = state[name].to(dtype) * gain
                state[name] = folded if R1 is None else folded @ R1
            continue
        if site.fold.kind == "kv_rows" and R2 is not None:
            _rotate_values(state, site.fold, R2.to(dtype))
            for name in weights:
                state[name] = apply_rotation(state[name].to(dtype), R2.to(dtype))
        if R1 is not None:
            for linear in site.linears:
                state[f"{linear}.weight"] = R1.T @ state[f"{linear}.weight"].to(dtype)
                if f"{linear}.bias" in state:
                    state[f"{linear}.bias"] = state[f"{linear}.bias"].to(dtype) @ R1
    return state


def _rotate_values(state: dict[str, Tensor], fold: Fold, R2: Tensor) -> None:
    """Rotate the rows of the linear that make values, and their biases, head by head."""
    (linear,) = fold.into
    for name in (f"{linear}.weight", f"{linear}.bias"):
        if name in state:
            rows = state[name].to(R2.dtype)
            values = apply_rotation(rows[fold.first_row :].t(), R2).t()  # t() of a bias is the bias
            state[name] = torch.cat((rows[: fold.first_row], values))


def rotate_ends(
    tensors: Mapping[str, Tensor], architecture: Architecture, R1: Float[Tensor, "hidden hidden"]
) -> dict[str, Tensor]:
    """Return embeddings, final norm and head, rotated; computed in the dtype of R1.

    The head has the final norm's gain, so it is no longer the embeddings where it was.
    """
    embeddings = tensors[architecture.embeddings].to(R1.dtype)
    head = tensors.get(architecture.head, embeddings).to(R1.dtype)
    gain = tensors[architecture.final_norm].to(R1.dtype)
    return {
        architecture.embeddings: embeddings @ R1,
        architecture.final_norm: torch.ones_like(gain),
        architecture.head: (head * gain) @ R1,
    }


def rotated_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a rotated model: embeddings and head are two tensors."""
    return {**config, "tie_word_embeddings": False}


class RotatedCheckpoint(SourceCheckpoint):
    """A checkpoint that is read as if it had been rotated. Weights are float32: bfloat16 would round them once more.

    Args:
        path: the checkpoint.
        rotations: what to rotate it by.
        device: where the products are computed.
    """

    def __init__(self, path: Path, rotations: ResidualRotations, device: torch.device) -> None:
        super().__init__(path)
        self._R1 = rotations.R1.to(device, torch.float32)
        self._R2 = rotations.R2.to(device, torch.float32)

    def layer_tensors(self, layer: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Return all tensors of a layer, rotated, on the rotations' device."""
        return self.rotate(layer, super().layer_tensors(layer, names))

    def rotate(self, layer: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what was read of a layer, rotated, on the rotations' device."""
        tensors = {name: tensor.to(self._R1.device) for name, tensor in stored.items()}
        return rotate_layer(tensors, self.architecture, layer, self._R1, self._R2[layer])

    def embedding_table(self) -> Float[Tensor, "vocab hidden"]:
        """Return the rotated embeddings, where those of any checkpoint are: on the CPU."""
        return (super().embedding_table().to(self._R1) @ self._R1).cpu()

    def rotate_ends(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what was read of embeddings, final norm and head, rotated."""
        tensors = {name: tensor.to(self._R1.device) for name, tensor in stored.items()}
        return rotate_ends(tensors, self.architecture, self._R1)
