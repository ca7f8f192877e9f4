"""The element-wise kernels compiled for Ampere, Ada and Hopper without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from qoqlab_kernels import elementwise
from qoqlab_kernels.rope import RopeForm, rope

from .compilers import assert_clean, compile_offline, needs_compilers

pytestmark = needs_compilers

#: (operation, kind, k, threads, codes, compute capability): every operation and type, every architecture, the widest rows.
KERNELS = [
    ("norm", "half", 4096, 256, True, (9, 0)),
    ("norm", "bfloat", 544, 64, False, (8, 0)),
    ("norm", "half", 16384, 512, True, (8, 9)),
    ("add_norm", "half", 4096, 128, True, (8, 0)),
    ("add_norm", "bfloat", 5120, 256, True, (9, 0)),
    ("add_norm", "half", 4096, 512, False, (8, 9)),
    ("silu", "half", 14336, 512, True, (8, 0)),
    ("silu", "bfloat", 14336, 512, True, (9, 0)),
    ("silu", "half", 896, 128, True, (8, 9)),
]
#: Branch instructions for each piece (reciprocals have a slow path) and beside them.
BRANCHES = 24, 40


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "-".join(map(str, kernel[:4])))
def test_compiles_cleanly(kernel: tuple, tmp_path: Path) -> None:
    operation, kind, k, threads, codes, capability = kernel
    program = elementwise.elementwise(operation, kind, k, threads, codes, capability >= (9, 0))
    made = compile_offline(program, capability, tmp_path)
    pieces = -(-k // (8 * threads))
    assert_clean(made, program, BRANCHES[0] * pieces + BRANCHES[1])
    # as many 16-byte loads as pieces, for every operand
    loads = made.listing.count("LDG.E.128")
    assert loads == pieces * (1 if operation == "norm" else 2) + (pieces if operation != "silu" else 0)
    assert ("IDP" in made.opcodes) == codes  # sums of codes
    assert ("PREEXIT" in made.opcodes) == (capability >= (9, 0))  # lets the next kernel start


@pytest.mark.parametrize(
    ("form", "capability"),
    [
        (RopeForm("half", 128, overlap=True), (9, 0)),
        (RopeForm("bfloat", 64, 16, normed=True), (8, 0)),
        (RopeForm("half", 128, normed=True, decode=False), (8, 9)),
    ],
)
def test_rope_compiles_cleanly(form: RopeForm, capability: tuple, tmp_path: Path) -> None:
    program = rope(form)
    assert_clean(compile_offline(program, capability, tmp_path), program, 60)
