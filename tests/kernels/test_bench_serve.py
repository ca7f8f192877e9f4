"""The serving benchmark, as far as it goes without a GPU."""

from __future__ import annotations

import pandas as pd
import pytest
from qoqlab_kernels import bench_serve
from qoqlab_kernels.bench_serve import Round

from qoqlab import load_tiny, quantize, runtime
from qoqlab.serve import fleet
from qoqlab.serve.surface import measured_surface


def test_requests_arrive_at_random_and_are_of_every_length() -> None:
    found = bench_serve.arriving(Round(4, 20, 11), 5.0, 400, 100)
    times = pd.Series([r.arrival for r in found]).diff().dropna()
    assert times.min() >= 0 and 0.15 < times.mean() < 0.25 and 0.8 < times.std() / times.mean() < 1.2
    assert {len(r.prompt) for r in found} == set(range(10, 21))
    assert {r.max_new_tokens for r in found} == set(range(6, 12))


def test_a_record_of_arrivals_can_be_simulated() -> None:
    model, _ = load_tiny()
    engine = runtime.compile(quantize(model, "rtn-w4a8kv4", progress=False, report=False), "cpu", max_batch=4, max_tokens=32)
    record = bench_serve.serve_arrivals(engine, Round(4, 16, 8), 40.0, 12)
    requests = pd.DataFrame(record["requests"])
    assert len(requests) == 12 and (requests["finish"] >= requests["first"]).all()
    assert sum(s["prompts"] for s in record["prefills"]) == requests["prompt"].sum()
    room = {"sequences": record["sequences"], "tokens": record["tokens"]}
    surface = measured_surface(pd.DataFrame(record["steps"]), pd.DataFrame(record["prefills"]), **room)
    assert fleet.replay(requests, surface)["measured"].gt(0).all()


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--arrivals", "0"], "--arrivals"),
        (["--arrivals", "2", "--precision", "fp16"], "--arrivals"),
        (["--tensor-parallel", "2", "--precision", "w8a8"], "--tensor-parallel: w8a8"),
        (["--precision", "w3a3"], "--precision"),
        (["--budget-gb", "-1"], "--budget-gb"),
    ],
)
def test_wrong_options_are_named(words: list[str], wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_serve.main(words)
    assert ended.value.code == 2 and wrong in capsys.readouterr().err
