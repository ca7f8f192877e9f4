"""v5 compiled for Hopper (sm_90a), without a GPU: every tile that the rules choose, every format."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from qoqlab_kernels import gemm
from qoqlab_kernels.gemm import Form
from qoqlab_kernels.plan import TOKENS, Plan, rules

from .compilers import assert_clean, compile_offline, needs_compilers

pytestmark = needs_compilers

#: Branch instructions, recorded with CUDA 13.5 (108 to 141) and rounded up; a tree for one tuple of accumulators adds 100.
BRANCHES = 180
#: Every tile, every number of groups with a narrow and a wide tile, every kind of epilogue; (batch, form, outputs)
CHOICES = [
    (8, Form(1), 4096),
    (16, Form(0, scaled=True, bias=True), 4096),
    (32, Form(2, bfloat=True), 4096),
    (64, Form(4), 4096),
    (64, Form(1), 64),  # alone in its cluster
    (128, Form(1), 6144),
    (256, Form(4, bias=True), 28672),
    (4096, Form(2), 4096),  # shares its activations
    (256, Form(0, raw=True), 28672),
]


def test_every_format_and_tile_is_compiled() -> None:
    assert {min(m, 256) for m, _, _ in CHOICES} == set(TOKENS["v5"])
    assert {form.groups for m, form, _ in CHOICES if m <= 64} == {0, 1, 2, 4}
    assert {form.groups for m, form, _ in CHOICES if m > 64} == {0, 1, 2, 4}


@pytest.mark.parametrize(
    ("m", "form", "n"), CHOICES, ids=lambda v: f"{v.groups}{'-raw' * v.raw}" if isinstance(v, Form) else str(v)
)
def test_v5(m: int, form: Form, n: int, tmp_path: Path) -> None:
    plan, tokens = rules("v5", m, n, 32, form, 132), min(m, 256)
    assert isinstance(plan, Plan) and plan.tokens == tokens
    program = gemm.v5(*plan.constants(form))
    made = compile_offline(program, (9, 0), tmp_path)
    assert_clean(made, program, BRANCHES)
    tensor = re.findall(r"IGMMA\.64x(\d+)x32\.U8\.S8", made.listing)
    assert set(tensor) == {str(tokens)}
    assert len(tensor) == made.opcodes["IGMMA"] and len(tensor) % 4 == 0
    assert "UBLKCP" in made.opcodes  # bulk copies
    assert (".MULTICAST" in made.listing) == (plan.cluster > 1)
    assert ("STSM" in made.opcodes) != form.raw  # stmatrix
    assert "SYNCS" in made.opcodes  # mbarriers
    assert ("USETMAXREG" in made.opcodes) == (tokens >= 128)
    if tokens >= 128:  # what the consumers claim must be there once the producers have given: else they wait for ever
        found = (re.search(rf"USETMAXREG\.{what}.*?(0x[0-9a-f]+)", made.listing) for what in ("DEALLOC", "TRY_ALLOC"))
        give, take = (int(match[1], 16) for match in found)
        assert give <= made.registers <= take
        assert 128 * (plan.warpgroups * take + give) <= made.registers * program.threads
    assert "IMMA" not in made.opcodes and "LDGSTS" not in made.opcodes
