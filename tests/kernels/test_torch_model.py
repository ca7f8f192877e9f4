"""The baseline on torch's kernels computes a decoder: steps continue prompts, products are products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qoqlab_kernels import torch_model
from qoqlab_kernels.torch_model import FP16, PRODUCTS, Product, TorchModel

from qoqlab.machines import Geometry

from .gpus import CAPABILITY

TINY = Geometry("tiny", 2, 128, 4, 2, 256, 96, 32)
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(CAPABILITY < (9, 0), reason="needs a Hopper GPU")])
EVERY = [product for products in PRODUCTS.values() for product in products]
#: Relative error that 16 bits, 8 bits, and 4 bits in groups leave of a product of normal numbers.
ROUNDED = {"fp16": 2e-3, "w8a8": 0.06, "w4a16": 0.12}


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


@pytest.mark.gpu
@pytest.mark.skipif(CAPABILITY < (9, 0), reason="needs a Hopper GPU")
@pytest.mark.parametrize("precision", PRODUCTS)
def test_times(precision: str) -> None:
    model = replace(TINY, head_dim=64)
    for us, names in (
        torch_model.step_time(model, precision, 20, 70),
        torch_model.prefill_time(model, precision, 2, 64, layers=2),
    ):
        assert us > 0 and len(names) == 4 and {*names} <= {product.name for product in PRODUCTS[precision]}
