"""Which backend runs where: the first that can of gpu, cpu, onednn, reference; each refusal is logged once."""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import TypedDict, TypeVar

import torch

from duquant.errors import ConfigError, KernelUnavailableError
from duquant.kernels.cpu import CpuBackend
from duquant.kernels.gpu import GpuBackend
from duquant.kernels.onednn import OneDnnBackend
from duquant.kernels.reference import ReferenceBackend
from duquant.kernels.settings import BACKENDS, setting
from duquant.kernels.types import Backend

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_DEVICES = {"gpu": "cuda", "cpu": "cpu", "onednn": "cpu"}
"""Where a backend's absence is worth a line in the log."""
_said: set[tuple[str, str]] = set()


class BackendStatus(TypedDict):
    """One row of `duquant doctor`'s kernel table."""

    backend: str
    available: bool
    reason: str
    """What runs, or why nothing does."""


@lru_cache(maxsize=1)
def backends() -> tuple[Backend, ...]:
    """Return all backends, fastest first. Importing one must cost nothing: it looks at the machine when asked."""
    return (GpuBackend(), CpuBackend(), OneDnnBackend(), ReferenceBackend())


def allowed() -> tuple[Backend, ...]:
    """Return the backends that DUQUANT_KERNELS allows; the reference is always among them.

    Raises:
        ConfigError: it names a backend that there is not.
    """
    chosen = setting(BACKENDS)
    if chosen is None:
        return backends()
    names = {name.strip() for name in chosen.split(",")}
    known = {backend.name for backend in backends()}
    if names - known:
        raise ConfigError(f"{BACKENDS} names {', '.join(sorted(names - known))}; there are {', '.join(sorted(known))}")
    return tuple(backend for backend in backends() if backend.name in names | {"reference"})


@lru_cache(maxsize=64)
def able(device_type: str, index: int | None = None) -> tuple[Backend, ...]:
    """Return the backends that run on a device, fastest first. Looked up once: machines and settings do not change."""
    device = torch.device(device_type if index is None else f"{device_type}:{index}")
    found = []
    for backend in allowed():
        try:
            backend.require(device)
        except KernelUnavailableError as err:
            if _DEVICES.get(backend.name) == device_type:
                _say_once(backend.name, str(err))
        else:
            found.append(backend)
    return tuple(found)


def forget() -> None:
    """Look at machine and settings again at the next use (tests change them)."""
    able.cache_clear()


def first_able(device: torch.device, what: str, use: Callable[[Backend], _T]) -> _T:
    """Return use(backend) of the first backend that runs on `device` and can do it.

    Raises:
        KernelUnavailableError: none can.
    """
    reason = "no backend runs there"
    for backend in able(device.type, device.index):
        try:
            return use(backend)
        except KernelUnavailableError as err:
            reason = str(err)
            _say_once(backend.name, f"{what}: {reason}")
    raise KernelUnavailableError(f"no kernel for {what} on {device}: {reason}")


def _say_once(backend: str, reason: str) -> None:
    if (backend, reason) not in _said:
        _said.add((backend, reason))
        _LOG.warning("the %s kernels are not used here: %s", backend, reason)


def describe() -> list[BackendStatus]:
    """Say which backends run here and why the others do not."""
    rows: list[BackendStatus] = []
    able = allowed()
    for backend in backends():
        device = torch.device("cuda" if backend.name == "gpu" else "cpu")
        try:
            words = backend.require(device) if backend in able else ""
            is_able = backend in able
            rows.append({"backend": backend.name, "available": is_able, "reason": words or f"left out by {BACKENDS}"})
        except KernelUnavailableError as err:
            rows.append({"backend": backend.name, "available": False, "reason": str(err)})
    return rows
