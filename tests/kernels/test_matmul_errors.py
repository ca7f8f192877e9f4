"""Bad input of the public functions: each error names the argument, what came and the rule, before any kernel starts."""

from __future__ import annotations

import pytest
import qoqlab_kernels as qk
import torch
from qoqlab_kernels import cases, gemm, launch, layout, matmul
from qoqlab_kernels.plan import Plan

from .simulator import Simulator

RULES = {
    "packed: not packed": ("TypeError", "packed: expected a PackedWeight (see pack_weight), got Tensor"),
    "dtype: fp32": ("TypeError", "dtype: expected torch.float16 or torch.bfloat16, got torch.float32"),
    "x_scales: twice": ("ValueError", "x_scales: Activations carry their own; pass None"),
    "x_scales: none": ("ValueError", "x_scales: int8 codes need their scales"),
    "x_scales: fp32": ("ValueError", "x_scales: expected fp16 [3] on cpu, one number per token, got torch.float32"),
    "x_scales: too many": (
        "ValueError",
        "x_scales: expected fp16 [3] on cpu, one number per token, got torch.float16 of shape 4",
    ),
    "x_scales: a list": ("TypeError", "x_scales: expected a torch.Tensor, got list"),
    "x_codes: a list": ("TypeError", "x_codes: expected a torch.Tensor, got list"),
    "x_codes: fp16": ("TypeError", "x_codes: expected int8 [M, K] or Activations, got torch.float16 of shape 3x64"),
    "x_codes: one row": ("TypeError", "x_codes: expected int8 [M, K] or Activations, got torch.int8 of shape 64"),
    "x_codes: other K": ("ValueError", "x_codes: K = 96 does not match the weight's K = 64"),
    "x_codes: other K, tiled": ("ValueError", "x_codes: K = 96 does not match the weight's K = 64"),
    "x_codes: no tokens": ("ValueError", "x: expected [M, K] with K a multiple of 32, got 0x64"),
    "packed: elsewhere": ("ValueError", "packed: on cpu, the activations on meta; use packed.to(...)"),
    "bias: wrong size": (
        "ValueError",
        "bias: expected a float [64] on cpu, one number per output, got torch.float32 of shape 32",
    ),
    "bias: integers": ("TypeError", "bias: expected a floating-point tensor, got torch.int32"),
    "bias: a matrix": (
        "ValueError",
        "bias: expected a float [64] on cpu, one number per output, got torch.float32 of shape 1x64",
    ),
    "bias: NaN": ("ValueError", "bias: holds 64 NaN and 0 infinite values"),
    "bias: a list": ("TypeError", "bias: expected a torch.Tensor, got list"),
    "out: fp32": ("ValueError", "out: expected torch.float16 [3, 64] on cpu, got torch.float32 of shape 3x64 on cpu"),
    "out: bf16": ("ValueError", "out: expected torch.bfloat16 [3, 64] on cpu, got torch.float16"),
    "out: wrong shape": ("ValueError", "out: expected torch.float16 [3, 64] on cpu, got torch.float16 of shape 64x3"),
    "out: a column block": ("ValueError", "out: must be contiguous and start on a 16-byte boundary"),
    "out: misaligned": ("ValueError", "out: must be contiguous and start on a 16-byte boundary"),
    "x: a list": ("TypeError", "x: expected a torch.Tensor, got list"),
    "x: fp64": ("TypeError", "x: expected fp16, bf16, fp32 or int8, got torch.float64"),
    "x: one row": ("ValueError", "x: expected [M, K] with K a multiple of 32, got 64"),
    "x: K = 48": ("ValueError", "x: expected [M, K] with K a multiple of 32, got 3x48"),
    "x: no tokens": ("ValueError", "x: expected [M, K] with K a multiple of 32, got 0x64"),
    "x: no inputs": ("ValueError", "x: expected [M, K] with K a multiple of 32, got 3x0"),
    "x: elsewhere": ("ValueError", "x: on meta; the CUDA simulator works on CPU tensors"),
    "x_scales: for floats": (
        "ValueError",
        "x_scales: int8 codes need their scales, other dtypes have none; x is torch.float32",
    ),
    "x_scales: missing": ("ValueError", "x_scales: int8 codes need their scales"),
}


@pytest.fixture(scope="module")
def raised(simulator: Simulator) -> dict:
    """What every call of the table raised, name -> ``[class, message]``."""
    return simulator("error_cases")


def test_every_rule_is_tried(raised: dict) -> None:
    assert set(raised) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_errors_name_argument_value_and_rule(raised: dict, name: str) -> None:
    kind, message = RULES[name]
    assert raised[name], "nothing was raised"
    assert raised[name][0] == kind
    assert message in raised[name][1]


def test_without_a_simulator_tensors_must_be_on_a_gpu() -> None:
    rule = r"on cpu; the kernels need a CUDA tensor \(qoqlab.reference.w4a8_matmul computes the same anywhere\)"
    with pytest.raises(ValueError, match="x: " + rule):
        qk.quantize_activations(torch.zeros(3, 64))
    a = cases.activations(3, 64)
    with pytest.raises(ValueError, match="x_codes: " + rule):
        qk.w4a8_gemm(layout.tile_activations(a.codes, a.scales), None, qk.pack_weight(cases.weight(64, 64, "g32")))


def test_without_numba_cuda_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba alone simulates kernels but cannot compile them as we do."""
    monkeypatch.setattr(launch, "_installed", lambda name: name != "numba-cuda")
    with pytest.raises(RuntimeError, match=r'pip install "qoqlab\[cu13\]".* or set NUMBA_ENABLE_CUDASIM=1'):
        launch.to_ltoir(gemm.v1(gemm.Form(1)), (8, 0))


def test_a_kernel_that_the_assembler_slowed_down_is_noticed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = "ptxas info : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    monkeypatch.setenv("QOQLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(launch, "to_ltoir", lambda *_: b"")
    monkeypatch.setattr(launch, "to_binary", lambda *_: (b"code", report))
    with pytest.warns(RuntimeWarning, match=r"v3.*C7512"):
        assert launch.binary(gemm.v3, (gemm.Form(1),), (9, 0))[1] == b"code"


def test_a_split_into_more_blocks_than_units_is_refused() -> None:
    packed = layout.pack_weight(cases.weight(64, 256))
    a = cases.activations(3, 256)
    x, out = layout.tile_activations(a.codes, a.scales), torch.empty(3, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="plan: 4 blocks cannot split 2 units of 128 inputs"):
        matmul.run(Plan("v5", 8, 2, 3, split=4), gemm.Form(1), x, packed, None, out)
