"""The CPU backend: C++ compiled on first use, the instruction set chosen at run time."""

from duquant.kernels.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
