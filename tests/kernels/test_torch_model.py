"""The baseline on torch's kernels computes a decoder: steps continue prompts, products are products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qoqlab_kernels import measure, torch_model
from qoqlab_kernels.torch_model import FP16, PRODUCTS, Product, TorchModel
from transformers import LlamaConfig, LlamaModel

from qoqlab import reference
from qoqlab.machines import MODELS, Geometry

from .gpus import CAPABILITY

TINY = Geometry("tiny", 2, 128, 4, 2, 256, 96, 32)
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(CAPABILITY < (9, 0), reason="needs a Hopper GPU")])
EVERY = list(dict.fromkeys(product for products in PRODUCTS.values() for product in products))
#: Relative error that 16 bits, 8 bits, and 4 bits in groups leave of a product of normal numbers.
ROUNDED = {"fp16": 2e-3, "w8a8": 0.06, "w8a8kv8": 0.06, "w4a16": 0.12}


def usable(product: Product, device: str) -> Product:
    """The product, or a skip where torch has it on GPUs only."""
    if device == "cpu" and product.name in ("4-bit kernel of torch", "FP8 per token, cuBLASLt"):
        pytest.skip(f"{product.name}: on GPUs only")
    return product


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("product", EVERY, ids=lambda product: product.name)
def test_products(product: Product, device: str) -> None:
    usable(product, device)
    w = torch.randn(96, 256, device=device).half() / 16
    x = torch.randn(33, 256, device=device).to(product.dtype)
    got = product.multiply(torch_model.fused(product.prepare)(x), product.weight(w))
    want = x.float() @ w.float().T
    precision = next(name for name, products in PRODUCTS.items() if product in products)
    assert got.dtype == product.dtype and got.shape == want.shape
    error = float((got.float() - want).norm() / want.norm())
    assert error < ROUNDED[precision]
    assert precision == "fp16" or error > 1e-3, "it is rounded"


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("product", [FP16, *PRODUCTS["w8a8"], *PRODUCTS["w4a16"]], ids=lambda product: product.name)
def test_a_step_continues_a_prompt(product: Product, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of prompts, all at once and as a step on what the others left."""
    torch.manual_seed(0)
    batch, length = 18, 5
    made = TorchModel(TINY, [usable(product, device)] * 4, TINY.layers, device)
    made.gain = torch.linspace(0.5, 2, TINY.hidden, device=device, dtype=made.dtype)
    x = torch.randn(batch, length, TINY.hidden, device=device).to(made.dtype)
    kept, heads = [], made.heads

    def watched(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept.append(heads(*arguments))
        return kept[-1]

    monkeypatch.setattr(made, "heads", watched)
    want = made.prompts(x).view(batch, length, -1)[:, -1].float()
    cache = torch.stack([torch.stack([k, v]) for _, k, v in kept]).transpose(3, 4).contiguous()
    cache[..., -1, :] = torch.nan  # the step's own
    got = made.step(x[:, -1], cache).float()
    # a last bit of attention moves codes; FP8 has three bits behind the first
    assert float((got - want).norm() / want.norm()) < (0.1 if "FP8" in product.name else 0.02) and want.std() > 0.5
    assert not cache.isnan().any()


def test_a_model_with_biases_is_that_of_transformers() -> None:
    """Prompts, and the same tokens one by one with a cache that only the test knows."""
    torch.manual_seed(0)
    shape = replace(TINY, qkv_bias=True)
    made = TorchModel(shape, [replace(FP16, dtype=torch.float32, weight=lambda w: (w.float(),))] * 4, TINY.layers, "cpu")
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
        vocab_size=4, head_dim=32, rms_norm_eps=torch_model.EPS, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    llama = LlamaModel(config)
    sizes = [128, 64, 64]
    for layer, stored in zip(llama.layers, made.weights, strict=True):
        attention, mlp, (qkv, out, gate_up, down) = layer.self_attn, layer.mlp, (w[0] for w in stored)
        assert made.bias is not None and (made.bias != 0).all()
        weights = [*qkv.split(sizes), out, *gate_up.chunk(2), down]
        linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj]
        for linear, weight in zip([*linears, mlp.down_proj], weights, strict=True):
            linear.weight.data = weight.clone()
        for linear, bias in zip(linears[:4], [*made.bias.split(sizes), torch.zeros(128)], strict=True):
            linear.bias.data = bias.clone()
    x, past = torch.randn(2, 5, 128), [[], []]

    def attend(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        past[i].append((k, v))
        keys, values = (torch.stack(t, 2) for t in zip(*past[i], strict=True))
        return reference.kv4_attention(q, keys, values).flatten(1)

    with torch.no_grad():
        want = llama(inputs_embeds=x).last_hidden_state
        steps = [made.step_by(x[:, t], t, attend) for t in range(5)]
        assert torch.allclose(made.prompts(x).view(2, 5, -1), want, atol=2e-5)
        assert torch.allclose(torch.stack(steps, 1), want, atol=2e-5)


def test_what_is_compiled_may_call_what_is_compiled() -> None:
    """`step_time` calls `product_time`."""
    config = torch._dynamo.config
    before = config.recompile_limit

    @torch_model.compiled()
    def inner() -> tuple[int, bool]:
        return config.recompile_limit, config.fail_on_recompile_limit_hit

    @torch_model.compiled()
    def outer() -> list[tuple[int, bool]]:
        return [inner(), inner()]

    assert outer() == [(256, True)] * 2 and config.recompile_limit == before < 256


def test_prompts_beyond_a_window_are_not_measured() -> None:
    with pytest.raises(measure.Unavailable, match="more than the window of 4096"):
        torch_model.prefill_time(MODELS["Mistral-7B"], "fp16", 1, 4097)


def test_the_fastest_way_that_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    us = {0.0: 3.0, 1.0: 2.0}
    monkeypatch.setattr(measure, "graph_time", lambda calls, replays: us[float(calls[0]())])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def fails() -> torch.Tensor:
        raise RuntimeError("not built in\nmore")

    ways = {"slow": lambda: torch.tensor(0.0), "quick": lambda: torch.tensor(1.0), "none": fails}
    found = torch_model.fastest(ways, [FP16], 1)
    assert (found.us, found.attention, found.refused) == (2.0, "quick", {"none": "RuntimeError: not built in"})
    with pytest.raises(measure.Unavailable, match="not built in"):
        torch_model.fastest({"none": fails}, [FP16], 1)
    with pytest.raises(measure.WrongResult, match="bad: results are not finite"):
        torch_model.fastest({"bad": lambda: torch.tensor(torch.nan)}, [FP16], 1)


@pytest.mark.gpu
@pytest.mark.skipif(CAPABILITY < (9, 0), reason="needs a Hopper GPU")
@pytest.mark.parametrize("precision", PRODUCTS)
def test_times(precision: str) -> None:
    model = replace(TINY, head_dim=64, qkv_bias=True, window=66)
    for time in (
        torch_model.step_time(model, precision, 20, 70),
        torch_model.prefill_time(model, precision, 2, 64, layers=2),
    ):
        assert time.us > 0 and len(time.products) == 4 and time.attention
        assert {*time.products} <= {product.name for product in PRODUCTS[precision]}
        assert not [name for name in time.refused if name not in torch_model.FUSED], time.refused
