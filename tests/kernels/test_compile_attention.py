"""Decode attention compiled for Ampere, Ada and Hopper without a GPU, and what the compilers report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from qoqlab_kernels import kv4, kv4_ladder
from qoqlab_kernels.attention import plan_for
from qoqlab_kernels.kv4 import Form

from .compilers import assert_clean, compile_offline, needs_compilers

pytestmark = needs_compilers

#: Compute capability -> shared memory of a block and of a multiprocessor, bytes (CUDA programming guide, table of limits).
SHARED = {(8, 0): (166912, 167936), (8, 9): (101376, 102400), (9, 0): (232448, 233472)}
#: Branch instructions, recorded with CUDA 13 and rounded up: loops over sequences, divisions, merges.
BRANCHES = 140


def name(value: object) -> str:
    if isinstance(value, Form):
        more = "".join(f"-{k}" for k in ("bfloat", "softcap", "lse", "settled") if getattr(value, k))
        return f"d{value.head_dim}-g{value.group}-p{value.page_size}{more}"
    return f"sm{value[0]}{value[1]}" if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(
    ("form", "capability", "page"),
    [
        (Form(128, 4, lse=True, settled=True), (9, 0), 1050),
        (Form(128, 4, lse=True), (8, 0), 1050),
        (Form(128, 1), (8, 9), 1050),
        (Form(64, 7, 16, True, True, True), (9, 0), 280),
    ],
    ids=name,
)
def test_v4(form: Form, capability: tuple, page: int, tmp_path: Path) -> None:
    """``page``: instructions from a page's first product to its last; CUDA 13 makes 1020, 1016, 994 and 267."""
    plan = plan_for(form, capability, 100, *SHARED[capability])
    program = kv4.v4(*plan.constants(form))
    made = compile_offline(program, capability, tmp_path)
    assert_clean(made, program, BRANCHES)
    # sums of queries, then keys and values of a page: written out, nothing more
    sums, products = form.tiles * form.head_dim // 16, form.tiles * form.head_dim // 16 * form.page_size // 8
    places = [place for place, name in enumerate(made.names) if name == "HMMA"]
    assert len(places) == sums + products and places[-1] - places[-products] < page
    # masks of codes are constants inside logical operations, not registers filled again and again
    assert made.listing.count("0xf000f,") == form.page_size * form.head_dim // 64
    assert not re.findall(r"MOV.* 0xf000f0? ", made.listing)
    assert ("UBLKCP" in made.opcodes) == (capability >= (9, 0)) != ("LDGSTS" in made.opcodes)


def test_three_blocks_have_registers(tmp_path: Path) -> None:
    """Twelve warps instead of eight on a multiprocessor (`bench_kv4`, ``--plans 4x1x3``) cost no spill."""
    program = kv4.v4(Form(128, 4, lse=True, settled=True), 4, 1, True, True, 8, residents=3)
    made = compile_offline(program, (9, 0), tmp_path)
    assert_clean(made, program, BRANCHES)
    assert made.registers <= 168


def test_wide_groups_spill_little(tmp_path: Path) -> None:
    """Two tiles of queries at head_dim 128 need every register; a few numbers that change once a segment leave them."""
    form = Form(128, 16, lse=True, settled=True)
    program = kv4.v4(*plan_for(form, (9, 0), 100, *SHARED[9, 0]).constants(form))
    made = compile_offline(program, (9, 0), tmp_path)
    assert made.registers <= 255 and made.opcodes["LDL"] <= 40 and made.opcodes["STL"] <= 24


@pytest.mark.parametrize(
    ("version", "form", "capability"),
    [
        ("v2", Form(128, 4), (8, 0)),
        ("v2", Form(64, 3, 16, True, True, True), (9, 0)),
        ("v3", Form(128, 4, lse=True), (8, 9)),
        ("v3", Form(128, 16, 128, True), (9, 0)),
        ("v2", Form(128, 4, lse=True, bits=8), (8, 0)),
        ("v2", Form(128, 4, lse=True, bits=16), (9, 0)),
    ],
    ids=name,
)
def test_a_warp_a_head(version: str, form: Form, capability: tuple, tmp_path: Path) -> None:
    """v2 converts every code from an integer, v3 none: one fp16 operation for two. Pages of 8 and 16 bits."""
    program = kv4_ladder.VERSIONS[version](form)
    made = compile_offline(program, capability, tmp_path)
    assert_clean(made, program, BRANCHES)
    codes = 2 * 8 * form.head_dim // 16  # of a tile of 16 tokens, keys and values, in a lane
    conversions = made.opcodes["I2F"] + made.opcodes["I2FP"]
    assert (conversions >= codes) == (version == "v2" and form.bits < 16)
    assert version == "v2" or made.opcodes["HADD2"] + made.opcodes["HFMA2"] >= codes // 2


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=name)
def test_v1(capability: tuple, tmp_path: Path) -> None:
    """Its accumulators are indexed by a loop, so they lie in local memory: what the later versions do away with."""
    made = compile_offline(kv4_ladder.v1(Form(128, 4, lse=True)), capability, tmp_path)
    assert {"LDL", "STL"} <= set(made.opcodes) and "HMMA" not in made.opcodes
