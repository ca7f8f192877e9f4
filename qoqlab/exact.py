"""Floating-point functions of which every rounding is laid down, so that CPUs, GPUs and kernels agree on every bit.

Sums are taken in a fixed order and nothing is contracted: each line is one fp32 operation, rounded once to nearest, which
torch and a kernel's ``add.rn`` or ``mul.rn`` do alike on every device. Results are rounded to the dtype of the input where
transformers' modules round, so these functions differ from those modules only by the last bits of fp32.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .affine import divide

#: Inputs that are added first: one 16-byte load of fp16.
PIECE = 8
#: log2(e) in two parts: the first has 13 bits, so its product with an fp16 or bf16 number is exact in fp32.
LOG2_E = (1.442626953125, 6.808776379330084e-05)
#: 2**f for f in -0.5..0.5, lowest power first: least relative error for this degree, constant term 1.
EXP2 = (1.0, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
#: Adding and subtracting it rounds a small fp32 number to an integer, ties to even.
ROUNDING = 12582912.0
#: |x| beyond which an exponential is that of this number: 1 + exp(-87) is 1, and -87 exp(-87) is as good as nothing.
EXP_LIMIT = 87.0


def fold(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis of ``x [..., n]``: zeros fill it up to a power of two, then its second half is added to its
    first, element by element, until one number is left.

    >>> fold(torch.tensor([1.0, 2.0, 3.0]))  # (1 + 3) + (2 + 0)
    tensor(6.)
    """
    x = pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    while x.shape[-1] > 1:
        low, high = x.chunk(2, -1)
        x = low + high
    return x[..., 0]


def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """fp32 sum of products over the last axis of ``x, y [..., K]``: `fold` of every `PIECE` products, then `fold` of the
    pieces. Products of two fp16 or two bf16 numbers are exact."""
    products = x.float() * y.float()
    return fold(fold(pad(products, (0, -products.shape[-1] % PIECE)).unflatten(-1, (-1, PIECE))))


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """fp32 sum of squares of ``x [..., K]``, see `dot`."""
    return dot(x, x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * (x / sqrt(mean(x**2) + eps))`` over the last axis of ``x [..., K]``: in fp32, rounded to x's dtype before
    and after the multiplication with ``weight [K]``, as transformers' modules do. No mean is subtracted."""
    mean = divide(sum_of_squares(x), x.shape[-1])
    root = (mean + torch.full_like(mean, eps)).sqrt()
    normed = (x.float() * (torch.ones_like(root) / root)[..., None]).to(x.dtype)
    return (weight.to(x.dtype).float() * normed.float()).to(x.dtype)


def exp_minus(x: torch.Tensor) -> torch.Tensor:
    """``exp(-x)`` in fp32 for ``|x| <= EXP_LIMIT`` (others as if they were at the limit).

    ``2**n * 2**f`` with ``-x log2(e) = n + f``; 2**f is a polynomial of degree 5. The relative error is below 2**-22.4 for
    every fp16 and bf16 input, and below 2**-18 for fp32, whose products with the first part of log2(e) are rounded.
    """
    t = (-x.float()).clamp(-EXP_LIMIT, EXP_LIMIT)
    head = t * LOG2_E[0]
    n = (head + ROUNDING) - ROUNDING
    f = (head - n) + t * LOG2_E[1]
    power = f * EXP2[5]
    for coefficient in EXP2[4:0:-1]:
        power = (power + coefficient) * f
    power = power + EXP2[0]
    return (power.view(torch.int32) + (n.int() << 23)).view(torch.float32)


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x * (1 / (1 + exp(-x)))`` in fp32, rounded once to x's dtype; below -`EXP_LIMIT` that of -`EXP_LIMIT`."""
    x32 = x.float().clamp(min=-EXP_LIMIT)
    divisor = 1 + exp_minus(x32)
    return (x32 * (torch.ones_like(divisor) / divisor)).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``gate_up [..., 2 I]``, the gate first: ``[..., I]``. Rounded to the input's dtype after `silu`
    and after the product, as transformers' modules do."""
    gate, up = gate_up.chunk(2, -1)
    return (silu(gate).float() * up.float()).to(gate_up.dtype)


def cap(score: torch.Tensor, limit: float) -> torch.Tensor:
    """``limit * tanh(score / limit)`` in fp32, the tanh as ``1 - 2 / (1 + exp(2 x))``."""
    limits = torch.full_like(score, limit)
    x = score / limits
    divisor = 1 + exp_minus(-(x + x))
    return limits * (1 - torch.full_like(divisor, 2) / divisor)


def join(seen: torch.Tensor, lse: torch.Tensor, score: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax over two parts: one with the result ``seen [..., D]`` and the log-sum-exp ``lse [...]`` of its scores (fp32;
    -inf for none), the other a single ``value [..., D]`` with its ``score [...]``. Rounded once, to seen's dtype.

    The larger of the two weighs 1, the other ``exp(-|score - lse|)``, both times the reciprocal of their sum.
    """
    less = exp_minus((score - lse).abs())
    one = torch.ones_like(less)
    share = one / (one + less)
    past, own = torch.where(lse >= score, share, less * share), torch.where(lse >= score, less * share, share)
    return (seen.float() * past[..., None] + value.float() * own[..., None]).to(seen.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``x [..., D]``: channel c turns together with channel c + D/2.

    ``cos``, ``sin`` ``[..., D/2]`` in x's dtype, broadcast against x. Every product and the sum are rounded to x's dtype, as
    transformers does.
    """
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos + -high * sin, high * cos + low * sin], -1)
