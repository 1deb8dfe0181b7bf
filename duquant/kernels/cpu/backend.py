"""CpuBackend: the kernels' interface over the compiled library."""

from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from duquant.config import ActivationConfig
from duquant.errors import KernelUnavailableError, ShapeError
from duquant.kernels.cpu.cache import attend, dequantize_kv, quantize_kv
from duquant.kernels.cpu.library import ISAS, Library, LinearArgs, QuantizeArgs, library
from duquant.kernels.cpu.norm import rms_norm
from duquant.kernels.cpu.rotations import AmxRotations, amx_rotations
from duquant.kernels.types import LinearWeight, PackedWeight, PreparedTransform, QuantizedActivation, join_weights
from duquant.quantizers.kv import KVQuantizer, PackedKV
from duquant.transforms.site import SiteTransform

_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class _TransformState:
    """What a prepared transform keeps for this backend."""

    template: QuantizeArgs
    rotations: AmxRotations | None


class CpuBackend:
    """4-bit weights read as they lie in the artifact; AMX, AVX512-VNNI, AVX2 or plain C++."""

    name = "cpu"

    def require(self, device: torch.device) -> str:
        """Return the instruction set in use.

        Raises:
            KernelUnavailableError: the device is no CPU, or the library cannot be compiled or loaded.
        """
        if device.type != "cpu":
            raise KernelUnavailableError(f"the CPU kernels do not run on {device}")
        return f"compiled, instruction set {library().isa} (of {', '.join(ISAS)})"

    def prepare_transform(
        self, transform: SiteTransform, config: ActivationConfig, clip_ratio: Float[Tensor, "2"]
    ) -> PreparedTransform:
        """Put the rotations into the layout of the matrix unit, where there is one.

        Raises:
            KernelUnavailableError: groups of channels have scales of their own.
        """
        if config.group_size is not None:
            raise KernelUnavailableError("activations with a scale for each group of channels have no kernel yet")
        rotations = None
        if library().isa == "amx" and config.bits <= 4:
            rotations = amx_rotations(transform)
        low, high = clip_ratio.tolist()
        args = QuantizeArgs(
            gain=1.0, clip_low=low, clip_high=high, bits=config.bits, is_symmetric=config.symmetric, block=0
        )
        args.out_is_pairs = config.bits <= 4
        return PreparedTransform(transform, config, clip_ratio, backend=self, state=_TransformState(args, rotations))

    def prepare_weight(self, weights: Sequence[PackedWeight]) -> LinearWeight:
        """Join the weights' rows; the words stay as they are.

        Raises:
            KernelUnavailableError: weights have 8 bits, or groups of channels have scales of their own.
        """
        W = join_weights(weights, self)
        if W.bits != 4 or W.scale.shape[1] != 1:
            raise KernelUnavailableError(
                f"{W.bits}-bit weights with {W.scale.shape[1]} scales a row have no kernel yet"
            )
        W = replace(W, data=W.data.contiguous(), scale=W.scale.float().contiguous())
        args = LinearArgs(
            weight=W.data.data_ptr(),
            scale=W.scale.data_ptr(),
            zero_point=W.zero_point.data_ptr(),
            weight_sum=W.weight_sum.data_ptr(),
            rows=W.out_features,
            channels=W.in_features,
            row_bytes=4 * W.data.shape[1],
        )
        return replace(W, state=args)

    def restore_weight(self, weight: LinearWeight) -> Int32[Tensor, "out_features words"]:
        """Return the words as they are."""
        return weight.data

    def transform_quantize_pack(
        self, X: Float[Tensor, "tokens in_features"], transform: PreparedTransform
    ) -> QuantizedActivation:
        """Transform in bfloat16 with float32 sums on the matrix unit, in float32 elsewhere; then round and pack."""
        lib = library()
        args, X = self._quantize_args(X, transform)
        tokens, channels = X.shape
        is_packed = bool(args.out_is_pairs)
        data = torch.empty(
            (tokens, (channels + 1) // 2 if is_packed else channels), dtype=torch.uint8 if is_packed else torch.int8
        )
        grids = torch.empty((3, tokens, 1), dtype=torch.float32)
        first = grids.data_ptr()
        args.out, args.scale = data.data_ptr(), first
        args.zero_point, args.row_sum = first + 4 * tokens, first + 8 * tokens
        if tokens:
            lib.quantize(byref(args), torch.get_num_threads())
        return QuantizedActivation(data, grids[0], grids[1], grids[2], channels, transform.config.bits)

    def int4_linear(
        self,
        X: QuantizedActivation,
        W: LinearWeight,
        bias: Float[Tensor, " out_features"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "tokens out_features"]:
        """Multiply codes; weights are read from memory once for all tokens."""
        lib = library()
        data, tokens = X.data.contiguous(), X.data.shape[0]
        parts = [part.float().contiguous() for part in (X.scale, X.zero_point, X.row_sum)]
        if any(part.shape != (tokens, 1) for part in parts):
            raise ShapeError(f"{tokens} rows of codes with grids of {[tuple(part.shape) for part in parts]}")
        args = self._linear_args(W)
        args.x, args.tokens, args.x_is_pairs = data.data_ptr(), tokens, X.is_packed
        args.x_scale, args.x_zero_point, args.x_row_sum = (part.data_ptr() for part in parts)
        return self._linear(lib, args, W, tokens, bias, dtype)

    def transformed_linear(
        self,
        X: Float[Tensor, "tokens in_features"],
        transform: PreparedTransform,
        W: LinearWeight,
        bias: Float[Tensor, " out_features"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "tokens out_features"]:
        """Do both in one step: the codes stay in a buffer of this call."""
        lib = library()
        first, X = self._quantize_args(X, transform)
        tokens, channels = X.shape
        row_bytes = (channels + 1) // 2 if first.out_is_pairs else channels
        buffer = torch.empty(tokens * (row_bytes + 12) + 4, dtype=torch.uint8)
        first.scale = buffer.data_ptr()
        first.zero_point, first.row_sum = first.scale + 4 * tokens, first.scale + 8 * tokens
        first.out = first.scale + 12 * tokens
        args = self._linear_args(W)
        args.x, args.tokens, args.x_is_pairs = first.out, tokens, first.out_is_pairs
        args.x_scale, args.x_zero_point, args.x_row_sum = first.scale, first.zero_point, first.row_sum
        if tokens:
            lib.quantize(byref(first), torch.get_num_threads())
        return self._linear(lib, args, W, tokens, bias, dtype)

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
        """Attend with one query a row of the batch, straight from the codes. See duquant.kernels.cpu.cache."""
        return attend(Q, keys, values, quantizer, scaling=scaling, mask=mask, sinks=sinks)

    def quantize_kv(
        self, X: Float[Tensor, "batch heads tokens head_dim"], quantizer: KVQuantizer, out: PackedKV
    ) -> None:
        """Round and write to `out`. See duquant.kernels.cpu.cache."""
        quantize_kv(X, quantizer, out)

    def dequantize_kv(
        self, packed: PackedKV, quantizer: KVQuantizer, dtype: torch.dtype
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Return what codes stand for. See duquant.kernels.cpu.cache."""
        return dequantize_kv(packed, quantizer, dtype)

    def rms_norm(
        self, X: Float[Tensor, "*rows channels"], weight: Float[Tensor, " channels"], epsilon: float
    ) -> Float[Tensor, "*rows channels"]:
        """Return the rows in one pass. See duquant.kernels.cpu.norm."""
        return rms_norm(X, weight, epsilon)

    def _quantize_args(self, X: Tensor, transform: PreparedTransform) -> tuple[QuantizeArgs, Tensor]:
        """Return the arguments but the outputs, and the rows that they point to: keep these alive."""
        state = transform.state
        assert isinstance(state, _TransformState)
        args, rotations = QuantizeArgs.from_buffer_copy(state.template), state.rotations
        if transform.transform.R1 is not None:
            if rotations is not None and X.dtype == torch.bfloat16:
                args.r1, args.r1_is_shared = rotations.R1.data_ptr(), rotations.R1.shape[0] == 1
                if rotations.R2 is not None and rotations.perm is not None:
                    args.r2, args.r2_is_shared = rotations.R2.data_ptr(), rotations.R2.shape[0] == 1
                    args.perm = rotations.perm.data_ptr()
                args.block, args.is_hadamard, args.gain = rotations.block, rotations.is_hadamard, rotations.gain
            else:
                X = transform.transform.apply(X.float())
        if X.dtype not in _DTYPES:
            X = X.float()
        X = X.contiguous()
        args.x, args.x_is_bfloat16 = X.data_ptr(), X.dtype == torch.bfloat16
        args.tokens, args.channels = X.shape
        return args, X

    @staticmethod
    def _linear_args(W: LinearWeight) -> LinearArgs:
        assert isinstance(W.state, LinearArgs)
        return LinearArgs.from_buffer_copy(W.state)

    @staticmethod
    def _linear(
        lib: Library, args: LinearArgs, W: LinearWeight, tokens: int, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        made = dtype if dtype in _DTYPES else torch.float32
        out = torch.empty((tokens, W.out_features), dtype=made)
        if bias is not None:
            bias = bias.float().contiguous()
            args.bias = bias.data_ptr()
        args.out, args.out_is_bfloat16 = out.data_ptr(), made == torch.bfloat16
        if tokens and W.out_features:
            lib.linear(byref(args), torch.get_num_threads())
        return out if made == dtype else out.to(dtype)
