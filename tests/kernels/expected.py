"""What the kernels must give, written once more and independently: integers in int64, then the fp32 epilogue."""

from __future__ import annotations

import torch

from qoqlab import reference
from qoqlab.affine import Affine
from qoqlab.grids import Zero
from qoqlab.progressive import ProgressiveWeight


def product(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: ProgressiveWeight | Affine,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """``[M, N]`` from int8 codes ``[M, K]`` and fp16 scales ``[M]``. In fp16 that is the reference's result, checked here;
    the reference knows no bf16, whose only difference is the last rounding."""
    total, sums = reference.w4a8_accumulate(codes, weight), codes.sum(-1, dtype=torch.int64)
    rows = scales.float()[:, None]
    if isinstance(weight, ProgressiveWeight):
        y = total.float() * (rows * weight.channel_scales.float())
    elif weight.zero is Zero.INTEGER:
        y = (total - sums[:, None] * weight.zeros.long()).float() * (rows * weight.scales.float())
    else:
        y = total.float() * (rows * weight.scales.float()) - (sums.float()[:, None] * rows) * weight.zeros.float()
    if bias is not None:
        y = y + bias.float()
    same = reference.w4a8_epilogue(total, scales, sums, weight, bias)
    assert torch.equal(y.half(), same)
    return y.to(dtype)
