"""Running a recipe: what is touched, what is reported, what is repeatable."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stderr
from pathlib import Path

import pandas as pd
import pytest
import torch

from qoqlab import attention, quantize, recipes, steps
from qoqlab.architecture import describe
from qoqlab.capture import run_block
from qoqlab.grids import INT8, UINT4
from qoqlab.pipeline import REPORT_COLUMNS, peak_bytes, sqnr_db
from qoqlab.recipes import PER_CHANNEL, PROGRESSIVE, Recipe, Step
from qoqlab.runtime import QuantLinear
from qoqlab.schemes import Scheme

from .families import FAMILIES, build, cast_parameters, logits, only, random_ids, relative_error, wide

IDS = random_ids(4, 24)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model, copied."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# --- the caller's model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("preset", ["fp16", "rtn-w4a8kv4", "qoq-g128", "qoq-g128-gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_is_untouched(family: str, preset: str, tied: bool) -> None:
    model = wide(family, tied=tied)
    model.train()
    before, config, expected = snapshot(model), model.config.to_dict(), logits(model, IDS)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    modules = {name: type(module) for name, module in model.named_modules()}
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    result = quantize(model, preset, IDS, progress=False)
    assert result.model is not model
    assert same(snapshot(model), before) and torch.equal(logits(model, IDS), expected)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert {name: p.requires_grad for name, p in model.named_parameters()} == gradients
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert model.config.to_dict() == config and model.training
    assert model.config._attn_implementation != attention.NAME
    assert not any(hasattr(layer.self_attn, "qoq") for layer in model.model.layers)
    assert describe(model).tied is tied


@pytest.mark.parametrize("family", FAMILIES)
def test_inplace_really_changes_the_model(family: str) -> None:
    expected = quantize(wide(family), "qoq-g128", IDS, progress=False)
    model = wide(family)
    result = quantize(model, "qoq-g128", IDS, inplace=True, progress=False)
    assert result.model is model and not model.training
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
    assert same(snapshot(model), snapshot(expected.model))
    assert model.config._attn_implementation == attention.NAME


def test_a_quantised_model_is_a_usable_causal_lm(quantized) -> None:
    model = quantized("llama", "qoq-g128").model
    out = model.generate(random_ids(1, 5), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 9) and torch.equal(out[:, :5], random_ids(1, 5))
    loss = model(IDS, labels=IDS).loss
    assert bool(torch.isfinite(loss))


def test_quantised_linears_follow_the_scheme(quantized) -> None:
    for preset in recipes.names():
        result = quantized("qwen2", preset)
        weights = result.recipe.scheme.weights
        for block in describe(result.model).blocks:
            for _, linear in block.linears():
                assert isinstance(linear, QuantLinear) == (weights is not None)
                if weights is not None:
                    scheme = result.recipe.scheme
                    assert linear.activations == scheme.activations
                    shape = linear.out_features, linear.in_features
                    assert linear.form.layout(*shape) == scheme.weights.layout(*shape)
            if preset != "fp16":
                assert block.attention.qoq.grid == result.recipe.scheme.kv
        assert type(result.model.lm_head) is torch.nn.Linear


# --- the report -----------------------------------------------------------------------------------------------------------


def test_the_report_has_a_row_per_layer_and_stage(quantized) -> None:
    report = quantized("llama", "qoq-g128-gptq").report
    stages = ["round to nearest", "rotate", "reorder", "smooth_attention", "smooth_output", "clip", "gptq"]
    assert isinstance(report, pd.DataFrame) and list(report.columns) == REPORT_COLUMNS
    assert report.stage.tolist() == stages * 2
    assert report.layer.tolist() == [0] * 7 + [1] * 7
    numbers = report[["weight_mse", "weight_nmse", "output_sqnr_db", "seconds"]].to_numpy()
    assert torch.isfinite(torch.tensor(numbers)).all()
    assert (report.weight_mse > 0).all() and (report.seconds >= 0).all()
    # 4 bits over +-3 sigma: step 0.4 sigma, squared error 0.4**2 / 12 = 0.013 of the power (GPTQ trades it for output)
    assert report.weight_nmse.between(0.003, 0.05).all()
    assert report.output_sqnr_db.between(5, 40).all()


def test_report_numbers_are_what_they_say() -> None:
    model = wide("llama")
    result = quantize(model, "rtn-w4a8kv4-g128", IDS[:1], progress=False)
    row = result.report.iloc[0]
    exact = [linear.weight.detach() for _, linear in describe(model).blocks[0].linears()]
    rounded = [linear.quantized.dequantize() for _, linear in describe(result.model).blocks[0].linears()]
    error = sum(float((a - b).double().square().sum()) for a, b in zip(exact, rounded, strict=True))
    power, count = sum(float(a.double().square().sum()) for a in exact), sum(a.numel() for a in exact)
    assert row.weight_mse == pytest.approx(error / count, rel=1e-6)
    assert row.weight_nmse == pytest.approx(error / power, rel=1e-6)
    attention.install(model)
    with torch.no_grad():
        y, q = (m(IDS[:1], use_cache=False, output_hidden_states=True).hidden_states[:2] for m in (model, result.model))
    assert row.output_sqnr_db == pytest.approx(sqnr_db(y[1] - y[0], q[1] - y[1]), rel=1e-4)


def test_without_calibration_there_is_no_output_error() -> None:
    result = quantize(wide("llama"), "rtn-w4a8kv4-g128", progress=False)
    assert len(result.report) == 2 and result.report.output_sqnr_db.isna().all()
    assert (result.report.weight_mse > 0).all()
    assert same(snapshot(result.model), snapshot(quantize(wide("llama"), "rtn-w4a8kv4-g128", IDS, progress=False).model))


def test_the_unquantised_recipe_reports_nothing_and_changes_nothing() -> None:
    model = build("llama")
    result = quantize(model, "fp16")
    assert result.report.empty and list(result.report.columns) == REPORT_COLUMNS
    assert torch.equal(logits(result.model, IDS), logits(model, IDS))


def test_later_layers_are_calibrated_on_exact_inputs() -> None:
    """As in the original: what a layer sees during calibration does not depend on how its predecessor was rounded."""
    scheme = Scheme(PROGRESSIVE, INT8, UINT4)
    clip = Step(steps.clip)
    rough = quantize(wide("llama"), only(clip, scheme=scheme), IDS, progress=False)
    fine = wide("llama")
    quantize(fine, only(), IDS, inplace=True, progress=False)
    result = quantize(fine, only(clip, scheme=scheme), IDS, progress=False)
    assert same(snapshot(rough.model), snapshot(result.model))


def test_progress_can_be_switched_off() -> None:
    for progress in (True, False):
        stream = io.StringIO()
        with redirect_stderr(stream):
            quantize(wide("llama"), "rtn-w4a8kv4", progress=progress)
        assert ("rtn-w4a8kv4" in stream.getvalue()) is progress


# --- repeatability and precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [name for name in recipes.names() if name != "fp16"])
def test_two_runs_are_bit_identical(preset: str, quantized) -> None:
    again = quantize(wide("qwen3"), preset, IDS, progress=False)
    first = quantized("qwen3", preset)
    assert same(snapshot(again.model), snapshot(first.model))
    columns = [c for c in REPORT_COLUMNS if c != "seconds"]
    pd.testing.assert_frame_equal(again.report[columns], first.report[columns], check_exact=True)


def test_global_random_state_is_neither_used_nor_changed(quantized) -> None:
    model = wide("llama")
    torch.manual_seed(123)
    before = torch.get_rng_state()
    result = quantize(model, "qoq-g128", IDS, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(snapshot(result.model), snapshot(quantized("llama", "qoq-g128").model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_precisions_keep_their_dtype(family: str, dtype: torch.dtype) -> None:
    model = cast_parameters(wide(family), dtype)
    result = quantize(model, "qoq-g128", IDS, progress=False)
    assert all(p.dtype == dtype for p in result.model.parameters())
    actual = logits(result.model, IDS)
    assert actual.dtype == dtype
    assert relative_error(actual, logits(wide(family), IDS)) < 0.5
    assert result.report.output_sqnr_db.notna().all()


def test_a_rotated_16_bit_model_is_rotated_in_fp32() -> None:
    """All steps run in fp32 and round once, so the equivalence holds to the rounding of the weights."""
    model = cast_parameters(wide("llama"), torch.bfloat16)
    changed = quantize(model, only(Step(steps.rotate)), IDS, progress=False).model
    assert relative_error(logits(changed, IDS), logits(model, IDS)) < 0.03


# --- sizes ----------------------------------------------------------------------------------------------------------------


def test_bytes_of_weights_and_cache(quantized, wide_model) -> None:
    exact, rounded = quantized("llama", "fp16"), quantized("llama", "qoq-g128")
    assert exact.weight_bytes() == 2 * sum(p.numel() for p in wide_model("llama").parameters())
    assert rounded.weight_bytes() < 0.6 * exact.weight_bytes()  # the embeddings of a tiny model weigh a lot
    assert exact.kv_bytes_per_token() == 2 * 2 * 2 * 32 * 2  # layers, K and V, KV heads, head dim, bytes
    assert rounded.kv_bytes_per_token() == 2 * 2 * 2 * (32 / 2 + 4)


def test_sqnr() -> None:
    assert sqnr_db(torch.ones(4), torch.zeros(4)) == math.inf
    assert sqnr_db(torch.ones(4), torch.ones(4)) == 0
    assert sqnr_db(torch.full((4,), 10.0), torch.full((4,), 0.1)) == pytest.approx(40)


def test_peak_bytes_add_up() -> None:
    parts = peak_bytes(64, 128, 32, 1000, gptq=True)
    assert parts["total"] == sum(v for name, v in parts.items() if name != "total")
    assert peak_bytes(64, 128, 32, 2000)["activations"] == 2 * parts["activations"]
    assert peak_bytes(64, 128, 32, 1000)["gptq"] == 0 < parts["gptq"]


# --- combinations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    [Scheme(kv=UINT4), Scheme(PER_CHANNEL), Scheme(PER_CHANNEL, INT8), Scheme(None, None, UINT4)],
    ids=str,
)
def test_partial_schemes(scheme: Scheme) -> None:
    model = wide("mistral")
    result = quantize(
        model, Recipe("partial", scheme, (Step(steps.rotate), Step(steps.smooth_attention))), IDS, progress=False
    )
    assert 0 < relative_error(logits(result.model, IDS), logits(model, IDS)) < 0.5
    if scheme.weights is None:
        assert (result.report.weight_mse == 0).all()


@pytest.mark.parametrize("first", [steps.gptq, steps.clip])
def test_decisions_do_not_outlive_the_weights_they_were_made_for(first) -> None:
    """Codes or clipping ratios chosen before a rotation belong to other weights and must not be installed after it."""
    model = wide("llama")
    exact = logits(model, IDS)
    scheme = Scheme(PROGRESSIVE, INT8)
    wrong_order = quantize(model, only(Step(first), Step(steps.rotate), scheme=scheme), IDS, progress=False)
    assert relative_error(logits(wrong_order.model, IDS), exact) < 0.5


SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((family, {}) for family in FAMILIES),
        ("mistral", {"sliding_window": 4}),
        pytest.param("qwen2", SLIDING, id="qwen2-window-in-one-layer"),
        pytest.param("qwen3", SLIDING, id="qwen3-window-in-one-layer"),
    ],
)
def test_every_block_is_calibrated_on_what_it_sees_in_the_model(family: str, config: dict[str, object]) -> None:
    """Qwen2 and Qwen3 may slide a window in some layers only; each block needs its own mask."""
    model = wide(family, **config)
    kept: list[torch.Tensor] = []

    def keep(context: steps.Context) -> None:
        kept.append(torch.cat([run_block(context.block, batch) for batch in context.batches]))

    quantize(model, only(Step(keep)), IDS, progress=False)
    with torch.no_grad():
        first, last = model(IDS, use_cache=False, output_hidden_states=True).hidden_states[1:]
        torch.testing.assert_close(kept[0], first, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.model.norm(kept[1]), last, rtol=1e-4, atol=1e-5)


def test_later_changes_of_the_original_do_not_reach_the_quantised_model() -> None:
    """Training or moving the original afterwards must not touch what was made from it."""
    for preset in ("fp16", "rtn-w4a8kv4"):
        model = wide("llama", tied=True)
        quantized = quantize(model, preset, progress=False).model
        expected = logits(quantized, IDS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        assert torch.equal(logits(quantized, IDS), expected)
        assert describe(quantized).tied


def test_the_readme_quotes_the_record_of_peak_memory() -> None:
    root = Path(__file__).parents[1]
    record = json.loads((root / "data" / "benchmarks" / "peak_memory.json").read_text(encoding="utf-8"))
    readme = " ".join((root / "README.md").read_text(encoding="utf-8").split())
    (row,) = [row for row in record["results"] if row["recipe"] == "qoq-g128"]
    g, tokens = row["geometry"], math.prod(row["calibration"])
    peak, beside = row["peak_bytes"], row["peak_bytes_beside_model"]
    paper = peak_bytes(g["hidden"], g["intermediate"], g["kv_heads"] * g["head_dim"], tokens)
    assert row["blocks"] == g["layers"] and not row["projected"] and record["gpu"] == "NVIDIA H200"
    assert row["peak_bytes_on_paper"] == paper and beside < paper["total"] < 1.15 * beside
    assert row["seconds"] < 300 and peak < 24e9, "what it should take at most"
    assert f"{paper['total'] / 2**30:.2f} GiB on paper" in readme
    assert f"all {g['layers']} blocks of that geometry, with random weights, took {row['seconds']:.0f} s" in readme
    assert (
        f"at most {peak / 1e9:.2f} GB of the GPU, {beside / 1e9:.2f} GB ({beside / 2**30:.1f} GiB) of them beside" in readme
    )
