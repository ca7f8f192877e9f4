"""The command line: what it does, what it prints, how it ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import qoqlab
from qoqlab import cli, comparison, formats, hf_quantizer, offload, tour

from .families import cast_parameters, wide


def invoke(*arguments: object):
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character."""
    core = Tokenizer(models.BPE(vocab={chr(i): i for i in range(128)}, merges=[]))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, a ``text.txt`` and the checkpoint ``quantised`` of them."""
    folder = tmp_path_factory.mktemp("cli")
    cast_parameters(wide("llama", num_hidden_layers=3), torch.bfloat16).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("".join(chr(32 + i * i % 90) for i in range(2000)))
    result = invoke("quantize", folder / "model", *OPTIONS, "--text", folder / "text.txt", "--out", folder / "quantised")
    assert (result.exit_code, result.exception) == (0, None), result.output
    return folder


OPTIONS = ("--recipe", "qoq-g128", "--length", 24, "--windows", 3)


def windows(place: Path, length: int = 24) -> torch.Tensor:
    return qoqlab.tokens(AutoTokenizer.from_pretrained(place / "model"), (place / "text.txt").read_text(), length)


# --- what it does ---------------------------------------------------------------------------------------------------------


def test_quantize_is_the_librarys(place: Path) -> None:
    written = qoqlab.load(place / "quantised")
    plain = AutoModelForCausalLM.from_pretrained(place / "model")
    expected = qoqlab.quantize(plain, "qoq-g128", qoqlab.bundled.spread(windows(place), 3), progress=False)
    ours, theirs = written.model.state_dict(), expected.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert len(written.report) == 18 and not (place / ".quantised.run").exists()
    assert AutoTokenizer.from_pretrained(place / "quantised")("abc")["input_ids"] == [97, 98, 99]


@pytest.mark.parametrize("mode", ["simulated", "runtime"])
def test_evaluate_prints_the_perplexity(mode: str, place: Path) -> None:
    result = invoke("evaluate", place / "quantised", "--text", place / "text.txt", "--length", 24, "--mode", mode)
    assert result.exit_code == 0, result.output
    loaded = qoqlab.load(place / "quantised")
    value = qoqlab.perplexity(loaded, windows(place), qoqlab.Mode(mode))
    assert f"perplexity {value:.4f} ({mode}, 83 windows of 24 tokens" in " ".join(result.output.split())


def test_evaluate_takes_plain_models_and_checkpoints_of_transformers(place: Path, tmp_path: Path) -> None:
    qoqlab.hf_quantizer.save_pretrained(qoqlab.load(place / "quantised"), tmp_path)
    options = ("--text", place / "text.txt", "--length", 24, "--windows", 2)
    lines = {}
    for name, folder in (("plain", place / "model"), ("native", place / "quantised"), ("transformers", tmp_path)):
        result = invoke("evaluate", folder, *options, "--tokenizer", place / "model")
        assert result.exit_code == 0, result.output
        lines[name] = " ".join(result.output.split()).partition("perplexity ")[2]
    assert lines["native"] == lines["transformers"] != lines["plain"]


def test_inspect_says_what_there_is(place: Path) -> None:
    result = invoke("inspect", place / "quantised")
    loaded = qoqlab.load(place / "quantised")
    assert result.exit_code == 0
    for text in ("qoq-g128", "W4A8KV4 g128", "rotate, reorder", f"{loaded.weight_bytes():,}", "output_sqnr_db", "clip"):
        assert text in result.output


def test_recipes_lists_the_presets() -> None:
    result = invoke("recipes")
    assert result.exit_code == 0 and all(name in result.output for name in qoqlab.recipes.names())


def test_export_writes_what_the_library_writes(place: Path, tmp_path: Path) -> None:
    result = invoke("export", place / "quantised", "--format", "qserve", "--out", tmp_path / "ours")
    assert result.exit_code == 0, result.output
    formats.export_qserve(qoqlab.load(place / "quantised"), tmp_path / "theirs")
    for path in (tmp_path / "theirs").glob("*.safetensors"):
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "ours" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    ("options", "write"),
    [
        (["qserve", "--engine", "SGLang"], lambda q, out: formats.export_qserve(q, out, engine=formats.Engine.SGLANG)),
        (["qserve", "--engine", "sglang"], lambda q, out: formats.export_qserve(q, out, engine=formats.Engine.SGLANG)),
        (["compressed-tensors"], lambda q, out: formats.export_compressed_tensors(q, out, formats.Layout.W8A8)),
        (
            ["compressed-tensors", "--layout", "W4A16"],
            lambda q, out: formats.export_compressed_tensors(q, out, formats.Layout.W4A16),
        ),
    ],
)
def test_export_takes_an_engine_or_a_layout(options: list[str], write, place: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of another engine than the one that is named
        result = invoke("export", place / "quantised", "--out", tmp_path / "ours", "--format", *options)
        assert result.exit_code == 0, result.output
        write(qoqlab.load(place / "quantised"), tmp_path / "theirs")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["qserve", "--engine", "vllm"], "Error: engine: expected QServe or SGLang, got 'vllm'"),
        (["compressed-tensors", "--engine", "QServe"], "Error: engine: goes with format qserve, got compressed-tensors"),
        (["compressed-tensors", "--layout", "W4"], "Error: layout: expected W8A8 or W4A16 or W4A8, got 'W4'"),
        (["qserve", "--layout", "W8A8"], "Error: layout: goes with format compressed-tensors, got qserve"),
        (["qserve", "--engine", "QServe"], "Error: export_qserve: QServe has attention kernels for heads of 128, not 32"),
        (["compressed-tensors", "--layout", "W4A8"], "Error: "),  # QoQ's zeros
    ],
)
def test_export_refuses_what_the_engine_or_layout_cannot_hold(
    options: list[str], message: str, place: Path, tmp_path: Path
) -> None:
    result = invoke("export", place / "quantised", "--out", tmp_path / "out", "--format", *options)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_compare_is_the_librarys(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ("--text", place / "text.txt", "--length", 24, "--windows", 3, "--test-windows", 2)
    names = ["fp16", "rtn-w8a8"]
    result = invoke(
        "compare", place / "model", *(o for n in names for o in ("--recipe", n)), *text, "--out", tmp_path / "t.csv"
    )
    assert result.exit_code == 0, result.output
    ids = windows(place)
    calibration, test = qoqlab.bundled.spread(ids, 3), qoqlab.bundled.spread(ids, 2)
    plain = AutoModelForCausalLM.from_pretrained(place / "model")
    expected = comparison.compare(names, plain, calibration, test, progress=False)
    table = pd.read_csv(tmp_path / "t.csv")
    assert table.method.tolist() == names
    assert table.perplexity.tolist() == pytest.approx(expected.perplexity.tolist(), rel=1e-12)

    calls = []

    def compare(recipes, model, calibration, test, out):
        calls.append((recipes, type(model).__name__, tuple(calibration.shape), tuple(test.shape), out))
        row = dict.fromkeys(comparison.COLUMNS, "hidden") | dict.fromkeys(SHOWN, 1.23456789) | {"error": None}
        return pd.DataFrame([row])

    monkeypatch.setattr(comparison, "compare", compare)
    result = invoke("compare", place / "model", "--preset", "paper", *text)
    assert result.exit_code == 0 and "1.2346" in result.output
    assert calls == [("paper", "LlamaForCausalLM", (3, 24), (2, 24), None)]


def test_compare_continues_after_finished_methods_and_reports_failed_ones(place: Path, tmp_path: Path) -> None:
    text = ("--text", place / "text.txt", "--length", 24, "--windows", 3, "--test-windows", 2, "--out", tmp_path / "t.csv")
    first = invoke("compare", place / "model", "--recipe", "rtn-w8a8", *text)
    assert first.exit_code == 0, first.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "t.jsonl"]
    record = (tmp_path / "t.jsonl").read_text()
    damaged = tmp_path / "model"  # other weights, which cannot be quantised
    shutil.copytree(place / "model", damaged)
    network = AutoModelForCausalLM.from_pretrained(damaged)
    network.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    network.save_pretrained(damaged)
    failed = invoke("compare", damaged, "--recipe", "rtn-w8a8", *text)
    assert failed.exit_code == 1 and "Failed: rtn-w8a8: ValueError: " in failed.stderr and "up_proj" in failed.stderr
    assert pd.read_csv(tmp_path / "t.csv").error.str.contains("up_proj").tolist() == [True]
    assert (tmp_path / "t.jsonl").read_text().startswith(record)
    before = (tmp_path / "t.jsonl").read_text()
    again = invoke("compare", place / "model", "--recipe", "rtn-w8a8", *text)
    assert again.exit_code == 0 and (tmp_path / "t.jsonl").read_text() == before, "nothing was measured again"
    assert pd.read_csv(tmp_path / "t.csv").perplexity.notna().all()


#: What `compare` prints, so that a row fits a terminal; the file that it writes has every column.
SHOWN = ["method", "format", "perplexity", "gap", "runtime_perplexity", "weight_bits", "kv_bits"]


def test_compare_prints_seven_columns_and_writes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {column: f"<{index}>" for index, column in enumerate(comparison.COLUMNS)}
    monkeypatch.setattr(comparison, "compare", lambda *_, out: pd.DataFrame([row | {"error": None}]))
    options = ("--windows", 1, "--test-windows", 1, "--out", tmp_path / "t.csv")
    result = invoke("compare", "tiny", "--recipe", "fp16", *options)
    assert result.exit_code == 0, result.output
    assert [column for column in comparison.COLUMNS if row[column] in result.stdout] == [
        column for column in comparison.COLUMNS if column in SHOWN
    ]
    header = [name.strip() for name in result.stdout.splitlines()[1].strip("┃").split("┃")]
    assert header == ["method", "format", "ppl", "gap", "runtime", "W bits", "KV bits"]
    assert pd.read_csv(tmp_path / "t.csv")[comparison.COLUMNS].to_dict("records") == [row]


@pytest.mark.parametrize(
    ("options", "calibrated", "tested"),
    [
        ([], "python-docs", "python-docs"),
        (["--text", "wikitext-2", "--text-path", "w"], "python-docs", "wikitext-2"),
        (["--calibration-text", "wikitext-2", "--text-path", "w"], "wikitext-2", "python-docs"),
        (["--calibration-text", "wikitext-2", "--text", "wikitext-2", "--text-path", "w"], "wikitext-2", "wikitext-2"),
        (["--calibration-text", "mine.txt", "--text", "wikitext-2", "--text-path", "w"], "mine.txt", "wikitext-2"),
        (["--text", "mine.txt"], "python-docs", "mine.txt"),
    ],
)
def test_compare_calibrates_on_the_text_that_you_name(
    options: list[str], calibrated: str, tested: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w").mkdir()
    for name in ("w/train.txt", "w/test.txt", "mine.txt"):
        Path(name).write_text(f"A page of {name} about nothing in particular.\n" * 20)
    seen = []

    def compare(recipes, model, calibration, test, out):
        seen.extend([calibration, test])
        return pd.DataFrame([dict.fromkeys(comparison.COLUMNS, 0.0) | {"error": None}])

    monkeypatch.setattr(comparison, "compare", compare)
    result = invoke("compare", "tiny", "--recipe", "fp16", "--windows", 3, "--test-windows", 2, "--length", 16, *options)
    assert result.exit_code == 0, result.output
    assert f"Calibrated on 3 windows of {calibrated}, tested on 2 of {tested}." in result.stderr
    words = qoqlab.load_tiny()[1]
    for got, name, split, windows in zip(seen, (calibrated, tested), ("calibration", "test"), (3, 2), strict=True):
        text = qoqlab.load_text(name, split, "w" if name == "wikitext-2" else None)
        assert torch.equal(got, qoqlab.bundled.spread(qoqlab.tokens(words, text, 16), windows))


def test_tiny_planted_is_the_bundled_model_with_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compare(recipes, model, calibration, test, out):
        seen.append((model, calibration, test))
        return pd.DataFrame([dict.fromkeys(comparison.COLUMNS, 0.0) | {"error": None}])

    monkeypatch.setattr(comparison, "compare", compare)
    for name in ("tiny", "tiny-planted"):
        result = invoke("compare", name, "--recipe", "fp16", "--windows", 2, "--test-windows", 1)
        assert result.exit_code == 0, result.output
    (plain, *texts), (planted, *same_texts) = seen
    assert all(torch.equal(a, b) for a, b in zip(texts, same_texts, strict=True))
    assert [tuple(ids.shape) for ids in texts] == [(2, 512), (1, 512)]
    expected = qoqlab.outliers.plant(plain, tour.ACTIVATION_RATIO, tour.KEY_RATIO).state_dict()
    ours = planted.state_dict()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[n], expected[n]) for n in ours)
    name = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(ours[name], plain.state_dict()[name])


def test_tiny_planted_can_be_quantised_and_evaluated(tmp_path: Path) -> None:
    options = ("--text", "python-docs", "--length", 16, "--windows", 1)
    result = invoke("quantize", "tiny-planted", *options, "--recipe", "rtn-w8a8", "--no-report", "--out", tmp_path / "q")
    assert result.exit_code == 0, result.output
    planted = qoqlab.outliers.plant(qoqlab.load_tiny()[0], tour.ACTIVATION_RATIO, tour.KEY_RATIO)
    ours = qoqlab.load(tmp_path / "q").model.state_dict()
    theirs = qoqlab.quantize(planted, "rtn-w8a8", progress=False).model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    result = invoke("evaluate", "tiny-planted", *options)
    assert result.exit_code == 0 and "tiny-planted: perplexity" in result.output


def test_copies_of_the_bundled_model_get_its_windows(tmp_path: Path) -> None:
    model, words = qoqlab.load_tiny()
    hf_quantizer.save_pretrained(qoqlab.quantize(model, "rtn-w8a8", progress=False), tmp_path / "transformers")
    qoqlab.save(qoqlab.quantize(model, "rtn-w8a8", progress=False), tmp_path / "native")
    model.save_pretrained(tmp_path / "copy")
    for name in ("transformers", "native", "copy"):
        words.save_pretrained(tmp_path / name)
        result = invoke("evaluate", tmp_path / name, "--windows", 1)
        assert result.exit_code == 0 and "1 windows of 512 tokens" in " ".join(result.output.split()), result.output


def test_other_models_get_the_papers_windows(place: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(place / "model")
    text, words = str(place / "text.txt"), AutoTokenizer.from_pretrained(place / "model")
    network.config.max_position_embeddings = 1000
    assert cli._windows(words, network, text, "test", None, None, None).shape == (2, 1000)
    network.config.max_position_embeddings = 4096
    with pytest.raises(ValueError, match="2000 tokens, fewer than one window of 2048"):
        cli._windows(words, network, text, "test", None, None, None)


def test_tiny_is_the_bundled_model(tmp_path: Path) -> None:
    result = invoke("evaluate", "tiny", "--windows", 1)
    model, words = qoqlab.load_tiny()
    ids = qoqlab.tokens(words, qoqlab.load_text("python-docs", "test"), 512)[:1]
    assert f"perplexity {qoqlab.perplexity(model, ids):.4f} (simulated, 1 windows of 512 tokens" in result.output


# --- kill and continue ----------------------------------------------------------------------------------------------------


def test_a_killed_quantize_continues(place: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "out", tmp_path / ".out.run"
    shutil.copytree(place / "model", tmp_path / "model")
    arguments = ["quantize", tmp_path / "model", *OPTIONS, "--text", place / "text.txt", "--out", out]
    command = [sys.executable, "-c", "from qoqlab.cli import main; main()", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run / "block-00000.safetensors").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not out.exists()
    finished = len(list(run.glob("block-*")))
    assert 1 <= finished < 3
    again = invoke(*arguments)
    assert again.exit_code == 0 and f"Continuing after {finished} finished blocks." in again.stderr, again.output
    ours, theirs = qoqlab.load(out).model.state_dict(), qoqlab.load(place / "quantised").model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert not run.exists()


def test_a_run_of_another_recipe_is_refused_without_a_word_about_continuing(place: Path, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(place / "model")
    qoqlab.quantize(network, "rtn-w8a8", progress=False, report=False, resume=tmp_path / ".out.run")
    result = invoke("quantize", place / "model", "--recipe", "rtn-w4a8", "--no-report", "--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.startswith("Error: resume: ") and "another run" in result.stderr
    assert "Continuing" not in result.output
    result = invoke("quantize", place / "model", "--recipe", "rtn-w8a8", "--no-report", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "Continuing after 3 finished blocks." in result.stderr, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "tiny", "--out", "q"], "Interrupted. The same command continues after the last finished block."),
        (
            ["compare", "--recipe", "fp16", "--out", "t.csv"],
            "Interrupted. The same command continues after the last finished",
        ),
        (["compare", "--recipe", "fp16"], "Interrupted.\n"),
        (["evaluate", "tiny"], "Interrupted.\n"),
        (["export", "tiny", "--out", "e"], "Interrupted.\n"),
    ],
)
def test_an_interrupt_says_what_is_kept(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for module, name in ((cli, "_tokenizer"), (offload, "open_model"), (formats, "load")):
        monkeypatch.setattr(module, name, interrupt)
    result = invoke(*arguments)
    assert result.exit_code == 130 and result.stderr.startswith(message)


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "no/such", "--out", "x"], "'no/such' is neither a folder with a config.json nor a repository"),
        (["quantize", "tiny", "--out", "x", "--recipe", "best"], "Error: recipe: 'best' is not a preset; presets: fp16"),
        (["quantize", "tiny", "--out", "x", "--text", "gone.txt"], "Error: name: 'gone.txt' is not a text"),
        (["quantize", "tiny", "--out", "x", "--dtype", "int8"], "dtype: expected one of float32, bfloat16, float16"),
        (["quantize", "tiny", "--out", "x", "--device", "gpu"], "Error: device: 'gpu' cannot be used"),
        (["evaluate", "tiny", "--mode", "fast"], "Error: mode: expected simulated or runtime, got 'fast'"),
        (["evaluate", "tiny", "--length", "1"], "Error: length: expected an integer of at least 2, got 1"),
        (["evaluate", "tiny", "--windows", "1", "--mode", "runtime"], "Error: mode: RUNTIME needs a QuantizedModel"),
        (["evaluate", "tiny", "--text-path", "x"], "Error: path: goes with 'wikitext-2', got name 'python-docs'"),
        (["inspect", "no/such"], "no/such/qoqlab.json: no such file"),
        (["export", "no/such", "--out", "x"], "no/such/qoqlab.json: no such file"),
        (["compare", "tiny", "--recipe", "fp16", "--text-path", "x"], "Error: path: goes with 'wikitext-2'"),
        (["compare", "tiny", "--recipe", "fp16", "--calibration-text", "gone.txt"], "name: 'gone.txt' is not a text"),
        (
            ["compare", "tiny", "--preset", "foo"],
            "Error: preset: expected paper or ladder, got 'foo'; single methods are named",
        ),
        (
            ["compare", "tiny", "--preset", "qoq-g128"],
            "preset: expected paper or ladder, got 'qoq-g128'; single methods are",
        ),
        (["compare", "tiny"], "Error: recipe: give --recipe, once or more, or --preset"),
        (["compare", "tiny", "--preset", "paper", "--out", "t.txt"], "out: expected a name that ends in .csv"),
        (["compare", "tiny", "--preset", "paper", "--out", "gone/t.csv"], "Error: out: gone is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("notes.txt", "notes.txt is a file, expected a folder or a new name"),
        ("notes.txt/q", "notes.txt is a file, expected a folder or a new name"),
        ("link", "link is a file, expected a folder or a new name"),
        ("thesis", "thesis holds chapter.tex and no qoqlab.json; expected an empty folder or a new name"),
    ],
)
def test_out_is_checked_before_the_model_is_loaded(
    out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(offload, "open_model", lambda *_: pytest.fail("the model was loaded"))
    result = invoke("quantize", "tiny", "--out", tmp_path / out)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("Error: out: ")
    assert message in result.stderr and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "holds", [[], ["qoqlab.json", "README.md"], [".q.0123.partial", "weights-0123456789abcdef.safetensors"]]
)
def test_out_may_be_empty_or_hold_a_checkpoint(holds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in holds:
        (tmp_path / name).touch()

    def opened(*_: object) -> None:
        raise ValueError("the model was opened")

    monkeypatch.setattr(offload, "open_model", opened)
    assert "the model was opened" in invoke("quantize", "tiny", "--out", tmp_path).stderr


@pytest.mark.parametrize("arguments", [["quantise"], ["quantize"], ["export", "x", "--out", "y", "--format", "gguf"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_help_names_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("quantize", "evaluate", "compare", "export", "inspect", "recipes"))
