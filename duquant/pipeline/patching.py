"""Letting a layer's modules run as something else for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from duquant.errors import UnsupportedModelError


def plain_linear(layer: nn.Module, name: str) -> nn.Linear:
    """Return a linear of a layer.

    Raises:
        UnsupportedModelError: it is none.
    """
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise UnsupportedModelError(f"{name} is no plain linear: nothing can be learned of it")
    return module


@contextmanager
def patched(forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let modules run these functions inside the `with` block."""
    try:
        for module, forward in forwards.items():
            module.forward = forward  # undone below
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
