"""The oneDNN backend: torch's int8 products on the CPU, where there is no compiler for the kernels."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int8
from torch import Tensor

from duquant.errors import KernelUnavailableError
from duquant.kernels.reference import ReferenceBackend
from duquant.kernels.types import LinearWeight, PackedWeight, join_weights
from duquant.quantizers.packing import unpack


class OneDnnBackend(ReferenceBackend):
    """The reference's arithmetic on weights that are unpacked once, not for every product.

    A weight then takes a byte a code beside its packed words: three times the memory of the other backends, three
    quarters of bfloat16's.
    """

    name = "onednn"

    def require(self, device: torch.device) -> str:
        """Return what runs.

        Raises:
            KernelUnavailableError: the device is no CPU, or torch is built without oneDNN.
        """
        if device.type != "cpu":
            raise KernelUnavailableError(f"oneDNN's products do not run on {device}")
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch's
            raise KernelUnavailableError("this torch is built without oneDNN")
        return "torch's int8 products, where the compiled kernels do not run; weights take a byte a code"

    def prepare_weight(self, weights: Sequence[PackedWeight]) -> LinearWeight:
        """Join the weights' rows, and unpack them.

        Raises:
            KernelUnavailableError: weights have 8 bits, which would take twice their memory, or groups of channels have
                scales of their own.
        """
        W = join_weights(weights, self)
        if W.bits != 4 or W.scale.shape[1] != 1:
            raise KernelUnavailableError(
                f"{W.bits}-bit weights with {W.scale.shape[1]} scales a row are not kept unpacked"
            )
        return replace(W, state=unpack(W.data, W.in_features, bits=W.bits))

    def weight_codes(self, W: LinearWeight) -> Int8[Tensor, "out_features in_features"]:
        """Return the codes that were unpacked before."""
        assert isinstance(W.state, Tensor)
        return W.state
