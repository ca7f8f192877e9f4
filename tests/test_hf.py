"""The 4-bit cache inside transformers."""

from __future__ import annotations

import pytest
import torch

from qoqlab import quantize, runtime
from qoqlab.attention import Mode, decode_attention
from qoqlab.grids import INT8, UINT4
from qoqlab.hf import KV4Cache, KV4Layer
from qoqlab.kv import Keys, KVFormat, quantize_kv4
from qoqlab.recipes import Recipe
from qoqlab.schemes import Scheme

from .families import FAMILIES, build, random_ids

GREEDY = {"do_sample": False, "max_new_tokens": 6}
PROMPT = random_ids(3, 7)


def keys(length: int = 5, heads: int = 2, dim: int = 16, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, heads, length, dim, generator=torch.Generator().manual_seed(seed))


def test_attention_sees_the_rounded_past_and_the_exact_present() -> None:
    cache = KV4Cache()
    k1, v1, k2, v2 = (keys(n, seed=s) for n, s in ((5, 1), (5, 2), (2, 3), (2, 4)))
    first = cache.update(k1, v1, 0)
    assert torch.equal(first[0], k1) and torch.equal(first[1], v1)
    second = cache.update(k2, v2, 0)
    for seen, old, new in ((second[0], k1, k2), (second[1], v1, v2)):
        assert torch.equal(seen, torch.cat([quantize_kv4(old).dequantize(), new], 2))


def test_tokens_are_quantised_once() -> None:
    cache = KV4Cache()
    everything = keys(9)
    for token in everything.split(1, 2):
        seen, _ = cache.update(token, token, 0)
    rounded = quantize_kv4(everything).dequantize()
    assert torch.equal(seen[:, :, :-1], rounded[:, :, :-1]) and torch.equal(seen[:, :, -1:], everything[:, :, -1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_cache_answers_in_the_models_dtype(dtype: torch.dtype) -> None:
    cache = KV4Cache()
    for _ in range(2):
        k, v = cache.update(keys().to(dtype), keys().to(dtype), 0)
    assert k.dtype == v.dtype == dtype


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("heads", [1, 3])
def test_storage_is_half_a_byte_per_number_and_four_per_head(heads: int, dim: int) -> None:
    cache = KV4Cache()
    assert cache.storage_bytes() == 0
    for layer in range(3):
        for length in (5, 1, 1):
            k = keys(length, heads, dim)
            cache.update(k, k, layer)
    assert cache.storage_bytes() == 3 * 2 * (2 * 7 * heads) * (dim // 2 + 4)


def test_storage_agrees_with_the_quantised_model(quantized) -> None:
    result = quantized("llama", "qoq-g128")
    cache = KV4Cache()
    with runtime.mode(result.model, Mode.RUNTIME):
        result.model.generate(PROMPT, past_key_values=cache, **GREEDY)
    assert cache.storage_bytes() == 3 * cache.get_seq_length() * result.kv_bytes_per_token()


def test_sequence_length_and_reset() -> None:
    cache = KV4Cache()
    assert cache.get_seq_length() == 0
    cache.update(keys(5), keys(5), 0)
    cache.update(keys(5), keys(5), 1)
    assert cache.get_seq_length() == cache.get_seq_length(1) == 5 and len(cache) == 2
    cache.update(keys(1), keys(1), 0)
    assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (6, 5)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.storage_bytes() == 0
    k, _ = cache.update(keys(3), keys(3), 0)
    assert k.shape[2] == 3 and cache.get_seq_length() == 3


def test_a_reset_cache_generates_as_a_new_one() -> None:
    model, cache = build("llama"), KV4Cache()
    first = model.generate(PROMPT, past_key_values=cache, **GREEDY)
    cache.reset()
    assert torch.equal(model.generate(PROMPT, past_key_values=cache, **GREEDY), first)


def test_sequences_are_selected_and_repeated() -> None:
    cache = KV4Cache()
    k, v = keys(batch=3, seed=1), keys(batch=3, seed=2)
    cache.update(k, v, 0)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    new = keys(1, batch=3)
    assert torch.equal(cache.update(new, new, 0)[0][:, :, :5], quantize_kv4(k).dequantize()[[2, 0, 0]])
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    new = keys(1, batch=4)
    assert torch.equal(cache.update(new, new, 0)[1][:, :, :5], quantize_kv4(v).dequantize()[[2, 2, 0, 0]])


def test_cropping_is_refused() -> None:
    cache = KV4Cache()
    cache.update(keys(), keys(), 0)
    with pytest.raises(TypeError, match="KV4Cache: crop is not supported"):
        cache.crop(-1)
    assert isinstance(cache.layers[0], KV4Layer)


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy decoding written out, one sequence at a time."""
    rows = []
    for row in prompt:
        cache, ids, step = KV4Cache(), row[None], row[None]
        for _ in range(tokens):
            step = model(step, past_key_values=cache).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, step], 1)
        rows.append(ids)
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_greedily_with_an_unquantised_model(family: str) -> None:
    model, cache = build(family), KV4Cache()
    out = model.generate(PROMPT, past_key_values=cache, **GREEDY)
    assert torch.equal(out, greedy(model, PROMPT, 6))
    assert cache.get_seq_length() == 12  # the last token is never fed back
    assert cache.storage_bytes() == 2 * 2 * (3 * 12 * 2) * (16 // 2 + 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_greedily_with_a_quantised_model(family: str) -> None:
    result = quantize(build(family), Recipe("kv only", Scheme(kv=UINT4)), progress=False)
    with runtime.mode(result.model, Mode.RUNTIME):
        out = result.model.generate(PROMPT, past_key_values=KV4Cache(), **GREEDY)
    # with no other rounding, the cache alone makes the difference
    assert torch.equal(out, greedy(build(family), PROMPT, 6))


def test_a_window_is_obeyed_by_the_cache() -> None:
    model = build("mistral", sliding_window=4)
    exact = model.generate(PROMPT, output_logits=True, return_dict_in_generate=True, **GREEDY).logits[0]
    rounded = model.generate(
        PROMPT, past_key_values=KV4Cache(), output_logits=True, return_dict_in_generate=True, **GREEDY
    ).logits[0]
    torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=1e-5)  # a prompt attends to exact keys
    assert torch.equal(model.generate(PROMPT, past_key_values=KV4Cache(), **GREEDY), greedy(model, PROMPT, 6))


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batches_agree_with_single_sequences(family: str) -> None:
    model = build(family)
    model.generation_config.pad_token_id = 0
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), PROMPT[:1, :4]], 1)
    batch = torch.cat([padded, PROMPT[1:2]])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    out = model.generate(batch, attention_mask=mask, past_key_values=KV4Cache(), **GREEDY)
    assert torch.equal(out[:1, 3:], greedy(model, PROMPT[:1, :4], 6))
    assert torch.equal(out[1:], greedy(model, PROMPT[1:2], 6))


@torch.no_grad()
def beam_score(model: torch.nn.Module, ids: torch.Tensor, prompt: int) -> float:
    """Log-probability of the continuation of ``ids [1, T]``, decoded through the cache."""
    cache, total, step = KV4Cache(), 0.0, ids[:, :prompt]
    for t in range(prompt, ids.shape[1]):
        total += float(model(step, past_key_values=cache).logits[0, -1].log_softmax(-1)[ids[0, t]])
        step = ids[:, t : t + 1]
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search(family: str) -> None:
    """Scores of the beams equal those of decoding each beam alone: codes move with their beams."""
    model, cache = build(family), KV4Cache()
    out = model.generate(
        PROMPT[:1],
        past_key_values=cache,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        **GREEDY,
    )
    assert out.sequences.shape == (3, 13) and len({tuple(s.tolist()) for s in out.sequences}) == 3
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        assert beam_score(model, sequence[None], 7) == pytest.approx(float(score), abs=1e-3)
    assert cache.storage_bytes() == 2 * 2 * (3 * 12 * 2) * (16 // 2 + 4)


def test_a_quantised_model_does_not_round_a_cached_key_twice(quantized) -> None:
    """`model.generate` with a `KV4Cache` in simulated mode: the cache rounds, the attention function then does not."""
    result = quantized("llama", "qoq-g128")
    prompt = torch.arange(6)[None]
    cache = KV4Cache()
    with torch.no_grad():
        result.model(prompt, past_key_values=cache, use_cache=True)
        seen: list[torch.Tensor] = []
        layer = result.model.model.layers[0].self_attn
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        result.model(torch.tensor([[7]]), past_key_values=cache, use_cache=True)
        handle.remove()
        layer.qoq.grid, grid = None, layer.qoq.grid
        try:
            again = KV4Cache()
            result.model(prompt, past_key_values=again, use_cache=True)
            handle = layer.register_forward_hook(lambda module, args, output: seen.append(output[0]))
            result.model(torch.tensor([[7]]), past_key_values=again, use_cache=True)
            handle.remove()
        finally:
            layer.qoq.grid = grid
    assert torch.equal(seen[0], seen[1])


# --- other formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 5, 8, 19])
def test_a_cache_with_keys_per_channel_is_the_decode_step(prompt: int) -> None:
    """A prompt, then token by token: what attention sees equals the formula for all steps at once."""
    form = KVFormat(UINT4, Keys.CHANNEL, window=8)
    cache, (q, k, v) = KV4Cache(form), (keys(20, seed=s) for s in (1, 2, 3))
    expected = decode_attention(q, k, v, None, form, prompt)
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, 20))]:
        part = slice(start, stop)
        seen_k, seen_v = cache.update(k[:, :, part], v[:, :, part], 0)
        assert seen_k.shape == seen_v.shape == (2, 2, stop, 16) and cache.get_seq_length() == stop
        mask = torch.arange(stop) <= torch.arange(start, stop)[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(q[:, :, part], seen_k, seen_v, attn_mask=mask)
        torch.testing.assert_close(out.transpose(1, 2), expected[:, part], rtol=1e-5, atol=1e-5)


def test_a_cache_with_keys_per_channel_stores_what_it_says() -> None:
    cache = KV4Cache(KVFormat(UINT4, Keys.CHANNEL, window=8))
    for token in keys(19).half().split(1, 2):
        cache.update(token, token, 0)
    rows = 2 * 2
    window = 16 * (8 // 2 + 4)  # 16 channels: 8 codes, a scale and a zero each
    assert cache.storage_bytes() == rows * (2 * window + 3 * 16 * 2 + 19 * (16 // 2 + 4))
    cache.reset()
    assert cache.storage_bytes() == 0 and cache.get_seq_length() == 0


def test_sequences_of_a_cache_with_keys_per_channel_can_be_selected() -> None:
    form = KVFormat(UINT4, Keys.CHANNEL, window=4)
    cache, swapped, k = KV4Cache(form), KV4Cache(form), keys(7)
    cache.update(k, k, 0)
    swapped.update(k.flip(0), k.flip(0), 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    new = keys(1, seed=4)
    for a, b in zip(cache.update(new, new, 0), swapped.update(new, new, 0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("preset", ["quarot-w4a8kv4", "kivi-kv4"])
def test_generation_equals_decode_steps(preset: str, quantized) -> None:
    """The cache and the formula for all decode steps at once lead to the same next token's logits."""
    result = quantized("llama", preset)
    form, ids = result.recipe.scheme.kv, random_ids(2, 40, seed=8)
    with runtime.mode(result.model, Mode.RUNTIME, prefill=10):
        expected = result.model(ids, use_cache=False).logits[:, 9:]
    cache, found = KV4Cache(form), []
    with runtime.mode(result.model, Mode.RUNTIME):
        for part in (ids[:, :10], *ids[:, 10:].split(1, 1)):
            found.append(result.model(part, past_key_values=cache, use_cache=True).logits[:, -1:])
    # sums in another order may move an activation or a key to the next code
    error = (torch.cat(found, 1) - expected).norm() / expected.norm()
    assert float(error) < 0.05


@pytest.mark.parametrize("bad", [None, KVFormat(None, rotate_keys=True)])
def test_a_cache_needs_a_grid(bad) -> None:
    with pytest.raises(ValueError, match="grid: expected a Grid or a KVFormat with a grid"):
        KV4Layer(bad)


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        ("x", TypeError, "grid: expected a Grid, a KVFormat or None, got 'x'"),
        (4, TypeError, "grid: expected a Grid, a KVFormat or None, got 4"),
        (None, ValueError, "grid: expected a Grid or a KVFormat with a grid, got None"),
        (KVFormat(None), ValueError, "grid: expected a Grid or a KVFormat with a grid"),
        (INT8, ValueError, "grid: keys and values need an unsigned grid, got INT8"),
    ],
)
def test_a_cache_of_nonsense_is_refused_when_it_is_made(grid: object, error: type[Exception], message: str) -> None:
    for kind in (KV4Cache, KV4Layer):
        with pytest.raises(error, match=message):
            kind(grid)
