"""An engine that runs a quantised model step by step: prefill, decode, generate (paper section 5).

Made by `qoqlab.runtime.compile`. It holds the model's weights as the GEMM reads them, q, k and v fused along N, gate and up
fused along N, and a paged cache. A prompt attends to exact keys and values, a decoded token to the quantised cache and to
its own exact key and value, as `attention.Mode.RUNTIME` says. The operations come from `arithmetic`, on the reference or on
the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from . import attention, exact
from .architecture import Architecture, Block
from .arithmetic import Ops, Projection, side_by_side
from .checks import require_count
from .kv import Keys, KVFormat
from .schemes import WeightKind

#: What attends: (layer, query [M, Hq, D], key and value [M, Hkv, D]) -> [M, Hq, D].
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: ``temperature`` 0 takes the likeliest; otherwise it is drawn from the ``top_k`` likeliest
    (None: all) that together hold ``top_p`` of the probability, with a generator that starts from ``seed``."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected a number of at least 0, got {self.temperature!r}")
        if self.top_k is not None:
            require_count("top_k", self.top_k, 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number with 0 < top_p <= 1, got {self.top_p!r}")

    def choose(self, logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """int64 tokens ``[B]`` from ``logits [B, V]``."""
        if not self.temperature:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        probabilities = scores.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0)  # the likeliest always stays
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@dataclass(frozen=True)
class Layer:
    """What one decoder layer needs."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    input_norm: torch.Tensor
    mlp_norm: torch.Tensor
    head_norms: tuple[torch.Tensor, torch.Tensor, float] | None  #: of queries and keys, with epsilon (Qwen3)
    window: int | None


def check(architecture: Architecture) -> KVFormat | None:
    """The cache's format, if an engine can run the model. Raises ValueError naming what it cannot run."""
    forms = set()
    for block in architecture.blocks:
        for role, linear in block.linears():
            form = getattr(linear, "form", None)
            if form is None:
                raise ValueError(f"model: {block.name(role)} is not quantised; an engine runs W4A8 recipes such as qoq-g128")
            if form.kind in (WeightKind.GROUP_U4, WeightKind.GROUP_S4):
                raise ValueError(f"model: {block.name(role)} has floating-point scales along K, which an engine cannot use")
            if getattr(linear, "online", None) is not None:
                raise ValueError(f"model: {block.name(role)} transforms its input, which engines do not")
            acts = getattr(linear, "activations", None)
            if getattr(acts, "name", "") != "INT8":
                raise ValueError(f"model: {block.name(role)} has activations {acts}, an engine needs INT8 per token")
        kv = KVFormat.of(attention.state(block.attention).grid)
        if kv is not None and (kv.keys is not Keys.TOKEN or kv.rotate_keys):
            raise ValueError(
                f"model: layer {block.index} caches keys per channel or rotated; an engine needs them per token"
            )
        if not isinstance(block.mlp.act_fn, nn.SiLU) and type(block.mlp.act_fn).__name__ != "SiLUActivation":
            raise ValueError(f"model: layer {block.index} has the activation {block.mlp.act_fn}, an engine needs SiLU")
        forms.add(kv)
    if len(forms) != 1:
        raise ValueError("model: layers differ in how they cache keys and values")
    return forms.pop()


def layer_of(block: Block, ops: Ops, device: torch.device) -> Layer:
    """A block's weights, fused and ready to run on ``device``."""

    def fused(*roles: str) -> Projection:
        linears: list[Any] = [block.linear(role) for role in roles]
        joined = side_by_side([_to(linear.quantized, device) for linear in linears])
        biases = [linear.bias for linear in linears]
        if all(bias is None for bias in biases):
            return ops.projection(joined, None)
        parts = [
            torch.zeros(linear.out_features) if bias is None else bias.float()
            for linear, bias in zip(linears, biases, strict=True)
        ]
        return ops.projection(joined, torch.cat([part.to(device) for part in parts]))

    def gain(norm: nn.Module) -> torch.Tensor:
        return norm.weight.detach().to(device, ops.dtype).contiguous()  # type: ignore[operator]

    norms = None
    if block.query_norm is not None and block.key_norm is not None:
        norms = gain(block.query_norm), gain(block.key_norm), float(block.query_norm.variance_epsilon)  # type: ignore[arg-type]
    return Layer(
        fused("q", "k", "v"),
        fused("o"),
        fused("gate", "up"),
        fused("down"),
        gain(block.input_norm),
        gain(block.mlp_norm),
        norms,
        block.window,
    )


def _to(weight: Any, device: torch.device) -> Any:
    """A quantised weight on a device."""
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(weight).items()}
    return type(weight)(**moved)


class Engine:
    """A compiled model: `prefill` prompts, `decode` a token for each of a batch of sequences, `free` them; or `generate`.

    ``max_batch`` sequences at a time of at most ``max_tokens`` tokens each, prompt included. ``logits`` are fp32.
    """

    def __init__(
        self,
        architecture: Architecture,
        ops: Ops,
        cache: Any,
        device: torch.device,
        max_batch: int,
        max_tokens: int,
    ) -> None:
        first = architecture.blocks[0]
        self.heads, self.kv_heads, self.head_dim = first.heads, first.kv_heads, first.head_dim
        self.ops, self.cache, self.device = ops, cache, device
        self.max_batch, self.max_tokens = max_batch, max_tokens
        self.layers = [layer_of(block, ops, device) for block in architecture.blocks]
        self.eps = float(architecture.final_norm.variance_epsilon)  # type: ignore[arg-type]
        self.final_norm = architecture.final_norm.weight.detach().to(device, ops.dtype)  # type: ignore[operator]
        self.embedding = architecture.embedding.weight.detach().to(device, ops.dtype)
        head = architecture.head
        self.head = self.embedding if architecture.tied else head.weight.detach().to(device, ops.dtype)
        self.head_bias = None if head.bias is None else head.bias.detach().to(device, ops.dtype)
        cos, sin = architecture.rotary(max_tokens, ops.dtype)
        self.cos, self.sin = cos.to(device), sin.to(device)
        self.lengths: dict[int, int] = {}

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.embedding.shape[0]

    # -- the step ---------------------------------------------------------------------------------------------------------

    def _hidden(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the last layer adds, the residual before) ``[M, hidden]`` of tokens ``[M]`` at positions ``[M]``."""
        ops = self.ops
        residual = self.embedding[tokens]
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        a = ops.norm(residual, self.layers[0].input_norm, self.eps)
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        y = residual
        for i, layer in enumerate(self.layers):
            query, key, value = ops.linear(a, layer.qkv).unflatten(-1, (-1, self.head_dim)).split(sizes, 1)
            if layer.head_norms is not None:
                q_gain, k_gain, eps = layer.head_norms
                query, key = exact.rms_norm(query, q_gain, eps), exact.rms_norm(key, k_gain, eps)
            seen = attend(i, exact.rotate(query, cos, sin), exact.rotate(key, cos, sin), value)
            y = ops.linear(ops.quantize(seen.flatten(1)), layer.out)
            a, residual = ops.add_norm(y, residual, layer.mlp_norm, self.eps)
            y = ops.linear(ops.silu_mul(ops.linear(a, layer.gate_up)), layer.down)
            if i + 1 < len(self.layers):
                a, residual = ops.add_norm(y, residual, self.layers[i + 1].input_norm, self.eps)
        return y, residual

    def _logits(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        last = self.ops.last_norm(y.contiguous(), residual.contiguous(), self.final_norm, self.eps)
        return nn.functional.linear(last, self.head, self.head_bias).float()

    # -- prompts ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int] | torch.Tensor]) -> tuple[list[int], torch.Tensor]:
        """Take in prompts of any lengths, all tokens in the same GEMMs: (a sequence for each, logits ``[B, V]`` after each).

        Raises ValueError for an empty prompt, one that is longer than ``max_tokens``, a token outside the vocabulary, more
        prompts than ``max_batch`` has room for; `paged.PagesExhausted` where the cache is full.
        """
        ids = [self._checked(prompt) for prompt in prompts]
        if not ids or len(self.lengths) + len(ids) > self.max_batch:
            raise ValueError(
                f"prompts: {len(ids)} beside {len(self.lengths)} sequences in work; expected at least 1 and together at most "
                f"max_batch = {self.max_batch}"
            )
        sequences = [self.cache.open() for _ in ids]
        try:
            for sequence, prompt in zip(sequences, ids, strict=True):
                self.cache.reserve(sequence, len(prompt))
        except BaseException:
            for sequence in sequences:
                self.cache.free(sequence)
            raise
        counts = [len(prompt) for prompt in ids]

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            found = []
            parts = zip(sequences, *(t.split(counts) for t in (query, key, value)), strict=True)
            for sequence, q, k, v in parts:
                found.append(causal(q, k, v, self.layers[layer].window))
                self.cache.append(layer, sequence, 0, k, v)
            return torch.cat(found)

        positions = torch.cat([torch.arange(count) for count in counts]).to(self.device)
        y, residual = self._hidden(torch.cat(ids).to(self.device), positions, attend)
        last = torch.tensor(counts).cumsum(0).sub(1).to(self.device)
        for sequence, count in zip(sequences, counts, strict=True):
            self.lengths[sequence] = count
        return sequences, self._logits(y[last], residual[last])

    def _checked(self, prompt: Sequence[int] | torch.Tensor) -> torch.Tensor:
        ids = torch.as_tensor(prompt)
        if ids.ndim != 1 or ids.is_floating_point() or not 1 <= len(ids) <= self.max_tokens:
            raise ValueError(
                f"prompts: expected 1..{self.max_tokens} token numbers each, got {ids.dtype} of shape {list(ids.shape)}"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            raise ValueError(f"prompts: tokens must lie in 0..{self.vocabulary - 1}, got {int(ids.min())}..{int(ids.max())}")
        return ids.long().cpu()

    # -- decoding ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, sequences: Sequence[int], tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Append one token to each of several different sequences: fp32 logits ``[B, V]`` for what follows.

        Raises KeyError for a sequence that is not open, ValueError for one named twice or at ``max_tokens``, or for tokens that
        do not fit; `paged.PagesExhausted` where the cache is full.
        """
        ids = torch.as_tensor(tokens)
        self._check_batch(sequences, ids)
        positions = [self.lengths[sequence] for sequence in sequences]
        for sequence, position in zip(sequences, positions, strict=True):
            self.cache.reserve(sequence, position + 1)
        logits = self._decode(sequences, positions, ids)
        for sequence in sequences:
            self.lengths[sequence] += 1
        return logits

    def _decode(self, sequences: Sequence[int], positions: list[int], tokens: torch.Tensor) -> torch.Tensor:
        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return self.cache.decode(layer, sequences, positions, (query, key, value), self.layers[layer].window)

        where = torch.tensor(positions, device=self.device)
        return self._logits(*self._hidden(tokens.to(self.device).long(), where, attend))

    def _check_batch(self, sequences: Sequence[int], ids: torch.Tensor) -> None:
        if not sequences or ids.shape != (len(sequences),):
            raise ValueError(f"tokens: expected one for each of {len(sequences)} sequences, got shape {list(ids.shape)}")
        if ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            raise ValueError(f"tokens: tokens must lie in 0..{self.vocabulary - 1}, got {ids.tolist()}")
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"sequences: expected different ones, got {list(sequences)}")
        for sequence in sequences:
            if sequence not in self.lengths:
                raise KeyError(f"sequences: {sequence} is not open")
            if self.lengths[sequence] >= self.max_tokens:
                raise ValueError(f"sequences: {sequence} has max_tokens = {self.max_tokens} tokens already")

    def free(self, sequences: Sequence[int]) -> None:
        """End sequences and give their pages back. Raises KeyError for one that is not open."""
        for sequence in sequences:
            if sequence not in self.lengths:
                raise KeyError(f"sequences: {sequence} is not open")
            self.cache.free(sequence)
            del self.lengths[sequence]

    # -- generation -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int] | torch.Tensor],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        stop: Sequence[int] = (),
    ) -> list[list[int]]:
        """Continue prompts of any lengths: the new tokens of each, at most ``max_new_tokens``, up to and with a token of
        ``stop``.

        Raises ValueError as `prefill` does, and for a prompt that leaves too little of ``max_tokens``.
        """
        require_count("max_new_tokens", max_new_tokens, 1)
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + max_new_tokens - 1 > self.max_tokens:
            raise ValueError(
                f"max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens exceed max_tokens = {self.max_tokens}"
            )
        generator = torch.Generator(self.device).manual_seed(sampling.seed)
        sequences, logits = self.prefill(prompts)
        found: list[list[int]] = [[] for _ in sequences]
        running = list(range(len(sequences)))
        try:
            while True:
                tokens = sampling.choose(logits, generator).tolist()
                for i, token in zip(running, tokens, strict=True):
                    found[i].append(token)
                running = [i for i in running if len(found[i]) < max_new_tokens and found[i][-1] not in stop]
                if not running:
                    return found
                logits = self.decode([sequences[i] for i in running], [found[i][-1] for i in running])
        finally:
            self.free(sequences)


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Attention of a prompt to itself: query ``[T, Hq, D]``, key and value ``[T, Hkv, D]`` -> ``[T, Hq, D]``, by torch."""
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    length, mask = len(query), None
    if window is not None and window < length:
        i = torch.arange(length, device=query.device)
        mask = (i[:, None] >= i) & (i[:, None] - i < window)
    seen = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    return seen[0].transpose(0, 1)
