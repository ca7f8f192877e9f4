"""Hadamard matrices of every size that language models use, constructed, not tabulated.

A Hadamard matrix has entries +-1 and orthogonal rows. Sylvester's doubling gives powers of two. Odd factors come from
Paley's two constructions over a finite field, which cover 12, 20, 28, 36, 52, 60, 108, 140, 148 ... (for example
Llama-3-8B's 14336 = 28 * 512), and from Williamson's four symmetric circulants for 92 and 172
(Llama-2-7B's 11008 = 172 * 64).
"""

from __future__ import annotations

import functools
import itertools

import torch

#: Largest factor that `base_size` tries; every hidden or intermediate size we know of needs at most 172.
LARGEST_BASE = 256
#: Orders 4n whose Williamson circulants are searched among unions of orbits of a multiplier subgroup of Z_n.
_WILLIAMSON = {92: 1, 172: 6}


def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, e)`` with q = p ** e and p prime, or None."""
    p = next((p for p in range(2, q + 1) if q % p == 0), None)
    if p is None:
        return None
    e = 0
    while q % p == 0:
        q, e = q // p, e + 1
    return (p, e) if q == 1 else None


def _field(p: int, e: int) -> tuple[list[tuple[int, ...]], set[tuple[int, ...]]]:
    """Elements of GF(p ** e) as coefficient tuples (lowest first), and the set of non-zero squares."""
    elements = list(itertools.product(range(p), repeat=e))

    def multiply(a: tuple[int, ...], b: tuple[int, ...], low: tuple[int, ...]) -> tuple[int, ...]:
        product = [0] * (2 * e - 1)
        for i, j in itertools.product(range(e), repeat=2):
            product[i + j] += a[i] * b[j]
        for top in range(2 * e - 2, e - 1, -1):  # x**e = -(low[0] + low[1] x + ...)
            for i in range(e):
                product[top - e + i] -= product[top] * low[i]
        return tuple(c % p for c in product[:e])

    zero, nonzero = (0,) * e, elements[1:]
    for low in elements:  # the first monic polynomial x**e + low that leaves no zero divisors defines the field
        pairs = itertools.combinations_with_replacement(nonzero, 2)
        if e == 1 or all(multiply(a, b, low) != zero for a, b in pairs):
            return elements, {multiply(a, a, low) for a in nonzero}
    raise AssertionError(f"no field of {p}**{e} elements found")


def _quadratic_residues(q: int) -> torch.Tensor:
    """Jacobsthal matrix [q, q] of GF(q): +1 where the difference is a square, -1 where not, 0 on the diagonal."""
    p, e = _prime_power(q) or (0, 0)
    elements, squares = _field(p, e)
    character = {a: 1 if a in squares else -1 for a in elements}
    character[(0,) * e] = 0
    rows = [[character[tuple((x - y) % p for x, y in zip(a, b, strict=True))] for b in elements] for a in elements]
    return torch.tensor(rows, dtype=torch.float64)


def _is_prime_power(q: int, residue: int) -> bool:
    """Whether q is a prime power that leaves ``residue`` modulo 4."""
    return q % 4 == residue and _prime_power(q) is not None


def _paley_one(n: int) -> torch.Tensor:
    """Paley's first construction: order n where n - 1 = 3 (mod 4) is a prime power."""
    skew = torch.zeros(n, n, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _quadratic_residues(n - 1)
    return skew + torch.eye(n, dtype=torch.float64)


def _paley_two(n: int) -> torch.Tensor:
    """Paley's second construction: order n where n / 2 - 1 = 1 (mod 4) is a prime power."""
    half = n // 2
    core = torch.ones(half, half, dtype=torch.float64)
    core[0, 0], core[1:, 1:] = 0, _quadratic_residues(half - 1)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(torch.eye(half, dtype=torch.float64), diagonal)


def _williamson(n: int, multiplier: int) -> torch.Tensor:
    """Williamson's Hadamard matrix of order 4n: four symmetric circulants with A^2 + B^2 + C^2 + D^2 = 4n I.

    Only sequences that are constant on the orbits of ``{+-multiplier ** i}`` in Z_n are searched; two pairs are met in the
    middle through their power spectra, which must add up to 4n at every frequency.
    """
    orbits: list[list[int]] = []
    left = set(range(1, n))
    while left:
        orbit, element = set(), min(left)
        while element not in orbit:
            orbit |= {element, -element % n}
            element = element * multiplier % n
        orbits.append(sorted(orbit))
        left -= orbit
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(orbits))), dtype=torch.float64)
    rows = torch.ones(len(signs), n, dtype=torch.float64)
    for i, members in enumerate(orbits):
        rows[:, members] = signs[:, i, None]
    spectra = torch.fft.fft(rows).real.square()[:, [0] + [members[0] for members in orbits]]
    fits = (spectra <= 4 * n + 1e-6).all(1).nonzero().flatten().tolist()
    pairs: dict[tuple[float, ...], tuple[int, int]] = {}
    for i, j in itertools.combinations_with_replacement(fits, 2):
        total = spectra[i] + spectra[j]
        if bool((total > 4 * n + 1e-6).any()):
            continue
        pairs[tuple((total + 1e-7).round(decimals=4).tolist())] = (i, j)
        match = pairs.get(tuple((4 * n - total + 1e-7).round(decimals=4).tolist()))
        if match:
            shift = (torch.arange(n)[None] - torch.arange(n)[:, None]) % n
            a, b, c, d = (rows[r][shift] for r in (i, j, *match))
            return torch.cat([torch.cat(r, 1) for r in ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))])
    raise AssertionError(f"no Williamson matrices of order {n} with multiplier {multiplier}")


def _has_base(m: int) -> bool:
    return m == 1 or m in _WILLIAMSON or (m % 4 == 0 and (_is_prime_power(m - 1, 3) or _is_prime_power(m // 2 - 1, 1)))


@functools.cache
def _base(m: int) -> torch.Tensor:
    """Hadamard matrix of an order that `_has_base` accepts (entries +-1, fp64)."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if m in _WILLIAMSON:
        return _williamson(m // 4, _WILLIAMSON[m])
    return _paley_one(m) if _is_prime_power(m - 1, 3) else _paley_two(m)


def base_size(n: int) -> int:
    """Smallest constructible m with n = m * 2**k.

    Raises ValueError for sizes that no construction here covers.

    >>> base_size(4096), base_size(14336), base_size(11008)
    (1, 28, 172)
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n: expected a positive integer, got {n!r}")
    odd, power = n, 1
    while odd % 2 == 0:
        odd //= 2
    while odd * power <= min(n, LARGEST_BASE):
        if _has_base(odd * power):
            return odd * power
        power *= 2
    raise ValueError(f"n: no Hadamard matrix of order {n} is constructed here (odd part {odd}); pad to another size")


def transform(x: torch.Tensor) -> torch.Tensor:
    """``x [..., n] @ hadamard(n)`` in O(n log n), in x's dtype (16-bit types are added up in fp32).

    >>> transform(torch.tensor([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    n = x.shape[-1]
    m = base_size(n)
    y = (x.float() if x.dtype.itemsize < 4 else x).reshape(*x.shape[:-1], m, n // m)
    if m > 1:
        y = _base(m).to(y).T @ y
    width = 1
    while width < n // m:
        pairs = y.unflatten(-1, (-1, 2, width))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        width *= 2
    return (y.reshape(x.shape) / n**0.5).to(x.dtype)


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Orthogonal matrix [n, n] with entries +-1 / sqrt(n): Sylvester's for powers of two, otherwise base (x) Sylvester.

    Raises ValueError for a size that cannot be constructed.
    """
    return transform(torch.eye(n, dtype=torch.float64)).to(dtype)
