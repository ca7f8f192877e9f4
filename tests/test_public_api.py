"""The names and meanings that outside code relies on."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pandas as pd
import pytest
import torch

import qoqlab
from qoqlab.progressive import Zero

from .families import build, logits, random_ids, wide

IDS = random_ids(3, 16)


def weight(n: int = 64, k: int = 256) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


# --- importing ------------------------------------------------------------------------------------------------------------


def in_a_new_interpreter(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_loads_nothing_heavy() -> None:
    heavy = ["transformers", "plotly", "ipywidgets", "numba", "safetensors", "tqdm", "matplotlib"]
    code = f"import sys, qoqlab; print([name for name in {heavy} if name in sys.modules])"
    assert in_a_new_interpreter(code).strip() == "[]"


def test_importing_is_quick_beyond_torch() -> None:
    code = "import torch, time; t = time.perf_counter(); import qoqlab, qoqlab.reference; print(time.perf_counter() - t)"
    assert float(in_a_new_interpreter(code)) < 1


def test_the_arithmetic_needs_no_transformers() -> None:
    code = (
        "import sys, torch, qoqlab\n"
        "w = qoqlab.progressive.quantize(torch.randn(32, 128))\n"
        "qoqlab.reference.w4a8_matmul(torch.randn(2, 128), w)\n"
        "qoqlab.kv.quantize_kv4(torch.randn(2, 64))\n"
        "qoqlab.packing.pack_qserve(w.codes)\n"
        "print('transformers' in sys.modules)"
    )
    assert in_a_new_interpreter(code).strip() == "False"


@pytest.mark.parametrize("name", qoqlab.__all__)
def test_every_listed_name_exists(name: str) -> None:
    assert getattr(qoqlab, name) is not None
    assert name in dir(qoqlab)


def test_every_module_can_be_imported() -> None:
    for module in pkgutil.iter_modules(qoqlab.__path__):
        importlib.import_module(f"qoqlab.{module.name}")


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'qoqlab' has no attribute 'quantise'"):
        qoqlab.quantise  # noqa: B018
    assert not hasattr(qoqlab, "nothing")


def test_the_package_states_its_version() -> None:
    assert isinstance(qoqlab.__version__, str) and qoqlab.__version__.count(".") == 2


def test_kernels_can_be_imported() -> None:
    import qoqlab_kernels

    assert qoqlab_kernels.__doc__


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (qoqlab.load_tiny, []),
        (qoqlab.load_text, ["name", "split"]),
        (qoqlab.tokens, ["tokenizer", "text", "length"]),
        (qoqlab.quantize, ["model", "recipe", "calibration", "inplace", "progress"]),
        (qoqlab.perplexity, ["model", "ids"]),
        (qoqlab.save, ["quantized", "folder"]),
        (qoqlab.load, ["folder"]),
        (qoqlab.recipes.names, []),
        (qoqlab.recipes.get, ["name"]),
        (qoqlab.progressive.quantize, ["weight", "group_size", "zero"]),
        (qoqlab.affine.quantize_per_channel_u4, ["weight"]),
        (qoqlab.affine.quantize_per_token_s8, ["x"]),
        (qoqlab.kv.quantize_kv4, ["x"]),
        (qoqlab.outliers.plant, ["model", "activation_ratio", "key_ratio", "seed"]),
        (qoqlab.packing.pack_qserve, ["codes"]),
        (qoqlab.packing.unpack_qserve, ["packed"]),
        (qoqlab.reference.w4a8_matmul, ["x", "weight"]),
        (qoqlab.reference.kv4_attention, ["query", "keys", "values", "scale"]),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else "",
)
def test_parameters_come_in_the_promised_order(function, parameters: list[str]) -> None:
    signature = list(inspect.signature(function).parameters.values())
    assert [p.name for p in signature[: len(parameters)]] == parameters
    assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in signature[len(parameters) :])
    assert function.__doc__


# --- the short way --------------------------------------------------------------------------------------------------------


def test_the_first_page_of_the_manual() -> None:
    model, tokenizer = qoqlab.load_tiny()
    text = qoqlab.load_text("python-docs", "calibration")
    ids = qoqlab.tokens(tokenizer, text, 64)[:2]
    assert isinstance(text, str) and ids.dtype == torch.int64 and ids.shape == (2, 64)
    q = qoqlab.quantize(model, "rtn-w4a8kv4-g128", calibration=ids, inplace=False, progress=False)
    assert isinstance(q, qoqlab.QuantizedModel)
    assert isinstance(q.report, pd.DataFrame) and len(q.report) == len(model.model.layers)
    exact, rounded = qoqlab.perplexity(model, ids), qoqlab.perplexity(q, ids)
    assert isinstance(exact, float) and isinstance(rounded, float) and 1 < exact < rounded


def test_quantize_takes_a_name_or_a_recipe() -> None:
    model = wide("llama")
    by_name = qoqlab.quantize(model, "qoq-g128", calibration=IDS, inplace=False, progress=False)
    by_recipe = qoqlab.quantize(model, qoqlab.recipes.get("qoq-g128"), calibration=IDS, progress=False)
    assert isinstance(by_recipe, qoqlab.QuantizedModel) and by_name.recipe == by_recipe.recipe
    assert torch.equal(logits(by_name.model, IDS), logits(by_recipe.model, IDS))
    assert {"stage", "layer"} <= set(by_name.report.columns)


def test_the_presets() -> None:
    names = qoqlab.recipes.names()
    assert {"fp16", "qoq-g128", "qoq-per-channel", "rtn-w4a8kv4-g128", "rtn-w4a8kv4"} <= set(names)
    assert all(isinstance(qoqlab.recipes.get(name), qoqlab.Recipe) for name in names)


def test_save_and_load(tmp_path) -> None:
    q = qoqlab.quantize(wide("llama"), "qoq-per-channel", calibration=IDS, progress=False)
    assert qoqlab.save(q, tmp_path) is None
    loaded = qoqlab.load(str(tmp_path))
    assert isinstance(loaded, qoqlab.QuantizedModel)
    assert torch.equal(logits(loaded.model, IDS), logits(q.model, IDS))


def test_plant() -> None:
    model = build("llama")
    planted = qoqlab.outliers.plant(model, activation_ratio=20.0, key_ratio=5.0, seed=3)
    torch.testing.assert_close(logits(planted, IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)


# --- quantised values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [Zero.INTEGER, Zero.SCALED])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_progressive_weights(group_size: int, zero: Zero) -> None:
    x = weight()
    w = qoqlab.progressive.quantize(x, group_size=group_size, zero=zero)
    groups = 256 // group_size
    assert w.codes.dtype == torch.uint8 and w.codes.shape == (64, 256) and int(w.codes.max()) <= 15
    assert w.group_scales.dtype == torch.int8 and w.group_scales.shape == (64, groups)
    assert w.group_zeros.dtype == (torch.uint8 if zero is Zero.INTEGER else torch.int8)
    assert w.group_zeros.shape == (64, groups)
    assert w.channel_scales.dtype == torch.float16 and w.channel_scales.shape == (64,)
    assert w.int8().dtype == torch.int8 and w.int8().shape == (64, 256)
    s, z = (t.repeat_interleave(group_size, 1).int() for t in (w.group_scales, w.group_zeros))
    meaning = (w.codes.int() - z) * s if zero is Zero.INTEGER else w.codes.int() * s - z
    assert torch.equal(meaning, w.int8().int())
    limit = 119 if zero is Zero.INTEGER else 120
    assert torch.equal(w.channel_scales, (x.abs().amax(1) / limit).half())
    assert torch.equal(w.dequantize(torch.float32), w.int8().float() * w.channel_scales.float()[:, None])


def test_the_default_is_groups_of_128_and_an_integer_zero() -> None:
    a, b = qoqlab.progressive.quantize(weight()), qoqlab.progressive.quantize(weight(), group_size=128, zero=Zero.INTEGER)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.group_zeros, b.group_zeros)
    assert qoqlab.progressive.Zero is Zero and {z.name for z in Zero} == {"INTEGER", "SCALED"}


def test_per_channel_weights() -> None:
    p = qoqlab.affine.quantize_per_channel_u4(weight())
    assert p.codes.dtype == torch.uint8 and int(p.codes.max()) <= 15
    assert p.scales.dtype == torch.float16 and p.scales.shape == p.zeros.shape == (64,)
    expected = p.scales.float()[:, None] * (p.codes.float() - p.zeros.float()[:, None])
    assert torch.equal(p.dequantize(torch.float32), expected)


def test_per_token_activations() -> None:
    x = torch.randn(2, 3, 64)
    a = qoqlab.affine.quantize_per_token_s8(x)
    assert a.codes.dtype == torch.int8 and a.codes.shape == x.shape
    assert a.scales.dtype == torch.float16 and a.scales.shape == (2, 3)
    assert int(a.codes.abs().max()) == 127
    assert torch.equal(a.dequantize(torch.float32), a.codes.float() * a.scales.float()[..., None])


def test_kv_codes() -> None:
    x = torch.randn(2, 3, 5, 64)
    c = qoqlab.kv.quantize_kv4(x)
    assert c.codes.dtype == torch.uint8 and c.codes.shape == x.shape and int(c.codes.max()) <= 15
    assert c.scales.dtype == c.zeros.dtype == torch.float16 and c.scales.shape == c.zeros.shape == (2, 3, 5)
    step = (x.amax(-1) - x.amin(-1)) / 15
    assert bool(((c.dequantize(torch.float32) - x).abs() <= 0.51 * step[..., None] + 1e-3).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_quantised_value_dequantises(dtype: torch.dtype) -> None:
    x = weight()
    values = [
        qoqlab.progressive.quantize(x),
        qoqlab.progressive.quantize(x, zero=Zero.SCALED),
        qoqlab.affine.quantize_per_channel_u4(x),
        qoqlab.affine.quantize_per_token_s8(x),
        qoqlab.kv.quantize_kv4(x),
    ]
    for value in values:
        assert value.dequantize(dtype).dtype == dtype and value.dequantize(dtype).shape == x.shape
        assert torch.equal(value.dequantize(dtype), value.dequantize(torch.float32).to(dtype))
        assert float((value.dequantize(torch.float32) - x).abs().max()) < 0.5


# --- layouts and references -----------------------------------------------------------------------------------------------


def test_qserve_packing() -> None:
    codes = torch.randint(16, (64, 128), dtype=torch.uint8)
    packed = qoqlab.packing.pack_qserve(codes)
    assert packed.dtype == torch.int8 and packed.shape == (64, 64)
    assert torch.equal(qoqlab.packing.unpack_qserve(packed), codes)


@pytest.mark.parametrize("kind", ["progressive", "per-channel"])
def test_w4a8_matmul(kind: str) -> None:
    w = qoqlab.progressive.quantize(weight()) if kind == "progressive" else qoqlab.affine.quantize_per_channel_u4(weight())
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    y = qoqlab.reference.w4a8_matmul(x, w)
    assert y.dtype == torch.float16 and y.shape == (5, 64)
    exact = qoqlab.affine.quantize_per_token_s8(x).dequantize(torch.float64) @ w.dequantize(torch.float64).T
    assert float((y.double() - exact).norm() / exact.norm()) < 1e-3


def test_kv4_attention() -> None:
    q, k, v = torch.randn(2, 8, 64), torch.randn(2, 2, 7, 64), torch.randn(2, 2, 7, 64)
    out = qoqlab.reference.kv4_attention(q, k, v, 0.2)
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, scale=0.2, enable_gqa=True)[:, :, 0]
    assert out.shape == q.shape and out.dtype == q.dtype
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    codes = [qoqlab.kv.quantize_kv4(t) for t in (k, v)]
    rounded = qoqlab.reference.kv4_attention(q, *codes, 0.2)
    assert torch.equal(rounded, qoqlab.reference.kv4_attention(q, *(c.dequantize(torch.float32) for c in codes), 0.2))
