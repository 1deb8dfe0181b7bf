"""The GPU backend: Triton kernels, compiled on first use for the GPU at hand."""

from duquant.kernels.gpu.backend import GpuBackend

__all__ = ["GpuBackend"]
