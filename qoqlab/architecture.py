"""The only module that knows transformers' class names: where a model keeps its linears, norms, heads and ties."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checks import require_finite

#: Decoder-only families whose blocks hold q/k/v/o_proj and gate/up/down_proj and whose norms are RMSNorm.
SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
#: Path of every quantised linear inside a block, in the order in which data flows.
LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
#: Activation sites: the tensors that feed linears, and the linears that read them.
SITES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
#: Entries of a ``config.json`` that decide what a supported model computes from its weights, in old files and new ones.
#: Token ids, text lengths for tokenizers, defaults of training and of generation do not.
DEFINING = (
    *("architectures", "model_type", "dtype", "torch_dtype", "vocab_size", "tie_word_embeddings"),
    *("hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"),
    *("rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
)


def defining(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those entries of a ``config.json`` that are in `DEFINING`."""
    return {name: config[name] for name in DEFINING if name in config}


def replace_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give ``module`` a new parameter. Parameters are never changed in place: a cloned model shares them with its origin."""
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=False))


@dataclass(frozen=True)
class Block:
    """One decoder layer, by role."""

    index: int
    layer: nn.Module
    heads: int
    kv_heads: int
    head_dim: int

    def linear(self, role: str) -> nn.Linear:
        """The linear (or its quantised replacement) of a role in `LINEARS`."""
        return self.layer.get_submodule(LINEARS[role])  # type: ignore[return-value]

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """``(role, module)`` of all seven linears."""
        for role in LINEARS:
            yield role, self.linear(role)

    def name(self, role: str) -> str:
        """Full parameter path, as in ``model.layers.0.self_attn.q_proj``."""
        return f"model.layers.{self.index}.{LINEARS[role]}"

    @property
    def attention(self) -> nn.Module:
        """The self-attention module."""
        return self.layer.self_attn  # type: ignore[return-value]

    @property
    def mlp(self) -> nn.Module:
        """The gated feed-forward module."""
        return self.layer.mlp  # type: ignore[return-value]

    @property
    def input_norm(self) -> nn.Module:
        """RMSNorm in front of q, k and v."""
        return self.layer.input_layernorm  # type: ignore[return-value]

    @property
    def mlp_norm(self) -> nn.Module:
        """RMSNorm in front of gate and up."""
        return self.layer.post_attention_layernorm  # type: ignore[return-value]

    @property
    def key_norm(self) -> nn.Module | None:
        """RMSNorm over the head dimension of keys (Qwen3), or None. `query_norm` exists with it."""
        return getattr(self.attention, "k_norm", None)

    @property
    def query_norm(self) -> nn.Module | None:
        """RMSNorm over the head dimension of queries (Qwen3), or None."""
        return getattr(self.attention, "q_norm", None)

    @property
    def window(self) -> int | None:
        """How many of the latest tokens, its own included, a token attends to; None: all."""
        if hasattr(self.attention, "sliding_window"):  # Qwen2 and Qwen3 decide layer by layer
            return self.attention.sliding_window  # type: ignore[return-value]
        return getattr(self.attention.config, "sliding_window", None)

    def set_linear(self, role: str, module: nn.Module) -> None:
        """Replace a linear."""
        self.layer.set_submodule(LINEARS[role], module)


@dataclass(frozen=True)
class Architecture:
    """A supported causal language model, by role."""

    model: nn.Module
    blocks: tuple[Block, ...]

    @property
    def embedding(self) -> nn.Embedding:
        """Token embedding ``[V, hidden]``."""
        return self.model.get_input_embeddings()  # type: ignore[operator]

    @property
    def final_norm(self) -> nn.Module:
        """RMSNorm in front of the head."""
        return self.model.model.norm  # type: ignore[return-value]

    def rotary(self, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[length, D / 2]`` of rotary positions 0 .. length - 1, scaled as the configuration says.

        Frequencies that depend on the length of a sequence ("dynamic", "longrope") are those for ``length``.
        """
        module = self.model.model.rotary_emb  # type: ignore[union-attr]
        device = self.embedding.weight.device
        positions = torch.arange(length, device=device)[None]
        with torch.no_grad():
            cos, sin = module(torch.zeros(1, dtype=dtype, device=device), positions)  # type: ignore[operator]
        half = cos.shape[-1] // 2  # both halves are alike
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    @property
    def head(self) -> nn.Linear:
        """Output projection ``[V, hidden]``."""
        return self.model.get_output_embeddings()  # type: ignore[operator]

    @property
    def tied(self) -> bool:
        """Whether embedding and head share one parameter."""
        return self.head.weight is self.embedding.weight

    def untie(self) -> None:
        """Give the head its own copy of the embedding. Rotation and norm folding treat the two differently."""
        if self.tied:
            replace_parameter(self.head, "weight", self.embedding.weight.detach().clone())
        self.model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def describe(model: nn.Module) -> Architecture:
    """Find the parts of a supported model.

    Raises TypeError for a class that is not in `SUPPORTED`, naming those that are.
    """
    kind = type(model).__name__
    if kind == "QuantizedModel":
        raise TypeError("model: QuantizedModel is quantised already; pass the original model, or its .model to look inside")
    if kind not in SUPPORTED:
        raise TypeError(f"model: {kind} is not a supported architecture; supported: {', '.join(SUPPORTED)}")
    config = model.config
    heads = int(config.num_attention_heads)  # type: ignore[union-attr, arg-type]
    kv_heads = int(config.num_key_value_heads)  # type: ignore[union-attr, arg-type]
    blocks = []
    for index, layer in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        blocks.append(Block(index, layer, heads, kv_heads, int(layer.self_attn.head_dim)))
    return Architecture(model, tuple(blocks))


def require_finite_weights(architecture: Architecture) -> None:
    """Raise ValueError naming the first parameter that holds NaN or infinity; those without memory have no values yet."""
    for name, parameter in architecture.model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            require_finite(f"model weight {name}", parameter.detach())


def clone(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor's storage with ``model``; ties stay ties.

    All transforms replace parameters (`replace_parameter`) instead of writing into them, so quantising a copy costs the
    memory of the new tensors alone. `own` ends the sharing.
    """
    shared: dict[int, torch.Tensor] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(b): b.detach() for b in model.buffers()}
    return copy.deepcopy(model, shared)


def own(model: nn.Module, original: nn.Module) -> None:
    """Give ``model`` its own copy of every tensor that it still shares with ``original``."""
    theirs = {t.untyped_storage().data_ptr() for t in [*original.parameters(), *original.buffers()] if t.numel()}
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in theirs:
            tensor.data = tensor.data.clone()  # the tensor objects are the clone's own, only their storage is shared
