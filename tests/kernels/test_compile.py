"""v1 to v4 and the activations' kernel compiled for Ampere, Ada and Hopper without a GPU, and what the compilers report."""

from __future__ import annotations

from pathlib import Path

import pytest
from numba import types
from qoqlab_kernels import gemm, ptx, quantize
from qoqlab_kernels.gemm import Form
from qoqlab_kernels.launch import Program
from qoqlab_kernels.plan import TOKENS, rules

from .compilers import assert_clean, compile_offline, needs_compilers

pytestmark = needs_compilers

#: Branch instructions, recorded with CUDA 13.5 and rounded up: loops, copies unrolled by the compiler, 64-bit divisions.
BRANCHES = {"v1": 12, "v2": 14, "v3": 12, "v4": 80, "quantize": 60}
#: Every format, and every kind of result, with one of the plain versions at least.
PLAIN = [
    ("v1", Form(1), (8, 0)),
    ("v1", Form(0, scaled=True, bias=True), (8, 9)),
    ("v1", Form(4, bfloat=True), (9, 0)),
    ("v2", Form(2, bias=True), (8, 0)),
    ("v2", Form(0), (8, 9)),
    ("v2", Form(1, bfloat=True), (9, 0)),
    ("v3", Form(4, bias=True), (8, 0)),
    ("v3", Form(1), (8, 9)),
    ("v3", Form(0, scaled=True, bfloat=True), (8, 0)),
    ("v3", Form(2), (9, 0)),
]
#: Every tile of `plan.TOKENS` and every format; the widest tile with the most registers twice.
TENSOR = [
    (8, Form(4), (8, 0)),
    (16, Form(0, scaled=True, bias=True), (8, 0)),
    (32, Form(2, bfloat=True), (8, 0)),
    (64, Form(1), (8, 0)),
    (64, Form(4, bias=True, bfloat=True), (8, 9)),
    (16, Form(1), (9, 0)),
    (64, Form(1, raw=True), (8, 0)),
]


def name(value: object) -> str:
    if isinstance(value, Form):
        return f"groups{value.groups}" + "".join(f"-{k}" for k in ("scaled", "bfloat", "bias", "raw") if getattr(value, k))
    return f"sm{value[0]}{value[1]}" if isinstance(value, tuple) else str(value)


def test_every_format_and_tile_is_compiled() -> None:
    for version in ("v1", "v2", "v3"):
        assert len({form.groups for v, form, _ in PLAIN if v == version}) >= 3
    assert {tokens for tokens, _, _ in TENSOR} == set(TOKENS["v4"])
    assert {form.groups for _, form, _ in TENSOR} == {0, 1, 2, 4}


@pytest.mark.parametrize(("version", "form", "capability"), PLAIN, ids=name)
def test_plain_versions(version: str, form: Form, capability: tuple, tmp_path: Path) -> None:
    program = gemm.VERSIONS[version](form)
    made = compile_offline(program, capability, tmp_path)
    assert_clean(made, program, BRANCHES[version])
    assert ("IDP" in made.opcodes) == (version == "v3")  # dp4a


@pytest.mark.parametrize(("tokens", "form", "capability"), TENSOR, ids=name)
def test_v4(tokens: int, form: Form, capability: tuple, tmp_path: Path) -> None:
    program = gemm.v4(*rules("v4", tokens, 4096, 32, form, 108).constants(form))
    made = compile_offline(program, capability, tmp_path)
    assert_clean(made, program, BRANCHES["v4"])
    assert made.opcodes["IMMA"] == 4 * tokens // 8  # four steps of 32 inputs for every 8 tokens, nothing more
    assert "IMMA.16832.U8.S8" in made.listing
    assert "LDGSTS" in made.opcodes and "LDSM" in made.opcodes  # asynchronous copies, ldmatrix
    assert "HMMA" not in made.opcodes


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        *((kind, (8, 0)) for kind in quantize.INPUTS),
        ("codes", (8, 9)),
        ("single", (9, 0)),
    ],
    ids=name,
)
def test_quantize(kind: str, capability: tuple, tmp_path: Path) -> None:
    program = quantize.quantize(kind)
    made = compile_offline(program, capability, tmp_path)
    assert_clean(made, program, BRANCHES["quantize"])
    assert "IDP" in made.opcodes  # sums of codes


# -- the checks can fail --------------------------------------------------------------------------------------------------

VECTOR = types.Array(types.int32, 1, "C")


def indexed(run_time: bool) -> Program:
    """Four of 32 registers are chosen, by the launch or by constants."""
    zeros = ptx.zeros(32)

    @ptx.device
    def fill(j, c0, c1, c2, c3, x):
        return x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]

    filled = ptx.map_quads(fill, 8)

    def chosen(x, out, which):
        values = filled(zeros(), x)
        for i in range(4):
            out[i] = values[(which + i) % 32]

    def constant(x, out, which):
        values = filled(zeros(), x)
        out[0], out[1], out[2], out[3] = values[1], values[2], values[3], values[4]

    return Program(chosen if run_time else constant, (VECTOR, VECTOR, types.uint32), 32)


def test_a_tuple_indexed_at_run_time_is_noticed(tmp_path: Path) -> None:
    """numba turns the index into a tree of branches, far more than any bound above allows for so small a kernel."""
    good, bad = indexed(False), indexed(True)
    made = compile_offline(good, (8, 0), tmp_path)
    assert_clean(made, good, BRANCHES["v1"])
    worse = compile_offline(bad, (8, 0), tmp_path)
    assert worse.branches >= 31 > made.branches
    with pytest.raises(AssertionError, match="branches, at most 12 are expected"):
        assert_clean(worse, bad, BRANCHES["v1"])


def test_local_memory_is_noticed(tmp_path: Path) -> None:
    from numba import cuda

    def kernel(x, out, which):
        local = cuda.local.array(64, types.int32)
        for i in range(which):
            local[x[i] & 63] = i
        out[0] = local[which & types.uint32(63)]

    program = Program(kernel, (VECTOR, VECTOR, types.uint32), 32)
    made = compile_offline(program, (8, 0), tmp_path)
    assert {"LDL", "STL"} & set(made.opcodes)
    with pytest.raises(AssertionError, match=r"stack frame|local memory"):
        assert_clean(made, program, 100)


def test_too_many_registers_are_noticed(tmp_path: Path) -> None:
    """The launch bound makes the compiler keep the registers below the limit, at the price of spills, which are noticed."""
    import dataclasses

    form = Form(1)
    program = dataclasses.replace(gemm.v4(form, 64, 4), residents=12)
    made = compile_offline(program, (8, 0), tmp_path)
    assert made.registers <= 65536 // (12 * 128)
    with pytest.raises(AssertionError, match="spill"):
        assert_clean(made, program, 200)
