"""Where a model keeps its parts, and the copy that shares its tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qoqlab.architecture import (
    LINEARS,
    SITES,
    SUPPORTED,
    clone,
    describe,
    replace_parameter,
    require_finite_weights,
)

from .families import FAMILIES, build, logits, random_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_every_family(family: str) -> None:
    model = build(family, kv_heads=2)
    architecture = describe(model)
    assert type(model).__name__ in SUPPORTED
    assert len(architecture.blocks) == 2
    assert architecture.embedding is model.model.embed_tokens
    assert architecture.head is model.lm_head
    assert architecture.final_norm is model.model.norm
    for index, block in enumerate(architecture.blocks):
        layer = model.model.layers[index]
        assert (block.index, block.heads, block.kv_heads, block.head_dim) == (index, 4, 2, 16)
        assert block.attention is layer.self_attn
        assert block.input_norm is layer.input_layernorm and block.mlp_norm is layer.post_attention_layernorm
        assert [role for role, _ in block.linears()] == ["q", "k", "v", "o", "gate", "up", "down"]
        assert all(isinstance(linear, nn.Linear) for _, linear in block.linears())
        for role in LINEARS:
            assert model.get_submodule(block.name(role)) is block.linear(role)
        assert (block.key_norm is not None) == (block.query_norm is not None) == (family == "qwen3")


def test_every_linear_reads_exactly_one_site() -> None:
    assert sorted(role for roles in SITES.values() for role in roles) == sorted(LINEARS)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_linear_of_a_block_is_forgotten(family: str) -> None:
    block = describe(build(family)).blocks[0]
    found = {id(m) for m in block.layer.modules() if isinstance(m, nn.Linear)}
    assert found == {id(linear) for _, linear in block.linears()}


@pytest.mark.parametrize("tied", [False, True])
def test_ties_are_seen_and_cut(tied: bool) -> None:
    model = build("llama", tied=tied)
    architecture = describe(model)
    assert architecture.tied is tied
    before = logits(model, random_ids())
    architecture.untie()
    assert not architecture.tied and model.config.tie_word_embeddings is False
    assert architecture.head.weight.data_ptr() != architecture.embedding.weight.data_ptr()
    assert torch.equal(logits(model, random_ids()), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_clone_shares_every_tensor_and_no_module(family: str, tied: bool) -> None:
    model = build(family, tied=tied)
    twin = clone(model)
    assert type(twin) is type(model) and describe(twin).tied is tied
    originals = dict(model.named_parameters()) | dict(model.named_buffers())
    copies = dict(twin.named_parameters()) | dict(twin.named_buffers())
    assert originals.keys() == copies.keys()
    assert all(copies[name].data_ptr() == originals[name].data_ptr() for name in originals)
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
    assert twin.config is not model.config


def test_replacing_a_clones_parameter_leaves_the_original_alone() -> None:
    model = build("llama")
    twin = clone(model)
    before = model.lm_head.weight.detach().clone()
    replace_parameter(twin.lm_head, "weight", torch.zeros_like(before))
    assert torch.equal(model.lm_head.weight, before) and not bool(twin.lm_head.weight.any())
    assert not twin.lm_head.weight.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_weights_are_named(value: float) -> None:
    model = build("qwen2")
    require_finite_weights(describe(model))
    model.model.layers[1].self_attn.k_proj.bias.data[3] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias: holds"):
        require_finite_weights(describe(model))


def test_an_unknown_class_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"model: Linear is not a supported architecture; supported: LlamaForCausalLM"):
        describe(nn.Linear(2, 2))
