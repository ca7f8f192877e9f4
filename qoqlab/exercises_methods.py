"""Checks for the exercises of lessons 03 to 06; `qoqlab.exercises` has them under its own name, and says how they behave."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import clipping, hadamard, transforms
from .progress import passed
from .schemes import WeightFormat, WeightKind

# --- 03: SmoothAttention --------------------------------------------------------------------------------------------------


def check_attention_scale(scale: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
    """``scale(key_max [D], alpha)`` -> lambda ``[D]``: equal on the RoPE pairs ``(i, i + D / 2)``, from the louder half."""
    factors = scale(torch.tensor([1.0, 1.0, 16.0, 1.0]), 0.5)
    assert tuple(factors.shape) == (4,), f"4 channels need 4 factors, got shape {list(factors.shape)}"
    got = [round(float(v), 4) for v in factors]
    assert got != [1, 1, 4, 1], (
        "channel 2 is turned together with channel 0 (D / 2 = 2 apart); with different factors lambda does not pass RoPE"
    )
    assert got != [1, 1, 4, 4], "neighbours are not partners here: RoPE pairs i with i + D / 2, so 0 with 2 and 1 with 3"
    assert got != [16, 1, 16, 1], "that is alpha = 1; raise the pair's largest magnitude to the power alpha"
    assert got == [4, 1, 4, 1], f"pairs (0, 2) and (1, 3) have the maxima 16 and 1: lambda [4, 1, 4, 1], got {got}"
    got = [round(float(v), 4) for v in scale(torch.tensor([0.0, 9.0, 0.0, 4.0]), 0.5)]
    assert got[0] == 1, f"a silent pair would get lambda {got[0]:g}, and keys are divided by it; leave it alone, with 1"
    assert got == [1, 3, 1, 3], f"the louder half of the pair counts: [1, 3, 1, 3], got {got}"
    maxima = torch.linspace(0.1, 9, 128).sin().abs() + 0.1
    want = transforms.attention_scale(maxima, 0.3)
    assert torch.allclose(scale(maxima, 0.3).float(), want, rtol=1e-5), (
        "128 channels at alpha = 0.3 differ from the library's"
    )
    passed("check_attention_scale")


def check_fold_attention(
    fold: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """``fold(q_weight [Hq * D, K], k_weight [Hkv * D, K], scale [Hkv, D])`` -> both weights with lambda inside.

    Query heads share KV heads in order: with 4 of them and 2 KV heads, queries 0 and 1 read KV head 0.
    """
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, width, inputs = 4, 2, 4, 6
    q_weight = torch.randn(heads * width, inputs, generator=generator)
    k_weight = torch.randn(kv_heads * width, inputs, generator=generator)
    scale = torch.tensor([[2.0, 1.0, 2.0, 1.0], [1.0, 5.0, 1.0, 5.0]])
    before = q_weight.clone(), k_weight.clone()
    q, k = fold(q_weight, k_weight, scale)
    assert torch.equal(q_weight, before[0]) and torch.equal(k_weight, before[1]), (
        "return new weights, leave the old ones alone"
    )
    assert q.shape == q_weight.shape and k.shape == k_weight.shape, "both weights keep their shapes"
    key_rows = (k / k_weight).nan_to_num(0).median(1).values
    assert not torch.allclose(key_rows, scale.flatten()), "the keys go into four bits, so they are *divided* by lambda"
    assert torch.allclose(k, k_weight / scale.flatten()[:, None]), (
        "output channel c of k_proj is *row* c of its weight: divide row c by lambda c"
    )
    query_rows = (q / q_weight).nan_to_num(0).median(1).values.view(heads, width)
    assert not torch.allclose(query_rows[1], scale[1]), (
        "query head 1 reads KV head 0 here: heads of a group are neighbours, so repeat_interleave, not repeat"
    )
    assert torch.allclose(q, q_weight * scale.repeat_interleave(2, 0).flatten()[:, None]), (
        "multiply row c of every query head by the lambda of the KV head that it reads"
    )
    x = torch.randn(3, inputs, generator=generator)
    scores, folded = (
        (x @ a.T).view(3, heads, width).transpose(0, 1)
        @ (x @ b.T).view(3, kv_heads, width).permute(1, 2, 0).repeat_interleave(2, 0)
        for a, b in ((q_weight, k_weight), (q, k))
    )
    assert torch.allclose(scores, folded, atol=1e-4), "the scores changed, and lambda has to cancel in query times key"
    passed("check_fold_attention")


# --- 04: rotation, smoothing, reordering ----------------------------------------------------------------------------------


def check_hadamard(matrix: Callable[[int], torch.Tensor]) -> None:
    """``matrix(n)`` -> orthogonal [n, n] with entries +-1 / sqrt(n), by Sylvester's doubling; n is a power of two."""
    got = matrix(1)
    assert got.tolist() == [[1]], f"the smallest one is [[1]], got {got.tolist()}"
    got = matrix(4)
    assert tuple(got.shape) == (4, 4), f"expected 4 rows and 4 columns, got shape {list(got.shape)}"
    got = got.double()
    assert not torch.equal(got.abs(), torch.ones(4, 4).double()), (
        "rows of four ones are 2 long, so this matrix stretches; divide by sqrt(n)"
    )
    assert torch.allclose(got.abs(), torch.full((4, 4), 0.5).double()), (
        "every entry is +-1 / sqrt(4) = +-0.5, or some channels would get more of an outlier than others"
    )
    gram = got @ got.T
    assert torch.allclose(gram, torch.eye(4).double(), atol=1e-6), (
        f"row 0 times row {int((gram[0].abs() > 1e-6).nonzero()[-1])} should be 0 and is not: the lower right block of "
        "every doubling is *minus* the smaller matrix"
    )
    got = matrix(64).double()
    assert torch.allclose(got, hadamard.hadamard(64), atol=1e-6), (
        "orthogonal, but not Sylvester's: [[H, H], [H, -H]] / sqrt(2)"
    )
    passed("check_hadamard")


def check_fold_rotation(fold: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    """``fold(producer [K, I], gain [K], consumer [N, K], rotation [K, K])`` -> (producer, consumer) of the rotated network.

    ``producer`` writes the residual stream, ``gain`` belongs to the RMSNorm in front of ``consumer`` and becomes 1.
    """
    generator = torch.Generator().manual_seed(0)
    producer, consumer = (torch.randn(*shape, generator=generator).double() for shape in ((8, 5), (3, 8)))
    gain = torch.rand(8, generator=generator).double() + 0.5
    # entries +-1 / sqrt(n), yet not symmetric, so that R and its transpose are told apart
    rotation = hadamard.hadamard(8) * torch.tensor([1, -1, 1, 1, -1, 1, 1, 1.0]).double()
    x = torch.randn(4, 5, generator=generator).double()

    def norm(h: torch.Tensor) -> torch.Tensor:
        return h / h.square().mean(-1, keepdim=True).sqrt()

    exact = (norm(x @ producer.T) * gain) @ consumer.T
    new_producer, new_consumer = fold(producer, gain, consumer, rotation)
    assert new_producer.shape == producer.shape and new_consumer.shape == consumer.shape, "both weights keep their shapes"
    written, wanted = x @ new_producer.T, (x @ producer.T) @ rotation
    assert not torch.allclose(written, (x @ producer.T) @ rotation.T, atol=1e-9), (
        "what the producer writes is turned the wrong way round: y R means R.T @ producer"
    )
    assert torch.allclose(written, wanted, atol=1e-9), "the producer has to write y R instead of y: R.T @ producer"
    got = norm(written) @ new_consumer.T
    assert not torch.allclose(got, norm(x @ producer.T) @ consumer.T, atol=1e-9), (
        "the gain is lost: fold it into the consumer's columns *before* you rotate them, since it does not commute with R"
    )
    assert not torch.allclose(new_consumer, (consumer @ rotation) * gain, atol=1e-9), (
        "the gain was folded after the rotation, where its channels are mixed: consumer * gain first, then @ R"
    )
    assert torch.allclose(got, exact, atol=1e-9), "the network's output changed; the consumer becomes (consumer * gain) @ R"
    passed("check_fold_rotation")


def check_reorder(reorder: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """``reorder(gate [I, K], up [I, K], down [N, I], activation_max [I])`` -> the three, loudest input of down last."""
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(*shape, generator=generator) for shape in ((4, 3), (4, 3), (2, 4)))
    loud = torch.tensor([9.0, 1.0, 4.0, 2.0])
    new_gate, new_up, new_down = reorder(gate, up, down, loud)
    order = [1, 3, 2, 0]
    assert not torch.equal(new_down, down[:, order[::-1]]), "that is loudest first; sort by rising magnitude"
    assert not torch.equal(new_down, down[:, torch.tensor(order).argsort()]), (
        "you used each channel's rank as an index; argsort itself says which old channel goes to each place"
    )
    assert torch.equal(new_down, down[:, order]), f"magnitudes [9, 1, 4, 2] put down's columns in the order {order}"
    assert not torch.equal(new_up, up), "up_proj still writes channels in the old order; its rows have to move along"
    assert not torch.equal(new_gate, gate), "gate_proj multiplies up_proj channel by channel, so its rows move as well"
    assert torch.equal(new_up, up[order]) and torch.equal(new_gate, gate[order]), (
        "rows of gate and up in the same order as down's columns"
    )
    passed("check_reorder")


# --- 05: clipping and GPTQ ------------------------------------------------------------------------------------------------


def check_best_ratio(best: Callable[[torch.Tensor, torch.Tensor, list[float]], float]) -> None:
    """``best(row [K], inputs [S, K], ratios)`` -> the ratio with the smallest squared error of ``inputs @ row``.

    The range is ``ratio * max|row|`` on either side, with 7 steps up and 7 down: ``step = ratio * max|row| / 7``, codes
    rounded and clamped to -7..7. Of equally good ratios the first wins.
    """
    row = torch.tensor([7.0, 0.4, -0.4, 0.4])
    ratios = [1.0, 0.5, 0.1]
    quiet = torch.tensor([[0.0, 1.0, -1.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    loud = torch.tensor([[5.0, 1.0, -1.0, 1.0], [3.0, 0.5, 1.0, 0.2]])
    got = float(best(row, quiet, ratios))
    assert got != 1.0, (
        "input 0 is always 0 here, so the large weight may be clipped as far as you like; you measured the weights' error, "
        "or chose the ratio 1 for another reason"
    )
    assert got == 0.1, f"only the small weights are heard, and a step of 0.1 hits them exactly: ratio 0.1, got {got:g}"
    got = float(best(row, loud, ratios))
    assert got == 1.0, f"input 0 is the loud one now: a clipped 7 costs more than rounded 0.4s, so ratio 1, got {got:g}"
    got = float(best(torch.tensor([7.0, 1.0, 2.0, 3.0]), loud, [1.0, 1.0 - 1e-9]))
    assert got == 1.0, "both ratios are exact; let the first one win, which clips less"
    row, inputs = torch.linspace(-3, 4, 64).sin() ** 3, torch.linspace(0, 99, 64 * 16).sin().view(16, 64)
    candidates = clipping.candidate_ratios(11, 0.5)
    step = torch.tensor(candidates)[:, None] * row.abs().max() / 7
    errors = (((row / step).round().clamp(-7, 7) * step - row) @ inputs.T).square().sum(1)
    want = candidates[int(errors.argmin())]
    got = float(best(row, inputs, candidates))
    assert abs(got - want) < 1e-9, f"a row of 64: the smallest output error is at ratio {want:g}, got {got:g}"
    passed("check_best_ratio")


def check_error_feedback(feedback: Callable[[list[float], list[list[float]]], list[int]]) -> None:
    """``feedback(weights, hessian)`` for two weights on the integers: round the first, then let the second make up for it.

    ``hessian`` is 2 x 2, the sum of ``x x^T``; the error to keep small is ``e^T H e`` with ``e`` = codes - weights.
    """
    got = list(feedback([0.4, 0.4], [[1.0, 0.0], [0.0, 1.0]]))
    assert got == [0, 0], f"uncorrelated inputs leave nothing to make up for: plain rounding, [0, 0], got {got}"
    got = list(feedback([0.4, 0.4], [[1.0, 0.9], [0.9, 1.0]]))
    assert got != [0, 0], (
        "the inputs are nearly the same, so the 0.4 lost by the first can be given to the second: add it before rounding"
    )
    assert got != [0, -1] and got != [1, 0], "the wrong way: what the first lost (0.4 - 0), the second *adds*"
    assert got == [0, 1], f"the second weight becomes 0.4 + 0.4 * 0.9 / 1.0 = 0.76, so [0, 1], got {got}"
    got = list(feedback([0.4, 0.4], [[1.0, 2.0], [2.0, 40.0]]))
    assert got == [0, 0], (
        f"the second input is loud, so it takes only H01 / H11 = 2 / 40 of the error: 0.42 rounds to 0, got {got}"
    )
    got = list(feedback([1.6, -0.3], [[1.0, -0.9], [-0.9, 1.0]]))
    assert got == [2, 0], (
        f"1.6 became 2, an error of +0.4; inputs of opposite sign: -0.3 + 0.36 = 0.06, so [2, 0], got {got}"
    )
    passed("check_error_feedback")


def check_optimal_clip_error(error: Callable[[torch.Tensor, float], tuple[float, float]]) -> None:
    """``error(row [K], limit)`` -> (squared error from rounding, squared error from clipping) of a symmetric 4-bit row.

    Codes -7..7 with ``step = limit / 7``. A weight beyond ``limit`` is clipped, all others are rounded.
    """
    row = torch.tensor([1.0, 0.24, -0.5, 0.1])
    rounding, clipping_error = (float(v) for v in error(row, 0.7))
    assert clipping_error > 0, "the weight 1.0 lies beyond 0.7 and comes back as 0.7: that 0.3 is the clipping error"
    assert abs(clipping_error - 0.3) > 1e-6, "0.3 is the error, 0.09 the squared one"
    assert abs(clipping_error - 0.09) < 1e-6, f"one clipped weight, (1 - 0.7)^2 = 0.09, got {clipping_error:g}"
    assert abs(rounding - 0.0916) > 1e-6, "that is everything; weights beyond the limit do not count as rounded"
    assert abs(rounding - 0.0016) < 1e-6, f"a step of 0.1 misses only 0.24, by 0.04: 0.0016, got {rounding:g}"
    rounding, clipping_error = (float(v) for v in error(row, 1.0))
    assert clipping_error == 0, f"nothing lies beyond the largest weight, got {clipping_error:g}"
    form = WeightFormat(WeightKind.CHANNEL_S4)
    row = torch.linspace(-1, 1, 127).sin() ** 3
    scales = form.choose(row[None], 1.0)
    want = float((scales.decode(scales.encode(row[None])) - row).square().sum())
    rounding, clipping_error = (float(v) for v in error(row, float(row.abs().max())))
    assert abs(rounding - want) < 0.02 * want, (
        f"a row of 127 without clipping: the library's error is {want:.4f}, got {rounding:.4f}"
    )
    passed("check_optimal_clip_error")


# --- 06: the whole model --------------------------------------------------------------------------------------------------


def check_perplexity(perplexity: Callable[[torch.Tensor, torch.Tensor], float]) -> None:
    """``perplexity(logits [T, V], ids [T])`` -> perplexity of a text whose token t + 1 is predicted by row t."""
    certain = torch.full((3, 4), -30.0)
    ids = torch.tensor([0, 2, 1])
    certain[0, 2] = certain[1, 1] = 30.0
    got = float(perplexity(certain, ids))
    assert got < 1e6, "row t predicts token t + 1: compare logits[:-1] with ids[1:]"
    assert got != 0, "that is the mean negative log-likelihood; perplexity is its exponential, 1 for a certain model"
    assert abs(got - 1) < 1e-4, f"a model that is certain and right has perplexity 1, got {got:g}"
    got = float(perplexity(torch.zeros(5, 8), torch.tensor([0, 1, 2, 3, 4])))
    assert abs(got - 3) > 1e-4, "that is in bits: the base of the logarithm and of the power have to agree"
    assert abs(got - 8) < 1e-3, f"a model that knows nothing hesitates among all 8 tokens: perplexity 8, got {got:g}"
    logits, ids = torch.linspace(0, 40, 6 * 5).sin().view(6, 5) * 3, torch.tensor([0, 3, 1, 4, 2, 2])
    want = float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:]).exp())
    got = float(perplexity(logits, ids))
    mean_of_powers = float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").exp().mean())
    assert abs(got - mean_of_powers) > 1e-3, "average first, then take the exponential: exp of the mean, not mean of exp"
    assert abs(got - want) < 1e-3, f"6 tokens leave 5 predictions; their perplexity is {want:.4f}, got {got:.4f}"
    passed("check_perplexity")


def check_sqnr(sqnr: Callable[[torch.Tensor, torch.Tensor], float]) -> None:
    """``sqnr(exact, rounded)`` -> signal-to-error ratio in dB, ``10 log10(|exact|^2 / |rounded - exact|^2)``."""
    exact = torch.tensor([3.0, 4.0, 0.0])
    got = float(sqnr(exact, exact * 1.1))
    assert abs(got - 10) > 1e-2, "decibels of amplitudes are 20 log10, of powers 10 log10; mind the squares"
    assert got > 0, "signal over error: small errors give large numbers"
    assert abs(got - 40) > 1e-2, "squares are already powers: 10 log10 of their ratio, not 20"
    assert abs(got - 20) < 1e-3, f"every number is off by a tenth, a hundredth of the power: 20 dB, got {got:g}"
    got = float(sqnr(torch.tensor([30.0, 0.1]), torch.tensor([30.0, 0.4])))
    assert abs(got - 40) < 1e-2, f"sum the squares over the whole tensor, then divide: 900.01 / 0.09 is 40 dB, got {got:g}"
    passed("check_sqnr")


def check_kv_bytes(kv_bytes: Callable[[int, int, int, int, int], float]) -> None:
    """``kv_bytes(layers, kv_heads, head_dim, bits, extra_bits)`` -> bytes that one token adds to the cache.

    Every vector (one per layer, head, and key or value) stores ``extra_bits`` for its scale and zero.
    """
    got = kv_bytes(1, 1, 128, 4, 0)
    assert got != 64, "64 bytes are the key; the value takes as many"
    assert got == 128, f"a key and a value of 128 channels at 4 bits: 128 bytes, got {got}"
    got = kv_bytes(1, 1, 128, 4, 32)
    assert got != 132, "key and value have a scale and zero each: 2 * 32 bits"
    assert got != 128 + 2 * 128 * 4, "one scale and zero per vector of 128 channels, not per channel"
    assert got == 136, f"2 * (128 * 4 + 32) bits are 136 bytes, got {got}"
    got = kv_bytes(5, 2, 128, 4, 32)
    assert got == 1360, f"the bundled model has 5 layers and 2 KV heads: 1360 bytes, got {got}"
    passed("check_kv_bytes")
