"""The fused element-wise kernels compiled for Ampere, Ada and Hopper without a GPU, and what the compilers report."""

from __future__ import annotations

from pathlib import Path

import pytest
from qoqlab_kernels import cases, elementwise, own_token, rope, sums
from qoqlab_kernels.gemm import Form
from qoqlab_kernels.pages import ChunkLayout

from .compilers import assert_clean, compile_offline, needs_compilers

pytestmark = needs_compilers

#: Branch instructions, recorded with CUDA 13.5 and rounded up; most are subroutines of divisions and square roots.
BRANCHES = {"plain": 50, "norm": 50, "add_norm": 50, "silu": 150}
ROPE_BRANCHES, OWN_BRANCHES, SUMS_BRANCHES = 150, 100, 30
#: Usual sizes, and the widest of each kind, which need the most registers.
KERNELS = [
    (("plain", "half", 4096, 512, True, True), (9, 0)),
    (("plain", "bfloat", 4096, 256), (8, 9)),
    (("norm", "half", 4096, 256, True, True), (9, 0)),
    (("norm", "bfloat", cases.WIDEST_K, 1024), (8, 0)),
    (("add_norm", "half", 32, 64), (8, 9)),
    (("add_norm", "bfloat", 4096, 128), (8, 0)),
    (("add_norm", "bfloat", 16384, 1024, False, True), (9, 0)),
    (("silu", "half", 14336, 512, True, True), (9, 0)),
    (("silu", "bfloat", cases.WIDEST_K, 1024), (8, 9)),
    (("add_norm", "half", 32768, 512, True, True), (9, 0)),
    (("plain", "half", 4096, 512, True, True, True), (9, 0)),
    (("silu", "half", 7168, 512, False, True), (9, 0)),
]


@pytest.mark.parametrize(("constants", "capability"), KERNELS, ids=lambda v: "-".join(map(str, v)))
def test_kernels(constants: tuple, capability: tuple, tmp_path: Path) -> None:
    program = elementwise.elementwise(*constants)
    made = compile_offline(program, capability, tmp_path)
    assert_clean(made, program, BRANCHES[constants[0]])
    quantising = len(constants) < 5 or constants[4]
    # the largest value and the sum of codes of a warp
    assert ("REDUX" in made.opcodes) == (quantising or constants[0] == "silu")
    assert "LDG.E.128" in made.listing and ("STG.E.64" in made.listing) == quantising


@pytest.mark.parametrize(
    ("constants", "capability"),
    [
        (("half", 32, 8, ChunkLayout(128), True, True), (9, 0)),
        (("bfloat", 64, 8, ChunkLayout(128), False), (8, 0)),
        (("half", 4, 4, ChunkLayout(64, 16), True), (8, 9)),
    ],
    ids=lambda v: "-".join(map(str, v[:3])),
)
def test_rope_and_append(constants: tuple, capability: tuple, tmp_path: Path) -> None:
    program = rope.rope_kv4(*constants)
    made = compile_offline(program, capability, tmp_path)
    assert_clean(made, program, ROPE_BRANCHES)
    assert "STG.E.U8" in made.listing and "SHFL" in made.opcodes


@pytest.mark.parametrize(
    ("constants", "capability"),
    [
        (("half", 32, 8, 128, False, 512, True), (9, 0)),
        (("bfloat", 64, 4, 128, True, 512), (8, 0)),
        (("half", 3, 3, 64, False, 64), (8, 9)),
        (("half", 16, 4, 128, False, 256, True, False), (9, 0)),
    ],
    ids=lambda v: "-".join(map(str, v)),
)
def test_a_token_joins_its_past(constants: tuple, capability: tuple, tmp_path: Path) -> None:
    program = own_token.attend_own(*constants)
    made = compile_offline(program, capability, tmp_path)
    assert_clean(made, program, OWN_BRANCHES)
    codes = len(constants) < 8 or constants[7]
    assert {"REDUX", "SHFL"} <= set(made.opcodes) and "LDG.E.128" in made.listing
    assert ("STG.E.64" in made.listing) == codes


@pytest.mark.parametrize(
    ("form", "capability"),
    [(Form(1), (9, 0)), (Form(0, scaled=True, bfloat=True, bias=True), (8, 0))],
    ids=["groups", "scaled-bfloat-bias"],
)
def test_sums_of_several_gpus(form: Form, capability: tuple, tmp_path: Path) -> None:
    program = sums.scale_sums(form, capability >= (9, 0))
    made = compile_offline(program, capability, tmp_path)
    assert_clean(made, program, SUMS_BRANCHES)
    assert "LDG.E.128" in made.listing and "STG.E.64" in made.listing
