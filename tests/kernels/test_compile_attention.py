"""Decode attention and the cache's append compiled for Ampere, Ada and Hopper without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from qoqlab_kernels import attention, rows
from qoqlab_kernels.attention import Form
from qoqlab_kernels.decode import plan_decode

from .compilers import assert_clean, compile_offline, needs_compilers

pytestmark = needs_compilers

#: Branch instructions, recorded with CUDA 13.5 (117 to 119; append 27) and rounded up.
BRANCHES, APPEND_BRANCHES = 160, 40
#: Form, compute capability, sequences.
CHOICES = [
    (Form(128, 4), (9, 0), 64),
    (Form(128, 8, bfloat=True), (9, 0), 1),
    (Form(128, 4), (8, 0), 64),
    (Form(64, 16, bfloat=True, capped=True), (8, 9), 64),
]


@pytest.mark.parametrize(("form", "capability", "batch"), CHOICES, ids=str)
def test_v4(form: Form, capability: tuple, batch: int, tmp_path: Path) -> None:
    plan = plan_decode(batch, 8, form, capability, 132)
    program = attention.v4(*plan.constants(form))
    made = compile_offline(program, capability, tmp_path)
    assert_clean(made, program, BRANCHES)
    assert made.opcodes["HMMA"] == 2 * 4 * form.dim // 16  # keys and values, four tiles of 16 tokens: nothing more
    assert ("UBLKCP" in made.opcodes) == plan.bulk == (capability == (9, 0))
    assert "LDGSTS" in made.opcodes or plan.bulk


@pytest.mark.parametrize(("dim", "bfloat", "capability"), [(128, False, (9, 0)), (64, True, (8, 0))])
def test_append(dim: int, bfloat: bool, capability: tuple, tmp_path: Path) -> None:
    program = rows.append(dim, bfloat)
    assert_clean(compile_offline(program, capability, tmp_path), program, APPEND_BRANCHES)
