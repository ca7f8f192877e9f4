"""The library on a CUDA device: integer results are those of the CPU, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qoqlab import affine, baselines, comparison, kv, offload, outliers, pipeline, progressive, recipes, reference, steps
from qoqlab.grids import INT4, INT8, UINT4, UINT8, Zero
from qoqlab.kv import Keys, KVFormat
from qoqlab.recipes import Recipe, Step
from qoqlab.schemes import ActivationFormat, WeightFormat, WeightKind, assemble, quantize_activations

from .families import build, random_ids, wide

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


def test_planted_outliers_equal_the_cpus() -> None:
    model = build("llama")
    on_cpu, on_gpu = outliers.plant(model, 30.0, 10.0), outliers.plant(model.cuda(), 30.0, 10.0)
    for (name, want), got in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(got.cpu(), want, msg=name)


def test_methods_are_compared_where_the_model_lies() -> None:
    names = [recipe.name for recipe in comparison.resolve("paper")]
    table = comparison.compare(names, wide("llama").cuda(), random_ids(4, 24), random_ids(3, 24, seed=5), progress=False)
    assert table["method"].tolist() == names and table["perplexity"].gt(0).all()


def test_the_matmul_equals_the_cpus() -> None:
    x, w = random(33, 2048), random(96, 2048, seed=1)
    for quantized in (progressive.quantize(w), affine.quantize_per_channel_u4(w)):
        moved = type(quantized)(**{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in vars(quantized).items()})
        a = affine.quantize_per_token_s8(x)
        total = reference.w4a8_accumulate(a.codes.cuda(), moved)
        assert torch.equal(total.cpu(), reference.w4a8_accumulate(a.codes, quantized))
        assert torch.equal(reference.w4a8_matmul(x.cuda(), moved).cpu(), reference.w4a8_matmul(x, quantized))


FORMATS = [
    *[WeightFormat(kind, 64) for kind in WeightKind],
    WeightFormat(WeightKind.GROUP_U4, 32, Zero.SCALED),
    WeightFormat(WeightKind.GROUP_S4, 128, outliers=128),
]


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("ratio", [1.0, 0.85])
def test_every_format_of_weights_equals_the_cpus(form: WeightFormat, ratio: float) -> None:
    w = random(128, 512)
    on_gpu, on_cpu = form.choose(w.cuda(), ratio), form.choose(w, ratio)
    assert_same(on_gpu, on_cpu)
    codes = on_cpu.encode(w)
    assert torch.equal(on_gpu.encode(w.cuda()).cpu(), codes)
    assert torch.equal(assemble(on_gpu, codes.cuda()).dequantize().cpu(), assemble(on_cpu, codes).dequantize())


@pytest.mark.parametrize(
    "form", [ActivationFormat(INT8), ActivationFormat(INT4, 32, ratio=0.9), ActivationFormat(INT4, 128, 128)], ids=str
)
def test_every_format_of_activations_equals_the_cpus(form: ActivationFormat) -> None:
    x = random(3, 5, 512)
    assert_same(quantize_activations(x.cuda(), form), quantize_activations(x, form))


@pytest.mark.parametrize(
    "form", [KVFormat(UINT8, ratio=0.9), KVFormat(UINT4, Keys.CHANNEL, window=4), KVFormat(UINT4)], ids=str
)
def test_every_format_of_keys_equals_the_cpus(form: KVFormat) -> None:
    x = random(2, 3, 18, 64)
    for function in (form.round_keys, form.round_values):
        assert torch.equal(function(x.cuda()).cpu(), function(x))


def stored(result: pipeline.QuantizedModel) -> dict[str, torch.Tensor]:
    """All codes, scales and zeros, on the CPU."""
    return {name: t.cpu() for name, t in result.model.state_dict().items()}


ROTATED = (Step(steps.rotate, {"values": True}), Step(baselines.hadamard_inputs))
DATA_FREE = [
    *[recipes.get(name) for name in recipes.names() if not pipeline.needs_calibration(recipes.get(name))],
    *[Recipe(f"rotated {n}", recipes.get(n).scheme, ROTATED) for n in ("quarot-w4a4kv4", "rtn-w4a8kv4-g128")],
    Recipe("clipped", recipes.get("atom-w4a4kv4-g128").scheme, (Step(baselines.clip_to, {"ratio": 0.85}),)),
]


@pytest.mark.parametrize("recipe", DATA_FREE, ids=lambda recipe: recipe.name)
def test_methods_without_data_give_the_cpus_codes(recipe: Recipe) -> None:
    on_cpu, on_gpu = (stored(pipeline.quantize(wide("llama").to(d), recipe, progress=False)) for d in ("cpu", "cuda"))
    assert on_cpu.keys() == on_gpu.keys()
    for name, tensor in on_cpu.items():
        assert torch.equal(on_gpu[name], tensor), name


def test_smoothing_by_statistics_gives_nearly_the_cpus_codes() -> None:
    """Statistics differ in the last bits of fp32 sums, so few codes may fall on the other side of a boundary."""
    ids = random_ids(4, 32)
    for preset in ("smoothquant-w8a8", "smoothquant-w4a8kv4"):
        pair = [stored(pipeline.quantize(wide("qwen2").to(d), preset, ids, progress=False)) for d in ("cpu", "cuda")]
        codes = [name for name in pair[0] if name.endswith(".codes")]
        assert len(codes) == 14
        for name in codes:
            assert float((pair[0][name] == pair[1][name]).float().mean()) > 0.99, (preset, name)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True)])
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_blocks_that_visit_the_gpu_equal_a_model_that_lives_there(
    home: str, family: str, tied: bool, tmp_path: Path
) -> None:
    """From disk and from main memory; embedding, head and blocks rest at home."""
    model, ids = wide(family, tied=tied, num_hidden_layers=3), random_ids(4, 32)
    model.save_pretrained(tmp_path)
    expected = stored(
        pipeline.quantize(wide(family, tied=tied, num_hidden_layers=3).cuda(), "qoq-g128", ids, progress=False)
    )
    visits = [offload.open_model(tmp_path, device="cuda", home=home)]
    if home == "cpu":
        visits.append(offload.work_on(model, "cuda"))
    for visitor in visits:
        result = pipeline.quantize(visitor, "qoq-g128", ids, inplace=True, progress=False)
        assert {t.device.type for t in result.model.state_dict().values()} == {home}
        found = stored(result)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        assert torch.isfinite(result.model(ids.to(home)).logits).all()


def test_a_tied_head_stays_tied_where_nothing_unties_it() -> None:
    model = wide("qwen3", tied=True)
    result = pipeline.quantize(offload.work_on(model, "cuda"), "smoothquant-w8a8", random_ids(2, 16), inplace=True)
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
    assert result.model.lm_head.weight.device.type == "cpu"


@pytest.mark.parametrize(
    "preset",
    [
        *("rtn-w4a8kv4-g128", "qoq-g128", "qoq-g128-gptq", "qoq-g128-search", "qoq-plus", "qoq-per-channel"),
        *("awq-w4a8kv4-g128", "awq-w4a16-g128", "gptq-w4a16-g128", "quarot-w4a4kv4", "quarot-w4a8kv4"),
        *("atom-w4a4kv4-g128", "atom-w4a8kv4-g128", "kivi-kv4"),
    ],
)
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
