"""Orthogonal matrices with flat rows: Hadamard where one is known for the order, Hartley otherwise."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def is_prime(n: int) -> bool:
    """Tell whether `n` is prime."""
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _paley(order: int) -> Float[Tensor, "n n"]:
    """Return the Paley construction I for order q + 1, q a prime of the form 4k + 3, entries +1 and -1."""
    q = order - 1
    squares = {(x * x) % q for x in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    skew = torch.zeros(order, order, dtype=torch.float64)
    skew[0, 1:] = 1.0
    skew[1:, 0] = -1.0
    skew[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    return skew + torch.eye(order, dtype=torch.float64)


def hadamard_factor(n: int) -> int | None:
    """Return the order m, n = 2^k * m, that a Hadamard matrix of order n is built from here; None when there is none.

    m is 1 for powers of two, else a Paley order 4j (j odd) with 4j - 1 prime: 12, 20, 44, 60, ...

    >>> hadamard_factor(128), hadamard_factor(96), hadamard_factor(144), hadamard_factor(36)
    (1, 12, None, None)
    """
    if n & (n - 1) == 0:
        return 1
    order = n
    while order % 2 == 0:
        if order >= 4 and (order - 1) % 4 == 3 and is_prime(order - 1) and order // 4 % 2:
            return order
        order //= 2
    return None


def flat_orthogonal(n: int) -> Float[Tensor, "n n"]:
    """Return a deterministic orthogonal float64 matrix whose entries are as equal in size as we can make them.

    A normalized Hadamard matrix (every entry 1/sqrt(n)) for n = 2^k and n = 2^k * Paley order; otherwise the discrete
    Hartley matrix (entries at most sqrt(2/n)), which exists for every n.

    Reference: Sylvester 1867; Paley 1933 (construction I); Hartley 1942.
    """
    factor = hadamard_factor(n)
    if factor is None:
        angle = torch.arange(n, dtype=torch.float64)
        angle = angle[:, None] * angle[None, :] % n * (2 * math.pi / n)
        return (angle.cos() + angle.sin()) / math.sqrt(n)
    matrix = torch.ones(1, 1, dtype=torch.float64) if factor == 1 else _paley(factor)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.kron(pair, matrix)
    return matrix / math.sqrt(n)


def random_signs(n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    """Return n signs, +1 or -1, float64 on the CPU."""
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
