"""Drawing tokens on a GPU: alike in any company, without a wait, in a server that takes steps in a row."""

from __future__ import annotations

import pytest
import torch

from qoqlab import load_text, load_tiny, quantize, runtime, tokens
from qoqlab.sampling import Sampling, choose, draws_of
from qoqlab.serve.requests import Request
from qoqlab.serve.server import Server

from .gpus import on_a_gpu

pytestmark = on_a_gpu
WAYS = [None, Sampling(0.7, seed=3), Sampling(1.0, top_k=9), Sampling(1.3, top_p=0.8), Sampling(2.0, 50, 0.5, 8)]


def test_a_row_is_drawn_alike_in_any_company_and_nobody_waits() -> None:
    device, vocabulary = torch.device("cuda"), 128256
    logits = torch.randn(64, vocabulary, device=device) * 3
    ways, positions = [WAYS[i % 5] for i in range(64)], torch.arange(64, device=device, dtype=torch.int32)
    draws = draws_of(ways, vocabulary, device)
    choose(logits, draws, positions)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        together = choose(logits, draws, positions)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i in range(64):
        alone = choose(logits[i : i + 1], draws_of([ways[i]], vocabulary, device), positions[i : i + 1])[0]
        assert torch.equal(alone, together[i : i + 1]), ways[i]


@pytest.mark.parametrize("pages", [None, 7])
def test_steps_in_a_row_draw_the_same_tokens(pages: int | None) -> None:
    model, tokenizer = load_tiny()
    ids = tokens(tokenizer, load_text("python-docs", "test"), 100)[:10].tolist()
    result = quantize(model, "rtn-w4a8kv4-g128", progress=False, report=False)
    requests = [Request(tuple(row[: 9 + 7 * i]), 40, sampling=WAYS[i % 5]) for i, row in enumerate(ids)]
    found = []
    for ahead in (1, 8):
        server = Server(runtime.compile(result, "cuda", max_batch=10, max_tokens=192, pages=pages), ahead=ahead)
        found.append([p.tokens for p in server.run(requests)])
        assert max(row["repeat"] for row in server.steps) == ahead
    if pages is None:  # with few pages batches differ, and so may logits in the last bit
        assert found[0] == found[1]
    assert all(len(row) == 40 for row in found[1])
