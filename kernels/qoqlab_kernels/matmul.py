"""The W4A8 GEMM as torch sees it: checks, choice of kernel, workspaces, launch, custom operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qoqlab.checks import require_rows, require_tensor, shape_of
from qoqlab.grids import Zero

from . import elementwise, gemm, launch, ptx, quantize, sums
from .layout import Activations, PackedWeight, blocks
from .plan import Plan, plan_for, rules, version_for

KINDS = {torch.float16: "half", torch.bfloat16: "bfloat", torch.float32: "single", torch.int8: "codes"}


def _run(build: Callable[..., launch.Program], constants: tuple, grid: tuple[int, int, int], arguments: list) -> None:
    """Launch a program on the GPU where its tensors are, or simulate it."""
    if ptx.SIMULATED:
        launch.simulate(build(*constants), grid, arguments)
        return
    device = arguments[0].device.index
    with launch.on(device):
        launch.kernel(build, constants, device)(grid, arguments)


def _require_place(name: str, tensor: torch.Tensor) -> None:
    """Tensors must be where kernels run."""
    if tensor.device.type != ("cpu" if ptx.SIMULATED else "cuda"):
        raise ValueError(
            f"{name}: on {tensor.device}; "
            + ("the CUDA simulator works on CPU tensors" if ptx.SIMULATED else "the kernels need a CUDA tensor")
            + " (qoqlab.reference.w4a8_matmul computes the same anywhere)"
        )


def quantize_activations(
    x: torch.Tensor, x_scales: torch.Tensor | None = None, largest: torch.Tensor | None = None
) -> Activations:
    """Per-token INT8 activations in the order that the GEMM reads, with the sums of codes that its epilogue needs.

    ``x [M, K]`` fp16, bf16 or fp32, or INT8 codes with their ``x_scales`` fp16 [M]; K a multiple of 32. Equals
    `qoqlab.affine.quantize_per_token_s8` bit for bit (paper section 4.1), in one kernel. NaN and infinity are not looked
    for: that would wait for the GPU.

    ``largest`` fp32 [M], for fp16 and bf16: each token's scale is this number over 127, since ``x`` is a slice of longer
    tokens of which it is the largest absolute value. The sums of codes are those of the slice.

    Raises TypeError or ValueError for another dtype, shape or device.
    """
    require_tensor("x", x)
    if x.dtype not in KINDS:
        raise TypeError(f"x: expected fp16, bf16, fp32 or int8, got {x.dtype}")
    if x.ndim != 2 or 0 in x.shape or x.shape[1] % 32:
        raise ValueError(f"x: expected [M, K] with K a multiple of 32, got {shape_of(x)}")
    m, k = x.shape
    if (x.dtype == torch.int8) != (x_scales is not None):
        raise ValueError(f"x_scales: int8 codes need their scales, other dtypes have none; x is {x.dtype}")
    if x_scales is not None:
        _require_scales(x_scales, m, x.device)
    if largest is not None:
        _require_largest(largest, x)
    _require_place("x", x)
    if torch.compiler.is_compiling():
        tiles, tokens = _quantize_operator(x, x_scales, largest)
        return Activations(tiles, tokens, m, k)
    x = _aligned(x)
    units, padded = blocks(k, 128), blocks(m, 8) * 8
    tiles = torch.empty(units, padded, 128, dtype=torch.int8, device=x.device)
    tokens = torch.empty(padded, 2, dtype=torch.int32, device=x.device)
    if x.element_size() == 2:
        capability, processors = ((8, 0), 132) if ptx.SIMULATED else _gpu(x.device.index)[:2]
        threads = elementwise.threads_for(m, k, processors, elementwise.SHORT_QUEUE)
        constants = ("plain", KINDS[x.dtype], k, threads, True, capability >= (9, 0), largest is not None)
        x = x.view(torch.uint16)
        best = x if largest is None else largest.contiguous()
        _run(elementwise.elementwise, constants, (padded, 1, 1), [x, x, best, x, tiles, tokens, m, padded, 0])
        return Activations(tiles, tokens, m, k)
    scales = tiles if x_scales is None else x_scales.contiguous()
    arrays = [x, scales, tiles, tokens]
    if ptx.SIMULATED:  # whose arrays have the dtypes that the kernels declare
        word = torch.float32 if x.dtype == torch.float32 else torch.uint8
        arrays = [x.view(word), scales.view(torch.uint16), tiles.view(torch.uint8), tokens.view(torch.uint32)]
    _run(quantize.quantize, (KINDS[x.dtype],), (padded, 1, 1), [*arrays, m, k, units])
    return Activations(tiles, tokens, m, k)


def _require_scales(scales: torch.Tensor, m: int, device: torch.device) -> None:
    require_tensor("x_scales", scales)
    if scales.dtype != torch.float16 or scales.shape != (m,) or scales.device != device:
        raise ValueError(
            f"x_scales: expected fp16 [{m}] on {device}, one number per token, got {scales.dtype} of shape "
            f"{shape_of(scales)} on {scales.device}"
        )


def _require_largest(largest: torch.Tensor, x: torch.Tensor) -> None:
    require_tensor("largest", largest)
    if x.element_size() != 2:
        raise ValueError(f"largest: only fp16 and bf16 tokens are quantised by a given number; x is {x.dtype}")
    if largest.dtype != torch.float32 or largest.shape != x.shape[:1] or largest.device != x.device:
        raise ValueError(
            f"largest: expected fp32 [{x.shape[0]}] on {x.device}, one number per token, got {largest.dtype} of shape "
            f"{shape_of(largest)} on {largest.device}"
        )


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy where it is not contiguous or not on a 16-byte boundary."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def w4a8_gemm(
    x_codes: torch.Tensor | Activations,
    x_scales: torch.Tensor | None,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """``y = x w^T + bias`` on integer tensor cores: exact int32 accumulation, fp32 epilogue, one rounding to ``dtype``.

    ``x_codes``: int8 ``[M, K]`` with ``x_scales`` fp16 [M], or `Activations` from `quantize_activations` with ``x_scales``
    None, which saves a pass. ``packed``: from `pack_weight`. ``bias`` float [N] (fp32 saves a conversion). ``out``: where
    the result goes, ``[M, N]`` contiguous of ``dtype``. ``dtype``: fp16 or bf16. Returns ``[M, N]``.

    In fp16 the result equals `qoqlab.reference.w4a8_matmul` bit for bit (paper section 5.2). Runs on torch's current stream;
    may be captured in a CUDA graph and used under torch.compile. `plan` explains the choice of kernel.

    Raises TypeError or ValueError naming the argument for wrong dtypes, shapes, devices or layouts of ``out``; RuntimeError
    on GPUs below compute capability 8.0.
    """
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"packed: expected a PackedWeight (see pack_weight), got {type(packed).__name__}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype}")
    if isinstance(x_codes, Activations):
        if x_scales is not None:
            raise ValueError("x_scales: Activations carry their own; pass None")
        x = x_codes
    else:
        require_tensor("x_codes", x_codes)
        if x_codes.dtype != torch.int8 or x_codes.ndim != 2:
            raise TypeError(
                f"x_codes: expected int8 [M, K] or Activations, got {x_codes.dtype} of shape {shape_of(x_codes)}"
            )
        if x_codes.shape[1] != packed.k:
            raise ValueError(f"x_codes: K = {x_codes.shape[1]} does not match the weight's K = {packed.k}")
        x = quantize_activations(x_codes, x_scales)
    if x.k != packed.k:
        raise ValueError(f"x_codes: K = {x.k} does not match the weight's K = {packed.k}")
    if x.device != packed.device:
        raise ValueError(f"packed: on {packed.device}, the activations on {x.device}; use packed.to(...)")
    _require_place("x_codes", x.tiles)
    bias = _checked_bias(bias, packed)
    if out is None:
        if torch.compiler.is_compiling():
            return _operator(x.tiles, x.tokens, x.m, packed.units, packed.rows, packed.n, packed.k, packed.group_size,
                             packed.zero is Zero.SCALED, bias, dtype)  # fmt: skip
        out = torch.empty(x.m, packed.n, dtype=dtype, device=x.device)
    else:
        require_tensor("out", out)
        if out.dtype != dtype or out.shape != (x.m, packed.n) or out.device != x.device:
            raise ValueError(
                f"out: expected {dtype} [{x.m}, {packed.n}] on {x.device}, got {out.dtype} of shape {shape_of(out)} on "
                f"{out.device}"
            )
        if not out.is_contiguous() or out.data_ptr() % 16:
            raise ValueError("out: must be contiguous and start on a 16-byte boundary")
    form = _form(packed, dtype, bias)
    run(plan(x.m, packed, form), form, x, packed, bias, out)
    return out


def w4a8_sums(x: Activations, packed: PackedWeight) -> torch.Tensor:
    """The integers behind `w4a8_gemm`, int32 ``[M, N]``: sums of products, less integer zeros times the sum of codes.

    For a layer whose inputs several GPUs share: their sums added, `scale_sums` gives the result of one GPU, bit for bit.
    ``x``: from `quantize_activations`. Raises TypeError or ValueError as `w4a8_gemm`.
    """
    for name, value, kind in (("x", x, Activations), ("packed", packed, PackedWeight)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    if x.k != packed.k or x.device != packed.device:
        raise ValueError(f"x: K = {x.k} on {x.device} does not match the weight's K = {packed.k} on {packed.device}")
    _require_place("x", x.tiles)
    out = torch.empty(x.m, packed.n, dtype=torch.int32, device=x.device)
    form = replace(_form(packed, torch.float16, None), raw=True)
    run(plan(x.m, packed, form), form, x, packed, None, out)
    return out


def scale_sums(
    total: torch.Tensor,
    x: Activations,
    packed: PackedWeight,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    token_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[M, N]`` of ``dtype`` (fp16 or bf16): the epilogue of `w4a8_gemm` on sums int32 ``[M, N]`` of `w4a8_sums`.

    ``x``, ``packed``: any part of the activations and of the weight, for their scales. ``token_sums`` int32 [M]: sums of all
    codes of every token, for weights with scaled zeros only. Raises TypeError or ValueError naming the argument.
    """
    require_tensor("total", total)
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype}")
    if total.dtype != torch.int32 or total.shape != (x.m, packed.n) or total.device != packed.device:
        raise ValueError(
            f"total: expected int32 [{x.m}, {packed.n}] on {packed.device}, got {total.dtype} of shape {shape_of(total)} on "
            f"{total.device}"
        )
    _require_place("total", total)
    bias = _checked_bias(bias, packed)
    form = _form(packed, dtype, bias)
    if form.scaled != (token_sums is not None):
        raise ValueError("token_sums: weights with scaled zeros need them, others have none")
    if token_sums is not None and (
        token_sums.dtype != torch.int32 or token_sums.shape != (x.m,) or token_sums.device != total.device
    ):
        raise ValueError(
            f"token_sums: expected int32 [{x.m}] on {total.device}, got {token_sums.dtype} of shape {shape_of(token_sums)} "
            f"on {token_sums.device}"
        )
    total, out = _aligned(total), torch.empty(x.m, packed.n, dtype=dtype, device=total.device)
    arrays = [total, x.tokens, x.tokens if token_sums is None else token_sums.contiguous(), packed.rows]
    arrays += [packed.rows if bias is None else _aligned(bias), out.view(torch.uint16)]
    grid = (blocks(packed.n, sums.THREADS * sums.OUTPUTS), blocks(x.m, sums.TOKENS), 1)
    overlap = not ptx.SIMULATED and _gpu(total.device.index)[0] >= (9, 0)
    _run(sums.scale_sums, (form, overlap), grid, [*arrays, x.m, packed.n])
    return out


def _checked_bias(bias: torch.Tensor | None, packed: PackedWeight) -> torch.Tensor | None:
    if bias is None:
        return None
    look_inside = ptx.SIMULATED and not torch.compiler.is_compiling()  # on a GPU that would wait for it
    require_rows("bias", bias) if look_inside else require_tensor("bias", bias)
    if not bias.is_floating_point() or bias.shape != (packed.n,) or bias.device != packed.device:
        raise ValueError(
            f"bias: expected a float [{packed.n}] on {packed.device}, one number per output, got {bias.dtype} of shape "
            f"{shape_of(bias)} on {bias.device}"
        )
    return bias.float().contiguous()


def _form(packed: PackedWeight, dtype: torch.dtype, bias: torch.Tensor | None) -> gemm.Form:
    scaled = packed.group_size == 0 and packed.zero is Zero.SCALED
    return gemm.Form(packed.groups, scaled, dtype == torch.bfloat16, bias is not None)


@functools.cache
def _gpu(index: int) -> tuple[tuple[int, int], int, str]:
    """Compute capability, multiprocessors and kind of a device. Plans are tuned for a kind, not for a product: an H200 is an
    H100 with other memory."""
    properties = torch.cuda.get_device_properties(index)
    capability, processors = (properties.major, properties.minor), properties.multi_processor_count
    return capability, processors, f"{launch.architecture(capability)}x{processors}"


def plan(m: int, packed: PackedWeight, form: gemm.Form | None = None) -> Plan:
    """The `Plan` by which a product with ``m`` tokens runs on the weight's device."""
    form = form or _form(packed, torch.float16, None)
    if ptx.SIMULATED:
        return simulated_plan(m, packed, form)
    capability, processors, name = _gpu(packed.device.index)
    return plan_for(m, packed.n, packed.k, form, capability, processors, name)


def simulated_plan(m: int, packed: PackedWeight, form: gemm.Form) -> Plan:
    """Small sizes for the simulator: three workers, so that tiles are shared."""
    units = blocks(packed.k, 128)
    chosen = rules(version_for((9, 0)), min(m, 64), packed.n, units, form, 3)
    stages = min(3, chosen.stages) if chosen.stages else 0
    return Plan(chosen.version, chosen.tokens, chosen.warpgroups, stages, 1, 3 if chosen.stages else 1)


def run(
    plan: Plan,
    form: gemm.Form,
    x: Activations,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    keep: bool = True,
) -> None:
    """Launch the kernel of a plan; operands are checked already. ``keep``: the workspace is kept for the next launch."""
    row_tiles, token_tiles = plan.tiles(x.m, packed.n)
    units_n, units_k = packed.units.shape[:2]
    if plan.split > units_k:
        raise ValueError(f"plan: {plan.split} blocks cannot split {units_k} units of 128 inputs")
    parts, flags = workspace(plan, x.device, keep)
    arguments = [packed.units, x.tiles, x.tokens, packed.rows, packed.rows if bias is None else bias, out, parts, flags]
    sizes = [x.m, packed.n, units_n, units_k, row_tiles, token_tiles]
    if ptx.SIMULATED:  # whose arrays have the dtypes that the kernels declare
        dtypes = (
            torch.uint8,
            torch.uint8,
            torch.uint32,
            torch.uint32,
            torch.float32,
            torch.uint16,
            torch.uint8,
            torch.uint32,
        )
        arguments = [tensor.view(kind) for tensor, kind in zip(arguments, dtypes, strict=True)]
    _run(gemm.VERSIONS[plan.version], plan.constants(form), plan.grid(x.m, packed.n), [*arguments, *sizes])


@dataclass
class Workspace:
    """Room for partial results that blocks share, and flags or counters, which every launch leaves at zero."""

    capture: int
    parts: torch.Tensor
    counters: torch.Tensor


_workspaces: dict[tuple, Workspace] = {}


def workspace(plan: Plan, device: torch.device, keep: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums and their flags for a launch on the current stream.

    Kernels of a stream follow each other and share theirs. A CUDA graph gets its own, because it may be replayed beside
    other work of the stream on which it was captured; its replay zeroes the flags once.
    """
    if plan.version not in ("v4", "v5") or plan.split > 1:
        nothing = torch.empty(1, dtype=torch.int32, device=device)
        return nothing.view(torch.uint8), nothing
    groups = plan.workers * plan.cluster * plan.warpgroups
    size = groups * 64 * plan.tokens * 4
    return room(size, groups, device) if keep else _new_room(size, groups, device)


def room(size: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """At least ``size`` bytes and ``count`` zeroed counters for a launch on the current stream; see `workspace`."""
    place: tuple = (device,)
    capture = 0
    if device.type == "cuda":
        with launch.on(device.index):
            capture = launch.capture_id()
            place = (device, launch.current_stream(device.index), capture > 0)
    found = _workspaces.get(place)
    if found is None or found.capture != capture or found.parts.numel() < size or found.counters.numel() < count:
        found = _workspaces[place] = Workspace(capture, *_new_room(size, max(count, 4096), device))
    return found.parts, found.counters


def _new_room(size: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    parts = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
    return parts, torch.zeros(count, dtype=torch.int32, device=device)


@torch.library.custom_op("qoqlab::quantize_activations", mutates_args=())
def _quantize_operator(
    x: torch.Tensor, x_scales: torch.Tensor | None, largest: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    made = quantize_activations(x, x_scales, largest)
    return made.tiles, made.tokens


@_quantize_operator.register_fake
def _(x, x_scales, largest=None):  # type: ignore[no-untyped-def]
    units, padded = blocks(x.shape[1], 128), blocks(x.shape[0], 8) * 8
    return x.new_empty((units, padded, 128), dtype=torch.int8), x.new_empty((padded, 2), dtype=torch.int32)


@torch.library.custom_op("qoqlab::w4a8_gemm", mutates_args=())
def _operator(
    tiles: torch.Tensor,
    tokens: torch.Tensor,
    m: int,
    units: torch.Tensor,
    rows: torch.Tensor,
    n: int,
    k: int,
    group_size: int,
    scaled: bool,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    packed = PackedWeight(units, rows, n, k, group_size, Zero.SCALED if scaled else Zero.INTEGER)
    out = torch.empty(m, n, dtype=dtype, device=tiles.device)
    form = _form(packed, dtype, bias)
    # torch.compile's own graphs allow no memory that outlives a call
    run(plan(m, packed, form), form, Activations(tiles, tokens, m, k), packed, bias, out, keep=False)
    return out


@_operator.register_fake
def _(tiles, tokens, m, units, rows, n, k, group_size, scaled, bias, dtype):  # type: ignore[no-untyped-def]
    return tiles.new_empty((m, n), dtype=dtype)
