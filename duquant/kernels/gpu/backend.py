"""GpuBackend: the kernels' interface over Triton. Nothing here imports Triton before a kernel is asked for."""

import importlib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from duquant.config import ActivationConfig
from duquant.errors import KernelUnavailableError
from duquant.kernels.types import LinearWeight, PackedWeight, PreparedTransform, QuantizedActivation, join_weights
from duquant.quantizers.kv import KVQuantizer, PackedKV
from duquant.transforms.site import SiteTransform

_LEAST_CAPABILITY = (8, 0)


class GpuBackend:
    """4-bit weights read as they lie in the artifact, int8 tensor cores; Triton, for Ampere, Ada, Hopper and later."""

    name = "gpu"

    def require(self, device: torch.device) -> str:
        """Return the GPU's name and architecture.

        Raises:
            KernelUnavailableError: the device is no CUDA device, there is none, it is too old, or Triton is missing.
        """
        if device.type != "cuda":
            raise KernelUnavailableError(f"the GPU kernels do not run on {device}")
        if torch.version.cuda is None or not torch.cuda.is_available():
            raise KernelUnavailableError("there is no CUDA device, or this torch is built without CUDA")
        found = torch.cuda.get_device_capability(device)
        if found < _LEAST_CAPABILITY:
            raise KernelUnavailableError(f"int8 tensor cores need sm_80 or later; this GPU is sm_{found[0]}{found[1]}")
        if find_spec("triton") is None:
            raise KernelUnavailableError("Triton is not installed")
        return f"Triton on {torch.cuda.get_device_name(device)} (sm_{found[0]}{found[1]})"

    def prepare_transform(
        self, transform: SiteTransform, config: ActivationConfig, clip_ratio: Float[Tensor, "2"]
    ) -> PreparedTransform:
        """Bring the rotations into bfloat16 and the last one into halves.

        Raises:
            KernelUnavailableError: blocks are odd or too large for the kernels, or groups of channels have scales of
                their own.
        """
        if config.group_size is not None:
            raise KernelUnavailableError("activations with a scale for each group of channels have no kernel yet")
        state = _module("transform").prepare(transform, clip_ratio)
        return PreparedTransform(transform, config, clip_ratio, backend=self, state=state)

    def prepare_weight(self, weights: Sequence[PackedWeight]) -> LinearWeight:
        """Join the weights' rows; the words stay as they are.

        Raises:
            KernelUnavailableError: weights have not 4 bits, or groups of channels have scales of their own.
        """
        joined = join_weights(weights, self)
        _module("linear").require_linear(joined)
        return joined

    def restore_weight(self, weight: LinearWeight) -> Int32[Tensor, "out_features words"]:
        """Return the words as they are."""
        return weight.data

    def transform_quantize_pack(
        self, X: Float[Tensor, "tokens in_features"], transform: PreparedTransform
    ) -> QuantizedActivation:
        """Rotate in bfloat16 with float32 sums; grids and codes are the reference's for the values that gives."""
        result: QuantizedActivation = _module("transform").transform_quantize_pack(X, transform)
        return result

    def int4_linear(
        self,
        X: QuantizedActivation,
        W: LinearWeight,
        bias: Float[Tensor, " out_features"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "tokens out_features"]:
        """Return the reference's result, bit for bit."""
        Y: Tensor = _module("linear").int4_linear(X, W, bias, dtype)
        return Y

    def int4_kv_attention(
        self,
        Q: Float[Tensor, "batch heads queries head_dim"],
        keys: PackedKV,
        values: PackedKV,
        quantizer: KVQuantizer,
        *,
        scaling: float,
        mask: Tensor | None,
        sinks: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """Attend to the packed codes themselves.

        Raises:
            KernelUnavailableError: the cache has not 4 bits, or heads are odd or too large.
        """
        Y: Tensor = _module("attention").int4_kv_attention(
            Q, keys, values, quantizer, scaling=scaling, mask=mask, sinks=sinks
        )
        return Y

    def quantize_kv(
        self, X: Float[Tensor, "batch heads tokens head_dim"], quantizer: KVQuantizer, out: PackedKV
    ) -> None:
        """Rotate, round and pack in one kernel, in place in the cache's buffers."""
        _module("cache").quantize_kv(X, quantizer, out)

    def dequantize_kv(
        self, packed: PackedKV, quantizer: KVQuantizer, dtype: torch.dtype
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Unpack and rotate back in one kernel."""
        Y: Tensor = _module("cache").dequantize_kv(packed, quantizer, dtype)
        return Y


@cache
def _module(name: str) -> ModuleType:
    """Import a module of kernels: Triton comes with it."""
    return importlib.import_module(f"duquant.kernels.gpu.{name}")
