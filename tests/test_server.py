"""The server on a real engine (CPU reference): the same tokens as `generate`, whatever else is served; faults stay apart."""

import functools

import pytest
import torch

from qoqlab import quantize, runtime
from qoqlab.engine import Engine
from qoqlab.sampling import Sampling
from qoqlab.serve import server as module
from qoqlab.serve.requests import Finish, Request
from qoqlab.serve.scheduler import Policy
from qoqlab.serve.server import Server, Turn

from .families import wide

PROMPTS = [(3, 1, 4, 1, 5, 9, 2, 6), (5,), tuple(range(60)), (7, 7, 7), (9, 8, 7, 6)]


@pytest.fixture(scope="module")
def quantized():
    return quantize(wide("llama"), "rtn-w4a8kv4-g128", progress=False)


@pytest.fixture(autouse=True, params=[False, True], ids=["", "overlap"])
def overlap(request, monkeypatch):
    """Everything without and with turns that are given to the device early, as on a GPU."""
    monkeypatch.setattr(Server, "__init__", functools.partialmethod(Server.__init__, overlap=request.param))
    return request.param


def engine_of(quantized, batch=3, pages=None):
    return runtime.compile(quantized, "cpu", max_batch=batch, max_tokens=128, pages=pages)


@pytest.fixture(scope="module")
def expected(quantized):
    """Greedy tokens of every prompt alone."""
    return [engine_of(quantized).generate([prompt], 9)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("policy", Policy)
def test_tokens_do_not_depend_on_company(quantized, expected, policy):
    server = Server(engine_of(quantized), policy, budget=16)
    found = server.run([Request(prompt, 9, arrival=0.02 * i) for i, prompt in enumerate(PROMPTS)])
    assert [p.tokens for p in found] == expected and {p.finish for p in found} == {Finish.LENGTH}
    assert server.engine.attend.cache.free_pages == server.engine.pages and not server.engine.lengths
    record = server.record()
    assert (record["first"] >= record["arrival"]).all() and (record["finish"] >= record["first"]).all()
    assert record["output"].sum() == 45 and sum(row["prompts"] for row in server.steps) == sum(map(len, PROMPTS))


def test_preemption_changes_no_token(quantized, expected):
    """Two prompts that cross into a second page where there are three."""
    prompt = PROMPTS[2]
    server = Server(engine_of(quantized, pages=3))
    found = server.run([Request(prompt, 9), Request(prompt, 9), Request(PROMPTS[0], 9)])
    assert sum(p.preemptions for p in found) >= 1
    assert [p.tokens for p in found] == [expected[2], expected[2], expected[0]]
    assert server.engine.attend.cache.free_pages == 3


@pytest.mark.parametrize("ahead", [1, 8])
def test_sampling_is_the_requests_own(quantized, ahead):
    """The tokens of `generate`, in whatever company, preempted or not, however many steps are taken in a row."""
    sampled = Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=4)
    alone = engine_of(quantized).generate([PROMPTS[2]], 9, sampled)[0]
    ways = (Sampling(1.0, seed=4), None, Sampling(0.5, top_p=0.5, seed=-1), Sampling(seed=9), Sampling(2.0, top_k=3))
    others = [Request(p, 9, sampling=way) for p, way in zip(PROMPTS, ways, strict=True)]
    server = Server(engine_of(quantized, pages=3), ahead=ahead)
    assert server.run([others[2], Request(PROMPTS[2], 9, sampling=sampled), *others])[1].tokens == alone
    assert sum(p.preemptions for p in server.requests.values()) >= 1 and len(set(alone)) > 1
    assert max(row["repeat"] for row in server.steps) == ahead


def test_one_token_and_stop(quantized, expected):
    server = Server(engine_of(quantized))
    stop = expected[0][3]
    one, stopped = server.run([Request(PROMPTS[1], 1), Request(PROMPTS[0], 9, stop={stop})])
    assert one.tokens == expected[1][:1] and one.finish is Finish.LENGTH
    assert stopped.tokens == expected[0][: expected[0].index(stop) + 1] and stopped.finish is Finish.STOP


def test_bad_requests_are_refused_and_nothing_changes(quantized):
    server = Server(engine_of(quantized, pages=1))
    with pytest.raises(ValueError, match="is outside 0"):
        server.submit(Request((10**6,), 1))
    with pytest.raises(ValueError, match="places in the cache"):
        server.submit(Request((1,) * 65, 1))
    with pytest.raises(ValueError, match="number: 0"):
        server.cancel(0)
    with pytest.raises(TypeError, match=r"sampling: expected a Sampling or None, got 0\.7"):
        server.submit(Request((1,), 1, sampling=0.7))
    with pytest.raises(ValueError, match="places in the cache"):
        server.run([Request((1,), 1), Request((1,) * 65, 1)])
    assert server.idle and not server.step() and server.record().empty
    engine = engine_of(quantized)
    engine.prefill([(1, 2)])
    with pytest.raises(ValueError, match="engine: 1 sequences are open"):
        Server(engine)


@pytest.mark.parametrize("at", range(1, 7))
def test_cancelled_at_every_step(quantized, expected, at):
    server = Server(engine_of(quantized, pages=3), ahead=1)
    numbers = [server.submit(Request(PROMPTS[i], 9)) for i in (0, 2, 2)]
    for _ in range(at):
        server.step()
    assert server.cancel(numbers[1]) and not server.cancel(numbers[1])
    server.run()
    assert [server.requests[n].tokens for n in (0, 2)] == [expected[0], expected[2]]
    assert server.requests[1].finish is Finish.CANCELLED and server.engine.attend.cache.free_pages == 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_faults_of_one_request_are_its_own(quantized, expected, monkeypatch, bad):
    """A listener that raises; logits that are NaN or infinite."""
    heard = []

    def fails(number, token):
        if len(heard) == 2:
            raise RuntimeError("no more room")
        heard.append(token)

    server = Server(engine_of(quantized), ahead=1)
    step, logits, rows = server.engine.attend.step, server.engine._logits, []

    def noted(layer, qkv, batch, window):
        at = {
            sequence: (row, start) for row, (sequence, start) in enumerate(zip(batch.sequences, batch.starts, strict=True))
        }
        row, start = at.get(server._sequences.get(1), (0, 0))
        rows[:] = [row] if start == len(PROMPTS[2]) + 3 else []  # the step after its fourth token
        return step(layer, qkv, batch, window)

    def spoilt(y, residual):
        found = logits(y, residual)
        found[rows, 3] = bad
        rows.clear()
        return found

    monkeypatch.setattr(server.engine.attend, "step", noted)
    monkeypatch.setattr(server.engine, "_logits", spoilt)
    first, second, third = server.run(
        [Request(PROMPTS[0], 9, on_token=fails), Request(PROMPTS[2], 9), Request(PROMPTS[1], 9)]
    )
    assert first.finish is Finish.ERROR and "no more room" in first.error and heard == expected[0][:2]
    assert second.finish is Finish.ERROR and "not finite" in second.error and second.tokens == expected[2][:4]
    assert third.tokens == expected[1] and server.engine.attend.cache.free_pages == server.engine.pages
    assert list(server.record()["reason"]) == ["error", "error", "length"]


def test_the_device_has_what_comes_next_before_tokens_are_read(quantized, expected, overlap, monkeypatch):
    """Prompts, of which a step takes one in, and steps, of which a turn has three."""
    server, order = Server(engine_of(quantized), ahead=3, budget=1), []
    take_in, steps, read = server._take_in, server._steps, Turn.results
    monkeypatch.setattr(server, "_take_in", lambda *a: order.append("prompt") or take_in(*a))
    monkeypatch.setattr(server, "_steps", lambda *a: order.append("steps") or steps(*a))
    monkeypatch.setattr(Turn, "results", lambda turn: order.append("read") or read(turn))
    found = server.run([Request(PROMPTS[i], 9) for i in (0, 2)])
    assert [p.tokens for p in found] == [expected[0], expected[2]]
    early = ["prompt", "prompt", "read", "read", "steps", "steps", "read", "steps", "read", "read"]
    assert order == (early if overlap else ["prompt", "read"] * 2 + ["steps", "read"] * 3), "8 tokens after the first"
    assert [row["repeat"] for row in server.steps] == [1, 1, 3, 3, 2] and not server._given


def test_a_prompt_that_raises_ends_alone(quantized, expected):
    """The second of three, each taken in by a step of its own, and all three by one."""
    for budget in (1, 8192):
        server = Server(engine_of(quantized), budget=budget)
        prompt = server.engine.attend.prompt

        def raises(layer, qkv, batch, window, prompt=prompt):
            if layer and len(PROMPTS[2]) in batch.counts:
                raise RuntimeError("out of luck")
            return prompt(layer, qkv, batch, window)

        server.engine.attend.prompt = raises
        first, broken, third = server.run([Request(PROMPTS[i], 9) for i in (0, 2, 1)])
        assert broken.finish is Finish.ERROR and broken.error == "RuntimeError: out of luck" and not broken.tokens
        assert (first.tokens, third.tokens) == (expected[0], expected[1])
        assert server.engine.attend.cache.free_pages == server.engine.pages and not server.engine.lengths


def test_a_choice_that_raises_ends_only_whose_it_is(quantized, expected, monkeypatch):
    """Of a prompt's first token, after the engine has taken the prompt in: of the second of three, in a step of its own and
    in one of all."""
    choose = module.choose

    def raises(logits, draws, positions):
        if len(PROMPTS[2]) in positions.tolist():
            raise RuntimeError("out of memory")
        return choose(logits, draws, positions)

    monkeypatch.setattr(module, "choose", raises)
    for budget in (1, 8192):
        server = Server(engine_of(quantized), budget=budget)
        first, broken, third = server.run([Request(PROMPTS[i], 9) for i in (0, 2, 1)])
        assert broken.finish is Finish.ERROR and broken.error == "RuntimeError: out of memory" and not broken.tokens
        assert (first.tokens, third.tokens) == (expected[0], expected[1])
        assert server.engine.attend.cache.free_pages == server.engine.pages and not server.engine.lengths


@pytest.mark.parametrize("at", range(2, 5))
def test_steps_whose_tokens_cannot_be_fetched_are_not_taken_twice(quantized, expected, monkeypatch, at):
    """The engine is some tokens further than anybody knows: the request ends instead of going on behind a gap."""
    calls, of = [], Turn.of

    def raises(*found):
        calls.append(found)
        if len(calls) == at:
            raise RuntimeError("no pinned memory")
        return of(*found)

    monkeypatch.setattr(Turn, "of", raises)
    server = Server(engine_of(quantized), ahead=3)
    (broken,) = server.run([Request(PROMPTS[0], 9)])
    assert broken.finish is Finish.ERROR and broken.error == "RuntimeError: no pinned memory"
    assert broken.tokens == expected[0][: 1 + 3 * (at - 2)]
    assert server.engine.attend.cache.free_pages == server.engine.pages and not server.engine.lengths


def test_nothing_is_given_early_where_the_engine_itself_waits(quantized, expected, monkeypatch):
    """By default. On the CPU the turn after a stop token's would only hold its tokens up."""
    for early in (False, True):
        if early:
            monkeypatch.setattr(Engine, "early", True)  # as on a GPU
        engine = engine_of(quantized)
        step, steps, heard = engine.attend.step, [], []
        engine.attend.step = lambda layer, *a, step=step, steps=steps: steps.append(layer) or step(layer, *a)
        stop = expected[0][2]
        request = Request(PROMPTS[0], 9, stop={stop}, on_token=lambda *_, s=steps, h=heard: h.append(s.count(0)))
        (found,) = Server(engine, ahead=3, overlap=None).run([request])
        assert found.tokens == expected[0][: expected[0].index(stop) + 1] and heard[0] == 0
        assert heard[2] == steps.count(0) == (6 if early else 3)


def test_who_comes_during_a_turn_is_taken_in_after_it(quantized, expected):
    """Not after the next one too, though the device is given that before the turn's tokens are read."""
    turns = []
    server = Server(engine_of(quantized), ahead=3, clock=lambda: float(len(turns)))
    steps = server._steps
    server._steps = lambda *a: turns.append(a) or steps(*a)
    found = server.run([Request(PROMPTS[0], 9), Request(PROMPTS[2], 9, arrival=1.0)])  # while the first turn runs
    assert [p.tokens for p in found] == [expected[0], expected[2]]
    assert [(row["prompts"] > 0, row["repeat"]) for row in server.steps[:4]] == [
        (True, 1),
        (False, 3),
        (True, 1),
        (False, 3),
    ]


@pytest.mark.parametrize("policy", Policy)
def test_seconds_are_those_of_prefill_and_of_decode(quantized, policy):
    """By a clock that only the engine moves: 5 for prompts, 1 for a step. A step that does both has both."""
    engine, ticks = engine_of(quantized), [0.0]
    prefill, ahead = engine.prefill, engine.decode_ahead

    def timed(call, seconds):
        ticks[0] += seconds
        return call()

    engine.prefill = lambda prompts: timed(lambda: prefill(prompts), 5)
    engine.decode_ahead = lambda s, t, steps, *rest: timed(lambda: ahead(s, t, steps, *rest), steps)
    server = Server(engine, policy, budget=1, ahead=3, clock=lambda: ticks[0], overlap=False)
    server.run([Request(PROMPTS[i], 9) for i in (0, 2)])
    rows = [(row["prompts"] > 0, row["batch"] * row["repeat"] > 0) for row in server.steps]
    assert (True, True) in rows if policy is Policy.BUDGET else (True, True) not in rows
    for row, (prompts, decodes) in zip(server.steps, rows, strict=True):
        assert (row["prefill_s"], row["decode_s"], row["other_s"]) == (5 * prompts, decodes * row["repeat"], 0)


def test_cancelled_while_the_device_takes_it_in(quantized, expected):
    """By the listener of the request before it, whose token is read when the next prompt is the device's already."""
    server = Server(engine_of(quantized), budget=1)
    numbers = [
        server.submit(Request(PROMPTS[0], 9, on_token=lambda *_: server.cancel(1))),
        server.submit(Request(PROMPTS[2], 9)),
    ]
    while not server.idle:
        server.step()
    first, second = (server.requests[number] for number in numbers)
    assert first.tokens == expected[0] and second.finish is Finish.CANCELLED and not second.tokens
    assert server.engine.attend.cache.free_pages == server.engine.pages and not server.engine.lengths


@pytest.mark.parametrize("policy", Policy)
def test_nan_in_the_model_is_one_requests_fault(quantized, expected, policy):
    """A token whose embedding is NaN, in prompts beside others' and alone; the server goes on."""
    server = Server(engine_of(quantized), policy)
    server.engine.network.embedding[77] = torch.nan
    good, bad, other = server.run([Request(PROMPTS[0], 9), Request((77, 2), 9), Request(PROMPTS[1], 9)])
    assert bad.finish is Finish.ERROR and "NaN" in bad.error and bad.tokens == []
    assert (good.tokens, other.tokens) == (expected[0], expected[1])
    assert server.engine.attend.cache.free_pages == server.engine.pages and not server.engine.lengths
    (alone,), (after,) = server.run([Request((77,), 1)]), server.run([Request(PROMPTS[0], 9)])
    assert alone.finish is Finish.ERROR and after.tokens == expected[0]


@pytest.mark.parametrize("ahead", [1, 8])
def test_a_step_that_raises_ends_only_whose_part_it_is(quantized, expected, ahead):
    """A layer that raises in the middle of a step, or of a turn, at one request's third token."""
    server = Server(engine_of(quantized), ahead=ahead)
    step = server.engine.attend.step

    def raises(layer, qkv, batch, window):
        at = dict(zip(batch.sequences, batch.starts, strict=True))
        if layer and at.get(server._sequences.get(1)) == len(PROMPTS[2]) + 2:
            raise RuntimeError("out of luck")
        return step(layer, qkv, batch, window)

    server.engine.attend.step = raises
    first, broken, third = server.run([Request(PROMPTS[i], 9) for i in (0, 2, 1)])
    assert broken.finish is Finish.ERROR and broken.error == "RuntimeError: out of luck"
    assert broken.tokens == expected[2][:3] and (first.tokens, third.tokens) == (expected[0], expected[1])
    assert server.engine.attend.cache.free_pages == server.engine.pages and not server.engine.lengths
    server.engine.alone = False  # other processes may not have failed, so nothing is tried again
    server.engine.attend.step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        server.run([Request(PROMPTS[0], 9)])


@pytest.mark.parametrize("ahead", [1, 8])
def test_a_listener_may_have_the_server_forget(quantized, expected, ahead):
    server = Server(engine_of(quantized), ahead=ahead)
    found = server.run([Request(p, 3 + i, on_token=lambda *_: server.forget()) for i, p in enumerate(PROMPTS)])
    assert [p.tokens for p in found] == [tokens[: 3 + i] for i, tokens in enumerate(expected)]
    assert not [p for p in server.requests.values() if p.finish is None]


@pytest.mark.parametrize("what", ["run", "step"])
def test_a_listener_cannot_serve(quantized, expected, what):
    """In the middle of a turn the engine is ahead of the tokens. It may submit."""
    server, more = Server(engine_of(quantized), ahead=3), []

    def submits(number, token):
        if not more:
            more.append(server.submit(Request(PROMPTS[3], 4)))

    serving = Request(PROMPTS[0], 9, on_token=lambda *_: getattr(server, what)())
    refused, other = server.run([serving, Request(PROMPTS[2], 9, on_token=submits)])
    assert refused.finish is Finish.ERROR and "RuntimeError: run, step: a listener" in refused.error
    assert other.tokens == expected[2] and server.requests[more[0]].tokens == expected[3][:4]
    (after,) = server.run([Request(PROMPTS[0], 9)])
    assert after.tokens == expected[0]


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("at", range(1, 6))
def test_whoever_interrupts_the_wait_for_tokens_may_go_on(quantized, expected, monkeypatch, policy, at):
    """Ctrl-C while the host waits: no token is lost, no step taken twice."""
    read, calls = Turn.results, []

    def interrupted(turn):
        calls.append(turn)
        if len(calls) == at:
            raise KeyboardInterrupt
        return read(turn)

    monkeypatch.setattr(Turn, "results", interrupted)
    server = Server(engine_of(quantized), policy, budget=1, ahead=3)
    numbers = [server.submit(Request(PROMPTS[i], 9)) for i in (0, 2)]
    with pytest.raises(KeyboardInterrupt):
        while not server.idle:
            server.step()
    server.run()
    assert [server.requests[n].tokens for n in numbers] == [expected[0], expected[2]]
    assert server.engine.attend.cache.free_pages == server.engine.pages and not server.engine.lengths


def test_cancelled_from_outside_leaves_nothing_to_do(quantized):
    server = Server(engine_of(quantized), ahead=3)
    number = server.submit(Request(PROMPTS[0], 9))
    server.step()
    server.step()
    assert server.cancel(number) and server.idle and not server.step() and not server._given


def test_steps_that_fail_are_the_others_error_too(quantized):
    """Where other processes take part, nothing may be tried again by this one alone, given early or not."""
    server = Server(engine_of(quantized), ahead=3)
    steps, calls = server._steps, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return steps(*arguments)

    server._steps, server.engine.alone = fails, False
    with pytest.raises(RuntimeError, match="out of luck"):
        server.run([Request(PROMPTS[0], 9)])


@pytest.mark.parametrize("ahead", [1, 8])
def test_who_listens_may_cancel_in_the_middle_of_a_turn(quantized, expected, ahead):
    """Its own request, and that of another listener: no token after that is kept, or told."""
    server, heard = Server(engine_of(quantized), ahead=ahead), {0: [], 1: []}

    def listen(number, token):
        heard[number].append(token)
        if number == 1 and len(heard[1]) == 3:
            assert server.cancel(0) and server.cancel(1)

    first, second, quiet = server.run([Request(PROMPTS[i], 9, on_token=listen if i < 2 else None) for i in range(3)])
    assert heard == {0: first.tokens, 1: second.tokens} == {0: expected[0][:3], 1: expected[1][:3]}
    assert first.finish is second.finish is Finish.CANCELLED and quiet.tokens == expected[2]
    assert server.engine.attend.cache.free_pages == server.engine.pages


@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_steps_in_a_row(quantized, expected, ahead):
    """The same tokens; a stop in the middle of a turn; NaN in the middle of a turn."""
    server = Server(engine_of(quantized), ahead=ahead)
    stop = expected[0][4]
    stopped, other = server.run([Request(PROMPTS[0], 9, stop={stop}), Request(PROMPTS[2], 9)])
    assert stopped.tokens == expected[0][: expected[0].index(stop) + 1] and other.tokens == expected[2]
    assert max(row["repeat"] for row in server.steps) == ahead
    logits, calls = server.engine._logits, []

    def spoilt(y, residual):
        calls.append(len(y))
        return logits(y, residual) * (torch.nan if len(calls) == 4 else 1)

    server.engine._logits = spoilt
    (broken,) = server.run([Request(PROMPTS[0], 9)])
    assert broken.finish is Finish.ERROR and broken.tokens == expected[0][:3]
    assert server.engine.attend.cache.free_pages == server.engine.pages
