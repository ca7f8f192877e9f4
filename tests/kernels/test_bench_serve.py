"""The serving benchmark, as far as it goes without a GPU."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch
from qoqlab_kernels import bench_serve, gemm, measure
from qoqlab_kernels.attention import MAX_GROUP
from qoqlab_kernels.bench_serve import Round
from qoqlab_kernels.layout import MAX_K
from qoqlab_kernels.pages import HEAD_DIMS
from qoqlab_kernels.plan import plan_for

from qoqlab import load_tiny, quantize, runtime
from qoqlab.machines import MODELS, Geometry
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
        (["--model", "llama-3-8b,llama-9"], "--model: 'llama-9' is not one of llama-3-8b"),
    ],
)
def test_wrong_options_are_named(words: list[str], wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_serve.main(words)
    assert ended.value.code == 2 and wrong in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_shapes_that_kernels_can_multiply_and_attend(name: str) -> None:
    model = MODELS[name]
    assert model.heads // model.kv_heads <= MAX_GROUP and model.head_dim in HEAD_DIMS
    for n, k in model.shapes.values():
        assert n % 32 == 0 and k % 128 == 0 and k <= MAX_K
        for m in (1, 16, 326, 8192):
            assert plan_for(m, n, k, gemm.Form(1), (9, 0), 132, "NVIDIA H100 80GB HBM3").tokens


def test_several_models_with_biases_and_windows() -> None:
    known, models = bench_serve.options(
        ["--model", "qwen1.5-72b,mistral-7b", "--precision", "w8a8kv8,w4a16", "--layers", "3"]
    )
    assert known.precisions == ("w8a8kv8", "w4a16")
    assert [(m.name, m.layers, m.qkv_bias, m.window) for m in models] == [
        ("Qwen1.5-72B", 3, True, None),
        ("Mistral-7B", 3, False, 4096),
    ]


def test_what_fits_into_80_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits of cache hold almost twice as many sequences; Qwen1.5-72B in 8 bits barely fits, in fp16 it does not."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=85.0e9))
    known = argparse.Namespace(prompt=1024, output=512, batches="auto", budget_gb=None)
    llama, qwen = MODELS["Llama-3-8B"], MODELS["Qwen1.5-72B"]
    wide, narrow = (bench_serve.batches_of(llama, precision, known) for precision in ("w8a8", "w8a8kv8"))
    assert wide[:2] == narrow[:2] == (64, 256) and 1.9 < narrow[-1] / wide[-1] < 2.0
    assert bench_serve.batches_of(qwen, "w8a8kv8", known)[-1] in range(1, 8)
    assert bench_serve.batches_of(qwen, "w4a8kv4-g128", known)[-1] > 32
    with pytest.raises(measure.Unavailable, match=r"Qwen1\.5-72B in fp16 does not fit into 85 GB"):
        bench_serve.batches_of(qwen, "fp16", known)


def test_what_does_not_fit_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def measured(model: Geometry, precision: str, *_: object) -> Iterator[dict]:
        if precision == "fp16":
            raise measure.Unavailable("it does not fit")
        yield {"model": model.name.lower(), "precision": precision, "batch": 1}
        raise torch.cuda.OutOfMemoryError("out of memory\nmuch more")

    monkeypatch.setattr(bench_serve, "measured", measured)
    monkeypatch.setattr(measure, "require_gpu", lambda: (9, 0))
    path = tmp_path / "made.json"
    assert bench_serve.main(["--precision", "fp16,w4a16", "--json", str(path)]) == 0 and path.exists()
    said = capsys.readouterr().out
    assert "Llama-3-8B in fp16 left out: it does not fit\n" in said
    assert "Llama-3-8B in w4a16 left out: out of memory\n" in said
    assert bench_serve.main(["--precision", "fp16"]) == 2 and "it does not fit" in capsys.readouterr().err


def test_lesson_12_measures_where_there_is_a_gpu_and_says_what_it_skips_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The GPU branch of the lesson's cell, on the benchmark's real options and real signatures."""
    notebook = nbformat.read(Path(__file__).parents[2] / "notebooks" / "12_serving.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if "gpu" in cell.metadata.get("tags", []))
    (output,) = cell.outputs
    assert output.text.startswith("GPU cell skipped: there is no CUDA GPU here.\n")
    commands = [line.split(": ", 1)[1] for line in output.text.splitlines() if f"python -m {bench_serve.MODULE}" in line]
    for command in commands:
        bench_serve.options(command.split()[3:])
    assert len(commands) == 1
    signature, jobs = inspect.signature(bench_serve.measured), []
    assert {"tokens_per_s", "predicted_tokens_per_s"} <= set(bench_serve.COLUMNS)

    def measured(*arguments: object) -> Iterator[dict]:
        given = signature.bind(*arguments).arguments
        jobs.append((given["model"].name, given["model"].layers, given["precision"], given["known"].batches))
        yield {"tokens_per_s": 1234.0, "predicted_tokens_per_s": 1300.0 if given["precision"] == "fp16" else None}

    monkeypatch.setattr(bench_serve, "measured", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    exec(compile(cell.source, "cell", "exec"), {"torch": torch})
    assert jobs == [("Llama-3-8B", 4, precision, "64") for precision in ("fp16", "w4a8kv4-g128")]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["fp16", "1,234", "tokens/s,", "predicted", "1,300"],
        ["w4a8kv4-g128", "1,234", "tokens/s,", "predicted", "nan"],
    ]
