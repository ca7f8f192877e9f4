"""The simulated fleet: equal to stepping through it, to queueing theory, and to itself at another size."""

from __future__ import annotations

import heapq
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qoqlab import prediction
from qoqlab.machines import GPUS, MODELS
from qoqlab.prediction import OURS
from qoqlab.roofline import PRECISIONS, Serving
from qoqlab.serve import fleet
from qoqlab.serve.fleet import Lengths, Router, Traffic, latencies, poisson, simulate
from qoqlab.serve.surface import Surface, measured_surface, surface

#: One step a millisecond, whatever the batch; prompts cost nothing.
CONSTANT = Surface(1e-3, 0, 0, 0, 0, sequences=1, tokens=10**9)
#: Every kind of cost, and little memory.
SMALL = Surface(2e-3, 3e-4, 1e-6, 1e-3, 2e-5, sequences=5, tokens=400, per_square=1e-7, burst=120)
STEPS = pd.DataFrame({"batch": [1, 2, 4], "cached": [8, 9, 90], "seconds": [1e-3, 2e-3, 3e-3]})
PREFILLS = pd.DataFrame({"prompts": [10, 100], "seconds": [1e-3, 2e-3]})
LLAMA, KV4 = MODELS["Llama-3-8B"], PRECISIONS["W4A8KV4"]
H200 = surface(LLAMA, KV4, GPUS["H200"])


def stepped(requests, s):
    """One GPU, one step at a time: the same rules as `simulate`, without closed forms or events."""
    now, following, waiting, running = 0.0, 0, [], {}
    arrival, prompt, output = (requests[c].tolist() for c in ("arrival", "prompt", "output"))
    first, finish = [math.nan] * len(arrival), [math.nan] * len(arrival)
    while following < len(arrival) or waiting or running:
        while following < len(arrival) and arrival[following] <= now:
            waiting.append(following)
            following += 1
        new = []
        for i in list(waiting):
            held = sum(prompt[j] + output[j] for j in [*running, *new, i])
            burst = sum(prompt[j] for j in [*new, i])
            if held > s.tokens or len(running) + len(new) == s.sequences or (new and burst > s.burst):
                break
            new.append(i)
            waiting.remove(i)
        if new:
            now += s.prefill + sum(s.per_prompt * prompt[i] + s.per_square * prompt[i] ** 2 for i in new)
            for i in new:
                first[i], running[i] = now, 1
        elif running:
            for _ in range(min(s.turn, *(output[i] - made for i, made in running.items()))):
                cached = sum(prompt[i] + made - 1 for i, made in running.items())
                now += s.step + s.per_sequence * len(running) + s.per_cached * cached
                running = {i: made + 1 for i, made in running.items()}
        else:
            now = arrival[following]
        for i in [i for i, made in running.items() if made == output[i]]:
            finish[i] = now
            del running[i]
    return first, finish


@pytest.mark.parametrize("turn", [1, 8])
@pytest.mark.parametrize("rate", [2.0, 12.0, 60.0])
def test_events_are_the_steps_between_them(rate, turn):
    rng = np.random.default_rng(3)
    requests = poisson(rate, 300).assign(prompt=rng.integers(1, 150, 300), output=rng.integers(1, 60, 300))
    server = replace(SMALL, turn=turn)
    served = simulate(requests, server)
    first, finish = stepped(requests, server)
    assert served["first"].to_numpy() == pytest.approx(first, rel=1e-9)
    assert served["finish"].to_numpy() == pytest.approx(finish, rel=1e-9)


def test_one_at_a_time_with_equal_lengths_is_m_d_1():
    """Pollaczek and Khinchine: a mean wait of rho * D / (2 * (1 - rho))."""
    requests = poisson(5.0, 20_000, output=101, seed=1)  # 100 steps, 0.1 s
    served = simulate(requests, CONSTANT)
    wait = latencies(served)["ttft_mean"]
    assert wait == pytest.approx(0.5 * 0.1 / (2 * 0.5), rel=0.05)
    assert latencies(served)["total_mean"] - wait == pytest.approx(0.1, rel=1e-6)


def test_a_batch_that_costs_nothing_is_m_m_c():
    """Erlang's C formula for four places and a load of 3. Its mean needs half a million requests, so an exact recursion over
    them meets the formula, and the simulation meets the recursion on the first of them."""
    requests = poisson(3.0, 500_000, output=10_000, lengths=Lengths.EXPONENTIAL, seed=2)
    free, waits = [0.0] * 4, []
    for arrival, output in zip(requests["arrival"].tolist(), requests["output"].tolist(), strict=True):
        start = max(arrival, free[0])  # whoever is free first takes the next
        heapq.heapreplace(free, start + 1e-4 * (output - 1))
        waits.append(start - arrival)
    busy = 3.0**4 / math.factorial(4) * 4 / (4 - 3)
    probability = busy / (sum(3.0**n / math.factorial(n) for n in range(4)) + busy)
    assert np.mean(waits) == pytest.approx(probability * 1.0 / (4 - 3), rel=0.05)
    served = simulate(requests[:4000], replace(CONSTANT, step=1e-4, sequences=4))
    assert (served["first"] - served["arrival"]).to_numpy() == pytest.approx(waits[:4000], abs=0.01)


def test_a_step_in_proportion_to_the_batch_is_processor_sharing():
    """Mean time in an M/G/1 queue that shares its server evenly: service / (1 - rho), whatever the lengths' distribution."""
    shared = Surface(0, 1e-4, 0, 0, 0, sequences=10**6, tokens=10**9)
    for lengths in Lengths:
        served = simulate(poisson(6.0, 10_000, output=1001, lengths=lengths, seed=4), shared)
        assert latencies(served)["total_mean"] == pytest.approx(0.1 / (1 - 0.6), rel=0.08), lengths


def test_a_sample_stands_for_a_fleet_under_random_routing():
    def found(gpus, count):
        requests = poisson(gpus * 20.0, count, lengths=Lengths.EXPONENTIAL, seed=gpus)
        return latencies(simulate(requests, H200, gpus, Router.RANDOM), warm_up=0.3)

    one, many = found(1, 6000), found(8, 12_000)
    for name in ("ttft_mean", "total_mean", "total_p50", "tpot_p95"):
        assert one[name] == pytest.approx(many[name], rel=0.1), name


def test_looking_at_loads_beats_drawing_at_random():
    requests = poisson(8 * 0.8 / 0.1, 8000, output=100, lengths=Lengths.EXPONENTIAL)
    waits = {router: latencies(simulate(requests, CONSTANT, 8, router))["ttft_mean"] for router in Router}
    assert waits[Router.LEAST_LOADED] < waits[Router.ROUND_ROBIN] < waits[Router.RANDOM]


def test_the_least_loaded_gpu_is_the_one_with_the_fewest_requests():
    served = simulate(poisson(40.0, 400, output=101), CONSTANT, 5)
    for index, row in enumerate(served.itertuples()):
        before = served.iloc[:index]
        there = before[before["finish"] > row.arrival]["gpu"].value_counts()
        assert there.get(row.gpu, 0) == min(there.get(g, 0) for g in range(5)), index


def test_the_surface_is_the_prediction():
    for batch, context in ((1, 1024), (64, 1024), (256, 4096)):
        step = OURS.efficiency.seconds(prediction.step_work(LLAMA, batch, context, KV4, GPUS["H200"]))
        assert H200.decode_seconds(1, batch, batch * context) == pytest.approx(step, rel=1e-6)
    four = OURS.efficiency.seconds(prediction.prefill_work(LLAMA, 4, 1024, KV4, GPUS["H200"]))
    assert H200.prefill_seconds([1024] * 4) == pytest.approx(four, rel=1e-3)
    assert 512 * H200.capacity(1024, 512) == pytest.approx(
        prediction.throughput(LLAMA, Serving(256), KV4, GPUS["H200"]), rel=0.02
    )
    small = surface(LLAMA, KV4, GPUS["H200"], memory=24e9)
    assert small.tokens < H200.tokens / 7 and small.step == H200.step


def test_many_steps_are_single_steps_added_and_inverted():
    one_by_one = sum(SMALL.decode_seconds(1, 3, 100 + 3 * i) for i in range(50))
    assert SMALL.decode_seconds(50, 3, 100) == pytest.approx(one_by_one, rel=1e-12)
    for seconds in (1e-6, 0.0123, 0.5):
        steps = SMALL.steps_within(seconds, 3, 100)
        assert SMALL.decode_seconds(steps - 1, 3, 100) < seconds <= SMALL.decode_seconds(steps, 3, 100)


def test_a_replay_compares_what_was_measured():
    requests = poisson(20.0, 300)
    measured = simulate(requests, H200).sample(frac=1, random_state=0)  # a record need not be in order
    assert fleet.replay(measured, H200)["error"].abs().max() < 1e-12
    slower = measured.assign(finish=lambda t: t["arrival"] + 2 * (t["finish"] - t["arrival"]))
    errors = fleet.replay(slower, H200).set_index("latency")["error"]
    assert errors["total_mean"] == pytest.approx(-0.5) and errors["ttft_p95"] == pytest.approx(0)


def test_a_record_of_a_run_is_replayed(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("replay", Path(__file__).parents[1] / "data" / "benchmarks" / "replay.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    run = simulate(poisson(20.0, 100), replace(H200, per_square=0, sequences=7))
    record = {
        "requests": run.to_dict("records"),
        "sequences": 7,
        "tokens": H200.tokens,
        "steps": [
            {"batch": b, "cached": c, "seconds": H200.decode_seconds(1, b, c)}
            for b, c in ((1, 9), (5, 999), (7, 99), (7, 9999))
        ],
        "prefills": [{"prompts": p, "seconds": H200.prefill + H200.per_prompt * p} for p in (100, 2000)],
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr("sys.argv", ["replay.py", str(tmp_path / "run.json")])
    script.main()
    errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[-4:]]
    assert errors == pytest.approx([0] * 4, abs=1e-3)
    del record["steps"]
    assert script.surface_of(record, "Llama-3-8B", "W4A8KV4") == replace(H200, sequences=7)


def test_a_real_server_takes_longer_than_its_predicted_surface_and_as_long_as_its_own():
    """What `surface` says of itself, and what lesson 12 says of its explorer."""
    path = Path(__file__).parents[1] / "data" / "benchmarks" / "serve_arrivals_h200.json"
    record = json.loads(path.read_text())["results"][0]
    steps, prefills, requests = (pd.DataFrame(record[name]) for name in ("steps", "prefills", "requests"))
    room = {name: record[name] for name in ("sequences", "tokens", "turn")}
    predicted = replace(H200, **room)
    own = replace(measured_surface(steps, prefills, room["sequences"], room["tokens"]), **room)
    assert fleet.replay(requests, own)["error"].abs().max() < 0.15
    assert fleet.replay(requests, predicted)["error"].max() < -0.15
    for low, high in ((1, 16), (16, 48), (48, 65)):
        part = steps[(steps["batch"] >= low) & (steps["batch"] < high)]
        told = [predicted.decode_seconds(1, b, c) for b, c in zip(part["batch"], part["cached"], strict=True)]
        assert len(part) > 20 and sum(told) < 0.85 * part["seconds"].sum()
    assert sum(predicted.prefill_seconds([p]) for p in prefills["prompts"]) < 0.95 * prefills["seconds"].sum()


def test_a_surface_is_found_from_measured_times():
    rng = np.random.default_rng(0)
    steps = pd.DataFrame({"batch": rng.integers(1, 300, 40), "cached": rng.integers(1, 10**6, 40)})
    steps["seconds"] = [H200.decode_seconds(1, b, c) for b, c in zip(steps["batch"], steps["cached"], strict=True)]
    prefills = pd.DataFrame({"prompts": [100, 2000, 9000], "seconds": [2e-3, 21e-3, 91e-3]})
    found = measured_surface(steps, prefills, 256, 10**6)
    assert (found.step, found.per_cached) == pytest.approx((H200.step, H200.per_cached), rel=1e-6)
    assert (found.prefill, found.per_prompt) == pytest.approx((1e-3, 1e-5), rel=1e-6)


def test_ten_thousand_gpus_cost_what_they_do_busy_or_not():
    surfaces = {"a": H200, "slow": replace(H200, step=20 * H200.step, per_sequence=20 * H200.per_sequence)}
    loads = [20_000, 40_000, 10**9]
    table = fleet.load_curve(surfaces, loads, 10_000, 3.6, Traffic(count=150))
    assert table[["precision", "load"]].to_numpy().tolist() == [[n, v] for n in ("a", "slow") for v in loads[:2]]
    half, full = table[table["precision"] == "a"]["dollars_per_million"]
    assert (half, half / full) == pytest.approx((10_000 * 3.6 / 3600 / (20_000 * 512) * 1e6, 2))
    assert (table[table["precision"] == "slow"]["total_p95"].to_numpy() > 2 * table["total_p95"].to_numpy()[:2]).all()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: replace(SMALL, step=-1), "step: expected a number of seconds"),
        (lambda: Surface(0, 0, 1, 0, 0, 1, 1), "step: a step of one sequence has to take time"),
        (lambda: replace(SMALL, tokens=0), "tokens: expected a positive integer"),
        (lambda: SMALL.capacity(400, 1), "prompt: 400"),
        (lambda: simulate(poisson(1, 3, prompt=400), SMALL), "requests: one of 912 tokens"),
        (lambda: simulate(poisson(1, 3, 1, 1).iloc[::-1], SMALL), "requests: arrivals have to be in order"),
        (lambda: simulate(poisson(1, 3, 1, 1).assign(output=0), SMALL), "requests: output is a whole number .*, got 0"),
        (lambda: simulate(poisson(1, 3, 1, 1).assign(prompt=1.5), SMALL), r"requests: prompt is a whole .* 1\.5"),
        (lambda: simulate(poisson(1, 3).drop(columns="output"), SMALL), "requests: expected columns .* missing output"),
        (lambda: simulate(poisson(1, 3).assign(arrival=[-1.0, 0, 1]), SMALL), "requests: arrival is in seconds .* -1.0"),
        (lambda: simulate(poisson(1, 3).assign(arrival=[0, math.nan, 1]), SMALL), "requests: arrival is in seconds .* nan"),
        (lambda: fleet.replay(poisson(1, 3), SMALL), "measured: expected columns .* missing first, finish"),
        (lambda: latencies(poisson(1, 3)), "served: expected columns .* missing first, finish"),
        (lambda: fleet.load_curve({"a": SMALL}, [1.0, math.nan], 1, 1.0), "loads: expected positive numbers .* nan"),
        (lambda: SMALL.capacity(0, 5), "prompt: expected a positive integer, got 0"),
        (lambda: SMALL.capacity(5, 0), "output: expected a positive integer, got 0"),
        (lambda: simulate(poisson(1, 3), SMALL, 0), "gpus: expected a positive integer"),
        (lambda: poisson(0, 3), "rate: expected a positive number"),
        (lambda: latencies(poisson(1, 3), 1.0), "warm_up: a share"),
        (lambda: surface(LLAMA, KV4, GPUS["H200"], memory=4e9), "memory: 4 GiB leave no room"),
        (lambda: measured_surface(pd.DataFrame(), pd.DataFrame(), 1, 1), "steps: at least 3 measurements"),
        (lambda: measured_surface(STEPS.assign(seconds=0), PREFILLS, 1, 1), r"steps: seconds are positive .* 0\.0"),
        (lambda: measured_surface(STEPS, PREFILLS.assign(seconds=[1, math.nan]), 1, 1), "prefills: seconds are .* nan"),
        (lambda: measured_surface(STEPS.assign(cached=-1), PREFILLS, 1, 1), r"steps: cached are numbers .* -1\.0"),
        (lambda: measured_surface(STEPS.drop(columns="batch"), PREFILLS, 1, 1), "steps: expected columns .* missing batch"),
    ],
)
def test_bad_input_is_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_loads_that_no_fleet_can_take_leave_an_empty_table_with_its_columns():
    full = fleet.load_curve({"a": H200}, [1.0], 1, 3.6, Traffic(count=20))
    none = fleet.load_curve({"a": H200}, [1e9], 1, 3.6, Traffic(count=20))
    assert none.empty and list(none) == list(full) and len(full) == 1 and not full.isna().any().any()


def test_no_requests_are_served_at_once():
    assert simulate(poisson(1, 1).iloc[:0], SMALL).empty
