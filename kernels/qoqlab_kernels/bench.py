"""Benchmark of the kernels beside their bounds and their peers, on this machine's GPU.

    python -m qoqlab_kernels.bench gemm --json data/benchmarks/gemm.json
    python -m qoqlab_kernels.bench elementwise        (module `bench_elementwise`)

times the W4A8 GEMM on the four linear layers of a Llama-3-8B block. Every result is compared with an exact reference,
element by element, before it is timed and while; every peer with fp64, to its own precision. kernels/README.md says how to
read the output.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qoqlab import reference
from qoqlab.affine import Affine, quantize_per_token_s8
from qoqlab.progressive import ProgressiveWeight

from . import bench_decode, bench_elementwise, bench_kv4, cases, gemm, matmul, measure
from .layout import Activations, PackedWeight, pack_weight, tile_activations
from .plan import Plan

MODULE = "qoqlab_kernels.bench"
#: Sets of layers that can be measured: name -> layer -> (N, K).
SHAPES: dict[str, dict[str, tuple[int, int]]] = {"llama-3-8b": cases.LAYERS}
#: What ``--groups`` takes -> name in `cases.FORMATS`.
GROUPS = {"128": "g128", "64": "g64", "32": "g32", "channel": "channel"}
#: Aims for the sum over the four layers on an H200, in microseconds, by number of tokens.
TARGETS = {1: 36, 2: 36, 4: 36, 8: 36, 16: 36, 64: 36, 128: 46, 256: 86, 1024: 300, 4096: 1160}
#: Other ways to the same result: int8 codes in the usual order instead of tiled ones; without programmatic dependent launch.
VARIANTS = ("int8_input", "no_overlap")
#: Outputs of a peer that are compared with its reference.
CHECKED = 256


# -- peers ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A peer ready to run: a call for each set of operands, and the operands of the first as the peer sees them."""

    calls: Sequence[Callable[[], torch.Tensor]]
    x: torch.Tensor
    w: torch.Tensor

    def error(self) -> float:
        """Relative error of the first call against fp64, on `CHECKED` outputs."""
        want = self.x.double() @ self.w[:CHECKED].double().T
        got = self.calls[0]()[:, :CHECKED].double()
        return ((got - want).norm() / want.norm()).item()


@dataclass(frozen=True)
class Peer:
    """Another library's product. ``bits`` of a weight (how many sets to rotate); ``tolerance``: largest relative error;
    ``batches``: from how many tokens to how many it is run."""

    prepare: Callable[[int, int, int, int], Trial]
    bits: int
    tolerance: float
    batches: tuple[int, int] = (1, 1 << 30)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def _integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, device="cuda", dtype=torch.int8)


def cublas_fp16(m: int, n: int, k: int, count: int) -> Trial:
    """fp16 operands through cuBLAS."""
    x, w = [_normal(m, k).half() for _ in range(count)], [_normal(n, k).half() / 64 for _ in range(count)]
    return Trial([partial(torch.mm, a, b.T) for a, b in zip(x, w, strict=True)], x[0], w[0])


def fp8_tensorwise(m: int, n: int, k: int, count: int) -> Trial:
    """fp8 operands with one scale each, through cuBLASLt with fast accumulation."""
    x = [_normal(m, k).to(torch.float8_e4m3fn) for _ in range(count)]
    w = [_normal(n, k).to(torch.float8_e4m3fn) for _ in range(count)]
    one = torch.ones((), device="cuda")
    options: dict[str, Any] = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return Trial([partial(torch._scaled_mm, a, b.T, **options) for a, b in zip(x, w, strict=True)], x[0], w[0])


def int8_matmul(m: int, n: int, k: int, count: int) -> Trial:
    """INT8 operands through cuBLASLt, int32 out, no scales."""
    x, w = [_integers(-128, 128, m, k) for _ in range(count)], [_integers(-128, 128, n, k) for _ in range(count)]
    return Trial([partial(torch._int_mm, a, b.T) for a, b in zip(x, w, strict=True)], x[0], w[0])


def w4a16(m: int, n: int, k: int, count: int) -> Trial:
    """torch's own W4A16: 4-bit codes with a bf16 scale and zero per group of 128, bf16 activations."""
    x = [_normal(m, k).bfloat16() for _ in range(count)]
    codes = _integers(0, 16, n, k).to(torch.uint8)
    scales, zeros = (_normal(k // 128, n).abs().bfloat16() / 64, _normal(k // 128, n).bfloat16() / 64)
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    both = torch.stack([scales, zeros], -1)
    head = codes[:CHECKED].reshape(-1, k // 128, 128).double() - 8
    w = head * scales.T[:CHECKED, :, None].double() + zeros.T[:CHECKED, :, None].double()
    calls = [partial(torch._weight_int4pack_mm, a, packed.clone(), 128, both) for a in x]
    return Trial(calls, x[0], w.reshape(-1, k))


PEERS: dict[str, Peer] = {
    "cublas_fp16": Peer(cublas_fp16, 16, 5e-3),
    "fp8_tensorwise": Peer(fp8_tensorwise, 8, 5e-2),
    "int_mm": Peer(int8_matmul, 8, 0.0, (17, 1 << 30)),
    "w4a16": Peer(w4a16, 4, 2e-2, (1, 256)),  # beyond, it takes milliseconds
}


def time_peers(m: int, n: int, k: int, about_us: float, cache_bytes: int) -> tuple[dict[str, float], dict[str, str]]:
    """(microseconds of every peer that is there and right, why the others are not), for one product."""
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, peer in PEERS.items():
        if not peer.batches[0] <= m <= peer.batches[1]:
            continue
        try:
            trial = peer.prepare(m, n, k, measure.copies(n * k * peer.bits // 8, cache_bytes))
            error = trial.error()
            if not error <= peer.tolerance:  # NaN is refused too
                refused[name] = f"relative error {error:.1e}, at most {peer.tolerance:.0e} expected"
                continue
            times[name] = measure.graph_time(trial.calls, about_us)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return times, refused


# -- the kernel -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """A layer's operands on the GPU, as many sets as rotate, and the exact results for the largest batch."""

    codes: torch.Tensor
    scales: torch.Tensor
    weights: list[PackedWeight]
    want: torch.Tensor

    def tiled(self, m: int) -> list[Activations]:
        """The first ``m`` tokens in the GEMM's order, one copy a set."""
        return [tile_activations(self.codes[:m], self.scales[:m]) for _ in self.weights]

    def outputs(self, m: int) -> list[torch.Tensor]:
        """Outputs full of poison."""
        return [torch.full((m, self.want.shape[1]), torch.nan, dtype=self.want.dtype, device="cuda") for _ in self.weights]


def exact(a: Affine, w: ProgressiveWeight | Affine) -> torch.Tensor:
    """What a W4A8 product must equal bit for bit. fp64 holds every sum of these integers exactly, and is fast on a GPU."""
    integers = w.int8() if isinstance(w, ProgressiveWeight) else w.codes
    total = (a.codes.double() @ integers.double().T).long()
    return reference.w4a8_epilogue(total, a.scales, a.codes.sum(-1, dtype=torch.int64), w)


def operands(n: int, k: int, name: str, most_tokens: int, cache_bytes: int, seed: int) -> Operands:
    """Random operands of a layer ``[n, k]`` in one of `cases.FORMATS`."""
    w = cases.weight(n, k, name, seed, "cuda")
    a = quantize_per_token_s8(_normal(most_tokens, k))
    packed = pack_weight(w)
    count = measure.copies(packed.nbytes, cache_bytes)
    weights = [packed, *(replace(packed, units=packed.units.clone()) for _ in range(count - 1))]
    torch.cuda.synchronize()  # kernels fetch weights before they wait for the one that wrote them
    return Operands(a.codes, a.scales, weights, exact(a, w))


def checked_time(
    calls: Sequence[Callable[[], Any]], outputs: Sequence[torch.Tensor], want: torch.Tensor, about_us: float
) -> float:
    """`measure.checked_time` of calls that give an exact result."""

    def problem(out: torch.Tensor) -> str:
        wrong = int((out != want).sum())
        return f"{wrong} of {want.numel()} results are wrong" if wrong else ""

    return measure.checked_time(calls, outputs, problem, about_us)


def time_plan(plan: Plan, form: gemm.Form, data: Operands, m: int, about_us: float) -> float:
    """Microseconds of a product of ``m`` tokens by a plan; raises `measure.WrongResult`."""
    x, out = data.tiled(m), data.outputs(m)
    calls = [partial(matmul.run, plan, form, x[i], w, None, out[i]) for i, w in enumerate(data.weights)]
    return checked_time(calls, out, data.want[:m], about_us)


def time_plain(data: Operands, m: int, about_us: float) -> float:
    """Microseconds of the public function on int8 codes in the usual order: two kernels, one that brings them into order."""
    codes, scales, out = data.codes[:m].contiguous(), data.scales[:m].contiguous(), data.outputs(m)
    calls = [partial(matmul.w4a8_gemm, codes, scales, w, out=out[i]) for i, w in enumerate(data.weights)]
    return checked_time(calls, out, data.want[:m], about_us)


def row(
    m: int,
    n: int,
    k: int,
    name: str,
    us: float,
    bound_us: float,
    peers: dict[str, float],
    variants: dict[str, float],
    plan: Plan,
) -> dict[str, Any]:
    """A point of the record."""
    moved = measure.gemm_bytes(m, n, k, cases.FORMATS[name][0])
    return {
        "op": "gemm",
        "precision": f"w4a8-{name}",
        "n": n,
        "k": k,
        "m": m,
        "us": us,
        "bound_us": bound_us,
        "ratio": us / bound_us,
        "tb_per_s": moved / us / 1e6,
        "tops": measure.gemm_ops(m, n, k) / us / 1e6,
        "variants_us": variants,
        "peers": peers,
        "plan": asdict(plan),
    }


@dataclass(frozen=True)
class Options:
    """What to measure."""

    layers: dict[str, tuple[int, int]]
    batches: tuple[int, ...]
    formats: tuple[str, ...]
    peers: bool = True


def measured(options: Options, ceilings: measure.Ceilings, seed: int) -> Iterator[dict[str, Any]]:
    """Every point in turn."""
    cache_bytes = torch.cuda.get_device_properties().L2_cache_size
    peers: dict[tuple[int, int, int], dict[str, float]] = {}
    for name in options.formats:
        for layer, (n, k) in options.layers.items():
            data = operands(n, k, name, max(options.batches), cache_bytes, seed)
            form = gemm.Form(data.weights[0].groups)
            for m in options.batches:
                bound = ceilings.bound(measure.gemm_bytes(m, n, k, cases.FORMATS[name][0]), measure.gemm_ops(m, n, k))
                if options.peers and (m, n, k) not in peers:
                    peers[m, n, k], refused = time_peers(m, n, k, bound, cache_bytes)
                    for peer, why in refused.items():
                        print(f"{layer} m={m}: no {peer}: {why}", flush=True)
                plan = matmul.plan(m, data.weights[0], form)
                us = time_plan(plan, form, data, m, bound)
                variants = {"int8_input": time_plain(data, m, bound)}
                if plan.version == "v5" and plan.overlap:
                    variants["no_overlap"] = time_plan(replace(plan, overlap=False), form, data, m, bound)
                yield row(m, n, k, name, us, bound, peers.get((m, n, k), {}), variants, plan)


def plans(options: Options) -> list[tuple[Plan, gemm.Form]]:
    """The kernels that a run needs, so that they can be compiled beforehand, in parallel."""
    capability, processors, gpu = matmul._gpu(torch.cuda.current_device())
    found = []
    for name in options.formats:
        size = cases.FORMATS[name][0]
        form = gemm.Form(128 // size if size else 0)
        for n, k in options.layers.values():
            for m in options.batches:
                plan = matmul.plan_for(m, n, k, form, capability, processors, gpu)
                found += [(plan, form), (replace(plan, overlap=False), form)]
    return found


# -- what is printed ------------------------------------------------------------------------------------------------------


def point_table(results: Sequence[dict[str, Any]]) -> str:
    """Every point, with its bound and its peers."""
    names = ["m", "NxK", "format", "us", "bound", "ratio", "TB/s", "TOPS", *VARIANTS, *PEERS]
    rows = []
    for r in results:
        others = [r["variants_us"].get(name) for name in VARIANTS] + [r["peers"].get(name) for name in PEERS]
        what = [r["m"], f"{r['n']}x{r['k']}", r["precision"].removeprefix("w4a8-")]
        rows.append([*what, r["us"], r["bound_us"], r["ratio"], r["tb_per_s"], r["tops"], *others])
    return measure.table(names, rows)


def sums(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every format and number of tokens the sums over the layers: time, bound, cuBLAS fp16, the best peer of each layer.

    ``target``: None where there is none or a layer is missing; peers None where one has not been measured.
    """
    found = []
    for precision, m in dict.fromkeys((r["precision"], r["m"]) for r in results):
        points = [r for r in results if (r["precision"], r["m"]) == (precision, m)]
        whole = {(r["n"], r["k"]) for r in points} == set(cases.LAYERS.values())
        everywhere = all(r["peers"] for r in points)
        found.append(
            {
                "precision": precision,
                "m": m,
                "us": sum(r["us"] for r in points),
                "bound_us": sum(r["bound_us"] for r in points),
                "best_peer_us": sum(min(r["peers"].values()) for r in points) if everywhere else None,
                "fp16_us": sum(r["peers"]["cublas_fp16"] for r in points)
                if all("cublas_fp16" in r["peers"] for r in points)
                else None,
                "target_us": float(TARGETS[m]) if whole and precision == "w4a8-g128" and m in TARGETS else None,
            }
        )
    return found


def sum_table(results: Sequence[dict[str, Any]]) -> str:
    """The sums, with the aims of an H200 and whether they are met."""
    rows = []
    for s in sums(results):
        met = "" if s["target_us"] is None else "met" if s["us"] <= s["target_us"] else "missed"
        times = [s["us"], s["bound_us"], s["us"] / s["bound_us"], s["best_peer_us"], s["fp16_us"], s["target_us"]]
        rows.append([s["precision"].removeprefix("w4a8-"), s["m"], *times, met])
    return measure.table(["format", "m", "us", "bound", "ratio", "best peer", "fp16", "target", ""], rows)


# -- command --------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> tuple[Options, argparse.Namespace]:
    """Options of the command line. Exits with code 2 and a message for what is wrong."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Time the kernels on this GPU.")
    commands = parser.add_subparsers(dest="what", required=True)
    command = commands.add_parser("gemm", help="the W4A8 GEMM on the linear layers of a model")
    commands.add_parser("decode", help="a whole decode step beside fp16", add_help=False)  # see `main`
    commands.add_parser("kv4_decode", help="decode attention on the KV4 cache (its own options: kv4_decode --help)")
    command.add_argument("--shapes", default="llama-3-8b", choices=sorted(SHAPES), help="whose layers")
    command.add_argument("--m", default=",".join(map(str, cases.BATCHES)), help="numbers of tokens, separated by commas")
    command.add_argument("--groups", default="128,channel", help=f"of {', '.join(GROUPS)}, separated by commas")
    command.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    command.add_argument("--json", type=Path, help="write the record here")
    command.add_argument("--commit", default="", help="recorded where the code runs outside a git checkout")
    commands.add_parser("elementwise", help="what lies between the GEMMs", add_help=False)  # see `main`
    known = parser.parse_args(arguments)
    try:
        batches = measure.numbers(known.m, "--m")
        groups = measure.choices(known.groups, "--groups", list(GROUPS))
    except ValueError as error:
        parser.error(str(error))
    return Options(SHAPES[known.shapes], batches, tuple(GROUPS[g] for g in groups), not known.no_peers), known


def bench_gemm(options: Options, command: Sequence[str], json: Path | None, commit: str) -> None:
    """Measure, print and write."""
    capability = measure.require_gpu()
    measure.compile_ahead(plans(options), capability)
    ceilings, seed = measure.measure_ceilings(capability), secrets.randbelow(1 << 20)
    results: list[dict[str, Any]] = []
    for point in measured(options, ceilings, seed):
        results.append(point)
        if json:  # after every point: what is done is kept if time runs out
            more = {"ceilings": measure.ceilings_record(ceilings), "seed": seed}
            measure.write_record(json, measure.record(command, commit, results, **more))
    print(point_table(results))
    print(f"\n{torch.cuda.get_device_name()}: {ceilings.bytes_per_s / 1e12:.2f} TB/s ({ceilings.sources[0]}),")
    print(f"{ceilings.ops_per_s / 1e12:.0f} TOPS ({ceilings.sources[1]})\n")
    print("Sum over the layers, microseconds; best peer: the fastest at each layer; target: on an H200\n")
    print(sum_table(results), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["elementwise"]:
        return bench_elementwise.main(given[1:])
    if given[:1] == ["decode"]:
        return bench_decode.main(given[1:])
    if given[:1] == ["kv4_decode"]:
        return bench_kv4.main(given[1:])
    options, known = parse(given)
    command = measure.command_line(MODULE, given)
    return measure.guarded(MODULE, lambda: bench_gemm(options, command, known.json, known.commit))


if __name__ == "__main__":
    sys.exit(main())
