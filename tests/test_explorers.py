"""Explorers: every position of the controls gives a figure of the same shape, and the numbers beside it are right."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import torch

import qoqlab
from qoqlab import affine, explorers, kv, roofline
from qoqlab.bundled import spread
from qoqlab.explorers import ACTIVATIONS, SHARED, WEIGHTS, Playground, RecipeLab, back, integer_grid, share_scales
from qoqlab.machines import GPUS, MODELS

PAGES = sorted((Path(__file__).parents[1] / "notebooks" / "explorers").glob("*.ipynb"))


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = qoqlab.load_tiny()
    ids = qoqlab.tokens(tokenizer, qoqlab.load_text("python-docs", "calibration"), 64)
    return {"bundled": model}, spread(ids, 2)


@pytest.fixture(scope="module")
def playground(tiny):
    models, ids = tiny
    return Playground(models, ids[:1])


@pytest.fixture(scope="module")
def lab(tiny):
    models, ids = tiny
    return RecipeLab(models, ids, ids)


@pytest.mark.parametrize("shared", SHARED)
def test_sharing_is_undone(shared):
    x = torch.arange(256.0 * 3).reshape(3, 256)
    rows = share_scales(x, shared)
    assert torch.equal(back(rows, x.shape, shared), x)
    counts = {"whole tensor": 1, "row": 3, "column": 256, "group of 128": 6, "group of 64": 12, "group of 32": 24}
    assert len(rows) == counts[shared]


def test_groups_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="rows of 96 columns do not split into groups of 64"):
        share_scales(torch.zeros(2, 96), "group of 64")
    with pytest.raises(ValueError, match="shared: expected one of"):
        share_scales(torch.zeros(2, 96), "diagonal")


@pytest.mark.parametrize(("bits", "symmetric", "ends"), [(4, True, (-7, 7)), (4, False, (0, 15)), (8, True, (-127, 127))])
def test_grids(bits, symmetric, ends):
    grid = integer_grid(bits, symmetric)
    assert (grid.low, grid.high) == ends


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_bits_out_of_range_are_named(bits):
    with pytest.raises(ValueError, match="bits"):
        integer_grid(bits, True)


@pytest.mark.parametrize("tensor", [*ACTIVATIONS, *WEIGHTS])
def test_every_tensor_draws(playground, tensor):
    figure, table = playground.view("bundled", 1, tensor, shared="group of 32", zero=True)
    assert len(figure.data) == 3 and tensor in figure.layout.title.text and len(table) == 1


def test_playground_agrees_with_the_library(playground, tiny):
    x = playground.tensor("bundled", 2, "input of qkv")
    exact = affine.quantize_per_token_s8(x).dequantize() - x
    _, table = playground.view("bundled", 2, "input of qkv", bits=8, shared="row")
    row = table.iloc[0]
    assert float(row["largest error"]) == pytest.approx(float(exact.abs().max()), rel=5e-3)
    wanted = 10 * torch.log10(x.square().sum() / exact.square().sum())
    assert float(row["signal to error (dB)"]) == pytest.approx(float(wanted), abs=0.06)
    assert float(row["bits per value"]) == pytest.approx(8 + 16 / x.shape[1], abs=6e-4)


def test_more_bits_and_smaller_groups_err_less(playground):
    def quality(**values):
        return float(playground.view("bundled", 2, "down_proj", **values)[1]["signal to error (dB)"].iloc[0])

    assert quality(bits=3) < quality(bits=4) < quality(bits=8)
    assert quality(shared="whole tensor") < quality(shared="row") < quality(shared="group of 32")
    assert quality(bits=4, zero=True) > quality(bits=4, zero=False), "a 16th code is worth something"


def test_keys_are_those_that_the_cache_sees(playground, tiny):
    models, ids = tiny
    keys = qoqlab.capture.layer_tensors(models["bundled"], ids[:1], 0)["keys"]
    assert torch.equal(playground.tensor("bundled", 0, "keys"), keys.movedim(0, 1).flatten(1))
    assert kv.quantize_kv4(keys).codes.shape == keys.shape


def test_recipe_lab_measures_what_it_lists(lab):
    figure, table = lab.view("bundled", clip=False)
    assert list(table["recipe"]) == ["fp16", "round to nearest", "your recipe"]
    assert list(figure.data[0].x) == ["round<br>to nearest", "rotate", "smooth<br>attention"]
    assert list(figure.data[0].y) == [str(i) for i in range(5)]
    assert table["format"].iloc[2] == "W4A8KV4 g128"
    lost = [float(v) for v in table["lost to fp16"].iloc[1:]]
    perplexities = [float(v) for v in table["perplexity"]]
    assert lost[0] == pytest.approx(perplexities[1] - perplexities[0], abs=0.011)


def test_recipe_lab_keeps_results_and_leaves_out_what_has_no_effect(lab):
    before = len(lab._kept)
    lab.view("bundled", clip=False)
    assert len(lab._kept) == before, "nothing new to measure"
    figure, table = lab.view("bundled", rotate=False, cache="16 bits", weights="per channel")
    assert list(figure.data[0].x) == ["round<br>to nearest"], "SmoothAttention is for a quantised cache"
    assert table["format"].iloc[2] == "W4A8KV16"


@pytest.mark.parametrize("gpu", GPUS)
def test_calculator_agrees_with_the_roofline(gpu):
    figure, table = explorers.serving(MODELS, gpu, "Llama-2-7B", 32, 1024, 2.0)
    scheme = roofline.PRECISIONS["W4A8KV4"]
    row = table.set_index("precision").loc["W4A8KV4"]
    step = roofline.decode_step(MODELS["Llama-2-7B"], 32, 1024, scheme, GPUS[gpu])["seconds"].sum()
    assert float(row["one step, ms"]) == pytest.approx(1e3 * step, abs=0.006)
    assert row["fits"] == "yes" and len(figure.data) == 5
    most = int(row["most users"].replace(",", ""))
    assert (
        explorers.serving(MODELS, gpu, "Llama-2-7B", most + 1, 1024)[1].set_index("precision").loc["W4A8KV4", "fits"] == "no"
    )


def test_there_are_three_pages():
    assert [page.stem for page in PAGES] == ["quantiser_playground", "recipe_lab", "serving_calculator"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_is_words_and_one_dashboard(page):
    notebook = nbformat.read(page, as_version=4)
    nbformat.validate(notebook)
    words, code = notebook.cells
    assert words.cell_type == "markdown" and words.source.startswith("# ") and "**Try this:**" in words.source
    assert code.source.count("widgets.dashboard(") == 1 and code.execution_count == 1
    assert "widgets" not in notebook.metadata and page.stat().st_size < 10_000
    assert code.outputs[0]["data"]["text/plain"].startswith("dashboard(")
