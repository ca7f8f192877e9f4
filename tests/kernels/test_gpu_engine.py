"""The engine on a GPU: against the same engine on the reference, and its captured steps against plain ones."""

from __future__ import annotations

import pytest
import torch

from qoqlab import load_text, load_tiny, quantize, runtime, tokens
from qoqlab.attention import Mode
from qoqlab.cached_attention import Batch, batch_of
from qoqlab.engine import Engine
from qoqlab.pipeline import QuantizedModel

from ..families import cast_parameters
from .engines import pair

HERE = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HERE or torch.cuda.get_device_capability() < (8, 0),
        reason="needs an NVIDIA GPU of compute capability 8.0 or newer",
    ),
]
STEPS = 256


@pytest.fixture(scope="module")
def bundled() -> tuple[QuantizedModel, list[torch.Tensor]]:
    """The bundled model, quantised, in fp16 on the GPU, and prompts of different lengths."""
    model, tokenizer = load_tiny()
    ids = tokens(tokenizer, load_text("python-docs", "test"), 64)
    result = quantize(model, "rtn-w4a8kv4-g128", progress=False, report=False)
    cast_parameters(result.model, torch.float16).cuda()
    return result, [ids[0, :40], ids[1, :7], ids[2]]


def forced(engine: Engine, prompts: list[torch.Tensor], said: list[list[int]]) -> torch.Tensor:
    """Logits ``[steps, B, V]`` of an engine that is fed with given tokens."""
    sequences, logits = engine.prefill(prompts)
    rows = [logits] + [engine.decode(sequences, list(step)) for step in zip(*said, strict=True)]
    engine.free(sequences)
    return torch.stack(rows[:-1])


def test_prompts_are_those_of_runtime_mode(bundled) -> None:
    result, prompts = bundled
    engine = runtime.compile(result, "cuda", 4, 512)
    sequences, logits = engine.prefill(prompts)
    with torch.no_grad(), runtime.mode(result.model, Mode.RUNTIME):
        for prompt, got in zip(prompts, logits, strict=True):
            want = result.model(prompt[None].cuda(), use_cache=False).logits[0, -1].float()
            assert (got - want).norm() <= 0.02 * want.norm()  # fp16's roundings in torch's attention move a few codes
    engine.free(sequences)


def test_tokens_of_the_kernels_and_of_the_reference(bundled) -> None:
    """Greedy, several prompts at once; where the tokens differ the reference's two best are close."""
    result, prompts = bundled
    fast, plain = pair(result, "cuda", torch.float16, (4, 512))
    said = fast.generate(prompts, STEPS)
    got, want = forced(fast, prompts, said), forced(plain, prompts, said)
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert errors.median() <= 0.02
    best = want.topk(2).values
    sure = best[..., 0] - best[..., 1] > 2 * (got - want).abs().amax(-1)
    assert torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure]) and sure.float().mean() > 0.8
    assert fast.generate(prompts, STEPS) == said  # repeats bit for bit


def test_captured_steps_equal_plain_ones(bundled) -> None:
    result, prompts = bundled
    engine = runtime.compile(result, "cuda", 4, 512)
    sequences, _ = engine.prefill(prompts)
    for _ in range(3):
        starts = [engine.lengths[s] for s in sequences]
        ids = torch.tensor([5, 6, 7], device="cuda")
        engine.attend.reserve(sequences, [s + 1 for s in starts])
        with torch.no_grad():
            batch = batch_of(sequences, [1] * 3, starts, engine.device)
            # the same rows as the captured step of four, whose last row is idle
            idle = (batch.positions, 0), (batch.slots, engine.attend.idle)
            four = Batch(*(torch.cat([t, t.new_tensor([end])]) for t, end in idle))
            plain = engine._logits(*engine._hidden(torch.cat([ids, ids.new_zeros(1)]), four, prompt=False))[:3]
        assert torch.equal(engine.decode(sequences, ids), plain)
    engine.free(sequences)
