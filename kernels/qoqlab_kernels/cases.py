"""The shapes and operands that tests and benchmark share.

`FORMATS` names every weight format that the kernels read, `LAYERS` the linear layers that are measured, `BATCHES` how many
tokens they get, `TAILS` the batches at the edges of tiles. `weight` and `activations` make operands of any shape;
`extreme_weight` and `extreme_codes` those in which every code is the lowest or the highest there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qoqlab import exact
from qoqlab.affine import Affine, quantize_per_channel_u4, quantize_per_token_s8
from qoqlab.grids import UINT4, Zero
from qoqlab.progressive import FirstLevel, ProgressiveWeight, quantize

#: name -> (group size, 0 for one scale per output; kind of zero)
FORMATS: dict[str, tuple[int, Zero]] = {
    "g128": (128, Zero.INTEGER),
    "g64": (64, Zero.INTEGER),
    "g32": (32, Zero.INTEGER),
    "g128-scaled": (128, Zero.SCALED),
    "g64-scaled": (64, Zero.SCALED),
    "g32-scaled": (32, Zero.SCALED),
    "channel": (0, Zero.INTEGER),
    "channel-scaled": (0, Zero.SCALED),
}

#: The four linear layers of a Llama-3-8B block, q, k, v and gate, up fused: name -> (N, K).
LAYERS: dict[str, tuple[int, int]] = {
    "qkv": (6144, 4096),
    "out": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
#: Tokens of a measurement: decoding small to large, then prefill.
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Tokens around the edges of groups of 8 and of every tile of 8 to 256.
TAILS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 255, 256, 257, 300, 513)
#: The K of the widest layer in use (Llama-3-405B's down projection).
WIDEST_K = 53248


@dataclass(frozen=True)
class Case:
    """One product: ``m`` tokens through a weight ``[n, k]`` of one of `FORMATS`."""

    m: int
    n: int
    k: int
    format: str = "g128"

    def __str__(self) -> str:
        return f"{self.format}-m{self.m}-{self.n}x{self.k}"

    @property
    def fits(self) -> bool:
        """Whether the groups divide K."""
        return self.k % max(32, FORMATS[self.format][0]) == 0


def edge_cases() -> list[Case]:
    """Shapes at the edges of units and tiles, in every format that fits them: tails in M, N and K, one group, one token."""
    shapes = [(1, 32, 32), (3, 64, 64), (8, 96, 128), (9, 32, 160), (17, 96, 288), (5, 160, 384), (33, 224, 640)]
    cases = [Case(m, n, k, name) for m, n, k in shapes for name in FORMATS]
    return [case for case in cases if case.fits]


def random_case(
    generator: torch.Generator, most_tokens: int = 600, most_outputs: int = 1024, most_inputs: int = 2048
) -> Case:
    """Any shape that the kernels must accept; half of the batches come from `TAILS`."""

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    name = list(FORMATS)[pick(len(FORMATS))]
    step = max(32, FORMATS[name][0])
    m = TAILS[pick(len(TAILS))] if pick(2) else 1 + pick(most_tokens)
    return Case(m, 32 * (1 + pick(most_outputs // 32)), step * (1 + pick(most_inputs // step)), name)


def weight(n: int, k: int, name: str = "g128", seed: int = 0, device: str = "cpu") -> ProgressiveWeight | Affine:
    """A random weight ``[n, k]`` with outliers in one of `FORMATS`; the same numbers on every run of a device."""
    group_size, zero = FORMATS[name]
    generator = torch.Generator(device).manual_seed(seed)
    w = torch.randn(n, k, generator=generator, device=device)
    w *= torch.logspace(-1, 1, n, device=device)[:, None]
    w[:, seed % k] *= 8
    return quantize(w, group_size, zero) if group_size else quantize_per_channel_u4(w, zero)


def activations(m: int, k: int, seed: int = 1, device: str = "cpu") -> Affine:
    """Random tokens ``[m, k]``, quantised per token to INT8; one token in eight is all zeros."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(m, k, generator=generator, device=device) * torch.logspace(-2, 1, m, device=device)[:, None]
    x[7::8] = 0
    return quantize_per_token_s8(x)


def extreme_weight(n: int, k: int, name: str = "g128", seed: int = 0, device: str = "cpu") -> ProgressiveWeight | Affine:
    """Codes 0 and 15 only, with the scales and zeros that take their decoded values to the ends of INT8."""
    group_size, zero = FORMATS[name]
    generator = torch.Generator(device).manual_seed(seed)
    codes = (torch.randint(2, (n, k), generator=generator, device=device) * 15).to(torch.uint8)
    outer = torch.full((n,), 2.0**-14, dtype=torch.float16, device=device)  # results stay in fp16's range
    if not group_size:
        if zero is Zero.SCALED:
            return Affine(outer, 7.5 * outer, UINT4, zero, codes)
        ends = torch.randint(2, (n,), generator=generator, device=device) * 15
        return Affine(outer, ends.to(torch.uint8), UINT4, zero, codes)
    groups = k // group_size
    scales = torch.full((n, groups), 16, dtype=torch.int8, device=device)
    if zero is Zero.INTEGER:  # (15 - 8) * 16 = 112, (0 - 8) * 16 = -128
        zeros = torch.full((n, groups), 8, dtype=torch.uint8, device=device)
    else:  # 15 * 16 - 113 = 127, 0 * 16 - 113 = -113; and 15 * 16 - 127 = 113, -127
        ends = torch.randint(2, (n, groups), generator=generator, device=device)
        zeros = (113 + 14 * ends).to(torch.int8)
    return ProgressiveWeight(outer, scales, zeros, group_size, zero, FirstLevel.UNROUNDED, codes)


def extreme_codes(m: int, k: int, seed: int = 1, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 tokens of -128 and 127 only, the first all -128, the second all 127, with fp16 scales: ``([m, k], [m])``."""
    generator = torch.Generator(device).manual_seed(seed)
    codes = (torch.randint(2, (m, k), generator=generator, device=device) * 255 - 128).to(torch.int8)
    codes[0] = -128
    codes[1:2] = 127
    return codes, torch.full((m,), 0.5, dtype=torch.float16, device=device)


def elementwise_operands(
    m: int, k: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x ``[m, k]``, residual ``[m, k]``, weight ``[k]``, gate and up ``[m, 2 k]``) of a type; sizes of tokens from 2**-9 to
    2**6, the second token all zeros."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    sizes = torch.logspace(-9, 6, m, 2.0, device=device)[:, None]
    x, residual, both = normal(m, k) * sizes, normal(m, k), normal(m, 2 * k) * sizes.clamp(max=8.0)
    for t in (x, residual, both):
        t[1:2] = 0
    return x.to(dtype), residual.to(dtype), (1 + normal(k) / 4).to(dtype), both.to(dtype)


def rope_agrees(
    head_dim: int, dtype: torch.dtype, normed: bool, decode: bool, heads: int, kv_heads: int, device: str = "cpu"
) -> dict[str, bool]:
    """Run `fused.rope_append` or `fused.rope_prompt` beside `qoqlab.exact.rotate` and `PagedKV4.append`: which parts agree.

    Two sequences have 18 and 3 tokens in pages of 16 and get one token each, or two as prompts do; one value is zeros, one
    constant.
    """
    from .cache import PagedKV4
    from .fused import Turn, rope_append, rope_prompt

    generator = torch.Generator(device).manual_seed(head_dim)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    caches = [PagedKV4(2, kv_heads, head_dim, 8, 16, sequences=4, max_tokens=48, device=device) for _ in range(2)]
    past, each = (18, 3), 1 if decode else 2
    for sequence, tokens in enumerate(past):
        keys, values = normal(2, 1, kv_heads, tokens, head_dim)
        for cache in caches:
            cache.open()
            cache.append(1, [sequence], keys, values)
            cache.reserve([sequence], each)
    got, want = caches
    m = 2 * each
    qkv = normal(m, (heads + 2 * kv_heads) * head_dim) * torch.logspace(0, 5, m, 2.0, device=device)[:, None]
    qkv[0, -head_dim:], qkv[1, -head_dim:] = 0, 7
    qkv, angle = qkv.to(dtype), normal(48, head_dim // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    gains = ((1 + normal(head_dim) / 4).to(dtype), (1 + normal(head_dim) / 4).to(dtype)) if normed else None
    positions = torch.tensor([p + i for p in past for i in range(each)], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 1], dtype=torch.int32, device=device).repeat_interleave(each)
    query, key, value = qkv.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
    if gains is not None:
        query, key = exact.rms_norm(query, gains[0], 1e-6), exact.rms_norm(key, gains[1], 1e-6)
    at = positions.long()
    query, key = (exact.rotate(x, cos[at][:, None], sin[at][:, None]) for x in (query, key))
    new = [x.unflatten(0, (2, each)).transpose(1, 2) for x in (key, value)]
    want.append(1, [0, 1], *new)
    turn = Turn(cos, sin, gains, 1e-6)
    if decode:
        found = {"query": torch.equal(rope_append(qkv, turn, got, 1, positions, slots), query)}
        found["lengths"] = torch.equal(got.lengths, want.lengths)
    else:
        queries, keys = rope_prompt(qkv, turn, got, 1, positions, slots)
        found = {"query": torch.equal(queries, query), "key": torch.equal(keys, key)}
    return found | {"pool": torch.equal(got.pool, want.pool)}
