"""The fused element-wise kernels in the CUDA simulator: what `qoqlab.reference` computes, bit for bit, and bad input."""

from __future__ import annotations

import pytest

from .simulator import Simulator

GOOD = {"equal": True, "kept": True}
QUANTISING = ["rms_norm_s8", "add_rms_norm_s8", "silu_mul_s8"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("operation", QUANTISING)
def test_every_operation_and_dtype(simulator: Simulator, operation: str, dtype: str) -> None:
    assert simulator("fused_case", operation=operation, m=3, k=160, dtype=dtype) == GOOD


@pytest.mark.parametrize("operation", ["rms_norm", "add_rms_norm"])
def test_norms_alone(simulator: Simulator, operation: str) -> None:
    assert simulator("fused_case", operation=operation, m=2, k=96, dtype="bfloat16") == GOOD


def test_a_ninth_token_of_one_piece_a_thread(simulator: Simulator) -> None:
    assert simulator("fused_case", operation="add_rms_norm_s8", m=9, k=32, dtype="float16") == GOOD


@pytest.mark.parametrize(("operation", "k"), [("rms_norm_s8", 1056), ("silu_mul_s8", 2592), ("add_rms_norm_s8", 2592)])
def test_several_pieces_a_thread(simulator: Simulator, operation: str, k: int) -> None:
    """Three pieces in registers; six, where the second operand is loaded when it is needed. The order of sums stays."""
    assert simulator("fused_case", operation=operation, m=1, k=k, dtype="float16", threads=64) == GOOD


@pytest.mark.parametrize("how", ["transposed", "misaligned", "strided"])
def test_where_the_input_lies_does_not_matter(simulator: Simulator, how: str) -> None:
    assert simulator("fused_case", operation="add_rms_norm_s8", m=2, k=64, dtype="float16", how=how) == GOOD


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "dtype", "stepwise"),
    [(64, 3, 1, "float16", True), (128, 4, 2, "bfloat16", False), (128, 32, 2, "float16", True)],
)
def test_rope_and_append(simulator: Simulator, dim: int, heads: int, kv_heads: int, dtype: str, stepwise: bool) -> None:
    """One and two heads a warp; more heads than threads take at once; pages that begin and end."""
    same = simulator("rope_case", dim=dim, heads=heads, kv_heads=kv_heads, dtype=dtype, stepwise=stepwise)
    assert same == {"queries": True, "keys": True, "cache": True, "lengths": True}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "options"),
    [(64, 3, 3, {}), (64, 16, 1, {"scale": 0.3}), (128, 4, 2, {"softcap": 2.0}), (128, 9, 3, {"threads": 64})],
)
def test_a_token_joins_its_past(
    simulator: Simulator, dim: int, heads: int, kv_heads: int, options: dict, dtype: str
) -> None:
    """Half a unit of inputs to fill up; one to 16 query heads a key; up to three pieces a thread; a ninth token."""
    m = 9 if heads == 3 else 5
    same = simulator("own_case", m=m, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, **options)
    assert same == {"equal": True, "value": True, "not quantised": True}


@pytest.mark.parametrize(
    "what",
    [
        *("lanes do not meet", "half of the lanes", "sign of the difference"),
        *("weights that do not add up", "no sum of the codes"),
    ],
)
def test_changed_kernels_are_noticed(simulator: Simulator, what: str) -> None:
    assert simulator("own_mutant_case", what="nothing")["equal"]
    assert not simulator("own_mutant_case", what=what)["equal"]


def test_under_torch_compile(simulator: Simulator) -> None:
    assert simulator("compiled_fused_case", m=2, k=64) == {"equal": [True] * 4}
    assert simulator("compiled_own_case") == {"equal": True}


RULES = {
    "x: a list": ("TypeError", "x: expected a torch.Tensor, got list"),
    "x: fp32": ("TypeError", "x: expected fp16 or bf16, got torch.float32"),
    "x: one row": ("ValueError", "x: expected a matrix with a multiple of 32 columns, got 64"),
    "x: K = 48": ("ValueError", "x: expected a matrix with a multiple of 32 columns, got 3x48"),
    "x: no tokens": ("ValueError", "x: expected a matrix with a multiple of 32 columns, got 0x64"),
    "x: elsewhere": ("ValueError", "x: on meta; the CUDA simulator works on CPU tensors"),
    "weight: a list": ("TypeError", "weight: expected a torch.Tensor, got list"),
    "weight: bf16": (
        "ValueError",
        "weight: expected torch.float16 of shape 64 on cpu, one gain per input, got torch.bfloat16",
    ),
    "weight: other K": ("ValueError", "weight: expected torch.float16 of shape 64 on cpu, one gain per input"),
    "eps: zero": ("ValueError", "eps: expected a positive number, got 0.0"),
    "eps: NaN": ("ValueError", "eps: expected a positive number, got nan"),
    "residual: other shape": ("ValueError", "residual: expected torch.float16 of shape 3x64 on cpu as x, got torch.float16"),
    "residual: bf16": ("ValueError", "residual: expected torch.float16 of shape 3x64 on cpu as x, got torch.bfloat16"),
    "residual: a list": ("TypeError", "residual: expected a torch.Tensor, got list"),
    "cache: none": ("TypeError", "cache: expected a PagedKV4, got NoneType"),
    "layer: beyond": ("ValueError", "layer: 1 is not one of 0..0"),
    "qkv: fp32": ("TypeError", "qkv: expected fp16 or bf16, got torch.float32"),
    "qkv: half a head": ("ValueError", "qkv: expected a matrix with a multiple of 64 columns, got 2x160"),
    "qkv: no queries": ("ValueError", "qkv: 128 columns are not queries beside 1 keys and values of 64"),
    "cos: fp32": ("ValueError", "cos: expected torch.float16 [positions, 32] on cpu, got torch.float32"),
    "cos: a head wide": (
        "ValueError",
        "cos: expected torch.float16 [positions, 32] on cpu, got torch.float16 of shape 9x64",
    ),
    "sin: fewer": ("ValueError", "sin: 5x32 does not have cos's shape 9x32"),
    "slots: int64": ("ValueError", "slots: expected int32 [2] on cpu, one number per token, got torch.int64"),
    "slots: too few": ("ValueError", "slots: expected int32 [2] on cpu, one number per token"),
    "positions: too few": ("ValueError", "positions: expected int32 [2] on cpu, one number per token"),
    "unquantised: K = 48": ("ValueError", "x: expected a matrix with a multiple of 32 columns, got 3x48"),
    "unquantised: residual": ("ValueError", "residual: expected torch.float16 of shape 3x64 on cpu as x"),
    "gate_up: fp32": ("TypeError", "gate_up: expected fp16 or bf16, got torch.float32"),
    "gate_up: I = 16": ("ValueError", "gate_up: expected a matrix with a multiple of 64 columns, got 3x32"),
    "gate_up: a list": ("TypeError", "gate_up: expected a torch.Tensor, got list"),
}


def test_bad_input_is_named(simulator: Simulator) -> None:
    raised = simulator("fused_errors")
    assert set(raised) == set(RULES)
    for name, (kind, text) in RULES.items():
        assert raised[name] and raised[name][0] == kind and raised[name][1].startswith(text), (name, raised[name])


OWN_RULES = {
    "seen: a list": ("TypeError", "seen: expected a torch.Tensor, got list"),
    "seen: fp32": ("TypeError", "seen: expected fp16 or bf16, as seen, got torch.float32"),
    "seen: flat": ("ValueError", "seen: expected [M, heads, D] on cpu, got shape 2x256 on cpu"),
    "seen: D = 32": ("ValueError", "seen: expected a head_dim of 64 or 128, got shape 2x4x32"),
    "query: bf16": ("TypeError", "query: expected fp16 or bf16, as seen, got torch.bfloat16"),
    "query: other heads": ("ValueError", "query: 2x2x64 does not have seen's shape 2x4x64"),
    "lse: a list": ("TypeError", "lse: expected a torch.Tensor, got list"),
    "lse: fp16": ("ValueError", "lse: expected fp32 [2, 4] on cpu, got torch.float16 of shape 2x4"),
    "lse: other tokens": ("ValueError", "lse: expected fp32 [2, 4] on cpu, got torch.float32 of shape 1x4"),
    "key: other tokens": ("ValueError", "key: expected [2, Hkv, 64] with Hkv a divisor of 4, got 1x2x64"),
    "key: 3 heads": ("ValueError", "key: expected [2, Hkv, 64] with Hkv a divisor of 4, got 2x3x64"),
    "value: one head": ("ValueError", "value: expected [2, 2, 64], as key, got 2x1x64"),
    "value: elsewhere": ("ValueError", "value: expected [M, heads, D] on cpu, got shape 2x2x64 on meta"),
    "scale: 0": ("ValueError", "scale: expected a positive number or None, got 0"),
    "softcap: NaN": ("ValueError", "softcap: expected a positive number or None, got nan"),
    "everything elsewhere": ("ValueError", "seen: on meta; the CUDA simulator works on CPU tensors"),
}


def test_bad_input_of_attend_own_is_named(simulator: Simulator) -> None:
    raised = simulator("own_errors")
    assert set(raised) == set(OWN_RULES)
    for name, (kind, text) in OWN_RULES.items():
        assert raised[name] and raised[name][0] == kind and raised[name][1].startswith(text), (name, raised[name])
