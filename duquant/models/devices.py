"""Device names."""

import re

import torch

from duquant.errors import ConfigError, KernelUnavailableError


def resolve_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: the name means nothing.
        KernelUnavailableError: CUDA is asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device {name!r} is not one of: auto, cpu, cuda, cuda:N", field="device")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise KernelUnavailableError(f"device {name!r} was asked for, but torch finds no CUDA device here")
    return device
