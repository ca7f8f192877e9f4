"""Fixtures shared by all tests."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from qoqlab import attention
from qoqlab.pipeline import QuantizedModel, quantize

from . import families

#: Files that take longest come first, so that at the end no processor is left with one of them while others are idle.
LONG = ("test_soak", "test_browser", "test_sweep", "test_tour", "test_baselines", "test_classroom")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files change places; the order within each stays."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def _exact_norm(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the input's own precision (transformers computes it in fp32 whatever the input)."""
    variance = hidden_states.square().mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMSNorm of every family in full fp64, so that an exact equivalence is exact to 1e-9 and not to 1e-6."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", _exact_norm)


@functools.cache
def _wide(family: str) -> nn.Module:
    return families.wide(family)


@functools.cache
def _quantized(family: str, preset: str) -> QuantizedModel:
    return quantize(_wide(family), preset, families.random_ids(4, 24), progress=False)


@pytest.fixture
def wide_model():
    """``wide_model(family)``: the unquantised model behind ``quantized``. Shared: do not change it."""
    return _wide


@pytest.fixture
def quantized():
    """``quantized(family, preset)``: a quantised tiny model, made once per session. Shared: do not change it."""
    return _quantized


@pytest.fixture
def our_attention():
    """Make a model use the library's attention function and return it."""

    def install(model: nn.Module) -> nn.Module:
        attention.install(model)
        return model

    return install
