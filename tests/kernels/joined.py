"""Operands of `attend_own_s8`: for the simulator's tests and the GPU's."""

from __future__ import annotations

import torch


def own_operands(m: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> tuple:
    """(seen, lse, query, key, value): the first token has no past; of the others the past weighs nothing, a little, about
    as much as the token itself, nearly everything. ``value`` is a slice, as of q, k, v side by side."""
    generator = torch.Generator().manual_seed(m * heads + dim)
    query, seen = torch.randn(2, m, heads, dim, generator=generator)
    qkv = torch.randn(m, heads + 2 * kv_heads, dim, generator=generator) * torch.logspace(1, -2, m)[:, None, None]
    key, value = qkv[:, heads : heads + kv_heads] * 2, qkv.to(device, dtype)[:, heads + kv_heads :]
    lse = torch.randn(m, heads, generator=generator) + torch.linspace(-120, 120, m)[:, None]
    lse[m // 2] *= 0.1
    lse[0], seen[0] = -torch.inf, 0
    seen, query, key = (x.to(device, dtype).contiguous() for x in (seen, query, key))
    return seen, lse.to(device), query, key, value
