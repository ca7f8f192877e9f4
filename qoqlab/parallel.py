"""One engine over several GPUs: every rank of a `torch.distributed` group holds a slice of every layer (Megatron's split).

    def work(ranks):                                         # runs in every process
        engine = parallel.compile(q, ranks, max_batch=64)    # as runtime.compile; the same q everywhere
        print(engine.generate([ids], 32))                    # the same call, the same tokens everywhere

    parallel.spawn(work, 2)

Rank r of R holds query and KV heads ``r H/R .. (r + 1) H/R`` with their cache, the same slice of gate and up, and the inputs
of the output and down projections that belong to them. Embedding, norms and head are on every rank. In a layer ranks meet
four times: before each of the two projections for the largest number of every token, so that all quantise their slices with
the scale that one GPU would use (the same INT8 codes; a token's sum of codes is that of the slice, and the zero that it
multiplies leaves the product by linearity); after each for the sum of what they have computed.

That sum is taken of integers, before scales and bias, on the CPU and on the GPU. So a linear gives the numbers of a single
engine, bit for bit, and on the CPU logits do. (Sums of 16-bit results would be half as many bytes, but their rounding puts
INT8 and 4-bit codes behind them elsewhere: 5 % of the bundled model's logits in fp16.) A GPU's attention adds up a long
context in pieces, which depend on how much of it there is to do; there logits may differ by a last bit and what it leads to.

Ranks are not led by one: each runs the same program, and makes the same calls with the same arguments in the same order.
What they decide by, logits, is the same on all of them to the last bit, given cards of one kind; sampling starts from the
same seeds. `serve.server.Server` works likewise, submitting the same requests everywhere; the one thing there that a clock
decides, which requests have arrived, is taken from the first rank.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from . import engine, exact, reference, runtime
from .affine import Affine, quantize, symmetric_scales
from .architecture import Architecture
from .arithmetic import KernelOps, Ops, Projection, ReferenceOps, Weight
from .cached_attention import Attention, HeadNorms, KernelAttention, ReferenceAttention, Shape
from .checks import require_count, require_positive, require_rows
from .engine import Engine, Network
from .grids import Zero
from .kv import KVFormat
from .progressive import ProgressiveWeight
from .sampling import Sampling
from .schemes import WeightFormat

#: Linears of which a rank holds a slice of the inputs; of the others it holds a slice of the outputs.
ROWS = ("o", "down")
#: The kernels multiply this many inputs at a time.
MULTIPLE = 32


class Ranks:
    """The processes that share an engine: ``group`` of `torch.distributed` (None: all), of the backend "nccl" for GPUs and
    "gloo" for the CPU, in which this one has the number ``rank`` of ``size`` and computes on ``device``.

    ``lost``: another rank is, and this object of no more use.

    ``timeout``: seconds that a call may wait for other ranks; on a GPU, seconds that any call of the engine may take, in
    which it may have kernels to compile. There the environment variable TORCH_NCCL_ASYNC_ERROR_HANDLING should be 0, as
    `spawn` sets it: otherwise torch ends the process where this class ends the group and raises.

    Raises RuntimeError where `torch.distributed` is not initialised, ValueError for a group of another backend or that this
    process is not in.
    """

    def __init__(
        self, device: str | torch.device = "cuda", group: dist.ProcessGroup | None = None, timeout: float = 300.0
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("group: torch.distributed is not initialised; see init_process_group, or parallel.spawn")
        require_positive("timeout", timeout)
        self.device, self.timeout = torch.device(device), float(timeout)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        default = dist.group.WORLD
        assert default is not None  # it is initialised
        self.group = group or default
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group: this process is not in it")
        wanted = "nccl" if self.device.type == "cuda" else "gloo"
        self.backend = dist.get_backend(self.group)
        if wanted not in self.backend:
            raise ValueError(f"group: its backend is {self.backend}; an engine on {self.device} needs {wanted}")
        self.lost = False

    def __repr__(self) -> str:
        return f"group {getattr(self.group, 'group_name', '')} ({self.backend}), rank {self.rank} of {self.size}"

    def _loss(self, what: object) -> RuntimeError:
        self.lost = True
        return RuntimeError(f"{self!r}: another rank is lost, or took longer than {self.timeout:g} s: {what}")

    def _meet(self, collective: Callable[..., Any], x: torch.Tensor, **options: Any) -> torch.Tensor:
        """A collective operation on ``x``, in place; what it says of a lost rank as an error that names the group."""
        if self.lost:
            raise self._loss("since an earlier call")
        try:
            if self.device.type == "cuda":  # on the current stream, so that it may be captured; see `waiting`
                collective(x, group=self.group, **options)
            else:
                collective(x, group=self.group, async_op=True, **options).wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise self._loss(error) from error
        return x

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, overwritten with the largest of all ranks' numbers, element by element."""
        return self._meet(dist.all_reduce, x, op=dist.ReduceOp.MAX)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, overwritten with the sum over all ranks."""
        return self._meet(dist.all_reduce, x, op=dist.ReduceOp.SUM)

    def first(self, number: float) -> float:
        """The first rank's number."""
        with self.waiting():
            return float(
                self._meet(dist.broadcast, torch.tensor(number, dtype=torch.float64, device=self.device), group_src=0)
            )

    def require_same(self, **values: object) -> None:
        """Raise ValueError, on all ranks, where they have not passed the same values."""
        digests = {name: hashlib.sha256(repr(value).encode()).digest()[:7] for name, value in values.items()}
        own = torch.tensor([int.from_bytes(digest, "big") for digest in digests.values()], device=self.device)
        with self.waiting():
            most, least = self.largest(own.clone()), -self.largest(-own)
            differing = (most != least).tolist()
        if any(differing):
            named = ", ".join(f"{name}={values[name]!r}" for name, bad in zip(values, differing, strict=True) if bad)
            raise ValueError(f"{self!r}: ranks differ; here {named}")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside waits for a GPU whose kernels wait for other ranks: after ``timeout`` seconds the group is
        ended, which ends its kernels, and RuntimeError raised. (gloo notices by itself.)"""
        if self.device.type != "cuda":
            yield
            return
        ended = threading.Event()

        def end() -> None:
            ended.set()
            self.group.abort()

        timer = threading.Timer(self.timeout, end)
        timer.daemon = True
        timer.start()
        try:
            yield
            torch.cuda.current_stream(self.device).synchronize()
        except RuntimeError as error:
            if ended.is_set():
                raise self._loss(error) from error
            raise
        finally:
            timer.cancel()
        if ended.is_set():
            raise self._loss("the group was ended")


# -- slices ---------------------------------------------------------------------------------------------------------------


def share(name: str, count: int, ranks: int, multiple: int = 1) -> int:
    """``count / ranks``. Raises ValueError where that is no multiple of ``multiple``."""
    if count % (ranks * multiple):
        rule = f"slices of a multiple of {multiple}" if multiple > 1 else "equal slices"
        raise ValueError(f"{name}: {count} cannot be cut into {ranks} {rule}, one for each rank")
    return count // ranks


def outputs(weight: Weight, part: slice) -> Weight:
    """Some outputs of a weight ``[N, K]``: the same codes, scales and zeros."""
    rows = {name: value[part] for name, value in vars(weight).items() if isinstance(value, torch.Tensor)}
    return replace(weight, **rows)  # type: ignore[arg-type]


def inputs(weight: Weight, part: slice) -> Weight:
    """Some inputs of a weight ``[N, K]``, whole groups of them; scales and zeros of outputs are those of the whole."""
    codes = weight.codes[:, part].contiguous()
    if not isinstance(weight, ProgressiveWeight):
        return replace(weight, codes=codes)
    groups = slice(part.start // weight.group_size, part.stop // weight.group_size)
    return replace(
        weight, codes=codes, group_scales=weight.group_scales[:, groups], group_zeros=weight.group_zeros[:, groups]
    )


@dataclass(frozen=True)
class Slice:
    """What rank ``rank`` of ``size`` holds."""

    rank: int
    size: int

    def of(self, count: int) -> slice:
        """Its part of ``count`` things in order."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def cut(self, role: str, weight: Weight, bias: torch.Tensor | None) -> tuple[Weight, torch.Tensor | None]:
        """Its part of a linear. The bias of a linear that is cut along its inputs stays whole."""
        n, k = weight.shape
        if role in ROWS:
            return inputs(weight, self.of(k)), bias
        return outputs(weight, self.of(n)), None if bias is None else bias[self.of(n)]

    def shape(self, whole: Shape) -> Shape:
        """Sizes of its attention and cache."""
        return replace(whole, heads=whole.heads // self.size, kv_heads=whole.kv_heads // self.size)


def require_slices(architecture: Architecture, size: int) -> None:
    """Raise ValueError, naming the layer, where a model cannot be cut for ``size`` ranks: heads, and inputs in whole groups
    and multiples of `MULTIPLE`."""
    for block in architecture.blocks:
        share(f"{block.name('k')}: KV heads", block.kv_heads, size)  # which divide the query heads
        for role in ROWS:
            linear: Any = block.linear(role)
            form: WeightFormat = linear.form
            multiple = math.lcm(MULTIPLE, form.group_size if form.kind.grouped else 1)
            share(f"{block.name(role)}: K", linear.in_features, size, multiple)


# -- operations -----------------------------------------------------------------------------------------------------------


class SlicedReferenceOps(ReferenceOps):
    """`ReferenceOps` on a rank's slices. What ranks add up are integers, so the result is that of the whole."""

    def __init__(self, dtype: torch.dtype, ranks: Ranks) -> None:
        super().__init__(dtype)
        self.ranks = ranks

    def silu_mul(self, gate_up: torch.Tensor) -> Affine:
        """See `Ops`."""
        return quantize_slice(exact.silu_mul(gate_up), self.ranks)

    def row_linear(self, a: Affine, projection: Projection) -> torch.Tensor:
        """See `Ops`."""
        sums = a.codes.sum(-1, keepdim=True, dtype=torch.int64)
        both = self.ranks.total(torch.cat([reference.w4a8_accumulate(a.codes, projection.weight), sums], 1))
        y = reference.w4a8_epilogue(both[:, :-1], a.scales, both[:, -1], projection.weight, projection.bias)
        return y.to(self.dtype)


class SlicedReferenceAttention(ReferenceAttention):
    """`ReferenceAttention` of a rank's heads."""

    def __init__(
        self,
        shape: Shape,
        form: KVFormat | None,
        rotary: tuple[torch.Tensor, torch.Tensor],
        norms: Sequence[HeadNorms],
        ops: SlicedReferenceOps,
    ) -> None:
        super().__init__(shape, form, rotary, norms, ops.dtype)
        self.ranks = ops.ranks

    def quantize(self, x: torch.Tensor) -> Affine:
        """See `ReferenceAttention`."""
        return quantize_slice(x, self.ranks)


def quantize_slice(x: torch.Tensor, ranks: Ranks) -> Affine:
    """INT8 per token of a rank's slice ``x [M, K / R]``, with the scale of the whole token.

    Raises ValueError on all ranks where one has NaN or infinity: if that one did so alone, the others would wait for it.
    """
    worst = x.float().abs().amax(-1).nan_to_num(torch.inf, torch.inf)  # a maximum over ranks may forget NaN
    largest = ranks.largest(worst)[:, None]
    require_rows("x", x)
    require_rows("x of another rank", largest)
    return quantize(x, symmetric_scales(largest))


class SlicedKernelOps(KernelOps):
    """`KernelOps` on a rank's slices. What ranks add up are integers, so the result is that of the whole."""

    def __init__(self, kernels: Any, dtype: torch.dtype, ranks: Ranks) -> None:
        super().__init__(kernels, dtype)
        self.ranks = ranks

    def silu_mul(self, gate_up: torch.Tensor) -> Any:
        """See `Ops`."""
        x, largest = self.kernels.silu_mul(gate_up)
        return self.kernels.quantize_activations(x, largest=self.ranks.largest(largest))

    def row_linear(self, a: Any, projection: Projection) -> torch.Tensor:
        """See `Ops`."""
        weight = projection.weight
        total = self.ranks.total(self.kernels.w4a8_sums(a, weight))
        scaled = not weight.group_size and weight.zero is Zero.SCALED
        token_sums = self.ranks.total(a.sums.clone()) if scaled else None
        return self.kernels.scale_sums(total, a, weight, projection.bias, self.dtype, token_sums)


class SlicedKernelAttention(KernelAttention):
    """`KernelAttention` of a rank's heads."""

    def __init__(
        self,
        kernels: Any,
        shape: Shape,
        rotary: tuple[torch.Tensor, torch.Tensor],
        norms: Sequence[HeadNorms],
        ranks: Ranks,
    ) -> None:
        super().__init__(kernels, shape, rotary, norms)
        self.ranks = ranks

    def quantize(self, x: torch.Tensor) -> Any:
        """See `KernelAttention`."""
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, dtype=torch.float32)
        return self.kernels.quantize_activations(x, largest=self.ranks.largest(largest))

    def join(
        self, seen: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Any:
        """See `KernelAttention`."""
        x, largest = self.kernels.attend_own(seen, lse, query, key, value)
        return self.kernels.quantize_activations(x, largest=self.ranks.largest(largest))


# -- the engine -----------------------------------------------------------------------------------------------------------


class ParallelEngine(Engine):
    """An `Engine` of which this process is one of several ``ranks``; all make the same calls in the same order.

    Its calls raise RuntimeError naming the group where another rank is lost; the engine is of no use after that.
    """

    alone = False

    def __init__(self, network: Network, ops: Ops, attend: Attention, limits: tuple[int, int], ranks: Ranks) -> None:
        super().__init__(network, ops, attend, limits)
        self.ranks = ranks

    def agreed(self, number: float) -> float:
        """See `Engine`."""
        return self.ranks.first(number)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A call of all ranks. If one is lost, captured steps are given up: NCCL waits for them before it ends."""
        try:
            with self.ranks.waiting():
                yield
        except RuntimeError:
            if self.ranks.lost:
                self._steps.clear()
            raise

    def prefill(self, prompts: Sequence[Sequence[int] | torch.Tensor]) -> tuple[list[int], torch.Tensor]:
        """See `Engine`."""
        with self._together():
            return super().prefill(prompts)

    def decode(self, sequences: Sequence[int], tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """See `Engine`."""
        with self._together():
            return super().decode(sequences, tokens)

    def decode_ahead(
        self,
        sequences: Sequence[int],
        tokens: Sequence[int] | torch.Tensor,
        steps: int,
        samplings: Sequence[Sampling | None] = (),
        nearly: torch.cuda.Event | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Engine`."""
        with self._together():
            return super().decode_ahead(sequences, tokens, steps, samplings, nearly)


@torch.no_grad()
def compile(
    q: Any,
    ranks: Ranks,
    max_batch: int = 64,
    max_tokens: int = 2048,
    dtype: torch.dtype | None = None,
    pages: int | None = None,
) -> ParallelEngine:
    """This rank's part of an engine for a quantised model; all ranks call it, with the same model and arguments.

    On the kernels where ``ranks.device`` is a GPU, on `reference` on the CPU; other arguments as in `runtime.compile`, pages
    being those of every rank. A model of which only a rank's slice fits into a GPU is quantised and passed on the CPU.

    Raises what `runtime.compile` raises; ValueError naming the layer whose KV heads or inputs cannot be cut for so many
    ranks, and where ranks differ in arguments, in the model's sizes or in their GPUs.
    """
    made = runtime.prepare(q, ranks.device, max_batch, max_tokens, dtype, pages)
    require_slices(made.architecture, ranks.size)
    gpu = "" if made.kernels is None else torch.cuda.get_device_name(made.place)
    ranks.require_same(model=str(made.architecture.model), shape=made.shape, dtype=made.dtype, form=made.form, gpu=gpu)
    part = Slice(ranks.rank, ranks.size)
    shape = part.shape(made.shape)
    ops: Ops
    attend: Attention
    if made.kernels is None:
        ops = SlicedReferenceOps(made.dtype, ranks)
        attend = SlicedReferenceAttention(shape, made.form, made.rotary(), made.norms(), ops)
        network = engine.network_of(made.architecture, ops, made.place, part.cut)
        return ParallelEngine(network, ops, attend, made.limits, ranks)
    with torch.cuda.device(made.place):
        ops = SlicedKernelOps(made.kernels, made.dtype, ranks)
        attend = SlicedKernelAttention(made.kernels, shape, made.rotary(), made.norms(), ranks)
        network = engine.network_of(made.architecture, ops, made.place, part.cut)
        return ParallelEngine(network, ops, attend, made.limits, ranks)


# -- processes ------------------------------------------------------------------------------------------------------------


def spawn(
    work: Callable[..., None],
    ranks: int,
    arguments: Sequence[Any] = (),
    device: str = "cuda",
    timeout: float = 300.0,
    fork: bool = False,
) -> None:
    """Run ``work(ranks, *arguments)`` in so many new processes of this machine, with a `Ranks` each: on GPUs 0 to
    ``ranks - 1`` or, where ``device`` is "cpu", all on the CPU. ``work`` is a function of a module, and waits for nothing
    but the others. ``fork``: copies of this process, on the CPU only, which save themselves all imports; they compute with
    one thread each, since this one's are not copied.

    Raises ValueError where there are fewer GPUs; `torch.multiprocessing.ProcessRaisedException` with the trace of the first
    process that failed, or `torch.multiprocessing.ProcessExitedException`, after ending the others.
    """
    require_count("ranks", ranks, 1)
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device: expected cuda or cpu, got {device!r}")
    if fork and device != "cpu":
        raise ValueError("fork: CUDA does not work in a copied process; leave it out")
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise ValueError(f"ranks: {ranks} on {torch.cuda.device_count()} GPUs; each needs its own")
    with tempfile.TemporaryDirectory() as folder:
        start = (work, ranks, str(Path(folder) / "store"), tuple(arguments), device, timeout, fork)
        multiprocessing.start_processes(_rank, start, ranks, start_method="fork" if fork else "spawn")


def _rank(
    number: int,
    work: Callable[..., None],
    ranks: int,
    store: str,
    arguments: tuple,
    device: str,
    timeout: float,
    fork: bool,
) -> None:
    """A process of `spawn`."""
    if fork:
        torch.set_num_threads(1)
    on_gpu = device == "cuda"
    place = torch.device("cuda", number) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # `Ranks.waiting` does that, and raises
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.FileStore(store, ranks),  # by an address, torch would wait for ever where the path has a space
        rank=number,
        world_size=ranks,
        timeout=timedelta(seconds=2 * timeout),  # `Ranks` is to be first
        device_id=place if on_gpu else None,
    )
    try:
        work(Ranks(place, timeout=timeout), *arguments)
    except BaseException:
        if not on_gpu:  # NCCL would wait for the others
            dist.destroy_process_group()
        raise
    gc.collect()  # captured steps, for which NCCL would wait
    dist.destroy_process_group()
