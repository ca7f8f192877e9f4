"""The benchmark's arithmetic, records, tables and command line. Times need a GPU; nothing here does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qoqlab_kernels import bench, cases, measure
from qoqlab_kernels.plan import Plan

from qoqlab import affine, progressive, reference

ROOT = Path(__file__).parents[2]
SESSION = ROOT / "kernels" / "session.py"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


def run(*command, **environment):
    """A command in a process of its own, from a checkout that need not be installed."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# -- bounds ---------------------------------------------------------------------------------------------------------------


def test_bytes_of_a_product_by_hand():
    # 3 tokens, 128 x 256: 16384 bytes of codes, 3 * 256 of activations, 3 * 6 of scales and sums, 3 * 128 * 2 of results
    common = 16384 + 768 + 18 + 768
    assert measure.gemm_bytes(3, 128, 256, 128) == common + 128 * 2 * 2 + 128 * 2  # two groups of two bytes an output
    assert measure.gemm_bytes(3, 128, 256, 32) == common + 128 * 8 * 2 + 128 * 2
    assert measure.gemm_bytes(3, 128, 256, 0) == common + 128 * 4
    assert measure.gemm_ops(3, 128, 256) == 2 * 3 * 128 * 256


@pytest.mark.parametrize("name", ["g128", "g32", "channel"])
def test_the_packed_layout_adds_under_one_percent_to_the_least_bytes(name):
    from qoqlab_kernels import pack_weight

    n, k = 256, 1024
    packed = pack_weight(cases.weight(n, k, name))
    least = measure.gemm_bytes(0, n, k, cases.FORMATS[name][0])
    assert least <= packed.nbytes <= least + n * 16  # rows hold 16 bytes an output


def test_the_bound_is_the_longer_of_both_and_agrees_with_the_roofline():
    ceilings = measure.Ceilings(4.3e12, 1580e12, ("copy", "estimate"))
    assert ceilings.bound(4.3e6, 0) == pytest.approx(1.0)
    assert ceilings.bound(0, 1580e6) == pytest.approx(1.0)
    assert ceilings.bound(8.6e6, 1580e6) == pytest.approx(2.0)
    for m, total in ((1, 26.2), (64, 27.9), (256, 70.7), (4096, 1130.8)):  # the roofline's table at these ceilings, us
        size = [ceilings.bound(measure.gemm_bytes(m, *s, 128), measure.gemm_ops(m, *s)) for s in cases.LAYERS.values()]
        assert sum(size) == pytest.approx(total, rel=0.005)


@pytest.mark.parametrize(("size", "cache", "count"), [(60, 60, 3), (13, 60, 11), (1000, 60, 2), (1, 60, 121)])
def test_operands_rotate_beyond_the_cache(size, cache, count):
    assert measure.copies(size, cache) == count
    assert (measure.copies(size, cache) - 1) * size >= measure.ROTATION * cache or size > measure.ROTATION * cache


def test_graphs_run_for_about_two_milliseconds():
    assert measure.rounds_for(10, 20.0) == 10
    assert measure.rounds_for(3, 5000.0) == 1
    assert measure.rounds_for(2, 1.0) == 16


# -- records and tables ---------------------------------------------------------------------------------------------------


def point(name="g128", m=16, n=4096, k=4096, us=4.0, bound=2.0, peers=None):
    peers = {"cublas_fp16": 12.0, "fp8_tensorwise": 7.0} if peers is None else peers
    return bench.row(m, n, k, name, us, bound, peers, {"int8_input": 5.0}, Plan("v5", 16, 2, 10, 1, 132))


def test_a_row_has_the_contracts_fields():
    row = point()
    assert list(row)[:7] == ["op", "precision", "n", "k", "m", "us", "bound_us"]
    assert (row["op"], row["precision"], row["ratio"]) == ("gemm", "w4a8-g128", 2.0)
    assert row["tb_per_s"] == measure.gemm_bytes(16, 4096, 4096, 128) / 4.0 / 1e6
    assert row["tops"] == 2 * 16 * 4096 * 4096 / 4.0 / 1e6
    assert Plan(**row["plan"]) == Plan("v5", 16, 2, 10, 1, 132)


def test_a_record_is_json_with_the_contracts_header(tmp_path):
    path = tmp_path / "new" / "gemm.json"
    more = {"ceilings": measure.ceilings_record(measure.Ceilings(4e12, 1.7e15, ("a", "b"))), "seed": 3}
    measure.write_record(path, measure.record(["python", "-m", "x", "--m", "1, 2"], "abc", [point()], **more))
    read = json.loads(path.read_text(encoding="utf-8"))
    assert list(read) == ["gpu", "date", "commit", "command", "versions", "ceilings", "seed", "results"]
    assert (read["commit"], read["command"]) == ("abc", "python -m x --m '1, 2'")
    assert read["versions"]["torch"] == torch.__version__.split("+")[0] or read["versions"]["torch"] == torch.__version__
    assert read["ceilings"]["sources"] == {"bytes_per_s": "a", "ops_per_s": "b"}
    assert read["results"] == [point()]
    assert [p.name for p in path.parent.iterdir()] == ["gemm.json"]


def test_tables_align_and_round():
    text = measure.table(["m", "us"], [[16, 4.0], [4096, 1234.56], [1, None]])
    assert text == "   m    us\n  16  4.00\n4096  1235\n   1     -"


def test_sums_add_the_layers_and_know_the_targets():
    layers = [
        point(n=n, k=k, us=us, bound=1.0) for (n, k), us in zip(cases.LAYERS.values(), (5.0, 4.0, 20.0, 8.0), strict=True)
    ]
    (total,) = bench.sums(layers)
    assert (total["us"], total["bound_us"], total["best_peer_us"], total["fp16_us"]) == (37.0, 4.0, 28.0, 48.0)
    assert total["target_us"] == 36.0
    assert bench.sum_table(layers).endswith("missed")
    layers[2]["us"] = 19.0
    assert bench.sum_table(layers).endswith("met")


def test_sums_promise_nothing_where_points_are_missing():
    (part,) = bench.sums([point()])
    assert part["target_us"] is None  # one layer of four
    whole = [point(n=n, k=k, peers={}) for n, k in cases.LAYERS.values()]
    assert (bench.sums(whole)[0]["best_peer_us"], bench.sums(whole)[0]["fp16_us"]) == (None, None)
    other = [point("channel", n=n, k=k) for n, k in cases.LAYERS.values()]
    assert bench.sums(other)[0]["target_us"] is None
    assert [s["precision"] for s in bench.sums(whole + other)] == ["w4a8-g128", "w4a8-channel"]


def test_the_tables_show_what_was_not_measured_as_such():
    header, line = bench.point_table([point(peers={})]).splitlines()
    columns = dict(zip(header.split(), line.split(), strict=False))
    assert (columns["NxK"], columns["us"], columns["ratio"]) == ("4096x4096", "4.00", "2.00")
    assert line.split()[-len(bench.PEERS) :] == ["-"] * len(bench.PEERS)


# -- what results are compared with ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(cases.FORMATS))
def test_the_fast_reference_is_the_reference(name):
    w, a = cases.weight(96, 384, name), cases.activations(9, 384)
    assert torch.equal(bench.exact(a, w), reference.w4a8_matmul(a, w))


def test_the_fast_reference_is_exact_at_the_widest_k():
    k = cases.WIDEST_K
    w = cases.extreme_weight(32, k, "channel")
    codes, scales = cases.extreme_codes(3, k)
    total = (codes.double() @ w.codes.double().T).long()
    assert torch.equal(total, codes.long() @ w.codes.long().T)
    assert scales.shape == (3,)


class OnCPU:
    """A stand-in for `measure.graph_time`: makes the calls, takes no time."""

    def __init__(self, after=None):
        self.after = after

    def __call__(self, calls, about_us=0.0, replays=1):
        for call in calls:
            call()
        if self.after:
            self.after()
        return 7.0


def test_a_time_counts_only_for_exact_results(monkeypatch):
    want, out = torch.tensor([1.0, torch.inf]).half(), torch.empty(2).half()
    monkeypatch.setattr(measure, "graph_time", OnCPU())
    assert bench.checked_time([lambda: out.copy_(want)], [out], want, 1.0) == 7.0
    with pytest.raises(measure.WrongResult, match="1 of 2 results are wrong before timing"):
        bench.checked_time([lambda: out[:1].copy_(want[:1])], [out], want, 1.0)  # the other stays poisoned
    monkeypatch.setattr(measure, "graph_time", OnCPU(after=lambda: out[:1].add_(1)))
    with pytest.raises(measure.WrongResult, match="1 of 2 results are wrong while timing"):
        bench.checked_time([lambda: out.copy_(want)], [out], want, 1.0)


def test_a_peer_that_is_wrong_or_missing_is_named_and_not_timed(monkeypatch):
    x, w = torch.ones(2, 4), torch.ones(3, 4)

    def right(m, n, k, count):
        return bench.Trial([lambda: x @ w.T] * count, x, w)

    def wrong(m, n, k, count):
        return bench.Trial([lambda: x @ w.T * 1.1], x, w)

    def silent(m, n, k, count):
        return bench.Trial([lambda: x @ w.T * torch.nan], x, w)

    def missing(m, n, k, count):
        raise RuntimeError("no such kernel\nmore")

    peers = {f.__name__: bench.Peer(f, 8, 1e-3) for f in (right, wrong, silent, missing)}
    peers["later"] = bench.Peer(right, 8, 1e-3, (17, 64))
    monkeypatch.setattr(bench, "PEERS", peers)
    monkeypatch.setattr(measure, "graph_time", OnCPU())
    times, refused = bench.time_peers(2, 3, 4, 1.0, 100)
    assert times == {"right": 7.0}
    assert refused["wrong"].startswith("relative error 1.0e-01")
    assert refused["silent"].startswith("relative error nan")
    assert refused["missing"] == "RuntimeError: no such kernel"
    assert set(bench.time_peers(64, 3, 4, 1.0, 100)[0]) == {"right", "later"}


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Random operands of peers on the CPU."""
    monkeypatch.setattr(bench, "_normal", lambda *shape: torch.randn(*shape))
    monkeypatch.setattr(bench, "_integers", lambda low, high, *s: torch.randint(low, high, s, dtype=torch.int8))


@pytest.mark.parametrize("name", ["cublas_fp16", "int_mm"])
def test_peers_compute_what_they_say(on_the_cpu, name):
    torch.manual_seed(0)
    peer = bench.PEERS[name]
    assert peer.prepare(24, 64, 256, 2).error() <= peer.tolerance


def test_w4a16s_operands_decode_to_its_reference(on_the_cpu, monkeypatch):
    """The packing for torch's CUDA kernel, high nibble first, against the same product written out."""
    torch.manual_seed(0)
    seen = {}

    def convert(packed, tiles):
        seen["codes"] = torch.stack([packed >> 4, packed & 15], -1).flatten(1)
        return packed

    def multiply(x, packed, group, both):
        scale, zero = (both[..., i].T.repeat_interleave(group, 1).double() for i in (0, 1))
        return x.double() @ ((seen["codes"].double() - 8) * scale + zero).T

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", convert)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)
    assert bench.w4a16(3, 32, 256, 2).error() < 1e-12


def test_the_kernels_of_every_format_can_be_benched():
    for name in bench.GROUPS.values():
        w = cases.weight(64, 128, name)
        assert isinstance(w, progressive.ProgressiveWeight | affine.Affine)


# -- the rate kernel ------------------------------------------------------------------------------------------------------

RATE = """
import warnings; warnings.simplefilter("ignore")
import torch
from qoqlab_kernels import launch, measure
torch.manual_seed(0)
source = torch.randint(256, (128 * 128,), dtype=torch.uint8)
out = torch.zeros(256 * 4, dtype=torch.int32)
launch.simulate(measure.int8_rate(8), (1, 1, 1), [source, out.view(torch.uint32), 3])
a = source.reshape(4, 256, 4, 4).long()                                # step, thread, register, byte
a = a.reshape(4, 2, 4, 8, 4, 2, 2, 4)                                  # step, group, warp, g, q, half, high, byte
a = a.permute(1, 2, 6, 3, 0, 5, 4, 7).reshape(2, 4, 16, 128)           # group, warp, output, input
x = source[:1024].view(torch.int8).reshape(8, 8, 16).long()
x = torch.stack([x[t, torch.arange(8) ^ t].flatten() for t in range(8)])
want = 3 * (a @ x.T)                                                   # group, warp, output, token
want = want.reshape(2, 4, 2, 8, 4, 2).permute(0, 1, 3, 4, 2, 5)        # group, warp, g, q, high, odd
print(torch.equal(out.reshape(2, 4, 8, 4, 2, 2).long(), want))
"""


def test_the_rate_kernel_really_multiplies():
    found = run("-c", RATE, NUMBA_ENABLE_CUDASIM="1")
    assert found.stdout.split() == ["True"], found.stderr


# -- command line ---------------------------------------------------------------------------------------------------------


def test_the_command_line_says_what_to_measure():
    options, known = bench.parse(["gemm", "--m", "16,1,16", "--groups", "channel,64", "--no-peers", "--json", "x.json"])
    assert options == bench.Options(cases.LAYERS, (16, 1), ("channel", "g64"), False)
    assert (known.json, known.commit) == (Path("x.json"), "")
    assert bench.parse(["gemm"])[0] == bench.Options(cases.LAYERS, cases.BATCHES, ("g128", "channel"), True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gemm", "--groups", "16"], "--groups: '16' is not one of 128, 64, 32, channel"),
        (["gemm", "--m", "1,,2"], "--m: expected positive numbers separated by commas, got '1,,2'"),
        (["gemm", "--m", "0"], "--m: expected positive numbers"),
        (["gemm", "--shapes", "gpt"], "--shapes"),
        ([], "required"),
    ],
)
def test_wrong_options_exit_with_2_and_say_why(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@needs_no_gpu
@pytest.mark.parametrize("module", ["bench", "tune"])
def test_without_a_gpu_one_line_and_exit_code_2(module):
    found = run("-m", f"qoqlab_kernels.{module}", *(["gemm"] if module == "bench" else []))
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.splitlines() == [
        f"qoqlab_kernels.{module}: no CUDA GPU here: these measurements need one of compute capability 8.0 or newer"
    ]


def test_the_simulator_is_not_timed():
    found = run("-m", "qoqlab_kernels.bench", "gemm", NUMBA_ENABLE_CUDASIM="1")
    assert found.returncode == 2
    assert "the simulator's times mean nothing" in found.stderr


# -- the session ----------------------------------------------------------------------------------------------------------


@needs_no_gpu
def test_a_session_reports_every_step(tmp_path):
    found = run(str(SESSION), "--out", str(tmp_path), "--only", "bench,memcheck", PATH="/nonexistent")
    assert found.returncode == 1
    last = [line.split(maxsplit=3) for line in found.stdout.splitlines()[-2:]]
    assert [(line[0], line[-1]) for line in last] == [
        ("bench", "failed (2)"),
        ("memcheck", "compute-sanitizer is not there"),
    ]
    assert "no CUDA GPU here" in (tmp_path / "bench.txt").read_text(encoding="utf-8")


def test_a_session_runs_every_step_once_and_within_its_time(tmp_path):
    found = run(str(SESSION), "--out", str(tmp_path), "--seconds", "1")
    assert found.returncode == 1
    steps = [line.split(maxsplit=3) for line in found.stdout.splitlines() if line]
    assert [(step[0], step[-1]) for step in steps] == [
        (name, "no time left")
        for name in ("smoke", "memcheck", "racecheck", "tune", "bench", "kv4_decode", "elementwise", "decode", "ncu")
    ]


def test_a_session_refuses_steps_it_does_not_have(tmp_path):
    found = run(str(SESSION), "--out", str(tmp_path), "--only", "smoke,dance")
    assert found.returncode == 2
    assert "steps are smoke, memcheck, racecheck, tune, bench, kv4_decode" in found.stderr


SMOKE = """
import sys; sys.path.insert(0, sys.argv[1])
import session
from qoqlab_kernels import cases
from qoqlab_kernels.gemm import REGISTERS
from qoqlab_kernels.plan import TOKENS
pairs = session.smoke_cases()
assert {(p.version, c.format) for c, p in pairs} >= {(v, f) for v in ("v1", "v2", "v3", "v4", "v5") for f in cases.FORMATS}
assert {(p.tokens, p.cluster) for c, p in pairs if p.version == "v5"} >= {(t, c) for t in TOKENS["v5"] for c in (1, 2, 4)}
assert {(p.tokens, p.split) for c, p in pairs} >= {(t, s) for t in (8, 16, 32, 64) for s in (1, 2, 4, 8)}
assert {(p.tokens, p.warpgroups) for c, p in pairs if p.version == "v5"} >= {(64, 4), *REGISTERS}
assert all(c.fits for c, p in pairs + session.smoke_cases(small=True))
shared = [p.workers > 1 and p.tiles(c.m, c.n)[0] * p.tiles(c.m, c.n)[1] * (c.k // 128) % p.workers for c, p in pairs]
assert any(shared)
print("fine")
"""


def test_a_session_smokes_every_version_format_tile_and_cluster():
    found = run("-c", SMOKE, str(ROOT / "kernels"))
    assert found.stdout.split() == ["fine"], found.stderr
