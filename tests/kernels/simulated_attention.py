"""What of decode attention runs inside the CUDA simulator, see `simulated`: functions from JSON to JSON."""

from __future__ import annotations

import contextlib
import os
from typing import Any
from unittest import mock

import numpy as np
import qoqlab_kernels as qk
import torch
from qoqlab_kernels import attention, emulation, kv4, kv4_ladder, matmul, ptx
from qoqlab_kernels.attention import AttentionPlan
from qoqlab_kernels.kv4 import Form

from .attended import attend, expected, filled


def attention_case(form: dict, plan: dict, reverse: bool = False, at_once: int = kv4.BATCH, **options: Any) -> dict:
    """Attention by a plan; ``at_once``: partial results fetched at a time. "counters": how much is left in the counters
    afterwards, which must be nothing."""
    from .simulated import backwards

    p = AttentionPlan(**plan)
    with backwards() if reverse else contextlib.nullcontext(), mock.patch.object(kv4, "BATCH", at_once):
        found = attend(p, Form(**form), **options)
    _, counters = matmul.room(1, 1, torch.device("cpu"))
    return found | {"counters": int(counters.abs().sum()) if p.version == "v4" else 0}


def public_attention_case(dtype: str = "float16", version: str | None = None, **options: Any) -> dict:
    """`kv4_attention` from end to end, on a list of sequences and on a tensor, with the version forced as a lesson would."""
    form = Form(64, 2, 16)
    cache, sequences = filled(form, 1, [5, 20])
    forced = {} if version is None else {attention.OVERRIDE: version}
    query = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(3)).to(getattr(torch, dtype))
    rules = options.get("scale") or 0.125, options.get("window"), options.get("softcap")
    want, sums = expected(query, cache, sequences, *rules)
    with mock.patch.dict(os.environ, forced):
        chosen = attention.attention_plan(form, query.device).version
        plain = qk.kv4_attention(query, cache, 1, sequences, **options)
        both = qk.kv4_attention(query, cache, 1, torch.tensor(sequences, dtype=torch.int32), **options, lse=True)
    got = [plain, both[0]]
    return {
        "lse": torch.allclose(both[1].double(), sums, rtol=1e-5, atol=1e-5),
        "error": ((got[0].double() - want).norm() / want.norm()).item(),
        "same": torch.equal(*got),
        "dtype": str(got[0].dtype),
        "version": chosen,
    }


def attention_mutant_case(version: str, what: str) -> dict:
    """A version with one instruction changed: its error. "nothing" changes none."""
    weigh, cap = emulation.pack_half, emulation.maximum
    name, wrong = {
        "nothing": ("pack_half", weigh),
        "weights of neighbours": ("pack_half", lambda low, high: weigh(high, low)),
        "no transposition": ("transpose8", lambda word: word),
        "no largest score": ("maximum", lambda a, b: cap(a, a)),
        "counts no arrivals": ("atomic_inc", lambda at: 0),
        "offset of the codes": ("fuse_pair", lambda a, b, c: emulation.fuse_pair(a, b, int(c) ^ 0x80008000)),
        "logarithm of another base": ("log2", lambda x: emulation.log2(x) * np.float32(0.7)),
        "conversion of the codes": ("to_float", lambda x: emulation.to_float(x) * np.float32(1.01)),
        "lanes do not meet": ("shuffle_xor", lambda value, mask: value),
    }[what]
    with mock.patch.object(ptx, name, wrong):
        found = attend(AttentionPlan(version, 2, 2, True, 2), Form(64, 2, 16, lse=True), 1, [50])
    for _, counters in [matmul.room(1, 1, torch.device("cpu"))]:
        counters.zero_()
    return found


def codes_case() -> dict:
    """Whether v3 and v4 make exactly code - 8, times `kv4.UNIT` in v4, of every code in every nibble of a word."""
    words = [sum((k + 3 * place) % 16 << 4 * place for place in range(8)) for k in range(16)]
    want = [[(word >> 4 * place & 15) - 8 for place in (0, 4, 1, 5, 2, 6, 3, 7)] for word in words]
    subnormal = [[float(x) / kv4.UNIT for pair in kv4.centred(word) for x in emulation.unpack_half(pair)] for word in words]
    return {"v3": [list(map(float, kv4_ladder.magic(word))) for word in words] == want, "v4": subnormal == want}


def attention_errors() -> dict:
    """Bad input of `kv4_attention`: name -> ``[class, message]``."""
    from .simulated import message_of

    cache = qk.PagedKV4(1, 2, 64, 4)
    s = cache.open()
    cache.append(0, [s], torch.ones(1, 2, 3, 64), torch.ones(1, 2, 3, 64))
    query = torch.ones(1, 4, 64, dtype=torch.float16)

    def call(q: Any = query, c: Any = cache, layer: Any = 0, which: Any = (s,), **options: Any) -> Any:
        return lambda: qk.kv4_attention(q, c, layer, which, **options)

    calls = {
        "cache: a tensor": call(c=query),
        "query: a list": call(q=[1.0]),
        "query: fp32": call(q=query.float()),
        "query: two dimensions": call(q=query[0]),
        "query: other sequences": call(q=query.repeat(2, 1, 1)),
        "query: other D": call(q=torch.ones(1, 4, 128, dtype=torch.float16)),
        "query: 3 heads": call(q=query[:, :3]),
        "query: 34 heads": call(q=query[:, :1].repeat(1, 34, 1)),
        "query: elsewhere": call(q=query.to("meta")),
        "layer: 1": call(layer=1),
        "sequences: not open": call(which=[5]),
        "sequences: int64": call(which=torch.tensor([s])),
        "scale: 0": call(scale=0),
        "scale: NaN": call(scale=float("nan")),
        "softcap: negative": call(softcap=-1.0),
        "window: 0": call(window=0),
        "window: 1.5": call(window=1.5),
    }
    found = {name: message_of(call) for name, call in calls.items()}
    wide = qk.PagedKV8(1, 2, 64, 4)
    with mock.patch.dict(os.environ, {attention.OVERRIDE: "v5"}):
        found["version: v5"] = message_of(call())
    with mock.patch.dict(os.environ, {attention.OVERRIDE: "v4"}):
        found["version: v4 on 8 bits"] = message_of(call(c=wide, which=[wide.open()]))
    return found
