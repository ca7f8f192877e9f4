"""The mark of tests that run on a GPU only."""

from __future__ import annotations

import pytest
import torch

HERE = torch.cuda.is_available()
CAPABILITY = torch.cuda.get_device_capability() if HERE else (0, 0)
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(CAPABILITY < (8, 0), reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]
