"""The compiled library through ctypes: structs as in src/kernels.h, and which instruction set is in use."""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache

from duquant.errors import ConfigError, KernelUnavailableError
from duquant.kernels.cpu.build import library_path
from duquant.kernels.settings import CPU_ISA, setting

ISAS = ("portable", "avx2", "vnni", "amx")


class LinearArgs(Structure):
    """struct Linear."""

    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("weight_sum", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("channels", c_int64),
        ("row_bytes", c_int64),
        ("x", c_void_p),
        ("x_scale", c_void_p),
        ("x_zero_point", c_void_p),
        ("x_row_sum", c_void_p),
        ("tokens", c_int64),
        ("out", c_void_p),
        ("x_is_pairs", c_int32),
        ("out_is_bfloat16", c_int32),
    )


class QuantizeArgs(Structure):
    """struct Quantize."""

    _fields_ = (
        ("x", c_void_p),
        ("tokens", c_int64),
        ("channels", c_int64),
        ("r1", c_void_p),
        ("perm", c_void_p),
        ("r2", c_void_p),
        ("block", c_int64),
        ("r1_is_shared", c_int32),
        ("r2_is_shared", c_int32),
        ("is_hadamard", c_int32),
        ("gain", c_float),
        ("clip_low", c_float),
        ("clip_high", c_float),
        ("bits", c_int32),
        ("is_symmetric", c_int32),
        ("x_is_bfloat16", c_int32),
        ("out_is_pairs", c_int32),
        ("out", c_void_p),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("row_sum", c_void_p),
    )


class CacheArgs(Structure):
    """struct Cache."""

    _fields_ = (
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("low", c_void_p),
        ("code_strides", c_int64 * 2),
        ("grid_strides", c_int64 * 2),
    )


class KvRowsArgs(Structure):
    """struct KvRows."""

    _fields_ = (
        ("x", c_void_p),
        ("rotation", c_void_p),
        ("cache", CacheArgs),
        ("x_strides", c_int64 * 3),
        ("batch", c_int64),
        ("heads", c_int64),
        ("tokens", c_int64),
        ("head_dim", c_int64),
        ("clip_ratio", c_float),
        ("x_is_bfloat16", c_int32),
    )


class AttentionArgs(Structure):
    """struct Attention."""

    _fields_ = (
        ("q", c_void_p),
        ("out", c_void_p),
        ("rotation", c_void_p),
        ("inverse", c_void_p),
        ("mask", c_void_p),
        ("keys", CacheArgs),
        ("values", CacheArgs),
        ("sink_keys", c_void_p),
        ("sink_values", c_void_p),
        ("batch", c_int64),
        ("kv_heads", c_int64),
        ("group", c_int64),
        ("tokens", c_int64),
        ("head_dim", c_int64),
        ("sinks", c_int64),
        ("mask_stride", c_int64),
        ("scaling", c_float),
        ("is_bfloat16", c_int32),
    )


class NormArgs(Structure):
    """struct Norm."""

    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("tokens", c_int64),
        ("channels", c_int64),
        ("epsilon", c_float),
        ("is_bfloat16", c_int32),
    )


class Library:
    """The library, started: its functions and the instruction set that they use."""

    def __init__(self, handle: ctypes.CDLL, highest: int) -> None:
        self.linear = handle.duquant_linear
        self.quantize = handle.duquant_quantize
        self.quantize_kv = handle.duquant_quantize_kv
        self.dequantize_kv = handle.duquant_dequantize_kv
        self.attend = handle.duquant_attend
        self.rms_norm = handle.duquant_rms_norm
        functions = (
            (self.linear, LinearArgs),
            (self.quantize, QuantizeArgs),
            (self.quantize_kv, KvRowsArgs),
            (self.dequantize_kv, KvRowsArgs),
            (self.attend, AttentionArgs),
            (self.rms_norm, NormArgs),
        )
        for function, arguments in functions:
            function.argtypes, function.restype = (POINTER(arguments), c_int), None
        handle.duquant_start.argtypes, handle.duquant_start.restype = (c_int,), c_int
        self.isa = ISAS[handle.duquant_start(highest)]


@lru_cache(maxsize=1)
def library() -> Library:
    """Return the library; compile it when this machine has not yet.

    Raises:
        KernelUnavailableError: it cannot be compiled or loaded.
        ConfigError: DUQUANT_CPU_ISA names no instruction set.
    """
    chosen = setting(CPU_ISA) or ISAS[-1]
    if chosen not in ISAS:
        raise ConfigError(f"{CPU_ISA} is {chosen!r}; it must be one of: {', '.join(ISAS)}")
    path = library_path()
    try:
        return Library(ctypes.CDLL(str(path)), ISAS.index(chosen))
    except OSError as err:
        raise KernelUnavailableError(f"the compiled kernels cannot be loaded from {path}: {err}") from err
