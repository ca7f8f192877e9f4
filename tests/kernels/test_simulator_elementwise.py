"""The element-wise kernels in the CUDA simulator: codes, scales, sums, order and 16-bit results, bit for bit."""

from __future__ import annotations

import pytest

from .simulator import Simulator

GOOD = {"tiles": True, "tokens": True, "total": True, "plain": True}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("operation", ["norm", "add_norm", "silu"])
def test_every_operation_and_dtype(simulator: Simulator, operation: str, dtype: str) -> None:
    assert simulator("elementwise_case", operation=operation, m=3, k=160, dtype=dtype) == GOOD


@pytest.mark.parametrize("operation", ["add_norm", "silu"])
def test_several_pieces_a_thread(simulator: Simulator, operation: str) -> None:
    """1184 inputs: 148 pieces in three rounds of 64 threads, the last one not full, and a last unit filled up with zeros."""
    assert simulator("elementwise_case", operation=operation, m=2, k=1184, dtype="float16", threads=64) == GOOD


def test_the_number_of_threads_changes_no_bit(simulator: Simulator) -> None:
    for threads in (32, 128):
        assert simulator("elementwise_case", operation="norm", m=2, k=544, dtype="float16", threads=threads) == GOOD


def test_a_ninth_token(simulator: Simulator) -> None:
    assert simulator("elementwise_case", operation="norm", m=9, k=32, dtype="bfloat16") == GOOD


@pytest.mark.parametrize(
    ("head_dim", "dtype", "normed", "decode", "heads", "kv_heads"),
    [
        (128, "float16", False, True, 3, 1),
        (64, "float16", True, True, 2, 2),
        (128, "bfloat16", True, False, 2, 1),
        (64, "bfloat16", False, False, 3, 1),
    ],
)
def test_rotary_positions_and_the_cache(
    simulator: Simulator, head_dim: int, dtype: str, normed: bool, decode: bool, heads: int, kv_heads: int
) -> None:
    answer = simulator(
        "rope_case", head_dim=head_dim, dtype=dtype, normed=normed, decode=decode, heads=heads, kv_heads=kv_heads
    )
    assert set(answer) == ({"query", "lengths", "pool"} if decode else {"query", "key", "pool"})
    assert all(answer.values()), answer


def test_torch_compile(simulator: Simulator) -> None:
    assert simulator("elementwise_compiled") == {"equal": [True] * 4}


def test_the_emulated_multiplication_and_addition_rounds_once(simulator: Simulator) -> None:
    assert simulator("fused_multiply_add") == {"wrong": 0}


RULES = {
    "x: a list": ("TypeError", "x: expected a torch.Tensor, got list"),
    "x: fp32": ("TypeError", "x: expected fp16 or bf16, got torch.float32"),
    "x: one row": ("ValueError", "x: expected a matrix with a multiple of 32 columns, got 64"),
    "x: K = 48": ("ValueError", "x: expected a matrix with a multiple of 32 columns, got 3x48"),
    "x: no tokens": ("ValueError", "x: expected a matrix with a multiple of 32 columns, got 0x64"),
    "x: elsewhere": ("ValueError", "x: on meta; the CUDA simulator works on CPU tensors"),
    "weight: bf16": (
        "ValueError",
        "weight: expected torch.float16 of shape 64 on cpu, one gain per input, got",
    ),
    "weight: too short": ("ValueError", "weight: expected torch.float16 of shape 64 on cpu"),
    "eps: zero": ("ValueError", "eps: expected a positive number, got 0.0"),
    "eps: NaN": ("ValueError", "eps: expected a positive number, got nan"),
    "residual: bf16": ("ValueError", "residual: expected torch.float16 of shape 3x64 on cpu as x, got torch.bfloat16"),
    "residual: fewer tokens": (
        "ValueError",
        "residual: expected torch.float16 of shape 3x64 on cpu as x, got",
    ),
    "residual: a list": ("TypeError", "residual: expected a torch.Tensor, got list"),
    "gate_up: fp32": ("TypeError", "gate_up: expected fp16 or bf16, got torch.float32"),
    "gate_up: I = 16": ("ValueError", "gate_up: expected a matrix with a multiple of 64 columns, got 3x32"),
    "plain x: fp32": ("TypeError", "x: expected fp16 or bf16, got torch.float32"),
    "qkv: fp32": ("TypeError", "qkv: expected fp16 or bf16, got torch.float32"),
    "qkv: no queries": ("ValueError", "qkv: 256 columns leave no query heads beside twice 2 heads of 64"),
    "positions: int64": ("ValueError", "positions: expected int32 [2] on cpu, got torch.int64"),
    "slots: too few": ("ValueError", "slots: expected int32 [2] on cpu, got torch.int32 of shape 1"),
    "cos: a whole head": (
        "ValueError",
        "cos: expected torch.float16 [positions, 32] on cpu, got torch.float16 of shape 8x64",
    ),
    "sin: bf16": ("ValueError", "sin: expected torch.float16 [positions, 32] on cpu, got torch.bfloat16"),
    "plain residual: bf16": ("ValueError", "residual: expected torch.float16 of shape 3x64 on cpu as x"),
}


def test_bad_input_is_named(simulator: Simulator) -> None:
    answers = simulator("elementwise_errors")
    assert set(answers) == set(RULES)
    for name, (kind, message) in RULES.items():
        assert answers[name][0] == kind and answers[name][1].startswith(message), f"{name}: {answers[name]}"
