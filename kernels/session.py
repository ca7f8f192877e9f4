"""Everything that the kernels need a GPU for, in one command.

    python kernels/session.py --out RESULTS [--seconds 480] [--only smoke,bench] [--commit HASH]

smoke       every version, format and tile of the GEMM against the exact reference; the other kernels on small cases
memcheck    compute-sanitizer on small cases: accesses out of bounds, misaligned
racecheck   compute-sanitizer on small cases: hazards in shared memory. It does not see that an mbarrier orders a bulk copy
            before the reads that wait for it, so hazards whose write is a bulk copy (UBLKCP) are counted and passed over
tune        the fastest plans for the four layers -> RESULTS/tuned.json
bench       the benchmark, with these plans -> RESULTS/gemm.json
kv4_decode, elementwise, decode
            the other benchmarks -> RESULTS/<step>.json
ncu         Nsight Compute on five launches -> RESULTS/ncu.txt

Each step is a process of its own with a time limit, its output in RESULTS/<step>.txt; a step that fails or runs out of time
does not keep the others from running. A table comes last. Works from a checkout that is not installed, and where numba-cuda
meets a NumPy without ``row_stack``: this runner, and nothing else, puts the name back.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy  # noqa: E402

if not hasattr(numpy, "row_stack"):  # numba-cuda 0.30 asks for it at import; NumPy 2.5 has removed it
    vars(numpy)["row_stack"] = numpy.vstack

#: What a case's line in a log starts with; the kernel's file follows.
CASE = "case "
BENCHMARKS = ("bench", "kv4_decode", "elementwise", "decode")
#: Step -> seconds it may take.
STEPS = {
    "smoke": 150,
    "memcheck": 90,
    "racecheck": 150,
    "tune": 170,
    "bench": 150,
    "kv4_decode": 120,
    "elementwise": 60,
    "decode": 150,
    "ncu": 60,
}
#: Bytes that L2 serves, bytes that multiprocessors get from it.
METRICS = "lts__t_bytes.sum,l1tex__m_xbar2l1tex_read_bytes.sum"
SECTIONS = (
    "ComputeWorkloadAnalysis",
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)


def command(step: str, out: Path, commit: str) -> list[str]:
    """What a step runs."""
    inner = "small" if step in ("memcheck", "racecheck") else "profile" if step == "ncu" else step
    own = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), "--step", inner]
    if commit:
        own += ["--commit", commit]
    if step in ("memcheck", "racecheck"):
        # numba-cuda asks the driver for functions that it may not have: no fault of ours
        quiet = ["--report-api-errors", "no", "--error-exitcode", "9"] if step == "memcheck" else []
        return ["compute-sanitizer", "--tool", step, *quiet, "--print-limit", "1000", *own]
    if step == "ncu":
        chosen = [word for section in SECTIONS for word in ("--section", section)]
        names = ["--kernel-name-base", "mangled", "--kernel-name", "regex:qoqlab_kernels4gemm"]
        return ["ncu", "--clock-control", "none", *names, "--launch-count", "5", *chosen, "--metrics", METRICS, *own]
    return own


def smoke_cases(small: bool = False) -> list[tuple]:
    """(case, plan) for every version and format, and for every tile and cluster of v5; ``small``: few, for a sanitizer."""
    from qoqlab_kernels import gemm
    from qoqlab_kernels.cases import FORMATS, Case
    from qoqlab_kernels.plan import TOKENS, Plan

    shape = (160, 512) if small else (416, 1152)
    found = []
    for name in ("g128", "channel") if small else FORMATS:
        found += [(Case(5, *shape, name), Plan(version)) for version in ("v1", "v2", "v3")]
        found.append((Case(21, *shape, name), Plan("v4", 16, 1, 3, 1, 5)))
        found.append((Case(21, *shape, name), Plan("v5", 16, 2, 4, 1, 3)))
    for tokens in (8, 64) if small else TOKENS["v4"]:
        found.append((Case(2 * tokens + 3, *shape, "g128"), Plan("v4", tokens, 1, 2, 1, 7)))
    for tokens in (8, 64, 128) if small else TOKENS["v5"]:
        deepest = gemm.stages_that_fit(tokens, 2, gemm.Form(1).unit)
        for cluster, stages, workers in ((1, deepest, 4), (2, deepest, 3), (4, min(deepest, 5), 2)):
            case = Case(2 * tokens + 3, *(shape if small else (1056, 1152)), "g128")
            found.append((case, Plan("v5", tokens, 2, stages, cluster, workers)))
        for split, warpgroups in ((1, 3), (1, 4), (2, 2), (2, 3), (2, 4), (4, 1), (4, 2), (8, 2)):
            deepest = gemm.stages_that_fit(tokens, warpgroups, gemm.Form(1).unit, split=split)
            if deepest >= 2 and (tokens < 128 or (tokens, warpgroups) in gemm.REGISTERS):
                case = Case(2 * tokens + 3, *(shape if small else (1056, 1152)), "g128")
                if case.k // 128 >= split:
                    workers = 5 if split == 1 else 1
                    found.append((case, Plan("v5", tokens, warpgroups, min(deepest, 3), workers=workers, split=split)))
    return found


def check_cases(pairs: Sequence[tuple]) -> None:
    """Run cases by plans into poisoned memory, three times each; raises SystemExit with what was wrong."""
    import torch
    from qoqlab_kernels import bench, cases, gemm, launch, matmul, measure
    from qoqlab_kernels.layout import pack_weight

    capability = measure.require_gpu()
    pairs = [(case, plan) for case, plan in pairs if plan.version != "v5" or capability == (9, 0)]

    def form_of(case: cases.Case) -> gemm.Form:
        size = cases.FORMATS[case.format][0]
        return gemm.Form(128 // size if size else 0, case.format == "channel-scaled")

    broken = measure.compile_ahead([(plan, form_of(case)) for case, plan in pairs], capability)
    failures = [f"{key}: {message}" for key, message in broken.items()]
    for case, plan in pairs:
        form = form_of(case)
        if (plan.version, plan.constants(form)) in broken:
            continue
        w = cases.weight(case.n, case.k, case.format, device="cuda")
        a = cases.activations(case.m, case.k, device="cuda")
        want, packed, x = bench.exact(a, w), pack_weight(w), matmul.quantize_activations(a.codes, a.scales)
        torch.cuda.synchronize()
        path = launch.binary_path(gemm.VERSIONS[plan.version], plan.constants(form), capability)
        print(f"{CASE}{path} {case} {plan}", flush=True)
        for _ in range(3):
            out = torch.full_like(want, torch.nan)
            matmul.run(plan, form, x, packed, None, out)
            torch.cuda.synchronize()
            wrong = int((out != want).sum())
            if wrong:
                failures.append(f"{case} {plan}: {wrong} of {want.numel()} wrong")
    print(f"{len(pairs)} cases, {len(failures)} failures")
    if failures:
        raise SystemExit("\n".join(failures[:40]))


def check_rest() -> None:
    """Attention and the kernels between the GEMMs on small cases; raises SystemExit with what was wrong."""
    import qoqlab_kernels as qk
    import torch
    from qoqlab_kernels import attention, launch, measure
    from qoqlab_kernels.bench_elementwise import same

    from qoqlab import reference

    capability, failures = measure.require_gpu(), []
    for dim, group, dtype in ((64, 1, torch.float16), (128, 4, torch.float16), (128, 12, torch.bfloat16)):
        cache = qk.PagedKV4(1, 2, dim, 8, device="cuda")
        sequences = [cache.open() for _ in range(3)]
        for sequence, tokens in zip(sequences, (1, 70, 130), strict=True):
            cache.append(0, [sequence], *torch.randn(2, 1, 2, tokens, dim, device="cuda"))
        query = torch.randn(3, 2 * group, dim, device="cuda", dtype=dtype)
        rows = [[t[None] for t in cache.gather(0, s)] for s in sequences]
        want = torch.cat([reference.kv4_attention(query[i : i + 1].float(), *kv) for i, kv in enumerate(rows)])
        for version in attention.VERSIONS:
            os.environ[attention.OVERRIDE] = version
            form = attention.Form(dim, group, cache.page_size, dtype == torch.bfloat16, lse=True)
            plan = attention.attention_plan(form, query.device)
            path = launch.binary_path(attention.VERSIONS[version], plan.constants(form), capability)
            print(f"{CASE}{path} {form} {plan}", flush=True)
            got, _ = qk.kv4_attention(query, cache, 0, sequences, lse=True)
            error = float((got.float() - want).norm() / want.norm())
            if not error <= (1e-3 if dtype == torch.float16 else 5e-3):
                failures.append(f"{form} {plan}: relative error {error}")
        del os.environ[attention.OVERRIDE]
    print(f"{CASE}- between the GEMMs", flush=True)
    for m, k in ((3, 160), (17, 4096)):
        x, other = torch.randn(2, m, k, device="cuda", dtype=torch.float16)
        weight = torch.randn(k, device="cuda", dtype=torch.float16)
        checks = {
            "rms_norm_s8": same(qk.rms_norm_s8(x, weight, 1e-5), reference.rms_norm_s8(x, weight, 1e-5)),
            "add_rms_norm_s8": same(
                qk.add_rms_norm_s8(x, other, weight, 1e-5), reference.add_rms_norm_s8(x, other, weight, 1e-5)
            ),
            "silu_mul_s8": same(qk.silu_mul_s8(torch.cat([x, other], 1)), reference.silu_mul_s8(torch.cat([x, other], 1))),
        }
        failures += [f"{name} {m}x{k}: not the reference's bits" for name, right in checks.items() if not right]
    failures += check_new_tokens()
    torch.cuda.synchronize()
    print(f"the other kernels, {len(failures)} failures")
    if failures:
        raise SystemExit("\n".join(failures))


def check_new_tokens() -> list[str]:
    """What is wrong with a decode step's way from q, k, v to the output GEMM on small cases: RoPE and append, then the token
    itself beside its past."""
    import qoqlab_kernels as qk
    import torch
    from qoqlab_kernels.bench_elementwise import same

    from qoqlab import exact, reference

    failures = []
    for dim, heads, kv_heads, dtype in ((128, 8, 2, torch.float16), (64, 9, 3, torch.bfloat16)):
        cache = qk.PagedKV4(1, kv_heads, dim, 8, device="cuda")
        sequences = [cache.open() for _ in range(5)]
        cache.grow(dict.fromkeys(sequences, 1))
        slots = torch.tensor(sequences, dtype=torch.int32, device="cuda")
        qkv = torch.randn(5, heads + 2 * kv_heads, dim, device="cuda", dtype=dtype)
        angles = torch.randn(1, dim // 2, device="cuda")
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        query, key = qk.rope_kv4_append(cache, 0, slots, qkv.flatten(1), cos, sin)
        turned = exact.rotate(qkv[:, : heads + kv_heads], cos[:, None], sin[:, None])
        if not torch.equal(torch.cat([query, key], 1), turned):
            failures.append(f"rope_kv4_append, head_dim {dim}: not the reference's bits")
        seen, lse = torch.randn_like(query), torch.randn(query.shape[:2], device="cuda")
        own = (seen, lse, query, key, qkv[:, heads + kv_heads :])
        if not same(qk.attend_own_s8(*own), reference.attend_own_s8(*own)):
            failures.append(f"attend_own_s8, head_dim {dim}: not the reference's bits")
        # a prompt at positions of its own, then a token behind it while attention fetches the prompt's pages
        for sequence in sequences:
            cache.free(sequence)
        sequence, tokens = cache.open(), 70
        cache.grow({sequence: tokens + 1})
        cache.lengths[0, sequence] = tokens
        angles = torch.randn(tokens + 1, dim // 2, device="cuda")
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        rows = torch.randn(tokens + 1, (heads + 2 * kv_heads) * dim, device="cuda", dtype=dtype)
        places = torch.arange(tokens + 1, dtype=torch.int32, device="cuda")
        numbers = torch.full_like(places, sequence)
        qk.rope_kv4_append(cache, 0, numbers[:-1], rows[:-1], cos, sin, places[:-1])
        query, _ = qk.rope_kv4_append(cache, 0, numbers[-1:], rows[-1:], cos, sin, places[-1:])
        early = qk.kv4_attention(query, cache, 0, numbers[-1:], lse=True, settled=True)
        late = qk.kv4_attention(query, cache, 0, numbers[-1:], lse=True)
        if not all(map(torch.equal, early, late)) or not early[0].isfinite().all():
            failures.append(f"kv4_attention, head_dim {dim}: settled pages give another result")
    return failures


def profile() -> None:
    """Launches for few tokens, some and many, and one tile with and without sharing activations, for Nsight Compute."""
    import torch
    from qoqlab_kernels import bench, gemm, matmul, measure
    from qoqlab_kernels.plan import Plan

    measure.require_gpu()
    form = gemm.Form(1)
    alone = Plan("v5", 128, 2, gemm.stages_that_fit(128, 2, form.unit), 1, 112)
    for m, plan in ((16, None), (128, None), (128, alone), (128, replace(alone, cluster=2, workers=56)), (512, None)):
        data = bench.operands(28672, 4096, "g128", m, 1, 0)
        w = data.weights[0]
        matmul.run(plan or matmul.plan(m, w), form, data.tiled(m)[0], w, None, data.outputs(m)[0])
        torch.cuda.synchronize()


def listing(path: str) -> dict[int, str]:
    """Address -> instruction of a compiled kernel; nothing for the path "-"."""
    if path == "-":
        return {}
    words = ["nvdisasm", "--print-code", path]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return {int(at, 16): instruction for at, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)}


def races(log: str) -> list[str]:
    """The hazards in a log of racecheck whose write is not a bulk copy."""
    found: list[str] = []
    case, code = "", {}
    for line in log.splitlines():
        if line.startswith(CASE):
            case = line.removeprefix(CASE)
            code = listing(case.split()[0])
        for at in re.findall(r"Write access at .*\+0x([0-9a-f]+)", line):
            text = code.get(int(at, 16), "no instruction")
            if "UBLKCP" not in text:
                found.append(f"{text} at {at} of {case}")
    return found


def run_step(step: str, out: Path, commit: str) -> int:
    """What a step's own process does."""
    os.environ.setdefault("QOQLAB_CACHE", str(Path(tempfile.gettempdir()) / "qoqlab-session"))
    from qoqlab_kernels import bench, measure, tune

    if step in ("smoke", "small"):
        pairs = smoke_cases(small=True) + ([] if step == "small" else smoke_cases())
        return measure.guarded("session.py", lambda: (check_cases(pairs), check_rest())[0])
    if step == "profile":
        return measure.guarded("session.py", profile)
    if step == "tune":
        return tune.main(["--budget", str(STEPS["tune"] - 30), "--ship", str(out / "tuned.json")])
    what = "gemm" if step == "bench" else step
    return bench.main([what, "--json", str(out / f"{what}.json"), *(["--commit", commit] if commit else [])])


def run_limited(words: Sequence[str], to: IO[str], limit: float) -> str:
    """Run a command for at most ``limit`` seconds, then end it with all processes that it started; how it went."""
    process = subprocess.Popen(words, stdout=to, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "out of time"
    return "ok" if code == 0 else f"failed ({code})"


def run_all(steps: Sequence[str], out: Path, seconds: float, commit: str) -> int:
    """Every step in turn; prints the end of each output, then a table. 0 if all went well."""
    out.mkdir(parents=True, exist_ok=True)
    begun, rows = time.monotonic(), []
    for step in steps:
        start = time.monotonic()
        limit = min(STEPS[step], seconds - (start - begun))
        words = command(step, out, commit)
        log = out / f"{step}.txt"
        if limit < 5:
            result = "no time left"
        elif shutil.which(words[0]) is None:
            result = f"{words[0]} is not there"
        else:
            with log.open("w", encoding="utf-8") as to:
                result = run_limited(words, to, limit)
            text = log.read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if not line.startswith(CASE)]
            if step == "racecheck" and result == "ok":
                others = races(text)
                lines = [
                    *lines[-2:],
                    f"{text.count('Race reported')} hazards, {len(others)} not of a bulk copy",
                    *others[:9],
                ]
                result = "failed" if others else "ok"
            print(f"-- {step}\n" + "\n".join(lines[-60:] if step in BENCHMARKS else lines[-15:]), flush=True)
        rows.append((step, f"{time.monotonic() - start:.0f} s", result))
    print("\n" + "\n".join(f"{step:10} {took:>6}  {result}" for step, took, result in rows), flush=True)
    return 0 if all(result == "ok" for _, _, result in rows) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--seconds", type=float, default=900.0, help="for everything together")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, separated by commas")
    parser.add_argument("--commit", default="", help="recorded where the code runs outside a git checkout")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    known = parser.parse_args(arguments)
    if known.step:
        return run_step(known.step, known.out, known.commit)
    steps = known.only.split(",")
    if not set(steps) <= set(STEPS):
        parser.error(f"--only: {known.only!r}; steps are {', '.join(STEPS)}")
    return run_all(steps, known.out, known.seconds, known.commit)


if __name__ == "__main__":
    sys.exit(main())
