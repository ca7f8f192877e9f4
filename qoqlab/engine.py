"""An engine that runs a quantised model step by step: prefill, decode, generate (paper section 5).

Made by `qoqlab.runtime.compile`. It holds the model's weights as the GEMM reads them, q, k and v fused along N, gate and up
fused along N, and a paged cache. A prompt attends to exact keys and values, a decoded token to the quantised cache and to
its own exact key and value, as `attention.Mode.RUNTIME` says. The operations come from `arithmetic`, on the reference or on
the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import sdpa_kernel

from . import attention
from .architecture import Architecture, Block
from .arithmetic import Ops, Projection, Weight, side_by_side
from .cached_attention import ALONE, IDLE, Attention, Batch, HeadNorms, batch_of
from .checks import require_count
from .kv import Keys, KVFormat
from .sampling import GREEDY, Sampling, choose, draws_of
from .schemes import WeightKind
from .transfer import sent


@dataclass(frozen=True)
class Layer:
    """What one decoder layer needs."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    input_norm: torch.Tensor
    mlp_norm: torch.Tensor
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


#: What of a linear an engine holds: (role, weight, bias) -> (weight, bias). `parallel` cuts slices.
Cut = Callable[[str, Weight, torch.Tensor | None], tuple[Weight, torch.Tensor | None]]


def whole(role: str, weight: Weight, bias: torch.Tensor | None) -> tuple[Weight, torch.Tensor | None]:
    """The `Cut` of an engine that is alone."""
    return weight, bias


def layer_of(block: Block, ops: Ops, device: torch.device, cut: Cut = whole) -> Layer:
    """A block's weights, or what ``cut`` leaves of them, fused and ready to run on ``device``."""

    def fused(*roles: str) -> Projection:
        linears: list[tuple[str, Any]] = [(role, block.linear(role)) for role in roles]
        weights, biases = zip(*(cut(role, linear.quantized, linear.bias) for role, linear in linears), strict=True)
        joined = side_by_side([_to(weight, device) for weight in weights])
        if all(bias is None for bias in biases):
            return ops.projection(joined, None)
        parts = [
            torch.zeros(weight.shape[0]) if bias is None else bias.float()
            for weight, bias in zip(weights, biases, strict=True)
        ]
        return ops.projection(joined, torch.cat([part.to(device) for part in parts]))

    return Layer(
        fused("q", "k", "v"),
        fused("o"),
        fused("gate", "up"),
        fused("down"),
        gain(block.input_norm, ops.dtype, device),
        gain(block.mlp_norm, ops.dtype, device),
        block.window,
    )


@dataclass(frozen=True)
class Network:
    """A model's weights on one device: quantised layers; embedding and head ``[V, hidden]``, final norm, in 16 bits."""

    layers: list[Layer]
    embedding: torch.Tensor
    final_norm: torch.Tensor
    eps: float
    head: torch.Tensor
    head_bias: torch.Tensor | None = None


def network_of(architecture: Architecture, ops: Ops, device: torch.device, cut: Cut = whole) -> Network:
    """A model's weights, or what ``cut`` leaves of its layers, fused and ready to run."""
    embedding, head = architecture.embedding.weight.detach().to(device, ops.dtype), architecture.head
    return Network(
        [layer_of(block, ops, device, cut) for block in architecture.blocks],
        embedding,
        gain(architecture.final_norm, ops.dtype, device),
        float(architecture.final_norm.variance_epsilon),  # type: ignore[arg-type]
        embedding if architecture.tied else head.weight.detach().to(device, ops.dtype),
        None if head.bias is None else head.bias.detach().to(device, ops.dtype),
    )


def gain(norm: nn.Module, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Weight of an RMSNorm."""
    return norm.weight.detach().to(device, dtype).contiguous()  # type: ignore[operator]


def head_norms(block: Block, dtype: torch.dtype, device: torch.device) -> HeadNorms:
    """RMSNorms of a block's query and key heads (Qwen3), or None."""
    if block.query_norm is None or block.key_norm is None:
        return None
    eps = float(block.query_norm.variance_epsilon)  # type: ignore[arg-type]
    return gain(block.query_norm, dtype, device), gain(block.key_norm, dtype, device), eps


def _to(weight: Any, device: torch.device) -> Any:
    """A quantised weight on a device."""
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(weight).items()}
    return type(weight)(**moved)


def step_size(count: int) -> int:
    """Rows of the captured step for ``count`` sequences: a power of two up to 16, then a multiple of 16, from 256 on of
    64."""
    if count <= 16:
        return 1 << (count - 1).bit_length()
    multiple = 16 if count <= 256 else 64
    return -(-count // multiple) * multiple


class Step:
    """A step of ``size`` sequences as a CUDA graph. Rows without one repeat the token `IDLE` of the sequence ``idle``."""

    def __init__(
        self, compute: Callable[[torch.Tensor, Batch], torch.Tensor], size: int, idle: int, device: torch.device
    ) -> None:
        self.ids = torch.zeros(size, dtype=torch.int64, device=device)
        self.positions = torch.full((size,), IDLE, dtype=torch.int32, device=device)
        self.slots = torch.full((size,), idle, dtype=torch.int32, device=device)
        self.idle, batch = idle, Batch(self.positions, self.slots)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # everything is compiled and loaded before the capture
            compute(self.ids, batch)
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        # what other threads do, such as the one that watches over NCCL, is no part of the capture and may go on
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = compute(self.ids, batch)

    def __call__(self, ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits ``[B, V]`` in the engine's dtype for B <= size sequences; they lie where those of the next step will."""
        count = len(ids)
        self.ids[:count], self.positions[:count], self.slots[:count] = ids, batch.positions, batch.slots
        self.positions[count:], self.slots[count:] = IDLE, self.idle
        self.graph.replay()
        return self.logits[:count]


class Engine:
    """A compiled model: `prefill` prompts, `decode` a token for each of a batch of sequences, `free` them; or `generate`.

    ``max_batch`` sequences at a time of at most ``max_tokens`` tokens each, prompt included. ``lengths``: tokens of every
    open sequence. ``alone``: no other process has a part in its calls. On a GPU a step is a captured graph, one for each
    `step_size`, made at its first use. A call that raises leaves every sequence as long as it was.
    """

    alone = True

    def __init__(
        self,
        network: Network,
        ops: Ops,
        attend: Attention,
        limits: tuple[int, int],
    ) -> None:
        self.network, self.ops, self.attend = network, ops, attend
        self.max_batch, self.max_tokens = limits
        self.lengths: dict[int, int] = {}
        self._steps: dict[int, Step] = {}

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.network.embedding.device

    @property
    def early(self) -> bool:
        """Whether its calls return before the device has done their work."""
        return self.alone and self.device.type == "cuda"

    @property
    def pages(self) -> int:
        """Pages of its cache."""
        return self.attend.shape.pages

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.network.embedding.shape[0]

    def agreed(self, number: float) -> float:
        """A number that a clock decides, as all processes of an engine take it: itself; in `parallel` the first rank's."""
        return number

    # -- the step ---------------------------------------------------------------------------------------------------------

    def _hidden(self, tokens: torch.Tensor, batch: Batch, prompt: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the last layer adds, the residual before) ``[M, hidden]`` of tokens ``[M]``."""
        ops, attend = self.ops, self.attend.prompt if prompt else self.attend.step
        layers, eps = self.network.layers, self.network.eps
        y = residual = self.network.embedding[tokens]
        a = ops.norm(residual, layers[0].input_norm, eps)
        for i, layer in enumerate(layers):
            y = ops.row_linear(attend(i, ops.linear(a, layer.qkv), batch, layer.window), layer.out)
            a, residual = ops.add_norm(y, residual, layer.mlp_norm, eps)
            y = ops.row_linear(ops.silu_mul(ops.linear(a, layer.gate_up)), layer.down)
            if i + 1 < len(layers):
                a, residual = ops.add_norm(y, residual, layers[i + 1].input_norm, eps)
        return y, residual

    def _logits(self, y: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """``[M, V]`` in the engine's dtype: as fp32 they would be written and read once more."""
        network = self.network
        last = self.ops.last_norm(y, residual, network.final_norm, network.eps)
        return nn.functional.linear(last, network.head, network.head_bias)

    # -- prompts ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int] | torch.Tensor]) -> tuple[list[int], torch.Tensor]:
        """Take in prompts of any lengths, all tokens in the same GEMMs: (a sequence for each, logits ``[B, V]`` after each).

        Raises ValueError for an empty prompt, one that is longer than ``max_tokens``, a token outside the vocabulary, more
        prompts than ``max_batch`` has room for; `allocator.PagesExhausted` where the cache is full.
        """
        ids = [self._checked(prompt) for prompt in prompts]
        if not ids or len(self.lengths) + len(ids) > self.max_batch:
            raise ValueError(
                f"prompts: {len(ids)} beside {len(self.lengths)} sequences in work; expected at least 1 and together at "
                f"most max_batch = {self.max_batch}"
            )
        sequences, counts = [self.attend.open() for _ in ids], [len(prompt) for prompt in ids]
        try:
            self.attend.reserve(sequences, counts)
            batch = batch_of(sequences, counts, [0] * len(ids), self.device)
            with sdpa_kernel(ALONE):
                y, residual = self._hidden(sent(torch.cat(ids), self.device), batch, prompt=True)
            last = batch.ends[1:].long() - 1
            logits = self._logits(y[last], residual[last]).float()
            self.attend.advance(batch)
        except BaseException:
            for sequence in sequences:
                self.attend.free(sequence)
            raise
        self.lengths |= dict(zip(sequences, counts, strict=True))
        return sequences, logits

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

        Raises KeyError for a sequence that is not open, ValueError for one named twice or at ``max_tokens``, or for tokens
        that do not fit; `allocator.PagesExhausted` where the cache is full.
        """
        ids = torch.as_tensor(tokens)
        self._check_batch(sequences, ids)
        starts = [self.lengths[sequence] for sequence in sequences]
        self.attend.reserve(sequences, [start + 1 for start in starts])
        batch = batch_of(sequences, [1] * len(starts), starts, self.device)
        ids = sent(ids, self.device).long()
        if self.device.type == "cuda" and self.attend.idle is not None:
            logits = self._captured(len(sequences))(ids, batch)
        else:
            logits = self._logits(*self._hidden(ids, batch, prompt=False))
        logits = logits.to(torch.float32, copy=True)
        self.attend.advance(batch)
        for sequence in sequences:
            self.lengths[sequence] += 1
        return logits

    @torch.no_grad()
    def decode_ahead(
        self,
        sequences: Sequence[int],
        tokens: Sequence[int] | torch.Tensor,
        steps: int,
        samplings: Sequence[Sampling | None] = (),
        nearly: torch.cuda.Event | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``steps`` times `decode` with the token that each sequence's sampling chooses (None, or none given: the
        likeliest), without a wait for the device in between: int64 tokens ``[steps, B]`` and whether a step's logits were
        NaN or infinite, bool ``[steps, B]``, both on the device. ``tokens`` on a GPU are taken as they are, which needs no
        wait either; ``nearly`` is recorded there before the last step.

        Raises as `decode` does, and ValueError where a sequence would exceed ``max_tokens`` or samplings are not one each.
        """
        require_count("steps", steps, 1)
        ids = torch.as_tensor(tokens)
        self._check_batch(sequences, ids)
        if samplings and len(samplings) != len(sequences):
            raise ValueError(f"samplings: expected one for each of {len(sequences)} sequences, got {len(samplings)}")
        starts = [self.lengths[sequence] for sequence in sequences]
        if max(starts) + steps > self.max_tokens:
            raise ValueError(f"steps: {steps} after {max(starts)} tokens exceed max_tokens = {self.max_tokens}")
        self.attend.reserve(sequences, [start + steps for start in starts])
        ids = sent(ids, self.device).long()
        draws = draws_of(samplings, self.vocabulary, self.device)
        found, spoilt = [], []
        captured = self.device.type == "cuda" and self.attend.idle is not None
        batch = first = batch_of(sequences, [1] * len(starts), starts, self.device)
        for left in range(steps, 0, -1):
            if left == 1 and nearly is not None:
                nearly.record(torch.cuda.current_stream(self.device))
            if captured:
                logits = self._captured(len(sequences))(ids, batch)
            else:
                logits = self._logits(*self._hidden(ids, batch, prompt=False))
            ids, bad = choose(logits, draws, batch.positions + 1)
            found.append(ids)
            spoilt.append(bad)
            batch = batch.next()
        both = torch.stack(found), torch.stack(spoilt)
        self.attend.advance(replace(first, counts=[steps] * len(starts)))
        for sequence in sequences:
            self.lengths[sequence] += steps
        return both

    def _captured(self, count: int) -> Step:
        """The captured step for at least ``count`` sequences."""
        size = step_size(count)
        if size not in self._steps:
            assert self.attend.idle is not None
            self._steps[size] = Step(
                lambda ids, batch: self._logits(*self._hidden(ids, batch, prompt=False)), size, self.attend.idle, self.device
            )
        return self._steps[size]

    def _check_batch(self, sequences: Sequence[int], ids: torch.Tensor) -> None:
        if not sequences or ids.shape != (len(sequences),):
            raise ValueError(f"tokens: expected one for each of {len(sequences)} sequences, got shape {list(ids.shape)}")
        looked = not ids.is_cuda and not ids.is_floating_point()
        if ids.is_floating_point() or (looked and (int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary)):
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
            self.attend.free(sequence)
            del self.lengths[sequence]

    # -- generation -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int] | torch.Tensor],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[int] = (),
    ) -> list[list[int]]:
        """Continue prompts of any lengths: the new tokens of each, at most ``max_new_tokens``, up to and with a token of
        ``stop``. Where tokens are drawn, each prompt has the seed after that of the one before it.

        Raises ValueError as `prefill` does, and for a prompt that leaves too little of ``max_tokens``; RuntimeError where
        logits are NaN or infinite.
        """
        require_count("max_new_tokens", max_new_tokens, 1)
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + max_new_tokens - 1 > self.max_tokens:
            raise ValueError(
                f"max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens exceed max_tokens = {self.max_tokens}"
            )
        ways = [replace(sampling, seed=sampling.seed + i) for i in range(len(prompts))]
        sequences, logits = self.prefill(prompts)
        found: list[list[int]] = [[] for _ in sequences]
        running = list(range(len(sequences)))
        try:
            while True:
                draws = draws_of([ways[i] for i in running], self.vocabulary, self.device)
                places = sent([self.lengths[sequences[i]] for i in running], self.device)
                chosen, spoilt = choose(logits, draws, places)
                if bool(spoilt.any()):
                    raise RuntimeError(
                        f"prompts: the model's logits of prompt {running[int(spoilt.long().argmax())]} are not finite"
                    )
                tokens = chosen.tolist()
                for i, token in zip(running, tokens, strict=True):
                    found[i].append(token)
                running = [i for i in running if len(found[i]) < max_new_tokens and found[i][-1] not in stop]
                if not running:
                    return found
                logits = self.decode([sequences[i] for i in running], [found[i][-1] for i in running])
        finally:
            self.free(sequences)
