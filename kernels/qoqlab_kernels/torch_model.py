"""A decoder of random weights on torch's own kernels, at several precisions: what engines are compared with.

As good as torch makes it. Products by cuBLAS, cuBLASLt or torch's 4-bit kernel, at every shape the fastest of those that a
precision may use; attention by the faster of flash and cuDNN on a static 16-bit cache; everything in between (norms with the
residual, SiLU, RoPE, quantisation of activations) fused by torch.compile; and the whole as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from qoqlab.machines import Geometry

from . import measure

EPS, GROUP = 1e-5, 128
#: Largest finite number of FP8 (e4m3), and of INT8.
FP8_MAX, INT8_MAX = 448.0, 127.0
FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
Parts = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Product:
    """A way to multiply activations ``[M, K]`` by a weight ``[N, K]``: ``weight`` stores an fp16 one, ``prepare`` says what
    is multiplied by it, ``multiply`` gives ``[M, N]`` in ``dtype``. ``batches``: the fewest and the most tokens."""

    name: str
    dtype: torch.dtype
    weight: Callable[[torch.Tensor], Parts]
    prepare: Callable[[torch.Tensor], Parts]
    multiply: Callable[[Parts, Parts], torch.Tensor]
    batches: tuple[int, int] = (1, 1 << 30)


# -- 16 bits --------------------------------------------------------------------------------------------------------------


def _alone(x: torch.Tensor) -> Parts:
    return (x,)


FP16 = Product("fp16, cuBLAS", torch.float16, _alone, _alone, lambda a, w: linear(a[0], w[0]))


# -- 8-bit weights and activations ----------------------------------------------------------------------------------------


def _scaled(x: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / largest
    return x.float() / scale, scale


def _fp8(x: torch.Tensor) -> Parts:
    codes, scale = _scaled(x, FP8_MAX)
    return codes.to(torch.float8_e4m3fn), scale


def _int8(x: torch.Tensor) -> Parts:
    codes, scale = _scaled(x, INT8_MAX)
    return codes.round().to(torch.int8), scale


def _multiply_fp8(a: Parts, w: Parts) -> torch.Tensor:
    return torch._scaled_mm(a[0], w[0].T, a[1], w[1].T, out_dtype=torch.bfloat16, use_fast_accum=True)


def _rescale(total: torch.Tensor, token: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return (total.float() * token * row.T).bfloat16()


def _multiply_int8(a: Parts, w: Parts) -> torch.Tensor:
    return fused(_rescale)(torch._int_mm(a[0], w[0].T), a[1], w[1])


W8A8 = (
    Product("FP8 per token, cuBLASLt", torch.bfloat16, _fp8, _fp8, _multiply_fp8),
    Product("INT8 per token, cuBLASLt and a scaling", torch.bfloat16, _int8, _int8, _multiply_int8, (17, 1 << 30)),
)


# -- 4-bit weights --------------------------------------------------------------------------------------------------------


def _groups(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0..15 uint8 ``[N, K]``, and the scale and the value of code 8 of every group, bf16 ``[N, K / 128]``."""
    grouped = w.float().unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-10)
    codes = ((grouped - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(1)
    return codes, scale.bfloat16(), (low + 8 * scale).bfloat16()


def _packed(w: torch.Tensor) -> Parts:
    codes, scale, middle = _groups(w)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale, middle


def _tiny(w: torch.Tensor) -> Parts:
    pairs, scale, middle = _packed(w)
    return torch._convert_weight_to_int4pack(pairs, 8), torch.stack([scale.T, middle.T], -1).contiguous()


def _unpack(pairs: torch.Tensor, scale: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    codes = torch.stack([pairs >> 4, pairs & 15], -1).flatten(1).unflatten(1, (-1, GROUP)).to(torch.bfloat16) - 8
    return (codes * scale[..., None] + middle[..., None]).flatten(1)


W4A16 = (
    Product(
        "4-bit kernel of torch", torch.bfloat16, _tiny, _alone,
        lambda a, w: torch._weight_int4pack_mm(a[0], w[0], GROUP, w[1]), (1, 256),
    ),
    Product(
        "dequantised, then cuBLAS", torch.bfloat16, _packed, _alone, lambda a, w: linear(a[0], fused(_unpack)(*w))
    ),
)  # fmt: skip

#: Products that a precision may choose from.
PRODUCTS: dict[str, Sequence[Product]] = {"fp16": (FP16,), "w8a8": W8A8, "w4a16": W4A16}


# -- what lies between ----------------------------------------------------------------------------------------------------

_compiled: dict[Any, Callable] = {}
#: torch compiles a function eight times and runs further uses of it uncompiled, with a line in its log. All functions with
#: given arguments are one to torch, so a few precisions and sizes reach that. What is measured here is compiled or an error.
compiled = torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)


def fused(function: Callable, *first: Any) -> Callable:
    """The function with its first arguments given, by torch.compile on a GPU (once, for any sizes); as it is elsewhere."""
    if (function, first) not in _compiled:
        given = partial(function, *first)
        _compiled[function, first] = torch.compile(given, dynamic=True) if torch.cuda.is_available() else given
    return _compiled[function, first]


def _add_norm(prepare: Callable, x: torch.Tensor, more: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, Parts]:
    x = x + more
    return x, prepare(rms_norm(x, gain.shape, gain, EPS))


def _gate(prepare: Callable, gate_up: torch.Tensor) -> Parts:
    gate, up = gate_up.chunk(2, -1)
    return prepare(silu(gate) * up)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def _heads(sizes: tuple[int, ...], dim: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Parts:
    """Turned queries, turned keys, values ``[..., heads, D]`` of ``qkv [..., (Hq + 2 Hkv) D]``; cos, sin ``[..., 1, D]``."""
    q, k, v = qkv.unflatten(-1, (-1, dim)).split(list(sizes), -2)
    return _turn(q, cos, sin), _turn(k, cos, sin), v


def _heads_to_cache(
    sizes: tuple[int, ...], dim: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *cache: torch.Tensor
) -> torch.Tensor:
    """`_heads`, keys and values into their places of the cache; turned queries."""
    q, k, v = _heads(sizes, dim, qkv, cos, sin)
    cache[0].copy_(k)
    cache[1].copy_(v)
    return q


# -- the model ------------------------------------------------------------------------------------------------------------


class TorchModel:
    """``layers`` layers of a geometry, with a product for each of the four linears."""

    def __init__(self, model: Geometry, products: Sequence[Product], layers: int, device: str = "cuda") -> None:
        self.model, self.products, self.dtype, self.device = model, products, products[0].dtype, device
        made = [p.weight(self._random(n, k)) for p, (n, k) in zip(products, model.shapes.values(), strict=True)]
        self.weights = [[tuple(part.clone() for part in w) for w in made] for _ in range(layers)]
        self.gain = torch.ones(model.hidden, device=device, dtype=self.dtype)
        sizes = (model.heads, model.kv_heads, model.kv_heads)
        self.norms = [fused(_add_norm, products[i].prepare) for i in (0, 2)]
        self.gate, self.take = fused(_gate, products[3].prepare), fused(products[1].prepare)
        self.heads = fused(_heads, sizes, model.head_dim)
        self.heads_to_cache = fused(_heads_to_cache, sizes, model.head_dim)
        self.last_norm = fused(_add_norm, _alone)

    def _random(self, n: int, k: int) -> torch.Tensor:
        return torch.randn(n, k, device=self.device, dtype=torch.float16) / k**0.5

    def rotary(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin ``[end - first, 1, D]`` of positions."""
        dim = self.model.head_dim
        powers = torch.arange(0, dim, 2, device=self.device) / dim
        angle = (torch.arange(first, end, device=self.device)[:, None] * 500000.0**-powers).repeat(1, 2)[:, None]
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def run(self, x: torch.Tensor, attend: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What the final norm gives for ``x [M, hidden]``; ``attend`` takes a layer's number and ``qkv [M, ...]``."""
        qkv, out, gate_up, down = (p.multiply for p in self.products)
        more = torch.zeros_like(x)
        for i, w in enumerate(self.weights):
            x, a = self.norms[0](x, more, self.gain)
            seen = attend(i, qkv(a, w[0]))
            x, a = self.norms[1](x, out(self.take(seen), w[1]), self.gain)
            more = down(self.gate(gate_up(a, w[2])), w[3])
        return self.last_norm(x, more, self.gain)[1][0]

    def prompts(self, x: torch.Tensor) -> torch.Tensor:
        """Prompts ``x [B, T, hidden]`` attend to themselves; what the final norm gives, ``[B T, hidden]``."""
        count, length = x.shape[:2]
        cos, sin = (t[None] for t in self.rotary(0, length))
        grouped = self.model.heads != self.model.kv_heads

        def attend(_: int, qkv: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.transpose(1, 2) for t in self.heads(qkv.view(count, length, -1), cos, sin))
            seen = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return seen.transpose(1, 2).reshape(count * length, -1)

        return self.run(x.flatten(0, 1), attend)

    def step(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """One more token ``x [B, hidden]`` for each of B sequences, the last one that ``cache [layers, 2, B, Hkv, T, D]``
        has room for; what the final norm gives."""
        cos, sin = self.rotary(cache.shape[-2] - 1, cache.shape[-2])
        grouped = self.model.heads != self.model.kv_heads

        def attend(i: int, qkv: torch.Tensor) -> torch.Tensor:
            keys, values = cache[i]
            query = self.heads_to_cache(qkv, cos, sin, keys[:, :, -1], values[:, :, -1])
            return scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=grouped).flatten(1)

        return self.run(x, attend)


def choose(model: Geometry, precision: str, tokens: int) -> list[Product]:
    """The fastest product of a precision for each of the four linears, measured where there is a choice."""
    allowed = [p for p in PRODUCTS[precision] if p.batches[0] <= tokens <= p.batches[1]]
    if len(allowed) == 1:
        return allowed * len(model.shapes)
    return [min(allowed, key=lambda p: product_time(p, n, k, tokens)) for n, k in model.shapes.values()]


@compiled
def product_time(product: Product, n: int, k: int, tokens: int, copies: int = 3) -> float:
    """Microseconds of a product with what prepares it, weights out of L2."""
    w = torch.randn(n, k, device="cuda", dtype=torch.float16) / k**0.5
    stored = product.weight(w)
    x = torch.randn(tokens, k, device="cuda", dtype=product.dtype)
    prepare = fused(product.prepare)
    weights = [tuple(part.clone() for part in stored) for _ in range(copies)]
    got, want = product.multiply(prepare(x), stored).float(), x.float() @ w.float().T
    if not float((got - want).norm() / want.norm()) < 0.15:  # what 4 bits round is a tenth of these
        raise measure.WrongResult(f"{product.name}: {n}x{k}, {tokens} tokens is not the product")
    return measure.graph_time([partial(lambda s: product.multiply(prepare(x), s), s) for s in weights], replays=5)


@compiled
def step_time(model: Geometry, precision: str, batch: int, context: int) -> tuple[float, list[str]]:
    """(microseconds of a decode step, names of the products): embedding, all layers, head. ``context`` tokens a sequence,
    the new one included. Raises `measure.Unavailable` where torch has no fused attention."""
    products = choose(model, precision, batch)
    made = TorchModel(model, products, model.layers)
    embedding, head = (made._random(model.vocabulary, model.hidden).to(made.dtype) for _ in range(2))
    shape = (model.layers, 2, batch, model.kv_heads, context, model.head_dim)
    cache = torch.empty(shape, device="cuda", dtype=made.dtype).normal_()
    ids = torch.randint(model.vocabulary, (batch,), device="cuda")

    def step() -> torch.Tensor:
        return linear(made.step(embedding[ids], cache), head).float()

    times, problem = [], ""
    for backend in FUSED:
        try:
            with sdpa_kernel(backend):
                if not bool(step().isfinite().all()):
                    raise measure.WrongResult(f"{precision}: the step's logits are not finite")
                times.append(measure.graph_time([step], replays=15))
        except RuntimeError as error:  # not built in, or not for these shapes
            problem = str(error).splitlines()[0]
            torch.cuda.synchronize()
    if not times:
        raise measure.Unavailable(f"torch has no fused attention here to compare with: {problem}")
    return min(times), [product.name for product in products]


@compiled
def prefill_time(model: Geometry, precision: str, prompts: int, length: int, layers: int = 4) -> tuple[float, list[str]]:
    """(microseconds of a prefill, names of the products), from ``layers`` layers; embedding and head are left out."""
    products = choose(model, precision, prompts * length)
    made = TorchModel(model, products, layers)
    x = torch.randn(prompts, length, model.hidden, device="cuda").to(made.dtype)
    us = measure.graph_time([lambda: made.prompts(x)], replays=7)
    return us * model.layers / layers, [product.name for product in products]
