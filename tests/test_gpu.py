"""The library on a CUDA device: integer results are those of the CPU, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qoqlab import affine, kv, offload, pipeline, progressive, reference
from qoqlab.grids import Zero
from qoqlab.recipes import PAPER

from .families import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 2, shape[-1])


def assert_same(on_gpu: object, on_cpu: object) -> None:
    """Every tensor of two quantised values is equal."""
    for name, value in vars(on_cpu).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(on_gpu, name).cpu(), value), name


@pytest.mark.parametrize("zero", Zero)
def test_codes_and_scales_equal_the_cpus(zero: Zero) -> None:
    w = random(256, 512)
    assert_same(progressive.quantize(w.cuda(), 128, zero), progressive.quantize(w, 128, zero))
    assert_same(affine.quantize_per_channel_u4(w.cuda(), zero), affine.quantize_per_channel_u4(w, zero))
    assert_same(affine.quantize_per_token_s8(w.cuda()), affine.quantize_per_token_s8(w))
    assert_same(kv.quantize_kv4(w.cuda()), kv.quantize_kv4(w))


def test_the_matmul_equals_the_cpus() -> None:
    x, w = random(33, 2048), random(96, 2048, seed=1)
    for quantized in (progressive.quantize(w), affine.quantize_per_channel_u4(w)):
        moved = type(quantized)(**{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in vars(quantized).items()})
        a = affine.quantize_per_token_s8(x)
        total = reference.w4a8_accumulate(a.codes.cuda(), moved)
        assert torch.equal(total.cpu(), reference.w4a8_accumulate(a.codes, quantized))
        assert torch.equal(reference.w4a8_matmul(x.cuda(), moved).cpu(), reference.w4a8_matmul(x, quantized))


@pytest.mark.parametrize("preset", sorted({*PAPER, "qoq-g128-gptq", "qoq-g128-search"} - {"fp16"}))
def test_a_model_is_quantised_where_it_is(preset: str) -> None:
    model = build("llama", hidden_size=128, intermediate_size=256, head_dim=64)
    ids = torch.randint(0, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    on_cpu = pipeline.quantize(model, preset, ids, progress=False)
    on_gpu = pipeline.quantize(model.cuda(), preset, ids, progress=False)
    assert all(t.is_cuda for t in on_gpu.model.state_dict().values())
    a, b = on_cpu.model(ids).logits, on_gpu.model(ids.cuda()).logits.cpu()
    # searches may break ties differently in the last bit, so only the quality is compared
    exact = model(ids.cuda()).logits.cpu()
    assert (b - exact).norm() < 1.2 * (a - exact).norm()


@pytest.mark.parametrize("preset", ["rtn-w4a8kv4-g128", "qoq-g128"])
def test_blocks_from_disk_give_what_a_model_on_the_gpu_gives(preset: str, tmp_path: Path) -> None:
    model = build("llama", hidden_size=128, intermediate_size=256, head_dim=64)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    opened = offload.open_model(tmp_path, device="cuda", home="cpu")
    from_disk = pipeline.quantize(opened, preset, ids, inplace=True, progress=False).model
    in_memory = pipeline.quantize(model.cuda(), preset, ids, progress=False).model
    ours, theirs = from_disk.state_dict(), in_memory.state_dict()
    assert ours.keys() == theirs.keys()
    assert not any(t.is_cuda for t in ours.values())
    # embedding, norms and rotations are computed at home, so what passes through them may differ in the last bit
    integers = [name for name, t in theirs.items() if not t.is_floating_point()]
    differing = sum(int((ours[n] != theirs[n].cpu()).sum()) for n in integers)
    assert differing <= 0.01 * sum(theirs[n].numel() for n in integers)
