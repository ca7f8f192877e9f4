"""Tiny random models of every supported family, for all tests that need a network but no language."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qoqlab.recipes import Recipe, Step
from qoqlab.schemes import Scheme

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VOCABULARY = 128
#: Llama 3.1's frequency scaling, shrunk so that it bites at the short lengths of these tests.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def build(
    family: str,
    *,
    tied: bool = False,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: object,
) -> nn.Module:
    """A model of ``family`` with two layers, four heads and nothing trivial: every gain, weight and bias is random."""
    config_class, model_class = FAMILIES[family]
    values: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
    }
    model = model_class(config_class(**(values | config))).to(dtype).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Weights of unit gain, norm gains around 1, biases of standard deviation 2 on q, k and v and 0.2 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.3 * noise
        elif name.endswith("bias"):
            noise = noise * (2.0 if any(f"{r}_proj" in name for r in "qkv") else 0.2)
        else:
            noise = noise / parameter.shape[1] ** 0.5
        parameter.copy_(noise)


def wide(family: str, **config: object) -> nn.Module:
    """A model whose linears take groups of 128: hidden 128, intermediate 256, heads of 32."""
    return build(family, hidden_size=128, intermediate_size=256, head_dim=32, **config)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters to ``dtype``, buffers (rotary frequencies) as they are: what ``from_pretrained(dtype=...)`` makes."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def random_ids(n: int = 3, length: int = 16, seed: int = 1) -> torch.Tensor:
    """int64 tokens ``[n, length]``."""
    return torch.randint(VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[n, length, V]`` without a cache."""
    return model(ids, use_cache=False).logits


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``|actual - expected| / |expected|`` in the Euclidean norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def only(*steps: Step, scheme: Scheme | None = None) -> Recipe:
    """A recipe of these steps, by default on unquantised formats: a pure equivalence."""
    return Recipe("test", scheme or Scheme(), steps)
