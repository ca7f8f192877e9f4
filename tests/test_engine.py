"""The engine on the reference: against transformers' own loop in RUNTIME mode, and its pages, batches and sampling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import sdpa_kernel

from qoqlab import generate, load_text, load_tiny, paged, quantize, runtime, tokens
from qoqlab.allocator import PagesExhausted
from qoqlab.arithmetic import kernel_problem, side_by_side
from qoqlab.attention import Mode
from qoqlab.cached_attention import ALONE, batch_of, causal, causal_prompts
from qoqlab.hf import KV4Cache
from qoqlab.kv import KVFormat
from qoqlab.paged import PAGE, PagedCache
from qoqlab.recipes import get
from qoqlab.sampling import Sampling
from qoqlab.schemes import Scheme

from .families import FAMILIES, LLAMA3_ROPE, build, cast_parameters, only, random_ids, wide

#: Where fp32 differs in its last bit, a number next to a tie falls to the neighbour of its fp16, INT8 or KV4 grid; one such
#: code moves the logits of these tiny random models by 1 %. A wrong position, window or scale moves them by 20 % and more.
FLIPS = 0.05
IDS = random_ids(3, 24)
PROMPTS = [IDS[0, :9], IDS[1, :1], IDS[2, :17]]


def one_by_one(result, prompt: torch.Tensor, steps: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and fp32 logits ``[steps, V]`` of transformers in RUNTIME mode with the quantised cache."""
    cache = KV4Cache(KVFormat.of(result.recipe.scheme.kv))
    ids, found, rows = prompt[None], [], []
    with torch.no_grad(), runtime.mode(result.model, Mode.RUNTIME):
        for _ in range(steps):
            rows.append(result.model(ids, past_key_values=cache, use_cache=True).logits[0, -1].float())
            ids = rows[-1].argmax()[None, None]
            found.append(int(ids))
    return found, torch.stack(rows)


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    """Logits ``[steps, V]`` are alike: the prompt's to fp32's rounding, the others but for a few codes."""
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert errors.max() <= FLIPS, errors


def logits_of(engine, prompts, continuations) -> list[torch.Tensor]:
    """The engine's logits ``[steps, V]`` for each prompt, fed with given tokens."""
    sequences, logits = engine.prefill(prompts)
    rows = [logits]
    for step in zip(*continuations, strict=True):
        rows.append(engine.decode(sequences, list(step)))
    engine.free(sequences)
    return list(torch.stack(rows[:-1], 1))


@pytest.mark.parametrize("preset", ["qoq-g128", "rtn-w4a8kv4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_runtime_mode(family: str, preset: str, quantized) -> None:
    """Biases (Qwen2), norms of heads (Qwen3), grouped heads, prompts of different lengths in one batch."""
    result = quantized(family, preset)
    engine = runtime.compile(result, "cpu", max_batch=3, max_tokens=64)
    expected = [one_by_one(result, prompt, 6) for prompt in PROMPTS]
    for got, (_, want) in zip(logits_of(engine, PROMPTS, [found for found, _ in expected]), expected, strict=True):
        check(got, want)
    assert engine.generate(PROMPTS, 6) == [found for found, _ in expected]
    assert not engine.lengths and engine.attend.cache.free_pages == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models(dtype: torch.dtype) -> None:
    model = cast_parameters(wide("qwen3"), dtype)
    result = quantize(model, "rtn-w4a8kv4-g128", progress=False)
    engine = runtime.compile(result, "cpu", max_batch=1, max_tokens=32)
    found, want = one_by_one(result, PROMPTS[0], 5)
    (got,) = logits_of(engine, PROMPTS[:1], [found])
    # transformers' cache returns rounded keys and values, and its attention rounds once more: more codes fall elsewhere
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert errors[0] <= (2**-10 if dtype == torch.float16 else 2**-6) and errors.max() <= 3 * FLIPS


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_window(family: str) -> None:
    config = {"sliding_window": 5} | ({"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {})
    model = wide(family, **config)
    windows = [block.window for block in runtime.describe(model).blocks]
    assert windows == ([5, 5] if family == "mistral" else [None, 5])
    result = quantize(model, "rtn-w4a8kv4-g128", progress=False)
    engine = runtime.compile(result, "cpu", max_batch=3, max_tokens=64)
    for prompt in PROMPTS:
        found, want = one_by_one(result, prompt, 8)
        (got,) = logits_of(engine, [prompt], [found])
        check(got, want)
    whole = runtime.compile(quantize(wide(family), "rtn-w4a8kv4-g128", progress=False), "cpu", 1, 64)
    (unlimited,) = logits_of(whole, [PROMPTS[2]], [found])
    assert (unlimited - want).norm() > 0.05 * want.norm()  # the window matters here


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}])
def test_scaled_rotary_positions(rope: dict) -> None:
    result = quantize(wide("llama", rope_parameters=rope), "rtn-w4a8kv4-g128", progress=False)
    found, want = one_by_one(result, PROMPTS[2], 5)
    (got,) = logits_of(runtime.compile(result, "cpu", 1, 64), [PROMPTS[2]], [found])
    check(got, want)


@pytest.mark.parametrize("kv", ["uint8", None])
def test_other_caches(kv: str | None) -> None:
    from qoqlab.grids import UINT8

    recipe = only(
        scheme=Scheme(get("rtn-w4a8kv4").scheme.weights, get("rtn-w4a8kv4").scheme.activations, UINT8 if kv else None)
    )
    result = quantize(wide("llama"), recipe, progress=False)
    engine = runtime.compile(result, "cpu", 1, 64)
    if kv:
        found, want = one_by_one(result, PROMPTS[0], 5)
        (got,) = logits_of(engine, PROMPTS[:1], [found])
    else:
        found = engine.generate(PROMPTS[:1], 5)[0]
        ids = torch.cat([PROMPTS[0], torch.tensor(found)])[None]
        with torch.no_grad(), runtime.mode(result.model, Mode.RUNTIME):
            want = result.model(ids, use_cache=False).logits[0, 8:13]
        (got,) = logits_of(engine, PROMPTS[:1], [found])
    check(got, want)


def test_tied_embeddings_and_the_bundled_model() -> None:
    result = quantize(wide("llama", tied=True), "rtn-w4a8kv4-g128", progress=False)
    assert runtime.compile(result, "cpu", 1, 32).generate([PROMPTS[0]], 4)[0] == one_by_one(result, PROMPTS[0], 4)[0]


def test_bundled_model_says_the_same_tokens() -> None:
    model, tokenizer = load_tiny()
    ids = tokens(tokenizer, load_text("python-docs", "test"), 40)
    result = quantize(model, "rtn-w4a8kv4-g128", progress=False, report=False)
    prompts = [ids[0, :30], ids[1, :11]]
    said = runtime.compile(result, "cpu", 2, 64).generate(prompts, 10)
    for prompt, new in zip(prompts, said, strict=True):
        want = generate(result, prompt[None], 10, do_sample=False, min_new_tokens=10)[0, len(prompt) :].tolist()
        assert new == want


# -- batches, pages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(quantized):
    """Three sequences of at most 70 tokens."""
    return runtime.compile(quantized("llama", "rtn-w4a8kv4-g128"), "cpu", max_batch=3, max_tokens=70)


def test_sequences_come_and_go(engine) -> None:
    """A sequence's logits do not depend on its neighbours, its pages or who had them before."""
    (alone,), want = engine.prefill([PROMPTS[0]])
    want = [want[0], engine.decode([alone], [5])[0], engine.decode([alone], [6])[0]]
    engine.free([alone])
    (a, b), _ = engine.prefill(PROMPTS[1:])
    (c,), logits = engine.prefill([PROMPTS[0]])
    got = [logits[0], engine.decode([b, c], [1, 5])[1]]
    engine.free([b])
    got.append(engine.decode([c, a], [6, 2])[0])
    torch.testing.assert_close(
        torch.stack(got), torch.stack(want), rtol=1e-5, atol=1e-5
    )  # torch's head depends on the batch
    engine.free([a, c])


def test_a_page_is_added_where_the_first_is_full(engine) -> None:
    (s,), _ = engine.prefill([torch.zeros(PAGE, dtype=torch.long)])
    free = engine.attend.cache.free_pages
    engine.decode([s], [1])
    assert engine.attend.cache.free_pages == free - 1
    engine.free([s])
    assert engine.attend.cache.free_pages == 6


def test_generation_ends_at_a_stop_token(engine) -> None:
    (plain,) = engine.generate([PROMPTS[0]], 8)
    assert len(plain) == 8
    first = plain[2]
    (stopped,) = engine.generate([PROMPTS[0]], 8, stop=[first])
    assert stopped == plain[: plain.index(first) + 1]


def test_bad_requests_are_named_and_change_nothing(engine) -> None:
    (s,), _ = engine.prefill([PROMPTS[0]])
    for call, kind, message in [
        (lambda: engine.prefill([]), ValueError, "prompts: 0 beside 1"),
        (lambda: engine.prefill([PROMPTS[0]] * 3), ValueError, "together at most max_batch = 3"),
        (lambda: engine.prefill([[]]), ValueError, r"prompts: expected 1..70 token numbers"),
        (lambda: engine.prefill([[1] * 71]), ValueError, r"prompts: expected 1..70 token numbers"),
        (lambda: engine.prefill([[1.5]]), ValueError, "prompts: expected"),
        (lambda: engine.prefill([[128]]), ValueError, r"tokens must lie in 0..127, got 128..128"),
        (lambda: engine.decode([], []), ValueError, "tokens: expected one for each of 0"),
        (lambda: engine.decode([s], [1, 2]), ValueError, "tokens: expected one for each of 1"),
        (lambda: engine.decode([s, s], [1, 2]), ValueError, "sequences: expected different ones"),
        (lambda: engine.decode([s], [128]), ValueError, "tokens: tokens must lie in 0..127"),
        (lambda: engine.decode([99], [1]), KeyError, "99 is not open"),
        (lambda: engine.decode_ahead([s], [1], 2, [None, None]), ValueError, "samplings: expected one for each of 1"),
        (lambda: engine.free([99]), KeyError, "99 is not open"),
        (lambda: engine.generate([PROMPTS[0]], 0), ValueError, "max_new_tokens: expected a positive integer"),
        (lambda: engine.generate([PROMPTS[0]], 63), ValueError, "exceed max_tokens = 70"),
    ]:
        with pytest.raises(kind, match=message):
            call()
    assert engine.lengths == {s: 9} and engine.attend.cache.free_pages == 5


def test_max_tokens_is_a_limit(engine) -> None:
    (s,), _ = engine.prefill([torch.zeros(70, dtype=torch.long)])
    with pytest.raises(ValueError, match="has max_tokens = 70 tokens already"):
        engine.decode([s], [1])


def test_a_full_cache_refuses_and_keeps_nothing(engine) -> None:
    taken = engine.attend.cache.allocator.take(engine.attend.cache.free_pages - 2)
    with pytest.raises(PagesExhausted, match=r"pages: 2 asked for, 1 of \d+ free"):
        engine.prefill([PROMPTS[0], [1] * 65])
    assert engine.attend.cache.free_pages == 2 and not engine.lengths
    engine.attend.cache.allocator.drop(taken)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=4), st.booleans())
def test_the_cache_returns_what_the_quantiser_gives(lengths: list[int], whole: bool) -> None:
    form = None if whole else KVFormat()
    cache = PagedCache(2, 3, 8, 8, form, torch.float32)
    stored = {}
    for i, length in enumerate(lengths):
        x = torch.randn(2, length, 3, 8, generator=torch.Generator().manual_seed(i))
        s = cache.open()
        cache.reserve(s, length)
        for start in range(0, length, 33):
            stop = min(length, start + 33)
            cache.append(1, s, start, x[0, start:stop], x[1, start:stop])
        stored[s] = x
    for s, x in stored.items():
        for got, side in zip(cache.gather(1, s, 0, x.shape[1]), x, strict=True):
            want = side if form is None else form.quantize_values(side).dequantize()
            assert torch.equal(got, want.transpose(0, 1))
        cache.free(s)
    assert cache.free_pages == 8
    with pytest.raises(KeyError, match="is not open"):
        cache.free(s)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_causal_attention_of_a_prompt(window: int | None) -> None:
    q, k, v = (torch.randn(7, h, 4, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    got = causal(q, k, v, window)
    for t in range(7):
        seen = slice(0 if window is None else max(0, t + 1 - window), t + 1)
        keys, values = (x[seen].transpose(0, 1)[None] for x in (k, v))
        torch.testing.assert_close(got[t], paged.reference.kv4_attention(q[t][None], keys, values)[0])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("counts", [[5], [4, 1, 7], [6, 6]])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_prompts_attend_to_themselves_alone(window: int | None, counts: list[int], device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(sum(counts), h, 64, dtype=dtype, device=device) for h in (4, 2, 2))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: list[int]) -> torch.Tensor:
        with sdpa_kernel(ALONE):
            return causal_prompts(q, k, v, batch_of(range(len(counts)), counts, [0] * len(counts), q.device), window)

    got = attend(q, k, v, counts)
    parts = [*zip(*(x.split(counts) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(got, torch.cat([causal(*part, window) for part in parts]))
    assert torch.equal(got, torch.cat([attend(*part, [len(part[0])]) for part in parts])), "bit for bit"
    assert len(counts) == 1 or not torch.equal(got, causal(q, k, v, window))


# -- sampling -------------------------------------------------------------------------------------------------------------


def test_sampled_generation_repeats(engine) -> None:
    first = engine.generate(PROMPTS[:2], 6, Sampling(1.0, seed=3))
    assert engine.generate(PROMPTS[:2], 6, Sampling(1.0, seed=3)) == first
    assert engine.generate(PROMPTS[:2], 6, Sampling(1.0, seed=4)) != first


# -- what cannot be compiled ----------------------------------------------------------------------------------------------


def test_models_that_an_engine_cannot_run_are_named(quantized) -> None:
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj is not quantised"):
        runtime.compile(build("llama"), "cpu")
    with pytest.raises(TypeError, match="not a supported architecture"):
        runtime.compile(torch.nn.Linear(2, 2), "cpu")
    with pytest.raises(ValueError, match="max_batch: expected a positive integer"):
        runtime.compile(quantized("llama", "qoq-g128"), "cpu", max_batch=0)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"device: cuda; an engine on a GPU needs compute capability 8\.0"):
            runtime.compile(quantized("llama", "qoq-g128"))
    with pytest.raises(TypeError, match="dtype: expected one of"):
        runtime.compile(quantized("llama", "qoq-g128"), "cpu", dtype=torch.float64)


@pytest.mark.parametrize("preset", ["quarot-w4a4kv4", "kivi-kv4", "atom-w4a4kv4-g128", "rtn-w4a16-g128"])
def test_other_recipes_are_refused(preset: str) -> None:
    with pytest.raises(ValueError, match=r"model: .*engine"):
        runtime.compile(quantize(wide("llama"), preset, IDS, progress=False), "cpu")


def test_fused_weights_compute_what_their_parts_do(quantized) -> None:
    from qoqlab import reference

    for preset in ("qoq-g128", "rtn-w4a8kv4"):
        block = runtime.describe(quantized("qwen2", preset).model).blocks[0]
        parts = [block.linear(role).quantized for role in "qkv"]
        x = torch.randn(3, 128)
        whole = reference.w4a8_matmul(x, side_by_side(parts))
        assert torch.equal(whole, torch.cat([reference.w4a8_matmul(x, part) for part in parts], -1))
        assert kernel_problem(side_by_side(parts)) == ""


def test_logits_that_are_not_finite_are_told(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = engine._logits
    monkeypatch.setattr(engine, "_logits", lambda y, r: logits(y, r).index_fill(0, torch.tensor([1]), torch.inf))
    with pytest.raises(RuntimeError, match="logits of prompt 1 are not finite"):
        engine.generate(PROMPTS[:2], 3)
    assert not engine.lengths
