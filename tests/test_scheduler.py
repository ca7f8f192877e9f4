"""The scheduler: pages, order, preemption, traces; any function stands for the model."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqlab.serve.requests import Finish, Request
from qoqlab.serve.scheduler import Event, Failure, Limits, Policy, Scheduler, Step, read_trace, replay

PAGE = 4


def after(progress):
    """A model: the next token is a function of everything before it that the cache holds."""
    seen = (*progress.request.prompt, *progress.tokens)[: max(len(progress.request.prompt), progress.cached + 1)]
    return hash(seen) % 97


def checked(scheduler, early=1):
    """Every page is held once, by a running request, and no running request has too few or many: none beyond ``early``
    tokens, more than one if the next steps are planned already."""
    held = [page for progress in scheduler.running for page in scheduler.pages_of(progress.number)]
    assert len(set(held)) == len(held) == scheduler.limits.pages - scheduler.allocator.free
    for progress in scheduler.running:
        count = len(scheduler.pages_of(progress.number))
        known = len(progress.request.prompt) + len(progress.tokens)
        assert scheduler.limits.pages_of(progress.cached) <= count <= scheduler.limits.pages_of(known + early)
    assert all(not scheduler.pages_of(progress.number) for progress in scheduler.waiting)
    for line in (scheduler.running, scheduler.waiting):
        assert [progress.number for progress in line] == sorted(progress.number for progress in line), "who came first"


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=9).map(tuple),
    max_new_tokens=st.integers(1, 12),
    stop=st.frozensets(st.integers(0, 96), max_size=6),
)
events = st.lists(
    st.one_of(
        st.builds(Event, at=st.integers(0, 25), request=requests),
        st.builds(Event, at=st.integers(0, 40), cancel=st.integers(0, 11)),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    events,
    st.integers(1, 4),
    st.integers(5, 12),
    st.sampled_from(Policy),
    st.integers(1, 20),
    st.integers(1, 9),
    st.booleans(),
)
def test_nothing_leaks_nobody_starves_and_results_do_not_depend_on_company(
    trace, batch, pages, policy, budget, most, overlap
):
    limits = Limits(batch, pages, max_tokens=20, page_size=PAGE, budget=budget)
    scheduler, all_requests = Scheduler(limits, policy), []
    submit = scheduler.submit
    scheduler.submit = lambda request: all_requests.append(submit(request)) or all_requests[-1]
    started = []
    for count, (step, ended) in enumerate(replay(trace, scheduler, after, most, overlap)):
        assert count < 2000, "somebody starves"
        checked(scheduler, most if overlap else 1)
        assert len(step.decode) + len(step.prefill) <= batch
        assert not set(step.prefill) & {*step.decode, *step.preempted} and not set(step.preempted) & set(step.decode)
        taken = [len(all_requests[number].request.prompt) for number in step.prefill]
        assert (len(taken) <= 1 or sum(taken) <= budget) and step.repeat <= (1 if taken else most)
        started += [number for number in step.prefill if number not in started]
        assert all(p.finish is not None for p in ended)
    assert started == sorted(started), "first come, first served"
    assert scheduler.idle and scheduler.allocator.free == pages
    for progress in all_requests:
        alone = Scheduler(limits, policy)
        only = alone.submit(progress.request)
        while (step := alone.plan()) is not None:
            alone.complete(step, {0: [after(only)]})
        if progress.finish is Finish.CANCELLED:
            assert only.tokens[: len(progress.tokens)] == progress.tokens
        else:
            assert (progress.tokens, progress.finish) == (only.tokens, only.finish)


def test_prompts_are_followed_by_those_that_had_come_before_them():
    """Not by who comes while they are taken in, as then nobody would ever decode; and where every step decodes by none."""
    scheduler = Scheduler(Limits(3, 12, 12, PAGE, budget=1))
    for _ in range(2):
        scheduler.submit(Request((1, 2), 4))
    steps = [scheduler.plan()]
    scheduler.submit(Request((1, 2), 4))
    steps.append(scheduler.follow(steps[0], 8))
    assert steps == [Step(prefill=(0,)), Step(prefill=(1,))] and scheduler.follow(steps[1], 8) is None
    for step in steps:
        scheduler.complete(step, {step.prefill[0]: [5]})
    assert scheduler.plan(8) == Step(decode=(0, 1))
    scheduler = Scheduler(Limits(3, 12, 12, PAGE, budget=1), Policy.BUDGET)
    for _ in range(2):
        scheduler.submit(Request((1, 2), 4))
    assert scheduler.follow(scheduler.plan(), 8) is None


def test_the_last_comer_is_preempted_and_computed_again():
    scheduler = Scheduler(Limits(2, 3, 12, PAGE))
    first, second = (scheduler.submit(Request((1, 2, 3), 8)) for _ in range(2))
    assert scheduler.plan() == Step(prefill=(0, 1))
    scheduler.complete(Step(prefill=(0, 1)), {0: [10], 1: [20]})
    steps = []
    while (step := scheduler.plan()) is not None:
        steps.append(step)
        known = second.tokens if second.tokens else [20]
        scheduler.complete(step, {n: [30 + len(steps)] for n in (*step.prefill, *step.decode)})
        assert second.tokens[: len(known)] == known  # what is known stays
    preempted = next(i for i, step in enumerate(steps) if step.preempted)
    assert steps[preempted] == Step(preempted=(1,), decode=(0,)) and second.preemptions == 1
    assert (len(first.tokens), len(second.tokens)) == (8, 8)
    again = next(i for i, step in enumerate(steps) if step.prefill)
    assert again > preempted and steps[again].prefill == (1,)
    assert len(steps) == again + 1 + 7  # all tokens but the last are fed, those from before again


def test_who_was_preempted_comes_before_who_still_waits():
    scheduler = Scheduler(Limits(2, 3, 12, PAGE))
    for _ in range(4):
        scheduler.submit(Request((1, 2, 3), 8))
    while not (step := scheduler.plan()).preempted:
        scheduler.complete(step, {n: [1] for n in (*step.prefill, *step.decode)})
    checked(scheduler)
    assert step.preempted == (1,) and [progress.number for progress in scheduler.waiting] == [1, 2, 3]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.booleans(),
    st.integers(1, 8),
    st.frozensets(st.integers(0, 9), max_size=3),
)
def test_tokens_in_one_call_are_tokens_one_by_one(tokens, broken, most, stop):
    ends = []
    for together in (True, False):
        scheduler = Scheduler(Limits(1, 9, 40, PAGE))
        progress = scheduler.submit(Request((1, 2), most, stop=stop))
        scheduler.complete(scheduler.plan(), {0: [5]})
        step, found = Step(decode=(0,), repeat=len(tokens)), [*tokens, *[Failure("broken")] * broken]
        for part in [found] if together else [[result] for result in found]:
            scheduler.complete(step, {0: part})
        ends.append((progress.tokens, progress.finish, progress.error, progress.finish or progress.cached))
    assert ends[0] == ends[1]


def test_a_prompt_never_overtakes_an_earlier_one():
    scheduler = Scheduler(Limits(4, 4, 16, PAGE))
    for length in (9, 13, 1):
        scheduler.submit(Request(tuple(range(length)), 2))
    assert scheduler.plan() == Step(prefill=(0,)), "13 tokens do not fit beside 9, and the third request waits for them"


def test_a_page_stays_free_for_each_running_request():
    """Else the next token of one that runs would throw the newcomer out at once."""
    for pages, together in ((4, False), (5, True)):
        scheduler = Scheduler(Limits(3, pages, 12, PAGE))
        for length in (7, 5):
            scheduler.submit(Request((1,) * length, 3))
        assert scheduler.plan().prefill == ((0, 1) if together else (0,))


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("most", [1, 8])
def test_prompts_that_never_end_hold_nobody_up(policy, most):
    """Somebody comes before every step: who comes while another is taken in waits until everybody has decoded a token."""
    scheduler = Scheduler(Limits(8, 64, 32, PAGE), policy)
    long = scheduler.submit(Request((1,) * 3, 20))
    steps = 0
    while long.finish is None:
        scheduler.submit(Request((1,), 1))
        step = scheduler.plan(most)
        scheduler.complete(step, {n: [1] * step.repeat for n in (*step.prefill, *step.decode)})
        steps += 1
        assert steps <= 40, "a prefill and a decode for each of 20 tokens"
    if policy is Policy.PREFILL_FIRST:
        assert steps > 20, "newcomers wait for one step, not for a turn"


def test_whoever_waited_is_taken_in_before_the_next_decode():
    scheduler = Scheduler(Limits(8, 64, 32, PAGE, budget=4))
    for _ in range(3):
        scheduler.submit(Request((1,) * 4, 9))
    assert [take_step(scheduler) for _ in range(4)] == [((0,), ()), ((1,), ()), ((2,), ()), ((), (0, 1, 2))]
    scheduler.submit(Request((1,) * 4, 9))
    assert take_step(scheduler) == ((3,), ()), "who comes during a decode need not wait for another"
    scheduler.submit(Request((1,) * 4, 9))
    assert [take_step(scheduler) for _ in range(2)] == [((), (0, 1, 2, 3)), ((4,), ())]


def take_step(scheduler):
    """What the next step prefills and decodes; every request gets a 1."""
    step = scheduler.plan()
    scheduler.complete(step, {n: [1] for n in (*step.prefill, *step.decode)})
    return step.prefill, step.decode


def test_a_step_is_planned_early_where_results_cannot_change_who_is_in_it():
    scheduler = Scheduler(Limits(2, 64, 40, PAGE))
    for count in (20, 12):
        scheduler.submit(Request((1,), count))
    scheduler.complete(scheduler.plan(), {0: [1], 1: [1]})
    step = scheduler.plan(8)
    assert step == Step(decode=(0, 1), repeat=8)
    assert scheduler.follow(step, 8) == Step(decode=(0, 1), repeat=3), "the second one needs 3 tokens more"
    scheduler.complete(step, {n: [1] * 8 for n in (0, 1)})
    late = Step(decode=(0, 1), repeat=3)
    assert scheduler.follow(late, 8) == Step(decode=(0,), repeat=8), "the second one has ended then"
    scheduler.submit(Request((1,), 1))
    assert scheduler.follow(late, 8) is None, "and gives its place to who waits"
    scheduler.complete(late, {n: [1] * 3 for n in (0, 1)})
    assert scheduler.follow(Step(decode=(0,)), 8) is None, "who waits would fit"
    assert take_step(scheduler) == ((2,), ())
    last = Step(decode=(0,), repeat=8)
    assert scheduler.follow(last, 8) is None, "nobody is left"
    checked(scheduler, 9)


def test_a_step_is_planned_early_only_with_pages_for_all():
    scheduler = Scheduler(Limits(2, 3, 12, PAGE))
    for _ in range(2):
        scheduler.submit(Request((1, 2), 9))
    scheduler.complete(scheduler.plan(), {0: [1], 1: [1]})
    step = scheduler.plan(8)
    assert step == Step(decode=(0, 1), repeat=2) and scheduler.allocator.free == 1
    assert scheduler.follow(step, 8) is None, "each needs a second page; `plan` will take one's pages away"


def test_budget_decodes_and_prefills_in_one_step():
    scheduler = Scheduler(Limits(4, 40, 32, PAGE, budget=6), Policy.BUDGET)
    for length in (4, 9, 3, 3, 1):
        scheduler.submit(Request(tuple(range(length)), 9))
    seen = [take_step(scheduler) for _ in range(4)]
    assert seen == [((0,), ()), ((1,), (0,)), ((2, 3), (0, 1)), ((), (0, 1, 2, 3))]


def test_failures_and_stops_end_one_request_only():
    scheduler = Scheduler(Limits(3, 9, 12, PAGE))
    a, b, c = (scheduler.submit(Request((1,), 3, stop=frozenset({7}))) for _ in range(3))
    step = scheduler.plan()
    assert scheduler.complete(step, {0: [Failure("broken")], 1: [7], 2: [5]}) == [a, b]
    assert (a.finish, a.error, a.tokens) == (Finish.ERROR, "broken", []) and (b.finish, b.tokens) == (Finish.STOP, [7])
    assert scheduler.running == [c] and scheduler.cancel(c) and not scheduler.cancel(c) and scheduler.idle
    assert scheduler.plan() is None and scheduler.allocator.free == 9


@pytest.mark.parametrize("at", range(8))
def test_cancelled_at_every_step(at):
    scheduler = Scheduler(Limits(2, 6, 12, PAGE))
    trace = [Event(0, Request((1, 2), 5)), Event(0, Request((3,), 5)), Event(1, Request((4,), 3)), Event(at, cancel=0)]
    ended = [p.number for _, done in replay(trace, scheduler, after) for p in done]
    assert scheduler.idle and scheduler.allocator.free == 6 and set(ended) >= {1, 2}


def test_ten_thousand_requests_queue():
    scheduler = Scheduler(Limits(64, 640, 64))
    every = [scheduler.submit(Request((1,) * 40, 8)) for _ in range(10_000)]
    while (step := scheduler.plan()) is not None:
        scheduler.complete(step, {n: [1] for n in (*step.prefill, *step.decode)})
    assert all(len(p.tokens) == 8 and p.finish is Finish.LENGTH for p in every) and scheduler.allocator.free == 640


def test_a_trace_repeats(tmp_path):
    lines = [{"at": 0, "prompt": [1, 2], "max_new_tokens": 4}, {"at": 2, "prompt": [3], "max_new_tokens": 2, "stop": [5]}]
    lines.append({"at": 3, "cancel": 0})
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    runs = [[step for step, _ in replay(read_trace(path), Scheduler(Limits(2, 4, 8, PAGE)), after)] for _ in range(2)]
    assert runs[0] == runs[1] and runs[0][0] == Step(prefill=(0,))
    good = path.read_text()
    for bad in ('{"at": 1}', '{"at": "x", "cancel": 0}', '{"at": 1, "cancel": -1}', '{"at": -1, "prompt": [1]}', "[]"):
        path.write_text(f"{good}\n{bad}", encoding="utf-8")
        with pytest.raises(ValueError, match="line 4 is no event"):
            read_trace(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request((), 1), "prompt: no tokens"),
        (lambda: Request((1, -2), 1), "prompt: token -2"),
        (lambda: Request((1,), 0), "max_new_tokens"),
        (lambda: Request((1,), 1, arrival=-1.0), "arrival"),
        (lambda: Request((1,), 1, arrival=float("nan")), "arrival"),
        (lambda: Request((1,), 1, arrival="x"), "arrival: expected a number of seconds, got 'x'"),
        (lambda: Request("abc", 1), "prompt: expected token numbers, integers, got 'abc'"),
        (lambda: Request((1.7,), 1), "prompt: expected token numbers"),
        (lambda: Request(5, 1), "prompt: expected token numbers, integers, got 5"),
        (lambda: Request((1,), 1, stop=5), "stop: expected token numbers"),
        (lambda: Request((1,), 1, stop={"a"}), "stop: expected token numbers"),
        (lambda: Request((1,), 1, on_token=3), "on_token: expected a function"),
        (lambda: Scheduler(Limits(1, 1, 1)).submit((1, 2)), "request: expected a Request"),
        (lambda: Limits(0, 1, 1), "batch"),
        (
            lambda: Scheduler(Limits(1, 2, 99, PAGE)).submit(Request((1,) * 8, 2)),
            "9 places in the cache.* 2 pages of 4 tokens",
        ),
        (lambda: Scheduler(Limits(1, 9, 5, PAGE)).submit(Request((1,) * 5, 2)), "6 places in the cache; there are 5"),
        (lambda: Scheduler(Limits(1, 1, 1), "fast"), "policy"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_request_that_just_fits_runs():
    trace = [Event(0, Request((1,) * 8, 1)), Event(0, Request((1,) * 5, 4))]
    ended = [p for _, done in replay(trace, Scheduler(Limits(1, 2, 8, PAGE)), after) for p in done]
    assert [(p.number, p.finish, len(p.tokens)) for p in ended] == [(0, Finish.LENGTH, 1), (1, Finish.LENGTH, 4)]
