"""The server on a GPU's kernels: the tokens of `Engine.generate`, whatever else is served."""

import pytest

from qoqlab import load_text, load_tiny, quantize, runtime, tokens
from qoqlab.serve.requests import Request
from qoqlab.serve.scheduler import Policy
from qoqlab.serve.server import Server

from .gpus import on_a_gpu

pytestmark = on_a_gpu


@pytest.fixture(scope="module")
def setting():
    model, tokenizer = load_tiny()
    ids = tokens(tokenizer, load_text("python-docs", "test"), 100)[:12].tolist()
    prompts = [tuple(row[: 9 + 7 * i]) for i, row in enumerate(ids)]
    return quantize(model, "rtn-w4a8kv4-g128", progress=False, report=False), prompts


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize(("batch", "pages"), [(4, None), (12, None), (5, 5)])
def test_tokens_are_those_of_generate(setting, policy, batch, pages):
    result, prompts = setting
    alone = runtime.compile(result, "cuda", max_batch=1, max_tokens=192)
    expected = [alone.generate([prompt], 40)[0] for prompt in prompts]
    server = Server(runtime.compile(result, "cuda", max_batch=batch, max_tokens=192, pages=pages), policy, budget=128)
    found = server.run([Request(prompt, 40) for prompt in prompts])
    assert [p.tokens for p in found] == expected
    assert (sum(p.preemptions for p in found) > 0) == (pages is not None)
