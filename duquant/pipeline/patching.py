"""Letting a layer's linears run as something else for a while."""

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
def patched(forwards: Mapping[nn.Linear, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let linears run these functions inside the `with` block."""
    try:
        for linear, forward in forwards.items():
            linear.forward = forward  # type: ignore[method-assign, assignment]  # undone below
        yield
    finally:
        for linear in forwards:
            linear.__dict__.pop("forward", None)
