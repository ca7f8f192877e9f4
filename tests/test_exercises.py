"""Every check accepts the library's own answer, lets the stub through, and meets likely mistakes with a useful sentence."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from qoqlab import affine, baselines, exercises, hadamard, packing, progressive, recipes, steps, transforms
from qoqlab.progressive import FirstLevel, ProgressiveWeight, Zero
from qoqlab.recipes import Recipe, Step


def cache_bytes(layers, kv_heads, head_dim, tokens, bits):
    return 2 * layers * kv_heads * head_dim * tokens * bits / 8


def roofline_seconds(bits, tokens, bandwidth, peak):
    return max(bits / 8 / bandwidth, 2 * tokens / peak)


def outlier_ratio(x):
    channels = x.abs().amax(0)
    return channels.max() / channels.median()


def per_token_int8(x):
    a = affine.quantize_per_token_s8(x)
    return a.codes, a.scales


def group_scale(low, high):
    row = torch.tensor([[low, high, 119.0, -119.0]])  # the second group pins the channel scale to 1
    scales = progressive.choose_scales(row, group_size=2)
    return int(scales.group_scales[0, 0]), int(scales.group_zeros[0, 0])


def progressive_dequant(codes, group_scales, group_zeros, channel_scales, group_size):
    parts = (channel_scales, group_scales, group_zeros, group_size, Zero.INTEGER, FirstLevel.UNROUNDED)
    return ProgressiveWeight(*parts, codes=codes).dequantize()


def bits_per_weight(columns, group_size, group_bits, row_bits):
    return 4 + group_bits / group_size + row_bits / columns


def key_ranking():
    return ["channel", "smoothed", "rotated", "token"]


def frontier(bits, loss):
    points = list(zip(bits, loss, strict=True))

    def beaten(p):
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)

    return sorted((i for i, p in enumerate(points) if not beaten(p)), key=lambda i: bits[i])


def crossing(bits, peak, bandwidth):
    return bits / 8 / bandwidth * peak / 2


def step_speedup(seconds, factors):
    return sum(seconds.values()) / sum(value / factors.get(name, 1.0) for name, value in seconds.items())


def unpack_budget(lanes, bandwidth, bits):
    return lanes / (bandwidth / (bits / 8))


def largest_batch(memory, weights, context, per_token):
    return max(0, int((memory - weights) // (context * per_token)))


def group_size(widths):
    return next((size for size in (128, 64, 32) if all(width % size == 0 for width in widths)), None)


def kl(exact, rounded):
    p, q = exact.log_softmax(-1), rounded.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def compression(parts):
    return sum(n * before for n, before, _ in parts) / sum(n * after for n, _, after in parts)


def unpack_word(word):
    return word & 0x0F0F0F0F, word >> 4 & 0x0F0F0F0F


def unsigned_word(word, scale, zero):
    return word * scale + (128 - zero * scale) * 0x01010101


def fold_attention(q_weight, k_weight, scale, shared=torch.repeat_interleave):
    rows = shared(scale, q_weight.shape[0] // k_weight.shape[0], 0)
    return transforms.scale_outputs(q_weight, rows.flatten()), transforms.scale_outputs(k_weight, 1 / scale.flatten())


def tiled(scale, times, _dim):
    return scale.repeat(times, 1)


def fold_rotation(producer, gain, consumer, rotation):
    return rotation.T @ producer, (consumer * gain) @ rotation


def reorder(gate, up, down, activation_max, by=transforms.salience_order):
    order = by(activation_max)
    return gate[order], up[order], down[:, order]


def output_errors(row, inputs, ratios):
    steps_ = torch.tensor(ratios)[:, None] * row.abs().max() / 7
    return (((row / steps_).round().clamp(-7, 7) * steps_ - row) @ inputs.T).square().sum(1)


def best_ratio(row, inputs, ratios):
    return ratios[int(output_errors(row, inputs, ratios).argmin())]


def error_feedback(weights, hessian, sign=1, divisor=1):
    first = round(weights[0])
    return [first, round(weights[1] + sign * (weights[0] - first) * hessian[0][1] / hessian[divisor][divisor])]


def clip_error(row, limit):
    step, beyond = limit / 7, row.abs() > limit
    errors = ((row / step).round().clamp(-7, 7) * step - row).square()
    return errors[~beyond].sum(), errors[beyond].sum()


def losses(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")


def perplexity(logits, ids):
    return losses(logits, ids).mean().exp()


def ratio_db(exact, rounded, times=10):
    return times * torch.log10(exact.square().sum() / (rounded - exact).square().sum())


def kv_bytes(layers, kv_heads, head_dim, bits, extra_bits):
    return 2 * layers * kv_heads * (head_dim * bits + extra_bits) / 8


def magic(word, mask=0x000F000F, one=0x64006400, offset=0x64086408):
    return word & mask | one, offset


def linear_scores(query, codes, scales, zeros):
    return scales * (codes.float() @ query - zeros * query.sum())


def merge(a, b, ratio=lambda own, top: math.exp(own - top)):
    largest = max(a[0], b[0])
    grown = [ratio(part[0], largest) for part in (a, b)]
    return largest, a[1] * grown[0] + b[1] * grown[1], a[2] * grown[0] + b[2] * grown[1]


def locate(table, token, page_size):
    return table[token // page_size], token % page_size


ROTATE, SMOOTH = Step(steps.rotate), Step(steps.smooth_attention)


def recipe(*chosen, like="qoq-g128"):
    return lambda: Recipe("mine", recipes.get(like).scheme, chosen)


def admit(prompts, free, page_size):
    started = 0
    for prompt in prompts:
        free -= -(-(prompt + 1) // page_size)
        if free < 0:
            break
        started += 1
    return started


def admit_any(prompts, free, page_size):
    """Small requests overtake large ones."""
    started = 0
    for prompt in prompts:
        pages = -(-(prompt + 1) // page_size)
        started += pages <= free
        free -= pages if pages <= free else 0
    return started


def fleet_cost(load, output, capacity, hourly, busy):
    gpus = max(1, math.ceil(load / (capacity * busy)))
    return gpus, gpus * hourly / 3600 / (load * output) * 1e6


ANSWERS = [
    (exercises.check_cache_bytes, cache_bytes),
    (exercises.check_outlier_ratio, outlier_ratio),
    (exercises.check_per_token_int8, per_token_int8),
    (exercises.check_group_scale, group_scale),
    (exercises.check_progressive_dequant, progressive_dequant),
    (exercises.check_pack_u4, packing.pack_u4),
    (exercises.check_bits_per_weight, bits_per_weight),
    (exercises.check_key_ranking, key_ranking),
    (exercises.check_frontier, frontier),
    (exercises.check_recipe, recipe(ROTATE, SMOOTH)),
    (exercises.check_roofline, roofline_seconds),
    (exercises.check_crossing, crossing),
    (exercises.check_step_speedup, step_speedup),
    (exercises.check_unpack_budget, unpack_budget),
    (exercises.check_largest_batch, largest_batch),
    (exercises.check_group_size, group_size),
    (exercises.check_divergence, lambda exact, rounded: kl(exact, rounded).mean()),
    (exercises.check_compression, compression),
    (exercises.check_unpack_word, unpack_word),
    (exercises.check_unsigned_word, unsigned_word),
    (exercises.check_attention_scale, transforms.attention_scale),
    (exercises.check_fold_attention, fold_attention),
    (exercises.check_hadamard, hadamard.hadamard),
    (exercises.check_fold_rotation, fold_rotation),
    (exercises.check_reorder, reorder),
    (exercises.check_optimal_clip_error, clip_error),
    (exercises.check_best_ratio, best_ratio),
    (exercises.check_error_feedback, error_feedback),
    (exercises.check_perplexity, perplexity),
    (exercises.check_sqnr, ratio_db),
    (exercises.check_kv_bytes, kv_bytes),
    (exercises.check_magic, magic),
    (exercises.check_linear_scores, linear_scores),
    (exercises.check_merge, merge),
    (exercises.check_locate, locate),
    (exercises.check_admit, admit),
    (exercises.check_fleet_cost, fleet_cost),
]


def test_every_check_is_covered():
    assert {check.__name__ for check, _ in ANSWERS} == {n for n in vars(exercises) if n.startswith("check_")}


@pytest.mark.parametrize(("check", "answer"), ANSWERS, ids=lambda f: f.__name__)
def test_accepts_the_library(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out == f"{check.__name__}: passed\n"


@pytest.mark.parametrize("check", [check for check, _ in ANSWERS], ids=lambda f: f.__name__)
def test_lets_the_stub_through(check):
    def stub(*_args):
        raise NotImplementedError("your turn")

    with pytest.raises(NotImplementedError, match="your turn"):
        check(stub)


def symmetric(x, reduced, levels=127, dtype=torch.float16):
    scale = (x.abs().amax(reduced, keepdim=True) / levels).to(dtype)
    return scale, (x / scale.float()).round()


def no_zero_token(x):
    scale, codes = symmetric(x, -1)
    return codes.nan_to_num().to(torch.int8), scale[:, 0]


def truncated(x):
    scale, _ = symmetric(x, -1)
    return (x / scale.float()).trunc().to(torch.int8), scale[:, 0]


def per_channel(x):
    scale, codes = symmetric(x, 0)
    return codes.to(torch.int8), scale[0]


def per_tensor(x):
    scale, codes = symmetric(x, (0, 1))
    return codes.to(torch.int8), scale.flatten()


def by_128(x):
    scale, codes = symmetric(x, -1, 128)
    return codes.clamp(-128, 127).to(torch.int8), scale[:, 0]


def unrounded_scale(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale[scale == 0] = 1
    return (x / scale).round().to(torch.int8), scale[:, 0].half()


def dequant(codes, s1, z, s0, size, cast=True, use_s1=True, tiled=False):
    if cast:
        codes, z = codes.int(), z.int()
    expand = (lambda t: t.repeat(1, size)) if tiled else (lambda t: t.repeat_interleave(size, 1))
    value = codes - expand(z)
    return (value * expand(s1) if use_s1 else value).float() * s0.float()[:, None]


MISTAKES = [
    (exercises.check_cache_bytes, lambda *a: cache_bytes(*a) / 2, "factor 2"),
    (exercises.check_cache_bytes, lambda *a: cache_bytes(*a) * 8, "number of bits"),
    (exercises.check_cache_bytes, lambda n, h, d, t, bits: 2 * n * h * d * t * max(1, bits // 8), "share a byte"),
    (exercises.check_outlier_ratio, lambda x: x.amax(0).max() / x.amax(0).median(), "magnitudes"),
    (exercises.check_outlier_ratio, lambda x: x.abs().max() / x.abs().median(), "all numbers"),
    (exercises.check_outlier_ratio, lambda x: x.abs().amax(1).max() / x.abs().amax(1).median(), "column"),
    (exercises.check_per_token_int8, per_tensor, "one scale for both"),
    (exercises.check_per_token_int8, per_channel, "per channel"),
    (exercises.check_per_token_int8, by_128, "by 127"),
    (exercises.check_per_token_int8, truncated, "do not truncate"),
    (exercises.check_per_token_int8, no_zero_token, "all-zero token"),
    (exercises.check_per_token_int8, unrounded_scale, "rounded to fp16"),
    (exercises.check_group_scale, lambda a, b: (round((b - a) / 16), round(-a / round((b - a) / 16))), "not by 16"),
    (exercises.check_group_scale, lambda a, b: (round((b - a) / 15), round(a / round((b - a) / 15))), "positive here"),
    (exercises.check_group_scale, lambda a, b: (round((b - a) / 15), round(-a / round((b - a) / 15))), "hold 0"),
    (
        exercises.check_group_scale,
        lambda a, b: (round((max(b, 0) - min(a, 0)) / 15), round(-min(a, 0) / max(round((max(b, 0) - min(a, 0)) / 15), 1))),
        "all-zero group",
    ),
    (exercises.check_progressive_dequant, lambda *a: dequant(*a, cast=False), "no negative numbers"),
    (exercises.check_progressive_dequant, lambda *a: dequant(*a, use_s1=False), "group scale is missing"),
    (exercises.check_progressive_dequant, lambda *a: dequant(*a, tiled=True), "group|16 = 112"),
    (exercises.check_pack_u4, lambda c: c[1::2] | (c[::2] << 4), "low nibble"),
    (exercises.check_pack_u4, lambda c: c[:8] | (c[8:] << 4), "pairs 0 with 8"),
    (exercises.check_pack_u4, lambda c: c, "fill 8 bytes"),
    (exercises.check_bits_per_weight, lambda k, g, b, r: 4 + b + r, "scale of its own"),
    (exercises.check_bits_per_weight, lambda k, g, b, r: 4 + (b + r) / k, "counts one group"),
    (exercises.check_bits_per_weight, lambda k, g, b, r: 4 + b / g, "row's own 16 bits"),
    (exercises.check_bits_per_weight, lambda k, g, b, r: 4 + (b + r) / g, "not once per group"),
    (exercises.check_bits_per_weight, lambda k, g, b, r: bits_per_weight(512, g, b, r), "a row of 4096"),
    (exercises.check_key_ranking, lambda: ["token", "channel"], "each once"),
    (exercises.check_key_ranking, lambda: key_ranking()[::-1], "set the ticks"),
    (exercises.check_key_ranking, lambda: ["channel", "rotated", "smoothed", "token"], "rotated before smoothed"),
    (exercises.check_frontier, lambda b, v: [min(range(len(b)), key=b.__getitem__)], "all three"),
    (exercises.check_frontier, lambda b, v: list(range(len(b))), "nobody wants it"),
    (
        exercises.check_frontier,
        lambda b, v: [i for i in range(len(b)) if v[i] == min(w for c, w in zip(b, v, strict=True) if c == b[i])],
        "not only with equal bits",
    ),
    (exercises.check_frontier, lambda b, v: sorted(frontier(b, v)), "by rising bits"),
    (
        exercises.check_frontier,
        lambda b, v: [i for i in frontier(b, v) if (b[i], v[i]) not in zip(b[:i], v[:i], strict=True)],
        "keep both",
    ),
    (exercises.check_recipe, lambda: (ROTATE, SMOOTH), "expected a qoqlab.recipes.Recipe"),
    (exercises.check_recipe, recipe(ROTATE, SMOOTH, like="qoq-per-channel"), "format must be that of qoq-g128"),
    (exercises.check_recipe, recipe(), "round to nearest"),
    (exercises.check_recipe, recipe(SMOOTH), "loud activation channels"),
    (exercises.check_recipe, recipe(ROTATE), "loud key channels"),
    (exercises.check_recipe, recipe(Step(baselines.smooth_inputs)), "loud key channels"),
    (exercises.check_roofline, lambda bits, tokens, bw, peak: bits / 8 / bw + 2 * tokens / peak, "not their sum"),
    (exercises.check_roofline, lambda bits, tokens, bw, peak: min(bits / 8 / bw, 2 * tokens / peak), "the larger number"),
    (exercises.check_roofline, lambda bits, tokens, bw, peak: max(bits / bw, 2 * tokens / peak), "bits are not bytes"),
    (exercises.check_roofline, lambda bits, tokens, bw, peak: max(bits / 8 / bw, tokens / peak), "two operations"),
    (exercises.check_roofline, lambda bits, tokens, bw, peak: bits / 8 / bw, "0.3, got 0.1"),
    (exercises.check_crossing, lambda bits, peak, bandwidth: bits / 8 * peak / bandwidth, "two operations"),
    (exercises.check_crossing, lambda bits, peak, bandwidth: bits * peak / bandwidth / 2, "bits are not bytes"),
    (exercises.check_crossing, lambda bits, peak, bandwidth: 2 * bandwidth / peak / (bits / 8), "upside down"),
    (exercises.check_crossing, lambda bits, peak, bandwidth: peak / bandwidth / 2, "78 tokens, got 156"),
    (exercises.check_step_speedup, lambda s, f: sum(f.get(n, 1) for n in s) / len(s), "do not average"),
    (
        exercises.check_step_speedup,
        lambda s, f: sum(t * f.get(n, 1) for n, t in s.items()) / sum(s.values()),
        "do not average",
    ),
    (exercises.check_step_speedup, lambda s, f: 1 / step_speedup(s, f), "old time over new time"),
    (
        exercises.check_step_speedup,
        lambda s, f: sum(s.values()) / sum(s[n] / f[n] for n in f) if f else 1,
        "stays in the sum",
    ),
    (exercises.check_unpack_budget, lambda lanes, bandwidth, bits: lanes / bandwidth * bits, "bandwidth counts bytes"),
    (exercises.check_unpack_budget, lambda lanes, bandwidth, bits: bandwidth / lanes / (bits / 8), "upside down"),
    (exercises.check_unpack_budget, lambda lanes, bandwidth, bits: lanes / bandwidth / (bits / 8), "half the time"),
    (exercises.check_largest_batch, lambda m, w, c, t: int(m // (c * t)), "weights are in that memory too"),
    (exercises.check_largest_batch, lambda m, w, c, t: int((m - w) // t), "a sequence of 10"),
    (exercises.check_largest_batch, lambda m, w, c, t: round((m - w) / (c * t)), "only whole sequences"),
    (exercises.check_largest_batch, lambda m, w, c, t: int((m - w) // (c * t)), "no sequence, 0"),
    (exercises.check_largest_batch, lambda m, w, c, t: float(max(0, (m - w) // (c * t))), "is an int"),
    (exercises.check_group_size, lambda widths: group_size(widths[:1]), "not only the first"),
    (exercises.check_group_size, lambda widths: group_size(widths) or 32, "None"),
    (exercises.check_group_size, lambda widths: min(widths), "groups of 128 fit"),
    (
        exercises.check_group_size,
        lambda widths: next((g for g in (128, 64) if not any(w % g for w in widths)), None),
        "3 . 32",
    ),
    (exercises.check_divergence, lambda p, q: (p.exp() * (p - q)).sum(-1).mean(), "softmax is missing"),
    (exercises.check_divergence, lambda p, q: kl(p, q).sum(), "average over the positions"),
    (exercises.check_divergence, lambda p, q: -kl(p, q).mean(), "the sign"),
    (exercises.check_divergence, lambda p, q: kl(q, p).mean(), "not the reverse"),
    (exercises.check_divergence, lambda p, q: kl(p, q).mean() / 2, "sum over the vocabulary"),
    (exercises.check_compression, lambda parts: 1 / compression(parts), "more than 1 is smaller"),
    (exercises.check_compression, lambda parts: sum(b / a for _, b, a in parts) / len(parts), "do not average"),
    (
        exercises.check_compression,
        lambda parts: sum(n * b / a for n, b, a in parts) / sum(n for n, *_ in parts),
        "do not average",
    ),
    (exercises.check_unpack_word, lambda word: (word & 0xFFFF, word >> 16), "halves of the word"),
    (exercises.check_unpack_word, lambda word: (word & 0x0F0F0F0F, word & 0xF0F0F0F0), "shift right by 4"),
    (exercises.check_unpack_word, lambda word: (word & 0x0F0F0F0F, word >> 4), "mask again"),
    (exercises.check_unpack_word, lambda word: (word >> 4 & 0x0F0F0F0F, word & 0x0F0F0F0F), "low nibbles of"),
    (exercises.check_unsigned_word, lambda w, s, z: w * s + (128 - z * s), "all four bytes"),
    (exercises.check_unsigned_word, lambda w, s, z: (w * s - z * s * 0x01010101) & 0xFFFFFFFF, "128 is missing"),
    (exercises.check_unsigned_word, lambda w, s, z: (w - z * 0x01010101) * s & 0xFFFFFFFF, "128 is missing"),
    (exercises.check_attention_scale, lambda k, a: k**a, "turned together"),
    (exercises.check_attention_scale, lambda k, a: (k.view(-1, 2).amax(1) ** a).repeat_interleave(2), "neighbours"),
    (exercises.check_attention_scale, lambda k, a: k.view(2, -1).amax(0).repeat(2), "alpha = 1"),
    (exercises.check_attention_scale, lambda k, a: (k.view(2, -1).amax(0) ** a).repeat(2), "silent pair"),
    (exercises.check_attention_scale, lambda k, a: k.view(2, -1).amax(0) ** a, "4 factors"),
    (exercises.check_fold_attention, lambda q, k, s: fold_attention(q, k, 1 / s), "divided"),
    (exercises.check_fold_attention, lambda q, k, s: fold_attention(q, k, s, tiled), "not repeat"),
    (exercises.check_fold_attention, lambda q, k, s: (q, fold_attention(q, k, s)[1]), "multiply row c"),
    (exercises.check_fold_attention, lambda q, k, s: (q, k), "divide row c"),
    (exercises.check_hadamard, lambda n: hadamard.hadamard(n) * n**0.5, "divide by sqrt"),
    (exercises.check_hadamard, torch.eye, "every entry"),
    (exercises.check_hadamard, lambda n: torch.ones(n, n) / n**0.5, "minus"),
    (exercises.check_hadamard, lambda n: hadamard.hadamard(n).flip(0) if n > 1 else torch.ones(1, 1), "not Sylvester"),
    (exercises.check_fold_rotation, lambda p, g, c, r: (r @ p, (c * g) @ r), "wrong way round"),
    (exercises.check_fold_rotation, lambda p, g, c, r: (p, (c * g) @ r), "has to write"),
    (exercises.check_fold_rotation, lambda p, g, c, r: (r.T @ p, c @ r), "gain is lost"),
    (exercises.check_fold_rotation, lambda p, g, c, r: (r.T @ p, (c @ r) * g), "after the rotation"),
    (exercises.check_fold_rotation, lambda p, g, c, r: (r.T @ p, (c * g) @ r.T), "output changed"),
    (exercises.check_reorder, lambda g, u, d, m: reorder(g, u, d, -m), "loudest first"),
    (exercises.check_reorder, lambda g, u, d, m: reorder(g, u, d, m, lambda v: v.argsort().argsort()), "rank as an index"),
    (exercises.check_reorder, lambda g, u, d, m: (g, u, reorder(g, u, d, m)[2]), "up_proj still writes"),
    (exercises.check_reorder, lambda g, u, d, m: (g, *reorder(g, u, d, m)[1:]), "gate_proj multiplies"),
    (exercises.check_optimal_clip_error, lambda r, m: (clip_error(r, m)[0], 0.0), "clipping error"),
    (exercises.check_optimal_clip_error, lambda r, m: (clip_error(r, m)[0], (r.abs() - m).relu().sum()), "squared one"),
    (exercises.check_optimal_clip_error, lambda r, m: (sum(clip_error(r, m)), clip_error(r, m)[1]), "that is everything"),
    (exercises.check_best_ratio, lambda r, x, q: q[0], "input 0 is always 0"),
    (exercises.check_best_ratio, lambda r, x, q: best_ratio(r, torch.eye(len(r)), q), "input 0 is always 0"),
    (exercises.check_best_ratio, lambda r, x, q: q[-1], "input 0 is the loud one"),
    (exercises.check_error_feedback, lambda w, h: [round(v) for v in w], "lost by the first"),
    (exercises.check_error_feedback, lambda w, h: error_feedback(w, h, sign=-1), "lost by the first|wrong way"),
    (exercises.check_error_feedback, lambda w, h: error_feedback(w, h, divisor=0), "second input is loud"),
    (exercises.check_perplexity, lambda x, i: torch.nn.functional.cross_entropy(x, i).exp(), "predicts token"),
    (exercises.check_perplexity, lambda x, i: losses(x, i).mean(), "is the mean negative"),
    (exercises.check_perplexity, lambda x, i: losses(x, i).exp().mean(), "not mean of exp"),
    (exercises.check_sqnr, lambda e, r: ratio_db(e, r, 5), "mind the squares"),
    (exercises.check_sqnr, lambda e, r: -ratio_db(e, r), "signal over error"),
    (exercises.check_sqnr, lambda e, r: ratio_db(e, r, 20), "already powers"),
    (
        exercises.check_sqnr,
        lambda e, r: -10 * torch.log10(((r - e)[e != 0] / e[e != 0]).square().mean()),
        "whole tensor",
    ),
    (exercises.check_kv_bytes, lambda n, h, d, b, x: kv_bytes(n, h, d, b, x) / 2, "the value takes as many"),
    (exercises.check_kv_bytes, lambda n, h, d, b, x: kv_bytes(n, h, d, b, 0) + x / 8, "a scale and zero each"),
    (exercises.check_kv_bytes, lambda n, h, d, b, x: 2 * n * h * d * (b + x) / 8, "not per channel"),
    (exercises.check_magic, lambda w: (w & 0x000F000F, 0x00080008), "without an exponent"),
    (exercises.check_magic, lambda w: magic(w, one=0x6400), "as well"),
    (exercises.check_magic, lambda w: magic(w, mask=0x00FF00FF), "more than one nibble"),
    (exercises.check_magic, lambda w: magic(w, mask=0x00F000F0), "1027 and 1029"),
    (exercises.check_magic, lambda w: magic(w, offset=0x6408), "from both halves"),
    (exercises.check_magic, lambda w: magic(w, offset=0x64006400), "8 more is centred"),
    (exercises.check_magic, lambda w: (1024 + (w & 15), 1032), "exponent of 1024 as well"),
    (exercises.check_linear_scores, lambda q, c, s, z: (s[:, None] * (c.float() - z[:, None])) @ q, "right, but"),
    (exercises.check_linear_scores, lambda q, c, s, z: (c.float() @ q) * s, "zero is missing"),
    (exercises.check_linear_scores, lambda q, c, s, z: (c.float() @ q - z) * s, "not z"),
    (exercises.check_linear_scores, lambda q, c, s, z: (c.float() @ q) * s - z * q.sum(), "scaled as well"),
    (exercises.check_linear_scores, lambda q, c, s, z: (c.float() @ q + z * q.sum()) * s, "token 0 scores"),
    (exercises.check_merge, lambda a, b: (max(a[0], b[0]), a[1] + b[1], a[2] + b[2]), "relative to their own maxima"),
    (exercises.check_merge, lambda a, b: (*merge(a, b)[:2], a[2] + b[2]), "values are not"),
    (exercises.check_merge, lambda a, b: (b[0], *merge(a, b)[1:]), "whichever comes first"),
    (exercises.check_merge, lambda a, b: (max(a[0], b[0]), (a[1] + b[1]) / 2, (a[2] + b[2]) / 2), "sums just add"),
    (
        exercises.check_merge,
        lambda a, b: merge(a, b, lambda own, top: torch.tensor(own).exp() / torch.tensor(top).exp()),
        "overflows",
    ),
    (exercises.check_locate, lambda table, token, size: divmod(token, size), "the table says which"),
    (exercises.check_locate, lambda table, token, size: (table[0], token), "first of the next page"),
    (exercises.check_locate, lambda table, token, size: (table[token // size], token), "next page|within the page|page 2"),
    (exercises.check_locate, lambda table, token, size: (table[token // 64], token % 64), "pages of 16"),
    (exercises.check_admit, lambda prompts, free, size: len(prompts), "belongs to one sequence alone"),
    (exercises.check_admit, lambda prompts, free, size: admit([p - 1 for p in prompts], free, size), "needs another one"),
    (exercises.check_admit, lambda prompts, free, size: min(2, len(prompts), free // 2), "1 may start|overtake"),
    (exercises.check_admit, admit_any, "must not overtake"),
    (exercises.check_admit, lambda prompts, free, size: admit(prompts, free, 64), "pages of 16"),
    (
        exercises.check_fleet_cost,
        lambda load, output, capacity, hourly, busy: (math.ceil(load / capacity), 0.0),
        "mind `busy`",
    ),
    (exercises.check_fleet_cost, lambda *job: (fleet_cost(*job)[0], fleet_cost(*job)[1] / 4), "not one"),
    (exercises.check_fleet_cost, lambda *job: (fleet_cost(*job)[0], fleet_cost(*job)[1] * job[1]), "a request has `output`"),
    (exercises.check_fleet_cost, lambda *job: (fleet_cost(*job)[0], fleet_cost(*job)[1] * 3600), "is per hour"),
    (exercises.check_fleet_cost, lambda *job: (fleet_cost(*job)[0], fleet_cost(*job)[1] / 1.2), "cannot be rented"),
    (
        exercises.check_fleet_cost,
        lambda *job: (int(fleet_cost(*job)[0] + 0.01) // 4 * 4, fleet_cost(*job)[1]),
        "still needs",
    ),
]


@pytest.mark.parametrize(("check", "wrong", "sentence"), MISTAKES, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_meets_mistakes_with_a_sentence(check, wrong, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check(wrong)


def test_remedies_for_keys_lie_far_apart():
    """The ranking is a fact of the formats, not of one draw of random numbers."""
    errors = exercises._key_errors()
    ordered = [errors[name] for name in key_ranking()]
    assert all(worse > 1.3 * better for better, worse in itertools.pairwise(ordered))
