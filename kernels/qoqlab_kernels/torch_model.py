"""A decoder of random weights on torch's own kernels, at several precisions: what engines are compared with.

As good as torch makes it. Products by cuBLAS, cuBLASLt or torch's 4-bit kernel, at every shape the fastest of those that a
precision may use; attention by the faster of flash and cuDNN on a static 16-bit cache, or by the faster of `torch_caches` on
one of 8 bits; everything in between (norms with the residual, SiLU, RoPE, quantisation of activations) fused by
torch.compile; and the whole as one CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from qoqlab.machines import Geometry

from . import measure, torch_caches
from .torch_caches import Attend, Look, Sizes

EPS, GROUP = 1e-5, 128
#: Largest finite number of FP8 (e4m3), and of INT8.
FP8_MAX, INT8_MAX = 448.0, 127.0
FUSED = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
#: Layers that a prefill is measured with.
PREFILL_LAYERS = 4
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
PRODUCTS: dict[str, Sequence[Product]] = {"fp16": (FP16,), "w8a8": W8A8, "w8a8kv8": W8A8, "w4a16": W4A16}
#: Precisions whose cache has 8 bits.
NARROW = ("w8a8kv8",)


# -- what lies between ----------------------------------------------------------------------------------------------------

_compiled: dict[Any, Callable] = {}


# torch compiles a function eight times and runs further uses of it uncompiled, with a line in its log. All functions with
# given arguments are one to torch, so a few precisions and sizes reach that. What is measured here is compiled or an error.
@contextlib.contextmanager
def compiled() -> Iterator[None]:
    """No function is run uncompiled in here, or in what this decorates; may be nested."""
    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
        yield


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


def _heads(
    sizes: tuple[int, ...],
    dim: int,
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> Parts:
    """Turned queries, turned keys, values ``[..., heads, D]`` of ``qkv [..., (Hq + 2 Hkv) D]`` and its bias, if it has one;
    cos, sin ``[..., 1, D]``."""
    if bias is not None:
        qkv = qkv + bias
    q, k, v = qkv.unflatten(-1, (-1, dim)).split(list(sizes), -2)
    return _turn(q, cos, sin), _turn(k, cos, sin), v


def _heads_to_cache(
    sizes: tuple[int, ...],
    dim: int,
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *cache: torch.Tensor,
) -> torch.Tensor:
    """`_heads`, keys and values into their places of the cache; turned queries."""
    q, k, v = _heads(sizes, dim, qkv, bias, cos, sin)
    cache[0].copy_(k)
    cache[1].copy_(v)
    return q


# -- the model ------------------------------------------------------------------------------------------------------------


class TorchModel:
    """``layers`` layers of a geometry, with a product for each of the four linears: one layer, copied to other places."""

    def __init__(self, model: Geometry, products: Sequence[Product], layers: int, device: str = "cuda") -> None:
        self.model, self.products, self.dtype, self.device = model, products, products[0].dtype, device
        made = [p.weight(self._random(n, k)) for p, (n, k) in zip(products, model.shapes.values(), strict=True)]
        self.weights = [made, *([tuple(part.clone() for part in w) for w in made] for _ in range(layers - 1))]
        self.bias = random_bias(model, device).to(self.dtype) if model.qkv_bias else None
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
            q, k, v = (t.transpose(1, 2) for t in self.heads(qkv.view(count, length, -1), self.bias, cos, sin))
            seen = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            return seen.transpose(1, 2).reshape(count * length, -1)

        return self.run(x.flatten(0, 1), attend)

    def step(self, x: torch.Tensor, cache: torch.Tensor, look: Look | None = None) -> torch.Tensor:
        """One more token ``x [B, hidden]`` for each of B sequences, the last one that ``cache [layers, 2, B, Hkv, T, D]``
        has room for; what the final norm gives. ``look``: attention, by default torch's fused one."""
        cos, sin = self.rotary(cache.shape[-2] - 1, cache.shape[-2])
        grouped = self.model.heads != self.model.kv_heads

        def attend(i: int, qkv: torch.Tensor) -> torch.Tensor:
            keys, values = cache[i]
            query = self.heads_to_cache(qkv, self.bias, cos, sin, keys[:, :, -1], values[:, :, -1])
            if look is not None:
                return look(query, keys, values)
            return scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=grouped).flatten(1)

        return self.run(x, attend)

    def step_by(self, x: torch.Tensor, position: int, attend: Attend) -> torch.Tensor:
        """`step` of tokens at a position, with a cache that only ``attend`` knows."""
        cos, sin = self.rotary(position, position + 1)
        return self.run(x, lambda i, qkv: attend(i, *self.heads(qkv, self.bias, cos, sin)))


def random_bias(model: Geometry, device: str = "cuda") -> torch.Tensor:
    """fp32, for queries, keys and values; none of it is zero."""
    return torch.rand(model.shapes["qkv"][0], device=device) / 10 + 0.01


@functools.cache
def choose(model: Geometry, precision: str, tokens: int) -> tuple[Product, ...]:
    """The fastest product of a precision for each of the four linears, measured where there is a choice."""
    allowed = [p for p in PRODUCTS[precision] if p.batches[0] <= tokens <= p.batches[1]]
    if len(allowed) == 1:
        return (allowed[0],) * len(model.shapes)
    return tuple(min(allowed, key=lambda p: product_time(p, n, k, tokens)) for n, k in model.shapes.values())


@compiled()
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


# -- times ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """Microseconds, of which products, with which attention; why other attentions did not run."""

    us: float
    products: list[str]
    attention: str
    refused: dict[str, str] = field(default_factory=dict)


def fastest(ways: dict[str, Callable[[], torch.Tensor]], products: Sequence[Product], replays: int) -> Time:
    """The fastest of several ways to the same, as graphs. Raises `measure.Unavailable` where none runs,
    `measure.WrongResult` where a result is not finite."""
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, way in ways.items():
        try:
            if not bool(way().isfinite().all()):
                raise measure.WrongResult(f"{name}: results are not finite")
            times[name] = measure.graph_time([way], replays=replays)
        except (RuntimeError, ValueError, NotImplementedError) as error:  # not built in, not for these shapes, no memory
            refused[name] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
            torch.cuda.synchronize()
    if not times:
        raise measure.Unavailable(f"torch has no attention here to compare with: {refused}")
    best = min(times, key=times.__getitem__)
    return Time(times[best], [product.name for product in products], best, refused)


def by_backend(compute: Callable[[], torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """What a function computes with each of torch's fused attentions."""

    def by(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return compute()

    return {name: partial(by, backend) for name, backend in FUSED.items()}


@compiled()
def step_time(model: Geometry, precision: str, batch: int, context: int) -> Time:
    """Of a decode step: embedding, all layers, head. ``context`` tokens a sequence, the new one included; no more than the
    model's window are kept. Raises `measure.Unavailable` where no attention runs."""
    products = choose(model, precision, batch)
    made = TorchModel(model, products, model.layers)
    embedding, head = (made._random(model.vocabulary, model.hidden).to(made.dtype) for _ in range(2))
    ids = torch.randint(model.vocabulary, (batch,), device="cuda")
    sizes = Sizes(batch, context if model.window is None else min(context, model.window))

    def whole(step: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return linear(step(embedding[ids]), head)  # in 16 bits, as an engine leaves them

    if precision not in NARROW:
        shape = (model.layers, 2, batch, model.kv_heads, sizes.context, model.head_dim)
        cache = torch.empty(shape, device="cuda", dtype=made.dtype).normal_()
        return fastest(by_backend(lambda: whole(partial(made.step, cache=cache))), products, 15)
    found: list[Time] = []
    refused: dict[str, str] = {}
    for name, way in narrow_steps(made, sizes):
        try:
            found.append(fastest({name: partial(whole, way())}, products, 15))
        except (measure.Unavailable, RuntimeError, ValueError, NotImplementedError) as error:
            refused[name] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        torch.cuda.empty_cache()  # of this cache
    if not found:
        raise measure.Unavailable(f"no attention to a cache of 8 bits runs here: {refused}")
    return replace(min(found, key=lambda time: time.us), refused=refused)


def narrow_steps(
    made: TorchModel, sizes: Sizes
) -> Iterator[tuple[str, Callable[[], Callable[[torch.Tensor], torch.Tensor]]]]:
    """Names of ways to keep 8 bits, and what makes such a cache and gives a step with it."""
    model = made.model

    def fp8() -> Callable[[torch.Tensor], torch.Tensor]:
        options = torch_caches.flex_options(model.heads, model.kv_heads, model.head_dim, Sizes(sizes.batch, 1024))
        return partial(made.step, cache=torch_caches.fp8_cache(model, sizes), look=torch_caches.flex(options))

    def pages() -> Callable[[torch.Tensor], torch.Tensor]:
        attend = torch_caches.paged(torch_caches.paged_cache(model, sizes), fused(torch_caches.to_u8))
        return partial(made.step_by, position=sizes.context - 1, attend=attend)

    yield "fp8 cache, FlexAttention", fp8
    yield "our pages of 8 bits, kernel v2 (the slow one)", pages


@compiled()
def prefill_time(model: Geometry, precision: str, prompts: int, length: int, layers: int = PREFILL_LAYERS) -> Time:
    """Of a prefill, from ``layers`` layers; embedding and head are left out. Raises `measure.Unavailable` for prompts that
    are longer than the model's window."""
    if model.window is not None and length > model.window:
        raise measure.Unavailable(f"prompt: {length} tokens are more than the window of {model.window} of {model.name}")
    layers = min(layers, model.layers)
    products = choose(model, precision, prompts * length)
    made = TorchModel(model, products, layers)
    x = torch.randn(prompts, length, model.hidden, device="cuda").to(made.dtype)
    time = fastest(by_backend(lambda: made.prompts(x)), products, 7)
    return replace(time, us=time.us * model.layers / layers)
