"""The bundled model, its tokenizer and its text."""

from __future__ import annotations

import os
import socket
import sys
import types

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import qoqlab
from qoqlab import bundled, outliers

WINDOW = 128


@pytest.fixture(scope="module")
def tiny():
    """Model and tokenizer, loaded once. Shared: do not change them."""
    return qoqlab.load_tiny()


@pytest.fixture(scope="module")
def windows(tiny):
    """A few calibration and test windows."""
    texts = [qoqlab.load_text("python-docs", split) for split in ("calibration", "test")]
    return [qoqlab.tokens(tiny[1], text, WINDOW)[:8] for text in texts]


def test_the_model_is_a_llama_on_the_cpu(tiny) -> None:
    model, tokenizer = tiny
    assert type(model) is LlamaForCausalLM and isinstance(tokenizer, PreTrainedTokenizerBase)
    assert not model.training
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}
    assert len(tokenizer) == model.config.vocab_size
    for linear in (m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)):
        assert linear.in_features % 128 == 0  # groups of 128 fit


def test_it_is_loaded_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    model, _ = qoqlab.load_tiny()
    assert sum(p.numel() for p in model.parameters()) > 1e6


def test_it_does_not_depend_on_the_working_directory(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (bundled.model_folder() / "config.json").is_file() and bundled.model_folder().is_absolute()


def test_a_missing_model_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "qoqlab").mkdir()
    monkeypatch.setattr(bundled.resources, "files", lambda name: tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"the bundled model is in neither .*model nor .*_bundled"):
        bundled.model_folder()
    inside = tmp_path / "qoqlab" / "_bundled" / "model"
    inside.mkdir(parents=True)
    (inside / "config.json").write_text("{}")
    assert bundled.model_folder() == inside  # an installed wheel
    checkout = tmp_path / "data" / "model"
    checkout.mkdir(parents=True)
    (checkout / "config.json").write_text("{}")
    assert bundled.model_folder() == checkout  # a checkout comes first


def test_it_knows_its_language(tiny, windows) -> None:
    """Far better than chance (the vocabulary's size) on text that it was not trained on."""
    model, _ = tiny
    assert qoqlab.perplexity(model, windows[1]) < model.config.vocab_size / 50


def paragraphs(text: str, longer_than: int = 0) -> set[str]:
    return {p.strip() for p in text.split("\n\n") if len(p.strip()) > longer_than}


def test_splits_cover_the_documentation() -> None:
    from pydoc_data.topics import topics

    texts = {split: qoqlab.load_text("python-docs", split) for split in ("calibration", "test")}
    assert set.union(*map(paragraphs, texts.values())) == set.union(*map(paragraphs, topics.values()))
    assert 0.15 < len(texts["calibration"]) / sum(map(len, texts.values())) < 0.6
    assert all(len(text) > 50_000 for text in texts.values())


def test_splits_share_no_paragraph() -> None:
    """Topics quote each other at length (``if`` and ``else`` are one text), so disjoint topics are not disjoint text."""
    calibration, test = (paragraphs(qoqlab.load_text("python-docs", s), 80) for s in ("calibration", "test"))
    assert not calibration & test


def test_text_is_the_same_every_time() -> None:
    assert qoqlab.load_text("python-docs", "test") == qoqlab.load_text("python-docs", "test")


def test_tokens_are_windows_of_the_text(tiny) -> None:
    _, tokenizer = tiny
    text = qoqlab.load_text("python-docs", "test")[:20_000]
    everything = tokenizer(text, verbose=False)["input_ids"]
    for length in (2, 100, 1024):
        ids = qoqlab.tokens(tokenizer, text, length)
        assert ids.dtype == torch.int64 and ids.shape == (len(everything) // length, length)
        assert ids.flatten().tolist() == everything[: ids.numel()]
    exactly = qoqlab.tokens(tokenizer, text, len(everything))
    assert exactly.shape == (1, len(everything))


def test_tokens_give_the_text_back(tiny) -> None:
    _, tokenizer = tiny
    text = qoqlab.load_text("python-docs", "calibration")[:5000]
    ids = qoqlab.tokens(tokenizer, text, 64)
    assert text.startswith(tokenizer.decode(ids.flatten()[:500], skip_special_tokens=True).lstrip()[:200])


@pytest.mark.parametrize("length", [1, 0, -5, 2.0, "8", None])
def test_a_window_needs_two_tokens(length: object, tiny) -> None:
    with pytest.raises(ValueError, match=rf"length: expected an integer of at least 2, got {length!r}"):
        qoqlab.tokens(tiny[1], "some text", length)


def test_a_short_text_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match=r"text: has \d+ tokens, fewer than one window of 1000"):
        qoqlab.tokens(tiny[1], "some text", 1000)


def test_unknown_text_is_refused() -> None:
    with pytest.raises(
        ValueError, match="name: 'wikitext' is not a text; there is 'python-docs', 'wikitext-2', or the path of a file"
    ):
        qoqlab.load_text("wikitext", "test")
    with pytest.raises(ValueError, match="split: expected 'calibration' or 'test', got 'train'"):
        qoqlab.load_text("python-docs", "train")


# --- what the project is about --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tiny):
    return outliers.plant(tiny[0])


@pytest.fixture(scope="module")
def gaps(planted, windows) -> dict[str, float]:
    """Perplexity of a recipe minus that of fp16, on the planted model."""
    calibration, test = windows
    exact = qoqlab.perplexity(planted, test)
    names = ["rtn-w8a8", "rtn-w4a8kv4-g128", "qoq-g128"]
    results = {name: qoqlab.quantize(planted, name, calibration, progress=False, report=False) for name in names}
    return {name: qoqlab.perplexity(result, test) - exact for name, result in results.items()}


def test_planting_keeps_the_bundled_models_perplexity(tiny, planted, windows) -> None:
    assert qoqlab.perplexity(planted, windows[1]) == pytest.approx(qoqlab.perplexity(tiny[0], windows[1]), rel=1e-4)


def test_planted_outliers_are_those_of_large_models(planted, windows) -> None:
    table = outliers.measure(planted, windows[0][:2])
    assert (table[table.site.isin(["qkv", "gate_up"])].ratio > 10).all()
    assert (table[table.site == "keys"].ratio > 4).all()


def test_qoq_closes_at_least_half_of_the_gap(gaps) -> None:
    assert gaps["rtn-w4a8kv4-g128"] > 0
    assert gaps["qoq-g128"] <= gaps["rtn-w4a8kv4-g128"] / 2


def test_eight_bits_cost_little(gaps) -> None:
    assert gaps["rtn-w8a8"] < gaps["qoq-g128"]


def test_the_bundled_model_survives_a_checkpoint(tiny, windows, tmp_path) -> None:
    result = qoqlab.quantize(tiny[0], "rtn-w4a8kv4-g128", progress=False)
    qoqlab.save(result, tmp_path)
    loaded = qoqlab.load(tmp_path)
    ids = windows[1][:1]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, result.model(ids).logits)
    assert sum(os.path.getsize(tmp_path / name) for name in os.listdir(tmp_path)) < 4 * sum(
        p.numel() for p in tiny[0].parameters()
    )


def test_text_is_generated_in_four_bits(tiny) -> None:
    model, tokenizer = tiny
    result = qoqlab.quantize(model, "rtn-w4a8kv4-g128", progress=False)
    prompt = torch.tensor([tokenizer("The following statement", verbose=False)["input_ids"]])
    out = qoqlab.generate(result, prompt, max_new_tokens=8, do_sample=False)
    assert prompt.shape[1] < out.shape[1] <= prompt.shape[1] + 8 and torch.equal(out[:, : prompt.shape[1]], prompt)


# --- text from files ------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_is(tmp_path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One.\n\n \nTwo é.\n", encoding="utf-8")
    assert qoqlab.load_text(str(path), "test") == qoqlab.load_text(path, "calibration") == "One.\n\n \nTwo é.\n"


@pytest.mark.parametrize("pattern", ["{}.txt", "wiki.{}.raw", "wiki.{}.tokens"])
def test_a_folder_has_a_file_per_split(pattern: str, tmp_path) -> None:
    for split in ("valid", "test"):
        (tmp_path / pattern.format(split)).write_text(split)
    assert [qoqlab.load_text(tmp_path, s) for s in ("calibration", "test")] == ["valid", "test"]
    (tmp_path / pattern.format("train")).write_text("train")
    assert qoqlab.load_text(tmp_path, "calibration") == "train"


def test_wikitext_is_joined_as_published_perplexities_have_it(tmp_path) -> None:
    separator = "\u2028"  # ends a line for str.splitlines, and for no published loader
    (tmp_path / "test.txt").write_text(f" \n = Title = \n \n Words ,{separator}and words . \n", encoding="utf-8")
    expected = f"\n\n = Title = \n\n\n\n\n Words ,{separator}and words . \n"
    assert qoqlab.load_text("wikitext-2", "test", tmp_path) == expected
    assert qoqlab.load_text("wikitext-2", "calibration", tmp_path / "test.txt") == expected


def test_wikitext_through_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args, split):
        calls.append((*args, split))
        return {"text": ["", " = Title = \n", "", " Words . \n"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert qoqlab.load_text("wikitext-2", "test") == "\n\n = Title = \n\n\n\n\n Words . \n"
    qoqlab.load_text("wikitext-2", "calibration")
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", split) for split in ("test", "train")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "qoqlab\[eval\]", or pass path='):
        qoqlab.load_text("wikitext-2", "test")


def test_text_that_cannot_be_read_is_named(tmp_path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"path: .*latin\.txt is not UTF-8 text"):
        qoqlab.load_text(tmp_path / "latin.txt", "test")
    with pytest.raises(FileNotFoundError, match=r"path: .* holds no test text; looked for test\.txt"):
        qoqlab.load_text(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="path: there is no file"):
        qoqlab.load_text("wikitext-2", "test", tmp_path / "gone")
    with pytest.raises(ValueError, match="path: goes with 'wikitext-2', got name 'python-docs'"):
        qoqlab.load_text("python-docs", "test", tmp_path)
    for name in ("gone.txt", 3):
        with pytest.raises(ValueError, match="is not a text; there is 'python-docs'"):
            qoqlab.load_text(name, "test")
