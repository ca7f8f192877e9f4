"""Checks for the exercises: each takes a student's function, and fails with a sentence that says what to look at.

A check calls the function on numbers small enough to follow by hand. It prints one fixed line when all is well, lets
NotImplementedError through, and raises AssertionError otherwise. Nothing is swallowed, so a wrong answer stops the cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch

from . import affine, hadamard, kv, outliers, progressive, recipes, transforms
from .evaluate import logits_sqnr_db
from .exercises_kernels import check_linear_scores as check_linear_scores
from .exercises_kernels import check_locate as check_locate
from .exercises_kernels import check_magic as check_magic
from .exercises_kernels import check_merge as check_merge
from .exercises_methods import check_attention_scale as check_attention_scale
from .exercises_methods import check_best_ratio as check_best_ratio
from .exercises_methods import check_error_feedback as check_error_feedback
from .exercises_methods import check_fold_attention as check_fold_attention
from .exercises_methods import check_fold_rotation as check_fold_rotation
from .exercises_methods import check_hadamard as check_hadamard
from .exercises_methods import check_kv_bytes as check_kv_bytes
from .exercises_methods import check_optimal_clip_error as check_optimal_clip_error
from .exercises_methods import check_perplexity as check_perplexity
from .exercises_methods import check_reorder as check_reorder
from .exercises_methods import check_sqnr as check_sqnr
from .exercises_serving import check_admit as check_admit
from .exercises_serving import check_fleet_cost as check_fleet_cost
from .grids import INT4, UINT4
from .pipeline import quantize
from .progress import passed
from .progress import progress as progress
from .schemes import Scheme

Pair = tuple[torch.Tensor, torch.Tensor]


def check_cache_bytes(cache_bytes: Callable[[int, int, int, int, float], float]) -> None:
    """``cache_bytes(layers, kv_heads, head_dim, tokens, bits)`` -> bytes of a KV cache (codes only, no scales)."""
    got = cache_bytes(1, 1, 128, 1, 8)
    assert got != 128, "128 bytes hold the key of that one token; its value lies in the cache as well (factor 2)"
    assert got != 2048, "that is the number of bits; there are 8 of them in a byte"
    assert got == 256, f"1 layer, 1 head of 128 channels, 1 token at 8 bits: a key and a value are 256 bytes, got {got}"
    got = cache_bytes(1, 1, 128, 1, 4)
    assert got == 128, f"two 4-bit codes share a byte, so the same cache at 4 bits is 128 bytes, got {got}"
    got = cache_bytes(32, 8, 128, 1000, 4)
    assert got == 32_768_000, f"32 layers, 8 KV heads, 128 channels, 1000 tokens at 4 bits: 32768000 bytes, got {got}"
    passed("check_cache_bytes")


def check_roofline(seconds: Callable[[float, int, float, float], float]) -> None:
    """``seconds(bits, tokens, bandwidth, peak)`` -> time of one weight of ``bits``, read once and used for all tokens."""
    got = seconds(8, 5, 10.0, 200.0)
    assert abs(got - 0.15) > 1e-9, "reading and multiplying go on side by side: the longer of the two counts, not their sum"
    assert abs(got - 0.05) > 1e-9, "the slower of the two sets the time, so it is the larger number"
    assert abs(got - 0.8) > 1e-9, "bits are not bytes: 8 bits are one byte to move"
    assert abs(got - 0.1) < 1e-9, f"1 byte at 10 bytes/s takes 0.1 s, 5 tokens 0.05 s at 200 operations/s: 0.1, got {got:g}"
    got = seconds(8, 30, 10.0, 200.0)
    assert abs(got - 0.15) > 1e-9, "a multiplication and an addition are two operations per token"
    assert abs(got - 0.3) < 1e-9, f"30 tokens are 60 operations, at 200 a second 0.3 s, longer than a byte: 0.3, got {got:g}"
    passed("check_roofline")


def check_outlier_ratio(outlier_ratio: Callable[[torch.Tensor], float]) -> None:
    """``outlier_ratio(x [T, K])`` -> largest channel over median channel, a channel being as large as its largest |x|."""
    x = torch.tensor([[1.0, -2.0, 0.5, -40.0, 3.0], [-2.0, 1.0, 1.0, 10.0, 1.0]])
    got = float(outlier_ratio(x))
    assert got != 10, "the outlier is -40, not 10: take magnitudes before you look for the largest"
    assert got != 40 and abs(got - 40 / 1.5) > 1e-4, (
        "your median is that of all numbers; reduce every channel (column) to its largest magnitude first"
    )
    assert got not in (4.0, 1.6), "you reduced every token (row); a channel is a column, reduced over all tokens"
    assert abs(got - 20) < 1e-4, f"channels are as large as [2, 2, 1, 40, 3]: median 2, so the ratio is 20, got {got:g}"
    passed("check_outlier_ratio")


def check_per_token_int8(quantize: Callable[[torch.Tensor], Pair]) -> None:
    """``quantize(x [T, K])`` -> ``(codes int8 [T, K], scales fp16 [T])``, symmetric, one scale per token."""
    x = torch.tensor([[0.5, -1.27, 0.0, 0.01], [12.7, 0.1, -5.0, 0.2]])
    codes, scales = quantize(x)
    assert scales.numel() != 1, "one scale for both tokens: the loud second token steals the first one's resolution"
    assert scales.numel() != 4, "one scale per channel cannot leave the sum over channels, so the GEMM could not use it"
    assert tuple(scales.shape) == (2,), f"2 tokens need 2 scales, got shape {list(scales.shape)}"
    assert codes.dtype == torch.int8, f"codes must be torch.int8, got {codes.dtype}"
    assert scales.dtype == torch.float16, f"scales are stored as torch.float16, got {scales.dtype}"
    assert int(codes[0, 1]) != -128 and abs(float(scales[0]) - 1.27 / 128) > 1e-5, (
        "the largest magnitude belongs at 127: the grid is -127..127, so divide by 127, not by 128"
    )
    expected = [[50, -127, 0, 1], [127, 1, -50, 2]]
    assert codes.tolist() == expected, f"expected codes {expected}, got {codes.tolist()} (round, do not truncate)"
    codes, scales = quantize(torch.zeros(1, 4))
    assert float(scales[0]) > 0 and not codes.any(), "an all-zero token has max|x| = 0; give it scale 1, codes 0"
    rows = torch.linspace(-3, 3, 4096).sin().view(8, 512)
    want = affine.quantize_per_token_s8(rows)
    assert torch.equal(quantize(rows)[0], want.codes), (
        "codes differ from the library's: divide by the scale as rounded to fp16, which is what the kernel multiplies by"
    )
    passed("check_per_token_int8")


def check_group_scale(choose: Callable[[float, float], tuple[int, int]]) -> None:
    """``choose(low, high)`` -> ``(group_scale, group_zero)`` of a group with first-level extremes ``low <= high``.

    ``group_scale = round((high - low) / 15)``, at least 1; ``group_zero = round(-low / group_scale)`` in 0..15; the range
    is widened to include 0 first.
    """
    scale, zero = choose(-60, 90)
    assert scale != 9 or zero != 7, "16 codes have 15 steps between them: divide the range by 15, not by 16"
    assert zero != -6, "the zero is the code that means 0: low + zero * scale = 0, so zero = -low / scale, positive here"
    assert (scale, zero) == (10, 6), (
        f"a group from -60 to 90 has scale 150 / 15 = 10 and zero 60 / 10 = 6, got {(scale, zero)}"
    )
    assert isinstance(scale, int) and isinstance(zero, int), "both are integers: the kernel never sees a float here"
    scale, zero = choose(30, 60)
    assert zero >= 0, (
        f"a group of positive numbers would get the zero {zero}, which is no 4-bit code; widen the range to hold 0"
    )
    assert (scale, zero) == (4, 0), f"a group from 30 to 60 is widened to 0..60: scale 4, zero 0, got {(scale, zero)}"
    scale, zero = choose(0, 0)
    assert scale >= 1, "an all-zero group would get scale 0, and the next line divides by it; use at least 1"
    passed("check_group_scale")


def check_progressive_dequant(
    dequantize: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor],
) -> None:
    """``dequantize(codes, group_scales, group_zeros, channel_scales, group_size)`` -> fp32 [N, K].

    Shapes: codes [N, K], group scales and zeros [N, G], channel scales [N].
    """
    codes = torch.tensor([[0, 14, 7, 8], [3, 0, 15, 1]], dtype=torch.uint8)
    group_scales = torch.tensor([[16, 2], [1, 4]], dtype=torch.int8)
    group_zeros = torch.tensor([[7, 0], [0, 15]], dtype=torch.uint8)
    channel_scales = torch.tensor([0.5, 2.0], dtype=torch.float16)
    got = dequantize(codes, group_scales, group_zeros, channel_scales, 2)
    assert tuple(got.shape) == (2, 4), f"4 codes per row come back as 4 values per row, got shape {list(got.shape)}"
    got = got.float()
    assert float(got[0, 0]) < 0, (
        f"code 0 with zero 7 is 7 steps below 0, yet you return {float(got[0, 0]):g}: "
        "uint8 has no negative numbers, convert the codes before you subtract"
    )
    assert float(got[0, 0]) != -3.5, "the group scale is missing: (code - zero) * group_scale * channel_scale"
    assert float(got[0, 1]) == 56, f"(14 - 7) * 16 = 112, times 0.5 is 56; got {float(got[0, 1]):g}"
    expected = [[-56.0, 56.0, 7.0, 8.0], [6.0, 0.0, 0.0, -112.0]]
    assert float(got[0, 2]) == 7, (
        f"column 2 lies in group 2 // 2 = 1, whose scale is 2 and whose zero is 0: expected 7, got {float(got[0, 2]):g}"
    )
    assert got.tolist() == expected, f"expected {expected}, got {got.tolist()}; each row has its own scales"
    weight = torch.linspace(-1, 1, 512).sin().view(2, 256)
    w = progressive.quantize(weight, group_size=64)
    got = dequantize(w.codes, w.group_scales, w.group_zeros, w.channel_scales, 64)
    assert torch.equal(got.float(), w.dequantize()), "small cases agree, a 2 x 256 weight in groups of 64 does not"
    passed("check_progressive_dequant")


def check_pack_u4(pack: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """``pack(codes uint8 [K])`` -> uint8 ``[K / 2]``, even positions in the low nibble (plain order, not the kernel's)."""
    got = pack(torch.arange(16, dtype=torch.uint8))
    assert got.dtype == torch.uint8, f"bytes are torch.uint8, got {got.dtype}"
    assert tuple(got.shape) == (8,), f"16 codes fill 8 bytes, got shape {list(got.shape)}"
    first = int(got[0])
    assert first != 0x01, (
        "code 0 comes first, so it belongs in the low nibble: byte 0 is 0x10, yours is 0x01 (nibbles swapped)"
    )
    assert first != 0x80, "neighbours share a byte (0 with 1), yours pairs 0 with 8; that is another layout"
    assert first == 0x10, f"code 0 in the low nibble, code 1 in the high one: byte 0 is 0x10, got {first:#04x}"
    assert got.tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], f"got {[f'{b:#04x}' for b in got.tolist()]}"
    passed("check_pack_u4")


def check_bits_per_weight(bits_per_weight: Callable[[int, int, int, int], float]) -> None:
    """``bits_per_weight(columns, group_size, group_bits, row_bits)`` -> bits that a row of 4-bit weights stores per weight.

    A row has ``columns`` weights. Every group of ``group_size`` stores ``group_bits`` bits of scale and zero, and every row
    ``row_bits`` more.
    """
    got = bits_per_weight(512, 128, 0, 0)
    assert got == 4, f"no scales, no zeros: the codes alone are 4 bits a weight, got {got:g}"
    got = bits_per_weight(512, 128, 16, 0)
    assert got != 20, "that gives every weight a scale of its own; a group of 128 weights shares one"
    assert got != 4 + 16 / 512, "that counts one group; a row of 512 has 512 / 128 = 4 of them"
    assert got == 4.125, f"4 groups with 16 bits each are 64 bits, a 512th of them per weight 0.125: 4.125, got {got:g}"
    got = bits_per_weight(512, 128, 16, 16)
    assert got != 4.125, "the row's own 16 bits (QoQ: the fp16 scale of the first level) are missing"
    assert got != 4.25, "the row's 16 bits are stored once for all of its columns, not once per group"
    assert got == 4.15625, f"64 bits of groups and 16 of the row over 512 weights: 4.15625, got {got:g}"
    formats = {
        recipes.PROGRESSIVE: (128, 8 + 8, 16),
        recipes.GROUPS: (128, 16 + 8, 0),
        recipes.PER_CHANNEL: (4096, 16 + 8, 0),
    }
    for form, (group_size, group_bits, row_bits) in formats.items():
        want, got = form.bits_per_weight(4096), bits_per_weight(4096, group_size, group_bits, row_bits)
        name = form.kind.name
        assert abs(got - want) < 1e-9, f"{name}, a row of 4096: the library stores {want:.4f} bits a weight, yours {got:.4f}"
    passed("check_bits_per_weight")


#: What there is against loud key channels, and what to say of each.
_KEY_REMEDIES = {
    "token": "one scale per token and head: the loud channels set the ticks of all the others",
    "rotated": "a Hadamard matrix spreads the loud channels over all: better, but every channel is a little loud then",
    "smoothed": "the loud pairs are divided by lambda and the queries multiplied by it: nobody else pays",
    "channel": "a scale per channel and window of tokens: a loud channel pays for itself alone",
}


def check_key_ranking(ranking: Callable[[], list[str]]) -> None:
    """``ranking()`` -> "token", "rotated", "smoothed", "channel" in the order of their error, the smallest first.

    The check measures: 128 keys of one head, two loud RoPE pairs, 4 bits, and the error of the attention scores.
    """
    got = ranking()
    assert isinstance(got, list) and sorted(map(str, got)) == sorted(_KEY_REMEDIES), (
        f"rank all of {', '.join(_KEY_REMEDIES)}, each once; got {got!r}"
    )
    errors = _key_errors()
    for better, worse in itertools.pairwise(got):
        assert errors[better] < errors[worse], (
            f"{better} before {worse}? Measured, {better} has {errors[better] / errors[worse]:.1f} times its error. "
            f"{better}: {_KEY_REMEDIES[better]}. {worse}: {_KEY_REMEDIES[worse]}."
        )
    passed("check_key_ranking")


def _key_errors(tokens: int = 128, width: int = 64, loud: float = 20.0) -> dict[str, float]:
    """Mean squared error of attention scores by remedy, for random queries and keys with two loud RoPE pairs."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, tokens, width, generator=generator) for _ in range(2))
    offset = torch.zeros(width)
    offset[[5, 5 + width // 2]], offset[[17, 17 + width // 2]] = loud, -loud
    keys = keys + offset * (1 + 0.2 * torch.randn(1, tokens, width, generator=generator))
    turn = hadamard.hadamard(width, torch.float32)
    scale = transforms.attention_scale(keys.abs().amax((0, 1)), alpha=0.5)
    windows = kv.KVFormat(UINT4, kv.Keys.CHANNEL).quantize_windows(keys)
    rounded = {
        "token": (queries, kv.quantize_kv4(keys).dequantize()),
        "rotated": (queries @ turn, kv.quantize_kv4(keys @ turn).dequantize()),
        "smoothed": (queries * scale, kv.quantize_kv4(keys / scale).dequantize()),
        "channel": (queries, kv.dequantize_windows(windows, torch.float32)),
    }
    exact = queries @ keys.mT
    return {name: float((q @ k.mT - exact).square().mean()) for name, (q, k) in rounded.items()}


def check_frontier(frontier: Callable[[list[float], list[float]], list[int]]) -> None:
    """``frontier(bits, loss)`` -> indices of the methods worth having, by rising bits.

    A method is not worth having if another one has at most its bits and at most its loss, and less of one of them.
    """
    got = list(frontier([4.0, 8.0, 16.0], [1.0, 0.1, 0.0]))
    assert got == [0, 1, 2], f"each loses less for more bits, so all three are worth having, got {got}"
    got = list(frontier([4.0, 8.0, 4.0], [1.0, 0.1, 3.0]))
    assert 2 not in got, "method 2 has the bits of method 0 and three times its loss: nobody wants it"
    assert 1 in got, "method 1 loses least of all, however many bits it takes"
    assert got == [0, 1], f"methods 0 and 1 are left, got {got}"
    got = list(frontier([4.0, 4.2, 8.0], [1.0, 2.0, 0.5]))
    assert 1 not in got, "method 1 takes more bits than method 0 and loses more; compare with all, not only with equal bits"
    got = list(frontier([16.0, 4.0, 8.0], [0.0, 1.0, 0.2]))
    assert sorted(got) == [0, 1, 2], f"the order in which methods are listed must not matter, got {got}"
    assert got == [1, 2, 0], f"list them by rising bits, 4 then 8 then 16: [1, 2, 0], got {got}"
    got = list(frontier([4.0, 4.0], [1.0, 1.0]))
    assert got == [0, 1], f"of two that are exactly alike neither is better, so keep both, got {got}"
    passed("check_frontier")


def check_recipe(recipe: Callable[[], recipes.Recipe]) -> None:
    """``recipe()`` -> a `Recipe` in QoQ's format, W4A8KV4 in progressive groups, that copes with loud activations and keys.

    The check runs it on a tiny random network with planted outliers, one kind at a time.
    """
    got = recipe()
    assert isinstance(got, recipes.Recipe), f"expected a qoqlab.recipes.Recipe, got {type(got).__name__}"
    assert got.scheme == recipes.get("qoq-g128").scheme, (
        f"the format must be that of qoq-g128, {recipes.get('qoq-g128').scheme} in progressive groups, got {got.scheme}"
    )
    assert got.steps, "a recipe without steps is round to nearest; add Step(function, parameters)"
    # one kind of outlier and one kind of rounding at a time, at the bits where it hurts
    gain = _gain_db(got, Scheme(recipes.PER_CHANNEL_INT8, INT4), activation_ratio=30.0)
    assert gain > 3, (
        f"loud activation channels: your steps gain {gain:.1f} dB over rounding to nearest, and more than 3 is possible. "
        "Which stage spreads a loud channel evenly over all others?"
    )
    gain = _gain_db(got, Scheme(kv=UINT4), key_ratio=30.0)
    assert gain > 3, (
        f"loud key channels: your steps gain {gain:.1f} dB over rounding to nearest, and more than 3 is possible. "
        "Rotation stops at RoPE; which stage divides keys and multiplies queries?"
    )
    passed("check_recipe")


def _gain_db(recipe: recipes.Recipe, scheme: Scheme, activation_ratio: float = 1.0, key_ratio: float = 1.0) -> float:
    """How many dB closer the steps of a recipe bring a tiny planted network's logits to the exact ones, at ``scheme``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = outliers.plant(LlamaForCausalLM(config).eval(), activation_ratio, key_ratio)
    ids = torch.randint(0, 128, (4, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = network(ids[2:], use_cache=False).logits.float()
    quality = []
    for steps in ((), recipe.steps):
        quantized = quantize(network, replace(recipe, scheme=scheme, steps=steps), ids[:2], progress=False, report=False)
        quality.append(logits_sqnr_db(exact, quantized, ids[2:]))
    return quality[1] - quality[0]


def check_crossing(crossing: Callable[[float, float, float], float]) -> None:
    """``crossing(bits, peak, bandwidth)`` -> tokens at which a GEMM stops waiting for its weights (bits per weight)."""
    got = crossing(8, 200.0, 10.0)
    assert got != 20, "an addition and a multiplication are two operations: M tokens need 2 * M of them per weight"
    assert got != 80, "bits are not bytes: 8 bits are one byte to move"
    assert got != 0.1, "upside down: more peak means that memory is the limit for longer, so peak is on top"
    assert got == 10, f"1 byte a weight at 10 bytes/s takes 0.1 s, and so do 10 tokens at 2 operations each: 10, got {got}"
    got = crossing(4, 624e12, 2.0e12)
    assert abs(got - 78) < 1e-6, f"W4A8 on an A100 (624 TOP/s, 2 TB/s): 78 tokens, got {got:g}"
    passed("check_crossing")


def check_step_speedup(speedup: Callable[[dict[str, float], dict[str, float]], float]) -> None:
    """``speedup(seconds, factors)`` -> how many times faster a step of parts gets if some parts get ``factors`` faster."""
    seconds = {"linear": 6.0, "attention": 3.0}
    got = speedup(seconds, {})
    assert got == 1, f"no part changes, so the step does not: 1, got {got}"
    got = speedup(seconds, {"linear": 3.0})
    assert got not in (3, 2) and abs(got - 7 / 3) > 1e-9, "speed-ups do not average, not even by time; add up the new times"
    assert abs(got - 5 / 9) > 1e-9, "old time over new time: more than 1 is faster"
    assert got != 4.5, "attention still takes its 3 seconds; a part without a factor stays in the sum"
    assert abs(got - 1.8) < 1e-9, f"6 / 3 + 3 = 5 seconds instead of 9: 1.8 times as fast, got {got}"
    got = speedup(seconds, {"linear": 1e12})
    assert abs(got - 3) < 1e-6, f"linear layers for free leave 3 of 9 seconds: at most 3 times, got {got}"
    assert seconds == {"linear": 6.0, "attention": 3.0}, "leave the caller's times as they are"
    passed("check_step_speedup")


def check_unpack_budget(budget: Callable[[float, float, float], float]) -> None:
    """``budget(lanes, bandwidth, bits)`` -> instructions per weight that hide behind reading it from memory."""
    got = budget(100.0, 10.0, 8)
    assert got != 80, "bandwidth counts bytes, and 8 bits are one of them: 10 weights arrive a second"
    assert got != 0.1, "upside down: more lanes mean more instructions per weight"
    assert got == 10, f"10 weights arrive a second, 100 instructions run: 10 for each, got {got}"
    got = budget(100.0, 10.0, 4)
    assert got != 20, "with half the bits twice as many weights arrive, so each has half the time"
    assert got == 5, f"4 bits: 20 weights a second, 5 instructions each, got {got}"
    passed("check_unpack_budget")


def check_largest_batch(largest: Callable[[float, float, int, float], int]) -> None:
    """``largest(memory, weights, context, per_token)`` -> sequences that fit beside the weights (bytes, tokens)."""
    got = largest(1000, 400, 10, 20)
    assert got != 5, "the weights are in that memory too: 600 bytes are left for the cache"
    assert got != 30, "20 bytes are one token; a sequence of 10 of them takes 200"
    assert got == 3, f"(1000 - 400) / (10 * 20) = 3, got {got}"
    got = largest(1000, 450, 10, 20)
    assert got == 2, f"550 / 200 = 2.75: only whole sequences fit, so 2, got {got}"
    assert isinstance(got, int), f"a number of sequences is an int, got {type(got).__name__}"
    got = largest(1000, 1200, 10, 20)
    assert got == 0, f"the weights alone do not fit: no sequence, 0, got {got}"
    passed("check_largest_batch")


def check_group_size(group_size: Callable[[list[int]], int | None]) -> None:
    """``group_size(widths)`` -> the largest of 128, 64 and 32 that divides every row length, or None."""
    got = group_size([512, 896])
    assert got == 128, f"512 = 4 * 128 and 896 = 7 * 128, so groups of 128 fit, got {got}"
    got = group_size([512, 960])
    assert got != 128, "960 is 7.5 groups of 128; every row has to be whole groups, not only the first"
    assert got == 64, f"960 = 15 * 64 and 512 = 8 * 64: 64, got {got}"
    got = group_size([512, 100])
    assert got is None, f"100 is no multiple of 128, 64 or 32: None, and scales per channel, got {got}"
    got = group_size([96])
    assert got == 32, f"96 = 3 * 32: 32, got {got}"
    passed("check_group_size")


def check_divergence(divergence: Callable[[torch.Tensor, torch.Tensor], float]) -> None:
    """``divergence(exact, rounded)`` -> mean KL divergence in nats of logits ``[positions, vocabulary]``."""
    exact = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    rounded = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    got = float(divergence(exact, exact + 3))
    assert abs(got) < 1e-6, f"a constant added to all logits changes no probability: 0, got {got:g} (softmax is missing)"
    got = float(divergence(exact, rounded))
    forward, backward = 0.14384, 0.13081
    assert abs(got - forward) > 1e-4, "average over the positions; the second one, without any error, counts as well"
    assert abs(got + forward / 2) > 1e-4, "the sign: log p - log q, weighted by p, is never negative in sum"
    assert abs(got - backward / 2) > 1e-4, "weight by the exact probabilities: that is KL(exact, rounded), not the reverse"
    assert abs(got - forward / 4) > 1e-4, "sum over the vocabulary, and average over positions alone"
    assert abs(got - forward / 2) < 1e-4, f"0.1438 nats at one of two positions: {forward / 2:.4f}, got {got:.4f}"
    passed("check_divergence")


def check_compression(compression: Callable[[list[tuple[int, float, float]]], float]) -> None:
    """``compression([(values, bits_before, bits_after), ...])`` -> how many times smaller all of it is."""
    got = compression([(100, 16, 4)])
    assert got != 0.25, "before over after: more than 1 is smaller"
    assert got == 4, f"16 bits become 4: 4 times smaller, got {got}"
    got = compression([(300, 16, 4), (100, 16, 16)])
    assert got not in (2.5, 3.25), "ratios do not average, not even by count; divide the sum before by the sum after"
    assert abs(got - 6400 / 2800) < 1e-9, f"6400 bits become 2800: {6400 / 2800:.3f} times smaller, got {got:g}"
    passed("check_compression")


def check_unpack_word(unpack: Callable[[int], tuple[int, int]]) -> None:
    """``unpack(word)`` -> two 32-bit words: the four low nibbles, and the four high ones, each in a byte of its own."""
    got = unpack(0x12345678)
    assert tuple(got) != (0x5678, 0x1234), "halves of the word are not its nibbles: every byte holds one code of each kind"
    assert got[0] == 0x02040608, f"low nibbles of 12 34 56 78 are 2, 4, 6, 8: 0x02040608, got {got[0]:#010x}"
    assert got[1] != 0x10305070, "the high nibbles are still in their high places: shift right by 4, then mask"
    assert got[1] != 0x01234567, "after the shift each byte also holds its neighbour's nibble: mask again"
    assert got[1] == 0x01030507, f"high nibbles of 12 34 56 78 are 1, 3, 5, 7: 0x01030507, got {got[1]:#010x}"
    got = unpack(0xF0F0F0F0)
    assert tuple(got) == (0, 0x0F0F0F0F), f"0xF0F0F0F0 is four zeros and four 15s, got {[f'{g:#010x}' for g in got]}"
    passed("check_unpack_word")


def check_unsigned_word(decode: Callable[[int, int, int], int]) -> None:
    """``decode(word, scale, zero)`` -> ``code * scale + (128 - zero * scale)`` in every byte, by one 32-bit multiply-add."""
    got = decode(0x00000005, 3, 1)
    assert got != 0x8C, "the offset belongs into all four bytes, since code 0 is a weight too: multiply it by 0x01010101"
    assert got & 0xFF != 12, "128 is missing: bytes stay unsigned, 128 too large, and the epilogue takes it out"
    assert got == 0x7D7D7D8C, f"codes 5, 0, 0, 0 with scale 3, zero 1: 0x7d7d7d8c, got {got:#010x}"
    got = decode(0x0F0F0F0F, 16, 8)
    assert got == 0xF0F0F0F0, f"the largest there is: 15 * 16 + 128 - 8 * 16 = 240 in each byte, got {got:#x}"
    assert decode(0, 16, 8) == 0, f"the smallest: 0 * 16 + 128 - 128 = 0, got {decode(0, 16, 8):#x}"
    passed("check_unsigned_word")
