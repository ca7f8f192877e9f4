"""Predicted times: additive by hand, fits that recover what made them, constants that the stored measurements give."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import astuple
from pathlib import Path

import pandas as pd
import pytest

from qoqlab import prediction, roofline, validation
from qoqlab.machines import GPUS, MODELS
from qoqlab.prediction import OURS, PUBLISHED, TORCH, Efficiency, System, Work
from qoqlab.roofline import PRECISIONS, Cores, Serving

DATA = Path(__file__).parents[1] / "data"
LLAMA, H200, KV4 = MODELS["Llama-3-8B"], GPUS["H200"], PRECISIONS["W4A8KV4"]
PERFECT = System("perfect", Efficiency())


@pytest.fixture(scope="module")
def rows():
    return validation.served(pd.read_csv(DATA / "paper" / "throughput.csv"))


@pytest.fixture(scope="module")
def table(rows):
    return validation.compared(rows)


def test_times_add_and_are_divided_by_shares():
    work = Work(weights=4.0, multiply=1.0, unpack=3.0, gemms=10)
    assert Efficiency(weights=0.5, multiply=0.25, tax=2.0, gemm_seconds=0.1).seconds(work) == pytest.approx(8 + 4 + 6 + 1)


def test_a_step_is_the_bounds_of_its_parts_added():
    """With perfect efficiency nothing is left but the data sheet's seconds, which overlap in a bound and add here."""
    step = prediction.step_work(LLAMA, 64, 1024, KV4, H200, PERFECT)
    gemms = [roofline.gemm(n, k, 64, KV4, H200.sheet) for n, k in LLAMA.shapes.values()]
    head = roofline.gemm(LLAMA.vocabulary, LLAMA.hidden, 64, PRECISIONS["fp16"], H200.sheet)
    attention = roofline.attention(LLAMA, 64, 1024, KV4, H200.sheet)
    assert step.weights == pytest.approx(32 * sum(g.memory for g in gemms) + head.memory)
    assert step.cache == pytest.approx(32 * attention.memory)
    assert (step.gemms, step.attentions, step.layers) == (129, 32, 32)
    bound = roofline.throughput(LLAMA, Serving(64), KV4, GPUS["A100"])
    assert prediction.throughput(LLAMA, Serving(64), KV4, GPUS["A100"], PERFECT) < bound


def test_attention_on_cuda_cores_unpacks_for_every_query_head():
    work = prediction.attention_work(LLAMA, 2, 100, KV4, H200, Cores.CUDA)
    assert work.unpack == pytest.approx(2 * 2 * 100 * 32 * 128 * 1.125 / H200.lanes)
    assert work.multiply == 0


def test_a_fit_finds_what_made_the_times():
    true = Efficiency(0.8, 0.5, 0.7, 1.0, 0.0, 3e-6, 0.0, 2e-5)
    works = [
        prediction.step_work(LLAMA, b, c, KV4, H200) + prediction.gemm_work(512, 512, b, KV4, H200) * b
        for b in (1, 7, 64, 200)
        for c in (64, 4096)
    ] + [prediction.gemm_work(4096, 4096, m, KV4, H200) for m in (1, 4096)]
    found = prediction.fit(works, [true.seconds(w) for w in works], frozenset({"tax", "elementwise", "attention_seconds"}))
    assert astuple(found) == pytest.approx(astuple(true), rel=1e-5, abs=1e-12)


def test_a_fit_stays_where_shares_have_a_meaning():
    """Faster than the data sheet is not a share: it stays at 1."""
    work = prediction.gemm_work(4096, 4096, 1, KV4, H200)
    assert prediction.fit([work], [work.weights / 2]).weights == 1.0


def test_constants_and_errors_are_those_of_the_stored_measurements(rows):
    record = json.loads((DATA / "benchmarks" / "calibration.json").read_text())
    torchs = {f"TORCH_{name.upper()}": system for name, system in TORCH.items()}
    systems = {"OURS": OURS, **torchs, **PUBLISHED}
    assert set(record["efficiencies"]) == set(systems)
    for name, system in systems.items():
        values = tuple(record["efficiencies"][name].values())
        assert astuple(system.efficiency) == pytest.approx(values, rel=6e-3, abs=1e-9), name
    for name, efficiency in validation.fitted(rows).items():
        assert astuple(efficiency) == pytest.approx(astuple(PUBLISHED[name].efficiency), rel=6e-3, abs=1e-9), name
    errors = pd.DataFrame(record["results"])
    assert (errors["predicted_us"] / errors["us"] - 1 - errors["error"]).abs().max() < 1e-3
    assert errors["error"].abs().median() < 0.1
    steps = errors[(errors["op"] == "decode_step")]
    assert steps["error"].abs().max() < 0.2 and steps["error"].abs().median() < 0.05
    served = errors[errors["op"] == "serve"]["error"].abs()
    assert len(served) >= 50 and served.median() < 0.05 and served.quantile(0.9) < 0.12


def test_stored_bounds_are_of_the_best_known_ceiling_and_predictions_stay_below():
    """The H200's is measured, the H100's its data sheet. What was predicted on the day of a record exceeds its bound where
    ``data/benchmarks/README.md`` says so; what is predicted now does nowhere."""
    names, above, count = {name.lower(): model for name, model in MODELS.items()}, set(), 0
    assert H200.measured is not None and GPUS["H100"].measured is None
    for path in sorted((DATA / "benchmarks").glob("serve_*.json")):
        record = json.loads(path.read_text())
        gpu = next(gpu for name, gpu in GPUS.items() if name in record["gpu"])
        for row in record["results"]:
            if row.get("bound_tokens_per_s") is None:
                continue  # of several GPUs, or of requests that arrive at random
            name = roofline.SERVED[row["precision"]]
            job = names[row["model"]], Serving(row["batch"], row["prompt"], row["output"]), PRECISIONS[name], gpu
            bound, count = roofline.throughput(*job), count + 1
            assert row["bound_tokens_per_s"] == pytest.approx(bound, rel=1e-9) and row["tokens_per_s"] < bound
            if row["predicted_tokens_per_s"] > bound:
                above.add((row["model"], row["precision"], row["batch"]))
            system = OURS if row["precision"].startswith("w4a8") else TORCH.get(name)
            assert system is None or prediction.throughput(*job, system) < bound
    assert count >= 40
    assert above == {("llama-3-8b", "fp16", 647), ("mistral-7b", "fp16", 512), ("llama-3-8b", "w4a16", 698)}


def test_calibration_reads_the_measurements():
    """The script's own points, fitted again here: a changed measurement without a new calibration shows."""
    spec = importlib.util.spec_from_file_location("calibrate", DATA / "benchmarks" / "calibrate.py")
    calibrate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(calibrate)
    sets = calibrate.calibrated()
    found = {name: astuple(efficiency) for name, (efficiency, _) in sets.items()}
    assert found["OURS"] == pytest.approx(astuple(OURS.efficiency), rel=6e-3, abs=1e-9)
    for name, system in TORCH.items():
        assert found[f"TORCH_{name.upper()}"] == pytest.approx(astuple(system.efficiency), rel=6e-3, abs=1e-9)
    stored = json.loads((DATA / "benchmarks" / "calibration.json").read_text())["unseen_models"]
    for name, count in (("OURS", 7), ("TORCH_FP16", 4)):
        rows = calibrate.unseen(sets[name][1], "llama-3-8b")
        kept = {(row["model"], row["batch"]): row["error"] for row in stored if row["set"] == name}
        assert len(kept) == count
        assert kept == pytest.approx({(row["model"], row["batch"]): row["error"] for row in rows}, abs=2e-3)
        assert all(abs(error) < 0.1 for error in kept.values())


def test_models_are_foreseen_without_their_own_rounds():
    """A model that runs at half the speed of the rest is seen as such: it takes no part in the fit that foresees it."""
    spec = importlib.util.spec_from_file_location("calibrate", DATA / "benchmarks" / "calibrate.py")
    calibrate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(calibrate)
    works = [prediction.gemm_work(4096, 4096, tokens, KV4, H200) for tokens in (1, 64, 1024)]
    times = [1e6 * OURS.efficiency.seconds(work) for work in works]
    known = [({"op": "gemm"}, work, us) for work, us in zip(works, times, strict=True)]
    own = [({"op": "serve", "model": "slow", "batch": 8}, work, 2 * us) for work, us in zip(works[:2], times, strict=False)]
    (row,) = calibrate.unseen(known + own, "fast")
    assert row["model"] == "slow" and row["us"] == pytest.approx(2 * sum(times[:2]))
    assert row["error"] == pytest.approx(-0.5, abs=0.02)


def test_every_large_error_has_a_reason_and_no_small_one(table):
    large = table["error"].abs() > validation.LARGE
    assert ((table["reason"] != "") == large).all()
    assert large.sum() <= 12 and len(table) == 66
    assert not table[large]["reason"].str.startswith("no batch").any()
    qserve = table[table["system"] == "QServe"]
    assert len(qserve) == 16 and qserve["error"].abs().max() < 0.25


def test_an_unknown_batch_is_a_remark_for_unpublished_batches_that_fit_only(rows, table):
    """With few enough sequences nearly any overestimate would vanish, so this must not pass for an explanation."""
    noted = table[table["reason"].str.startswith("the batch is not published")]
    assert len(noted) and noted["batch"].isna().all()
    for row in noted.itertuples():
        near = int(row.reason.split("consistent with a batch of ")[1].split(",")[0])
        assert 1 <= near < row.used_batch
        cell = validation.cell(row)
        assert cell.throughput(PUBLISHED[row.system].efficiency, near) == pytest.approx(row.tokens_per_s, rel=0.1)
    known = validation.compared(rows.assign(batch=table["used_batch"]))
    assert known["error"].to_numpy() == pytest.approx(table["error"].to_numpy())
    assert not known["reason"].str.contains("not published").any()
    assert known.loc[noted.index, "reason"].str.startswith("no batch explains it").all()
    fast = rows.assign(tokens_per_s=lambda t: t["tokens_per_s"] * 10)
    assert not validation.compared(fast)["reason"].str.contains("not published").any(), "more than fit are no batch"


def test_a_cell_that_nothing_explains_says_so(rows):
    slow = rows[rows["system"] == "QServe"].assign(tokens_per_s=lambda t: t["tokens_per_s"] / 10)
    assert validation.compared(slow)["reason"].str.contains("no batch explains it").all()


def test_the_stored_table_is_this_one(table):
    stored = pd.read_csv(DATA / "benchmarks" / "validation.csv").fillna("")
    texts = [[re.sub(r"prediction is \d+", "", reason) for reason in t["reason"]] for t in (stored, table)]
    assert texts[0] == texts[1]
    assert stored["predicted"].to_numpy() == pytest.approx(table["predicted"].to_numpy(), rel=0.02)


def test_one_card_foresees_the_other_where_its_work_tells_enough(rows):
    other = validation.foreseen(rows, "A100")
    assert set(other["gpu"]) == {"L40S"}
    assert other[other["system"] == "QServe"]["error"].abs().median() < 0.25


def test_an_l40s_with_qserve_is_cheaper_than_an_a100_with_tensorrt_llm(table):
    prices = pd.read_csv(DATA / "prices.csv")
    published, model = (validation.claim(table, prices, rate) for rate in ("tokens_per_s", "predicted"))
    assert (published["speed"] > 1).sum() == 6 and (published["saving"] > 1).all()
    assert published.set_index("model")["saving"]["Llama-2-7B"] == pytest.approx(2.96, abs=0.01)
    assert (model["saving"] > 1).all() and (model["speed"] < 1).all(), "cheaper, yes; faster only where INT8 disappoints"
    free = prices.assign(dollars=prices["dollars"].where(prices["gpu"] != "A100", 1.0))
    assert (validation.claim(table, free)["saving"] < 1).all()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Efficiency(weights=1.5), "weights: a share of the data sheet"),
        (lambda: Efficiency(cache=0), "cache: a share"),
        (lambda: Efficiency(tax=-1), "tax: expected a number of at least 0"),
        (lambda: prediction.fit([], []), "seconds: expected one for each of 0 works"),
        (lambda: prediction.fit([Work(weights=1)], [0.0]), "seconds: expected positive numbers"),
        (lambda: prediction.fit([Work(weights=1)], [1.0], frozenset({"speed"})), "fixed: expected names among weights"),
        (lambda: prediction.prefill_work(LLAMA, 1, 0, KV4, H200), "prompt: expected a positive integer"),
    ],
)
def test_bad_input_is_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_missing_price_is_named(table):
    prices = pd.DataFrame({"gpu": ["A100"], "dollars": [1]})
    with pytest.raises(ValueError, match="prices: no price for L40S"):
        validation.dollars(table, prices)
