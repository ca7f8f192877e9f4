"""What of `attend_own_s8` runs inside the CUDA simulator, see `simulated`: functions from JSON to JSON."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import numpy as np
import qoqlab_kernels as qk
import torch
from qoqlab_kernels import elementwise, emulation, ptx

from qoqlab import reference
from qoqlab.affine import quantize_per_token_s8

from .joined import own_operands


def own_case(m: int, heads: int, kv_heads: int, dim: int, dtype: str, threads: int = 0, **options: Any) -> dict:
    """`attend_own_s8` against `reference.attend_own_s8`; whether a token without a past gives its value."""
    from .simulated import _as_the_reference, poisoned_outputs

    operands = own_operands(m, heads, kv_heads, dim, getattr(torch, dtype))
    want = reference.attend_own_s8(*operands, **options)
    chosen = mock.patch.object(elementwise, "threads_for", lambda *_: threads) if threads else contextlib.nullcontext()
    with poisoned_outputs(), chosen:
        got = qk.attend_own_s8(*operands, **options)
        joined, largest = qk.attend_own(*operands, **options)
    value = operands[4][0].repeat_interleave(heads // kv_heads, 0).flatten()
    alone = reference.quantize_per_token_s8(value)
    as_codes = quantize_per_token_s8(joined)  # which has the largest number in it
    alike = torch.equal(as_codes.codes, want.codes) and torch.equal(as_codes.scales, want.scales)
    return {
        "equal": _as_the_reference(got, want),
        "value": torch.equal(got.codes[0], alone.codes),
        "not quantised": alike and torch.equal(joined[0], value) and torch.equal(largest, joined.float().abs().amax(-1)),
    }


def compiled_own_case() -> dict:
    """The operator under torch.compile, in one graph."""
    operands = own_operands(2, 2, 1, 64, torch.float16)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(*x: torch.Tensor) -> torch.Tensor:
        return qk.attend_own_s8(*x, softcap=3.0).tiles

    return {"equal": torch.equal(step(*operands), qk.attend_own_s8(*operands, softcap=3.0).tiles)}


def own_mutant_case(what: str) -> dict:
    """The kernel with one instruction changed: is its result still the reference's? "nothing" changes none."""
    shuffle = emulation.shuffle_xor
    name, wrong = {
        "nothing": ("shuffle_xor", shuffle),
        "lanes do not meet": ("shuffle_xor", lambda value, mask: value),
        "half of the lanes": ("shuffle_xor", lambda value, mask: shuffle(value, min(int(mask), 2))),
        "sign of the difference": ("absolute", lambda value: value),
        "weights that do not add up": ("reciprocal", lambda value: emulation.reciprocal(value) * np.float32(0.99)),
        "no sum of the codes": ("dp4a", lambda weights, codes, total: np.int32(total)),
    }[what]
    with mock.patch.object(ptx, name, wrong):
        return own_case(5, 2, 1, 64, "float16")


def own_errors() -> dict:
    """Bad input of `attend_own_s8`: name -> ``[class, message]``."""
    from .simulated import message_of

    names = ("seen", "lse", "query", "key", "value")
    good = dict(zip(names, own_operands(2, 4, 2, 64, torch.float16), strict=True))

    def call(**changed: Any) -> Any:
        return lambda: qk.attend_own_s8(**{**good, **changed})

    seen, key = good["seen"], good["key"]
    calls = {
        "seen: a list": call(seen=[1.0]),
        "seen: fp32": call(seen=seen.float()),
        "seen: flat": call(seen=seen.flatten(1)),
        "seen: D = 32": call(seen=seen[..., :32]),
        "query: bf16": call(query=good["query"].bfloat16()),
        "query: other heads": call(query=good["query"][:, :2]),
        "lse: a list": call(lse=[1.0]),
        "lse: fp16": call(lse=good["lse"].half()),
        "lse: other tokens": call(lse=good["lse"][:1]),
        "key: other tokens": call(key=key[:1]),
        "key: 3 heads": call(key=torch.cat([key, key[:, :1]], 1)),
        "value: one head": call(value=good["value"][:, :1]),
        "value: elsewhere": call(value=good["value"].to("meta")),
        "scale: 0": call(scale=0),
        "softcap: NaN": call(softcap=float("nan")),
        "everything elsewhere": call(**{name: x.to("meta") for name, x in good.items()}),
    }
    return {name: message_of(each) for name, each in calls.items()}
