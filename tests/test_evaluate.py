"""Perplexity and generation, against plain computations."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from qoqlab import generate, load_tiny, perplexity, quantize, runtime
from qoqlab.attention import Mode
from qoqlab.evaluate import lm_eval, logits_sqnr_db
from qoqlab.grids import UINT4
from qoqlab.hf import KV4Cache
from qoqlab.recipes import Recipe
from qoqlab.schemes import Scheme

from .families import FAMILIES, build, cast_parameters, logits, random_ids

IDS = random_ids(5, 16)
KV_ONLY = Recipe("kv only", Scheme(kv=UINT4))


def plain_perplexity(all_logits: torch.Tensor, ids: torch.Tensor) -> float:
    """exp of the mean of -log p(next token), one number at a time, in Python floats."""
    total, count = 0.0, 0
    for row, window in zip(all_logits.double(), ids, strict=True):
        for t in range(len(window) - 1):
            scores = row[t].tolist()
            top = max(scores)
            total += top + math.log(sum(math.exp(s - top) for s in scores)) - scores[int(window[t + 1])]
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_equals_a_plain_computation(family: str) -> None:
    model = build(family)
    assert perplexity(model, IDS) == pytest.approx(plain_perplexity(logits(model, IDS), IDS), rel=1e-5)


def test_perplexity_of_a_quantised_model_equals_a_plain_computation(quantized) -> None:
    result = quantized("llama", "qoq-g128")
    expected = plain_perplexity(logits(result.model, IDS), IDS)
    assert perplexity(result, IDS) == pytest.approx(expected, rel=1e-5)
    assert perplexity(result.model, IDS) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    model = build("llama")
    model.lm_head.weight.data.zero_()
    assert perplexity(model, IDS) == pytest.approx(128, rel=1e-5)


def test_perplexity_agrees_with_the_loss_of_transformers() -> None:
    model = build("qwen2")
    with torch.no_grad():
        loss = model(IDS, labels=IDS).loss
    assert perplexity(model, IDS) == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.parametrize("mode", list(Mode))
def test_perplexity_does_not_depend_on_the_batch_size(mode: Mode, quantized) -> None:
    result = quantized("qwen3", "qoq-g128")
    values = [perplexity(result, IDS, mode, prefill=3, batch_size=size) for size in (1, 2, 3, 5, 100)]
    assert values == pytest.approx([values[0]] * 5, rel=1e-4)


def test_windows_are_independent_and_count_equally() -> None:
    model = build("llama")
    each = [perplexity(model, window[None]) for window in IDS]
    assert perplexity(model, IDS) == pytest.approx(math.exp(sum(map(math.log, each)) / len(each)), rel=1e-5)


def test_the_shortest_window_predicts_one_token() -> None:
    model = build("llama")
    p = logits(model, IDS[:1, :2])[0, 0].softmax(-1)[IDS[0, 1]]
    assert perplexity(model, IDS[:1, :2]) == pytest.approx(1 / float(p), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_perplexity_of_other_precisions(dtype: torch.dtype) -> None:
    model = cast_parameters(build("llama"), dtype)
    expected = plain_perplexity(logits(model, IDS), IDS)
    assert perplexity(model, IDS) == pytest.approx(expected, rel=1e-4)


def test_perplexity_leaves_the_model_as_it_was(quantized) -> None:
    result = quantized("llama", "qoq-g128")
    before = logits(result.model, IDS)
    perplexity(result, IDS, Mode.RUNTIME, prefill=2)
    assert torch.equal(logits(result.model, IDS), before)


# --- runtime mode ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(model: torch.nn.Module, ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits of every position: a prompt at once, then token by token, through the 4-bit cache."""
    cache, out = KV4Cache(), []
    steps = [ids[:, :prefill], *ids[:, prefill:].split(1, dim=1)]
    for step in steps:
        if step.shape[1]:
            out.append(model(step, past_key_values=cache, use_cache=True).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("prefill", [1, 2, 7, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_runtime_mode_equals_decoding_through_the_cache(family: str, prefill: int) -> None:
    model = build(family)
    result = quantize(model, KV_ONLY, progress=False)
    with runtime.mode(result.model, Mode.RUNTIME):
        stepwise = decode(result.model, IDS, prefill)
    with runtime.mode(result.model, Mode.RUNTIME, prefill):
        at_once = logits(result.model, IDS)
    torch.testing.assert_close(at_once, stepwise, rtol=1e-4, atol=1e-4)
    # the unquantised model with nothing but the cache does the same
    torch.testing.assert_close(decode(model, IDS, prefill), stepwise, rtol=1e-4, atol=1e-4)
    expected = plain_perplexity(stepwise, IDS)
    assert perplexity(result, IDS, Mode.RUNTIME, prefill=prefill) == pytest.approx(expected, rel=1e-5)


def test_runtime_mode_equals_decoding_with_a_sliding_window() -> None:
    result = quantize(build("mistral", sliding_window=4), KV_ONLY, progress=False)
    with runtime.mode(result.model, Mode.RUNTIME):
        stepwise = decode(result.model, IDS, 6)
    assert perplexity(result, IDS, Mode.RUNTIME, prefill=6) == pytest.approx(plain_perplexity(stepwise, IDS), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["qoq-g128", "qoq-per-channel"])
def test_runtime_mode_of_a_whole_recipe_equals_decoding(preset: str, family: str, quantized) -> None:
    """Per-token activation codes do not depend on the batch, so even INT8 rounding agrees, bar ties."""
    result = quantized(family, preset)
    with runtime.mode(result.model, Mode.RUNTIME):
        stepwise = decode(result.model, IDS, 4)
    assert perplexity(result, IDS, Mode.RUNTIME, prefill=4) == pytest.approx(plain_perplexity(stepwise, IDS), rel=0.02)


def test_a_whole_prompt_has_no_kv_error() -> None:
    model = build("llama")
    result = quantize(model, KV_ONLY, progress=False)
    assert perplexity(result, IDS, Mode.RUNTIME, prefill=16) == pytest.approx(perplexity(model, IDS), rel=1e-5)
    assert perplexity(result, IDS, Mode.RUNTIME, prefill=1) != pytest.approx(perplexity(model, IDS), rel=1e-3)
    assert perplexity(result, IDS) != pytest.approx(perplexity(model, IDS), rel=1e-3)


def test_runtime_mode_of_the_unquantised_recipe_is_the_model() -> None:
    model = build("llama")
    assert perplexity(quantize(model, "fp16"), IDS, Mode.RUNTIME) == perplexity(model, IDS)


# --- generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_greedy_decoding_through_the_cache(family: str, quantized) -> None:
    result = quantized(family, "qoq-g128")
    prompt = IDS[:2, :5]
    out = generate(result, prompt, max_new_tokens=6, do_sample=False)
    assert out.shape == (2, 11) and torch.equal(out[:, :5], prompt)
    with runtime.mode(result.model, Mode.RUNTIME):
        stepwise = decode(result.model, out, 5)
    assert torch.equal(stepwise[:, 4:-1].argmax(-1), out[:, 5:])


def test_generate_takes_a_plain_model() -> None:
    model = build("llama")
    expected = model.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(generate(model, IDS[:1, :5], max_new_tokens=4, do_sample=False), expected)


def test_generate_uses_a_cache_that_is_passed_in(quantized) -> None:
    cache = KV4Cache()
    generate(quantized("llama", "qoq-g128"), IDS[:1, :5], max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == 8


@pytest.mark.filterwarnings("error::FutureWarning")
def test_generate_names_its_cache_as_this_release_of_transformers_does(quantized) -> None:
    generate(quantized("llama", "qoq-g128"), IDS[:1, :5], max_new_tokens=2, do_sample=False)


def test_generate_returns_to_simulated_mode(quantized) -> None:
    result = quantized("llama", "qoq-g128")
    before = logits(result.model, IDS)
    generate(result, IDS[:1, :5], max_new_tokens=2, do_sample=False)
    assert torch.equal(logits(result.model, IDS), before)


def test_logits_sqnr(quantized, wide_model) -> None:
    model = wide_model("llama")
    exact = logits(model, IDS)
    coarse, fine = (logits_sqnr_db(exact, quantized("llama", name), IDS) for name in ("rtn-w4a8kv4", "rtn-w8a8"))
    assert 3 < coarse < fine < 60
    # the unquantised copy differs by the order of additions alone
    assert logits_sqnr_db(exact, quantized("llama", "fp16"), IDS) > 100
    # a constant added to all logits of a token changes no probability
    assert logits_sqnr_db(exact + 5, quantized("llama", "rtn-w8a8"), IDS) == pytest.approx(fine, abs=0.01)


# --- bad input ------------------------------------------------------------------------------------------------------------


def test_perplexity_refuses_bad_arguments(quantized) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="ids: windows of 1 token leave nothing to predict; expected length >= 2"):
        perplexity(model, IDS[:, :1])
    for prefill in (0, -1, 17):
        with pytest.raises(ValueError, match=rf"prefill: expected 1\.\.16, got {prefill}"):
            perplexity(model, IDS, prefill=prefill)
    with pytest.raises(TypeError, match="mode: RUNTIME needs a QuantizedModel"):
        perplexity(model, IDS, Mode.RUNTIME)
    with pytest.raises(ValueError, match=r"ids: token ids must lie in 0\.\.127, got 0\.\.128"):
        perplexity(model, torch.tensor([[0, 128]]))
    with pytest.raises(TypeError, match=r"ids: expected int64 token ids, got torch\.float32"):
        perplexity(model, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="ids: expected non-empty int64 tokens"):
        generate(model, torch.zeros(0, 4, dtype=torch.int64), 1)


# --- lm-evaluation-harness ------------------------------------------------------------------------------------------------

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


@pytest.fixture
def local_tasks(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A folder with task ``words``: twelve questions with two answers each, in a local JSONL file."""
    pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"q": f"The {i}th keyword is", "choices": [" def", " quetzalcoatl"], "gold": int(i % 4 == 0)} for i in range(12)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.yaml").write_text(TASK.format(name="words", data=tmp_path / "words.jsonl"))
    return tmp_path


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer, limit: int) -> float:
    """The task's score, written out: the continuation of the larger log-probability wins."""
    right = 0
    for i in range(limit):
        prompt = tokenizer(f"The {i}th keyword is")["input_ids"]
        scores = []
        for choice in (" def", " quetzalcoatl"):
            ids = tokenizer(f"The {i}th keyword is{choice}")["input_ids"]
            log_p = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        right += scores.index(max(scores)) == int(i % 4 == 0)
    return right / limit


def test_lm_eval_scores_a_local_task(local_tasks) -> None:
    model, tokenizer = load_tiny()
    result = quantize(model, "rtn-w8a8", progress=False, report=False)
    for subject, network, limit in ((model, model, None), (result, result.model, 8)):
        table = lm_eval(subject, "words", include_path=local_tasks, limit=limit)
        assert table[["task", "metric", "filter"]].to_numpy().tolist() == [["words", "acc", "none"]]
        assert table.value.item() == pytest.approx(accuracy(network, tokenizer, limit or 12))
        assert table.stderr.item() >= 0
    assert lm_eval(result, ["words"], tokenizer, local_tasks, 2, mode=Mode.RUNTIME).value.between(0, 1).all()


def test_lm_eval_refuses_bad_arguments(local_tasks) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=r"tasks: 'nothing' is neither a task of the harness nor one of"):
        lm_eval(model, "nothing", include_path=local_tasks)
    with pytest.raises(ValueError, match="tokenizer: none given, and none found for the model's name"):
        lm_eval(model, "words", include_path=local_tasks)


def test_lm_eval_checks_before_the_harness_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "qoqlab\[eval\]"'):
        lm_eval(build("llama"), "words")
    for tasks in ([], [3]):
        with pytest.raises(ValueError, match="tasks: expected a task's name or a list of names"):
            lm_eval(build("llama"), tasks)
    with pytest.raises(TypeError, match="mode: RUNTIME needs a QuantizedModel"):
        lm_eval(build("llama"), "words", mode=Mode.RUNTIME)
    with pytest.raises(TypeError, match="model: expected a Hugging Face causal language model"):
        lm_eval(3, "words")
