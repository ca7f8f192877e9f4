"""PTX instructions as functions of a numba kernel, each declared once.

numba reaches the instructions that it has no name for through inline assembly. Under the CUDA simulator
(``NUMBA_ENABLE_CUDASIM=1``) every name of this module is its Python emulation in `emulation` instead, so a kernel's own
source runs on a laptop.

Shared memory is addressed by 32-bit offsets (`shared_base`), global memory by 64-bit addresses (`address`). Accumulators
travel as tuples of registers. Never index such a tuple with a run-time value: numba lowers that to a tree of branches
(`each_quad` and `map_quads` unroll with constants instead).

Semantics: PTX ISA, sections "mma", "wgmma", "mbarrier", "cp.async.bulk", "griddepcontrol", "setmaxnreg".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import config, cuda, types

SIMULATED = bool(config.ENABLE_CUDASIM)
if SIMULATED:
    from . import emulation
else:
    from numba.cuda.extending import intrinsic

u8, u32, i32, u64, f32 = types.uint8, types.uint32, types.int32, types.uint64, types.float32

#: numba type -> (LLVM type, constraint letter of inline assembly)
REGISTERS = {
    u32: (ir.IntType(32), "r"),
    i32: (ir.IntType(32), "r"),
    u64: (ir.IntType(64), "l"),
    f32: (ir.FloatType(), "f"),
}


def device(function: Callable) -> Callable:
    """A function to call from kernels, always inlined; the plain function under the simulator."""
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def _declare(takes: int, typing: Callable) -> Callable:
    """An intrinsic of ``takes`` arguments (numba reads the number off the signature)."""
    names = "".join(f", a{k}" for k in range(takes))
    scope: dict[str, Any] = {"typing": typing}
    exec(f"def declared(typingctx{names}):\n    return typing(({names[2:]}{',' if takes else ''}))", scope)
    return intrinsic(scope["declared"])


def _emit(builder: Any, template: str, returns: list, operands: list, tied: int = 0, pure: bool = False) -> Any:
    """Inline assembly: outputs ``returns`` (numba types), ``operands`` as (type, value); the first ``tied`` share registers
    with the outputs. Returns the LLVM values of the outputs."""
    outputs = [REGISTERS[t][0] for t in returns]
    result = ir.VoidType() if not outputs else outputs[0] if len(outputs) == 1 else ir.LiteralStructType(outputs)
    inputs = [str(k) if k < tied else REGISTERS[t][1] for k, (t, _) in enumerate(operands)]
    constraints = ["=" + REGISTERS[t][1] for t in returns] + inputs + ([] if pure else ["~{memory}"])
    shape = ir.FunctionType(result, [REGISTERS[t][0] for t, _ in operands])
    # convergent: the threads of a warp meet here, so the compiler must neither duplicate the call nor move it into a branch
    value = builder.call(
        ir.InlineAsm(shape, template, ",".join(constraints), side_effect=not pure),
        [v for _, v in operands],
        attrs=() if pure else ("convergent",),
    )
    return [value] if len(outputs) == 1 else [builder.extract_value(value, k) for k in range(len(outputs))]


def instruction(name: str, template: str, returns: tuple = (), takes: tuple = (), pure: bool = False) -> Callable:
    """Declare an instruction. ``template``: PTX with $0.. for the outputs, then the inputs. ``pure``: no side effect, so
    the compiler may move or merge it. Several outputs come back as a tuple."""
    if SIMULATED:
        return getattr(emulation, name)
    result = types.void if not returns else returns[0] if len(returns) == 1 else types.Tuple(returns)

    def typing(_: tuple) -> tuple:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            out = _emit(builder, template, list(returns), list(zip(takes, values, strict=True)), pure=pure)
            if not out:
                return context.get_dummy_value()
            return out[0] if len(out) == 1 else context.make_tuple(builder, signature.return_type, out)

        return result(*takes), codegen

    return _declare(len(takes), typing)


# -- addresses and plain memory -------------------------------------------------------------------------------------------

if SIMULATED:
    address, shared_base = emulation.address, emulation.shared_base
else:

    @intrinsic
    def address(typingctx: Any, array: Any) -> Any:
        """Global (or generic) address of an array's first element, as uint64."""

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, values[0]).data
            return builder.ptrtoint(data, ir.IntType(64))

        return u64(array), codegen

    _to_shared = instruction("_to_shared", "cvta.to.shared.u64 $0, $1;", (u64,), (u64,), pure=True)

    @device
    def shared_base() -> Any:
        """32-bit address of the block's dynamic shared memory."""
        return u32(_to_shared(address(cuda.shared.array(0, u8))))


lds1 = instruction("lds1", "ld.shared.u32 $0, [$1];", (u32,), (u32,))
lds2 = instruction("lds2", "ld.shared.v2.u32 {$0, $1}, [$2];", (u32,) * 2, (u32,))
lds4 = instruction("lds4", "ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];", (u32,) * 4, (u32,))
sts1 = instruction("sts1", "st.shared.u32 [$0], $1;", (), (u32, u32))
ldg1 = instruction("ldg1", "ld.global.nc.u32 $0, [$1];", (u32,), (u64,))
ldg4 = instruction("ldg4", "ld.global.v4.u32 {$0, $1, $2, $3}, [$4];", (u32,) * 4, (u64,))
#: from L2, so also what another multiprocessor wrote while this kernel waited
ldr1 = instruction("ldr1", "ld.relaxed.gpu.global.u32 $0, [$1];", (u32,), (u64,))
st_byte = instruction("st_byte", "st.global.u8 [$0], $1;", (), (u64, u32))
prefetch = instruction("prefetch", "prefetch.global.L2 [$0];", (), (u64,))
stg2 = instruction("stg2", "st.global.v2.u32 [$0], {$1, $2};", (), (u64, u32, u32))
stg4 = instruction("stg4", "st.global.v4.u32 [$0], {$1, $2, $3, $4};", (), (u64, u32, u32, u32, u32))
#: a flag: set after everything that its thread did or saw before; wait until it is not 0, and see what was before it
store_release = instruction("store_release", "st.release.gpu.global.u32 [$0], $1;", (), (u64, u32))
wait_until_set = instruction(
    "wait_until_set",
    "{ .reg .pred set; .reg .u32 flag;\nAGAIN_${:uid}:\nld.acquire.gpu.global.u32 flag, [$0];\n"
    "setp.ne.u32 set, flag, 0;\n@!set bra AGAIN_${:uid}; }",
    (),
    (u64,),
)
atomic_inc = instruction("atomic_inc", "atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;", (u32,), (u64,))
stg1 = instruction("stg1", "st.global.u32 [$0], $1;", (), (u64, u32))

# -- arithmetic -----------------------------------------------------------------------------------------------------------

#: permute(a, b, selector): byte i of the result is byte selector[4i..4i+2] of the eight bytes b:a
permute = instruction("permute", "prmt.b32 $0, $1, $2, $3;", (u32,), (u32, u32, u32), pure=True)
#: numba divides in 64 bits, a hundred instructions
quotient = instruction("quotient", "div.u32 $0, $1, $2;", (u32,), (u32, u32), pure=True)
modulo = instruction("modulo", "rem.u32 $0, $1, $2;", (u32,), (u32, u32), pure=True)
#: product rounded once: numba may not contract it with an addition
multiply = instruction("multiply", "mul.rn.f32 $0, $1, $2;", (f32,), (f32, f32), pure=True)
add = instruction("add", "add.rn.f32 $0, $1, $2;", (f32,), (f32, f32), pure=True)
subtract = instruction("subtract", "sub.rn.f32 $0, $1, $2;", (f32,), (f32, f32), pure=True)
as_float = instruction("as_float", "mov.b32 $0, $1;", (f32,), (u32,), pure=True)
#: int32 -> fp32, rounded to nearest (numba's own conversion goes through 64 bits)
to_float = instruction("to_float", "cvt.rn.f32.s32 $0, $1;", (f32,), (i32,), pure=True)
pack_half = instruction("pack_half", "cvt.rn.f16x2.f32 $0, $2, $1;", (u32,), (f32, f32), pure=True)
pack_bfloat = instruction("pack_bfloat", "cvt.rn.bf16x2.f32 $0, $2, $1;", (u32,), (f32, f32), pure=True)
#: fp16 or bf16 pair -> two fp32
unpack_half = instruction(
    "unpack_half",
    "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
    (f32, f32),
    (u32,),
    pure=True,
)
unpack_bfloat = instruction(
    "unpack_bfloat", "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", (f32, f32), (u32,), pure=True
)
#: fp16 in the low half of a word -> fp32
widen_half = instruction("widen_half", "{ .reg .b16 l; cvt.u16.u32 l, $1; cvt.f32.f16 $0, l; }", (f32,), (u32,), pure=True)
#: fp32 -> the nearest fp16, as fp32
round_half = instruction(
    "round_half", "{ .reg .b16 l; cvt.rn.f16.f32 l, $1; cvt.f32.f16 $0, l; }", (f32,), (f32,), pure=True
)
#: pairs of fp16 or bf16: every product and sum rounded once (a bf16 product is an fma with -0, which changes nothing)
multiply_halves = instruction("multiply_halves", "mul.rn.f16x2 $0, $1, $2;", (u32,), (u32, u32), pure=True)
add_halves = instruction("add_halves", "add.rn.f16x2 $0, $1, $2;", (u32,), (u32, u32), pure=True)
multiply_bfloats = instruction(
    "multiply_bfloats",
    "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
    (u32,),
    (u32, u32),
    pure=True,
)
add_bfloats = instruction(
    "add_bfloats",
    "{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2; }",
    (u32,),
    (u32, u32),
    pure=True,
)
#: the larger absolute values of two pairs
largest_halves = instruction(
    "largest_halves",
    "{ .reg .b32 a, b; abs.f16x2 a, $1; abs.f16x2 b, $2; max.f16x2 $0, a, b; }",
    (u32,),
    (u32, u32),
    pure=True,
)
largest_bfloats = instruction(
    "largest_bfloats",
    "{ .reg .b32 a, b; abs.bf16x2 a, $1; abs.bf16x2 b, $2; max.bf16x2 $0, a, b; }",
    (u32,),
    (u32, u32),
    pure=True,
)
root = instruction("root", "sqrt.rn.f32 $0, $1;", (f32,), (f32,), pure=True)
reciprocal = instruction("reciprocal", "rcp.rn.f32 $0, $1;", (f32,), (f32,), pure=True)
minimum = instruction("minimum", "min.f32 $0, $1, $2;", (f32,), (f32, f32), pure=True)
divide = instruction("divide", "div.rn.f32 $0, $1, $2;", (f32,), (f32, f32), pure=True)
absolute = instruction("absolute", "abs.f32 $0, $1;", (f32,), (f32,), pure=True)
maximum = instruction("maximum", "max.f32 $0, $1, $2;", (f32,), (f32, f32), pure=True)
as_int = instruction("as_int", "mov.b32 $0, $1;", (i32,), (f32,), pure=True)
#: fp32 -> nearest integer (ties to even) in -127..127, as an unsigned byte
round_to_byte = instruction(
    "round_to_byte",
    "{ .reg .s32 v; cvt.rni.s32.f32 v, $1; min.s32 v, v, 127; max.s32 v, v, -127; and.b32 $0, v, 255; }",
    (u32,),
    (f32,),
    pure=True,
)
#: 2**x, off by at most 2 units in the last place; results below 2**-126 are 0
exp2 = instruction("exp2", "ex2.approx.ftz.f32 $0, $1;", (f32,), (f32,), pure=True)
#: log2(x), off by at most 2**-22 (of itself outside of 0.5..2)
log2 = instruction("log2", "lg2.approx.ftz.f32 $0, $1;", (f32,), (f32,), pure=True)
#: a * b + c, rounded once
fuse = instruction("fuse", "fma.rn.f32 $0, $1, $2, $3;", (f32,), (f32, f32, f32), pure=True)
#: a - b and a * b + c on fp16 pairs
subtract_pair = instruction("subtract_pair", "sub.rn.f16x2 $0, $1, $2;", (u32,), (u32, u32), pure=True)
fuse_pair = instruction("fuse_pair", "fma.rn.f16x2 $0, $1, $2, $3;", (u32,), (u32, u32, u32), pure=True)
#: four products of unsigned weight bytes and signed activation bytes, added to an int32
dp4a = instruction("dp4a", "dp4a.u32.s32 $0, $1, $2, $3;", (i32,), (u32, u32, i32), pure=True)

#: the value of the lane whose number differs in the bits of the mask
shuffle_xor = instruction("shuffle_xor", "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", (i32,), (i32, u32))

#: the largest word, the sum of the integers of all 32 lanes
largest_of_warp = instruction("largest_of_warp", "redux.sync.max.u32 $0, $1, 0xffffffff;", (u32,), (u32,))
sum_of_warp = instruction("sum_of_warp", "redux.sync.add.s32 $0, $1, 0xffffffff;", (i32,), (i32,))
#: the value of the lane that many below; the lowest lanes get their own
shuffle_up = instruction("shuffle_up", "shfl.sync.up.b32 $0, $1, $2, 0, 0xffffffff;", (i32,), (i32, u32))
#: the lanes of a warp meet and see each other's memory
warp_barrier = instruction("warp_barrier", "bar.warp.sync 0xffffffff;")

# -- barriers and bulk copies (sm_90) -------------------------------------------------------------------------------------

barrier_init = instruction("barrier_init", "mbarrier.init.shared::cta.b64 [$0], $1;", (), (u32, u32))
barrier_expect = instruction("barrier_expect", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", (), (u32, u32))
barrier_arrive = instruction("barrier_arrive", "mbarrier.arrive.shared::cta.b64 _, [$0];", (), (u32,))
#: arrive at the barrier of the same offset in another block of the cluster: (address, block's rank)
barrier_arrive_at = instruction(
    "barrier_arrive_at",
    "{ .reg .u32 remote; mapa.shared::cluster.u32 remote, $0, $1; mbarrier.arrive.shared::cluster.b64 _, [remote]; }",
    (),
    (u32, u32),
)
#: wait until the phase of the given parity has completed
barrier_wait = instruction(
    "barrier_wait",
    "{ .reg .pred done;\nAGAIN_${:uid}:\nmbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;\n"
    "@done bra OVER_${:uid};\nbra AGAIN_${:uid};\nOVER_${:uid}: }",
    (),
    (u32, u32),
)
#: the same for a barrier at which other blocks of the cluster arrive
barrier_wait_cluster = instruction(
    "barrier_wait_cluster",
    "{ .reg .pred done;\nAGAIN_${:uid}:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [$0], $1;\n"
    "@done bra OVER_${:uid};\nbra AGAIN_${:uid};\nOVER_${:uid}: }",
    (),
    (u32, u32),
)
barrier_fence = instruction("barrier_fence", "fence.mbarrier_init.release.cluster;")
#: (shared destination, global source, bytes, barrier to which the bytes are reported)
bulk_load = instruction(
    "bulk_load",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    (),
    (u32, u64, u32, u32),
)
#: the same into every block of the cluster that the bit mask names
bulk_load_multicast = instruction(
    "bulk_load_multicast",
    "{ .reg .b16 mask; cvt.u16.u32 mask, $4; "
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [$0], [$1], $2, [$3], mask; }",
    (),
    (u32, u64, u32, u32, u32),
)
cluster_sync = instruction("cluster_sync", "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;")
#: the two halves of the barrier, for threads that need not wait
cluster_arrive = instruction("cluster_arrive", "barrier.cluster.arrive;")
cluster_wait = instruction("cluster_wait", "barrier.cluster.wait;")
#: where an address of shared memory lies in another block of the cluster: (address, block's rank), and a store there
map_shared = instruction("map_shared", "mapa.shared::cluster.u32 $0, $1, $2;", (u32,), (u32, u32), pure=True)
sts4_remote = instruction("sts4_remote", "st.shared::cluster.v4.u32 [$0], {$1, $2, $3, $4};", (), (u32, u32, u32, u32, u32))
cluster_rank = instruction("cluster_rank", "mov.u32 $0, %cluster_ctarank;", (u32,), pure=True)
cluster_index = instruction("cluster_index", "mov.u32 $0, %clusterid.x;", (u32,), pure=True)
cluster_count = instruction("cluster_count", "mov.u32 $0, %nclusterid.x;", (u32,), pure=True)
#: barrier of `threads` threads with one of 16 numbers: (number, threads)
named_barrier = instruction("named_barrier", "bar.sync $0, $1;", (), (u32, u32))
#: programmatic dependent launch: let the next kernel of the stream start; wait until the previous one is complete
allow_next_kernel = instruction("allow_next_kernel", "griddepcontrol.launch_dependents;")
wait_for_previous_kernel = instruction("wait_for_previous_kernel", "griddepcontrol.wait;")


def limit_registers(count: int) -> Callable:
    """setmaxnreg for a warpgroup that needs few registers: give the rest back."""
    if SIMULATED:
        return emulation.nothing
    return instruction("limit_registers", f"setmaxnreg.dec.sync.aligned.u32 {count};")


def claim_registers(count: int) -> Callable:
    """setmaxnreg for a warpgroup that needs many."""
    if SIMULATED:
        return emulation.nothing
    return instruction("claim_registers", f"setmaxnreg.inc.sync.aligned.u32 {count};")


# -- asynchronous copies and tensor cores of sm_80 ------------------------------------------------------------------------

#: 16 bytes from global to shared memory, past the registers and L1: (destination, source)
copy_async = instruction("copy_async", "cp.async.cg.shared.global.L2::128B [$0], [$1], 16;", (), (u32, u64))
copy_commit = instruction("copy_commit", "cp.async.commit_group;")


def copy_wait(pending: int) -> Callable:
    """Wait until at most ``pending`` committed groups of copies are unfinished."""
    if SIMULATED:
        return emulation.nothing
    return instruction("copy_wait", f"cp.async.wait_group {pending};")


#: four 8x16-byte matrices, row addresses from lanes 8 i + r: the activations' operand of two k32 steps
load_matrices = instruction(
    "load_matrices", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", (u32,) * 4, (u32,)
)
#: m16n8k32: (acc0..3, a0..3 unsigned bytes, b0, b1 signed bytes) -> acc0..3
mma = instruction(
    "mma",
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};",
    (i32,) * 4,
    (i32,) * 4 + (u32,) * 6,
)
#: m16n8k16 on fp16: (acc0..3, a0..3, b0, b1) -> acc0..3 in fp32
mma_half = instruction(
    "mma_half",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};",
    (f32,) * 4,
    (f32,) * 4 + (u32,) * 6,
    pure=True,
)
#: 8x8 matrix of 16-bit numbers, a row in four lanes' registers -> transposed
transpose8 = instruction("transpose8", "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", (u32,), (u32,))
#: two 8x8 matrices of 16-bit numbers, stored transposed: (row address, first matrix, second matrix); lanes 0-15 give the
#: addresses
store_transposed = instruction(
    "store_transposed", "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [$0], {$1, $2};", (), (u32, u32, u32)
)

# -- tensor cores of sm_90a -----------------------------------------------------------------------------------------------


def zeros(count: int) -> Callable:
    """A function that returns a tuple of ``count`` int32 zeros."""
    if SIMULATED:
        return lambda: (i32(0),) * count
    kind = types.UniTuple(i32, count)

    def typing(_: tuple) -> tuple:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return context.make_tuple(builder, signature.return_type, [ir.Constant(ir.IntType(32), 0)] * count)

        return kind(), codegen

    return _declare(0, typing)


def wgmma(tokens: int) -> Callable:
    """``start(accumulators, a, descriptor)``: issue four wgmma m64 x ``tokens`` x k32 in a row and return at once.

    ``a``: 16 registers of unsigned bytes, four for each k32 step; ``descriptor``: of the signed activations in 128-byte
    swizzled shared memory. Neither may be touched before `wgmma_wait`.
    """
    if SIMULATED:
        return emulation.wgmma(tokens)
    count = tokens // 2
    kind, operand = types.UniTuple(i32, count), types.UniTuple(u32, 16)
    d = "{" + ", ".join(f"${k}" for k in range(count)) + "}"
    a = 2 * count  # number of the first A register
    lines = ["{ .reg .b64 step<4>;"]
    lines += [f"add.s64 step{s}, ${a + 16}, {2 * s};" for s in range(4)]  # 32 bytes further, in units of 16
    lines += ["wgmma.fence.sync.aligned;"]
    for s in range(4):
        registers = ", ".join(f"${a + 4 * s + j}" for j in range(4))
        lines += [f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.u8.s8 {d}, {{{registers}}}, step{s}, 1;"]
    template = "\n".join([*lines, "wgmma.commit_group.sync.aligned; }"])

    def typing(_: tuple) -> tuple:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            operands = [(i32, builder.extract_value(values[0], k)) for k in range(count)]
            operands += [(u32, builder.extract_value(values[1], k)) for k in range(16)] + [(u64, values[2])]
            out = _emit(builder, template, [i32] * count, operands, tied=count)
            return context.make_tuple(builder, signature.return_type, out)

        return kind(kind, operand, u64), codegen

    return _declare(3, typing)


def wgmma_wait(tokens: int, pending: int = 0) -> Callable:
    """``wait(accumulators)`` -> accumulators, once at most ``pending`` groups of wgmma of this warp are unfinished."""
    if SIMULATED:
        return emulation.wgmma_wait
    count = tokens // 2
    kind = types.UniTuple(i32, count)

    def typing(_: tuple) -> tuple:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            operands = [(i32, builder.extract_value(values[0], k)) for k in range(count)]
            out = _emit(builder, f"wgmma.wait_group.sync.aligned {pending};", [i32] * count, operands, tied=count)
            return context.make_tuple(builder, signature.return_type, out)

        return kind(kind), codegen

    return _declare(1, typing)


# -- tuples of accumulators -----------------------------------------------------------------------------------------------


def _unrolled(quads: int, body: str, result: str, more: str = "", **scope: Callable) -> Callable:
    def quad(name: str, j: int) -> str:
        return ", ".join(f"{name}[{4 * j + k}]" for k in range(4))

    calls = "".join(f"    {body.format(j=j, q=quad('acc', j), p=quad('other', j))}\n" for j in range(quads))
    names: dict[str, Any] = dict(scope)
    exec(f"def unrolled(acc, {more}*rest):\n{calls}    return {result}\n", names)
    return device(names["unrolled"])


def _all_results(quads: int) -> str:
    return "(" + ", ".join(f"r{j}[{k}]" for j in range(quads) for k in range(4)) + ")"


def each_quad(step: Callable, quads: int) -> Callable:
    """``f(acc, *rest)``: call ``step(j, acc[4j], acc[4j+1], acc[4j+2], acc[4j+3], *rest)`` for every j, written out."""
    return _unrolled(quads, "step({j}, {q}, *rest)", "None", step=step)


def map_quads(step: Callable, quads: int) -> Callable:
    """``f(acc, *rest)`` -> tuple of the four results of ``step(j, acc[4j], .., *rest)`` for every j, written out."""
    return _unrolled(quads, "r{j} = step({j}, {q}, *rest)", _all_results(quads), step=step)


def zip_quads(step: Callable, quads: int) -> Callable:
    """``f(acc, other, *rest)``: `map_quads` of ``step(j, acc[4j], .., other[4j], .., *rest)``."""
    return _unrolled(quads, "r{j} = step({j}, {q}, {p}, *rest)", _all_results(quads), "other, ", step=step)


def fold_quads(step: Callable, quads: int, join: Callable) -> Callable:
    """``f(acc, *rest)``: the results of ``step(j, acc[4j], .., *rest)``, joined as `qoqlab.exact.fold` adds: the second half
    with the first, until one is left. What is missing up to a power of two is left out."""
    names: list[str | None] = [f"r{j}" for j in range(quads)]
    names += [None] * ((1 << (quads - 1).bit_length()) - quads)
    while len(names) > 1:
        half = len(names) // 2
        names = [a if b is None else f"join({a}, {b})" for a, b in zip(names[:half], names[half:], strict=True)]
    return _unrolled(quads, "r{j} = step({j}, {q}, *rest)", str(names[0]), step=step, join=join)
