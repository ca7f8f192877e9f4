"""What passes through a model, kept and reduced."""

from __future__ import annotations

import pytest
import torch

from qoqlab import attention, capture
from qoqlab.architecture import SITES, describe

from .families import FAMILIES, build, logits, random_ids

IDS = random_ids(5, 12)


def block_outputs(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states before each block and after the last, as transformers reports them (the last one is normalised)."""
    with torch.no_grad():
        return list(model(ids, use_cache=False, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_inputs_are_the_embeddings_in_batches(family: str) -> None:
    model = build(family)
    batches = capture.first_inputs(model, IDS, batch_size=2)
    assert [len(b.hidden) for b in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([b.hidden for b in batches]), model.model.embed_tokens(IDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_run_alone_as_they_do_in_the_model(family: str, our_attention) -> None:
    model = our_attention(build(family))
    states = block_outputs(model, IDS)
    batches = capture.first_inputs(model, IDS)
    first = torch.cat([capture.run_block(describe(model).blocks[0], b) for b in batches])
    torch.testing.assert_close(first, states[1], rtol=1e-6, atol=1e-6)
    batches = [capture.Batch(capture.run_block(describe(model).blocks[0], b), b.arguments) for b in batches]
    last = torch.cat([capture.run_block(describe(model).blocks[1], b) for b in batches])
    torch.testing.assert_close(model.model.norm(last), states[2], rtol=1e-5, atol=1e-5)


def test_first_inputs_leave_no_hook_behind() -> None:
    model = build("llama")
    capture.first_inputs(model, IDS)
    assert not model.model.layers[0]._forward_pre_hooks
    assert bool(torch.isfinite(logits(model, IDS)).all())


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = build("llama")

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    model.model.embed_tokens.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        capture.first_inputs(model, IDS)
    assert not model.model.layers[0]._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_a_direct_computation(family: str, our_attention) -> None:
    model = our_attention(build(family))
    block = describe(model).blocks[0]
    batches = capture.first_inputs(model, IDS, batch_size=2)
    seen = capture.observe(block, batches, keep=1000, hessian=True)

    direct: dict[str, torch.Tensor] = {}
    with capture.taps(
        block, lambda site, x: direct.__setitem__(site, x), lambda *qkv: direct.update(zip("qkv", qkv, strict=True))
    ):
        capture.run_block(block, capture.first_inputs(model, IDS, batch_size=5)[0])
    x = block.input_norm(model.model.embed_tokens(IDS)).flatten(0, 1)
    torch.testing.assert_close(direct["qkv"], x, rtol=1e-5, atol=1e-6)
    for site in SITES:
        x = direct[site]
        torch.testing.assert_close(seen.absmax[site], x.abs().amax(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen.sample[site], x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.hessian[site], x.T @ x, rtol=1e-4, atol=1e-4)
    for found, name in ((seen.queries, "q"), (seen.keys, "k"), (seen.values, "v")):
        torch.testing.assert_close(found, direct[name].abs().amax((0, 2)), rtol=1e-5, atol=1e-6)
    assert seen.queries.shape == (4, 16) and seen.keys.shape == (2, 16)


@pytest.mark.parametrize("keep", [1, 7, 30, 60])
def test_the_sample_is_bounded(keep: int, our_attention) -> None:
    model = our_attention(build("llama"))
    seen = capture.observe(describe(model).blocks[0], capture.first_inputs(model, IDS, batch_size=5), keep=keep)
    assert all(1 <= len(rows) <= keep for rows in seen.sample.values())


def test_hessians_are_only_made_on_demand(our_attention) -> None:
    model = our_attention(build("llama"))
    assert capture.observe(describe(model).blocks[0], capture.first_inputs(model, IDS)).hessian == {}


def test_taps_restore_the_observer(our_attention) -> None:
    block = describe(our_attention(build("llama"))).blocks[0]
    mine = lambda *_: None  # noqa: E731
    attention.state(block.attention).observer = mine
    with pytest.raises(RuntimeError), capture.taps(block, print, print):
        raise RuntimeError
    assert attention.state(block.attention).observer is mine
    assert not any(linear._forward_pre_hooks for _, linear in block.linears())


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_tensors(family: str) -> None:
    model = build(family)
    before = logits(model, IDS)
    found = capture.layer_tensors(model, IDS[:1], layer=1)
    widths = {"qkv": 64, "o": 64, "gate_up": 64, "down": 128}
    assert {site: tuple(found[site].shape) for site in SITES} == {site: (12, k) for site, k in widths.items()}
    assert {n: tuple(found[n].shape) for n in ("queries", "keys", "values")} == {
        "queries": (4, 12, 16),
        "keys": (2, 12, 16),
        "values": (2, 12, 16),
    }
    # values are not rotated by RoPE, so they can be recomputed from the layer's input
    v = torch.nn.functional.linear(found["qkv"], *_weight_and_bias(model.model.layers[1].self_attn.v_proj))
    torch.testing.assert_close(found["values"], v.view(12, 2, 16).transpose(0, 1), rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation != attention.NAME
    assert not any(hasattr(layer.self_attn, "qoq") for layer in model.model.layers)
    assert torch.equal(logits(model, IDS), before)


def _weight_and_bias(linear: torch.nn.Linear):
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


@pytest.mark.parametrize("layer", [-1, 2])
def test_layer_tensors_refuses_a_layer_out_of_range(layer: int) -> None:
    with pytest.raises(IndexError, match=rf"layer: {layer} is not in 0\.\.1"):
        capture.layer_tensors(build("llama"), IDS, layer)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.int64), ValueError, "ids: expected non-empty int64 tokens"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"ids: expected non-empty int64 tokens \[n, length\].*shape 4"),
        (torch.zeros(1, 4, dtype=torch.int32), ValueError, "ids: expected non-empty int64 tokens.*int32"),
        (torch.zeros(1, 4), TypeError, "ids: expected int64 token ids, got torch.float32"),
        (torch.full((1, 4), 128), ValueError, r"ids: token ids must lie in 0\.\.127, got 128\.\.128"),
        (torch.full((1, 4), -1), ValueError, r"ids: token ids must lie in 0\.\.127, got -1\.\.-1"),
        ([[1, 2]], TypeError, "ids: expected a torch.Tensor of token ids"),
    ],
)
def test_tokens_are_checked(ids: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        capture.require_ids("ids", ids, 128)
