"""What is made once and used several times: results that linears share, and what kernels made of parameters."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

_T = TypeVar("_T")


class Shared(Generic[_T]):
    """A result that several readers ask for, one after the other, with the same tensor.

    It is made for the first and forgotten after the last. The tensor is recognised by identity, held weakly.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.result: _T | None = None
        self._seen: weakref.ref[Tensor] | None = None
        self._version = 0
        self._uses = 0

    def get(self, X: Tensor, make: Callable[[], _T]) -> _T:
        """Return the result for `X`."""
        # In inference mode tensors count no versions, and in-place changes of an input are not done there.
        version = 0 if X.is_inference() else X._version
        result = self.result
        if result is None or self._seen is None or self._seen() is not X or self._version != version:
            result = self.result = make()
            self._seen, self._version = weakref.ref(X), version
            self._uses = 0
        self._uses += 1
        if self._uses >= self.readers:
            self.forget()
        return result

    def forget(self) -> None:
        """Let go of input and result."""
        self._seen = self.result = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared[_T]":
        return Shared(self.readers)


@dataclass(frozen=True)
class Prepared(Generic[_T]):
    """What the kernels made of some parameters, and which parameters they were."""

    result: _T
    parameters: tuple[nn.Parameter | None, ...]

    def is_of(self, parameters: tuple[nn.Parameter | None, ...]) -> bool:
        """Tell whether they are still the same."""
        return all(a is b for a, b in zip(self.parameters, parameters, strict=True))
