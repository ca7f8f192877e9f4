"""Measure which plan is fastest on this machine's GPU, and remember it.

    python -m qoqlab_kernels.tune --m 1,16,64,128,256,1024,4096 --budget 120

For every layer and number of tokens the candidates are compiled (in parallel), checked against an exact reference, timed as
the benchmark times them, and the best is kept in this machine's table (`plan.remember`), which from then on is what `plan`
answers. ``--ship`` also writes the table that travels with the package.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import bench, cases, gemm, matmul, measure
from .layout import UNIT_N, blocks
from .plan import OVERRIDE, SHIPPED, TOKENS, Plan, key, remember, rules, version_for

MODULE = "qoqlab_kernels.tune"
BATCHES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Blocks that may share activations, stages of v4 that are tried.
CLUSTERS, DEPTHS = (1, 2), (3, 4, 6)
#: Plans that are timed twice.
FINALISTS = 4
#: Blocks that may split a tile's inputs.
SPLITS = (2, 4, 8)


@functools.cache
def shared_bytes(chosen: Plan, form: gemm.Form) -> int:
    """Dynamic shared memory of a plan's kernel."""
    return gemm.VERSIONS[chosen.version](*chosen.constants(form)).shared


def token_tiles(version: str, m: int) -> tuple[int, ...]:
    """Tiles worth trying for ``m`` tokens: the smallest that holds them, or the widest, and the next smaller one (larger,
    where there is none)."""
    sizes = TOKENS[version]
    best = next((i for i, size in enumerate(sizes) if size >= m), len(sizes) - 1)
    return sizes[max(0, best - 1) : max(2, best + 1)]


def worker_counts(units: int, tiles: int, places: int) -> tuple[int, ...]:
    """How many workers are worth trying where ``places`` of them run at once.

    One a place; as many as share the tiles evenly, none of them cut, if that keeps three quarters of the places busy.
    """
    whole = blocks(tiles, blocks(tiles, places))
    counts = [places, *([whole] if 4 * whole >= 3 * places else [])]
    return tuple(dict.fromkeys(min(count, units) for count in counts))


def candidates(version: str, m: int, n: int, k: int, form: gemm.Form, processors: int, limit: int) -> list[Plan]:
    """Plans worth measuring for a product, the one by rule first. ``limit``: bytes of shared memory a block may have."""
    k_blocks = blocks(k, 128)
    found = [rules(version, m, n, k_blocks, form, processors)]
    for tokens in token_tiles(version, m):
        found += (
            _of_v5(m, n, k_blocks, form, processors, tokens)
            if version == "v5"
            else _of_v4(m, n, k_blocks, processors, tokens)
        )
    return [p for p in dict.fromkeys(found) if shared_bytes(p, form) <= limit]


def _of_v5(m: int, n: int, k_blocks: int, form: gemm.Form, processors: int, tokens: int) -> list[Plan]:
    found = _split(m, n, k_blocks, form, processors, tokens)
    # Two blocks share a multiprocessor where half of the registers suffice: up to 64 tokens.
    rooms = [(height, gemm.SHARED_LIMIT, 1) for height in heights(tokens)]
    if tokens <= 64:
        rooms.append((2, gemm.SHARED_HALF, 2))
    for (warpgroups, limit, residents), cluster in itertools.product(rooms, CLUSTERS):
        if blocks(n, UNIT_N) <= warpgroups * (cluster - 1):
            continue  # a block of the cluster would have no outputs
        stages = gemm.stages_that_fit(tokens, warpgroups, form.unit, limit)
        tiles = blocks(blocks(n, UNIT_N), warpgroups * cluster) * blocks(m, tokens)
        for share in range(1, residents + 1):
            counts = worker_counts(tiles * k_blocks, tiles, max(1, share * processors // cluster))
            if share == 2 and tiles <= 4 * share * processors:
                counts += (tiles,)  # a block a tile, more than fit at once: the hardware hands them out
            found += [Plan("v5", tokens, warpgroups, stages, cluster, count) for count in counts]
    return found


def heights(tokens: int) -> tuple[int, ...]:
    """Warpgroups worth trying. Tall tiles read fewer activations from L2, which limits from 64 tokens on."""
    return tuple(w for w in (2, 3, 4) if w == 2 or tokens == 64 or (tokens, w) in gemm.REGISTERS)


def _split(m: int, n: int, k_blocks: int, form: gemm.Form, processors: int, tokens: int) -> list[Plan]:
    """Tiles whose inputs are split, as far as that fills the GPU: one block on a multiprocessor, or two (and one or two of
    the next kernel) where they fit."""
    found = []
    rooms = [(height, gemm.SHARED_LIMIT, processors) for height in heights(tokens)]
    if tokens <= 64:
        rooms += [(2, gemm.SHARED_HALF, 2 * processors)]
        rooms += [(1, room, 2 * processors) for room in (gemm.SHARED_THIRD, gemm.SHARED_HALF // 2)]
    for warpgroups, limit, places in rooms:
        tiles = blocks(blocks(n, UNIT_N), warpgroups) * blocks(m, tokens)
        for split in SPLITS:
            stages = gemm.stages_that_fit(tokens, warpgroups, form.unit, limit, split)
            if 0.6 * processors <= tiles * split <= places and split <= k_blocks and stages >= 3:
                found.append(Plan("v5", tokens, warpgroups, stages, split=split))
    return found


def _of_v4(m: int, n: int, k_blocks: int, processors: int, tokens: int) -> list[Plan]:
    tiles = blocks(n, UNIT_N) * blocks(m, tokens)
    return [
        Plan("v4", tokens, 1, stages, 1, count)
        for stages in DEPTHS
        for share in (1, 2, 3)
        for count in worker_counts(tiles * k_blocks, tiles, share * processors)
    ]


@dataclass(frozen=True)
class Options:
    """What to tune."""

    layers: dict[str, tuple[int, int]]
    batches: tuple[int, ...]
    formats: tuple[str, ...]
    budget: float = float("inf")
    ship: Path | None = None


def parse(arguments: Sequence[str]) -> Options:
    """Options of the command line. Exits with code 2 and a message for what is wrong."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Find the fastest plans on this GPU.")
    parser.add_argument("--shapes", default="llama-3-8b", choices=sorted(bench.SHAPES), help="whose layers")
    parser.add_argument("--m", default=",".join(map(str, BATCHES)), help="numbers of tokens, powers of two")
    parser.add_argument("--groups", default="128", help=f"of {', '.join(bench.GROUPS)}, separated by commas")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing new is begun")
    parser.add_argument(
        "--ship", type=Path, nargs="?", const=SHIPPED, help="also add to this table (default: the package's own)"
    )
    known = parser.parse_args(arguments)
    try:
        batches = measure.numbers(known.m, "--m")
        groups = measure.choices(known.groups, "--groups", list(bench.GROUPS))
        odd = [m for m in batches if m & (m - 1)]
        if odd:
            raise ValueError(f"--m: {odd[0]} is not a power of two; plans are kept for powers of two, others use the next")
        if not known.budget > 0:
            raise ValueError(f"--budget: {known.budget} is not a positive number of seconds")
    except ValueError as error:
        parser.error(str(error))
    formats = tuple(bench.GROUPS[g] for g in groups)
    return Options(bench.SHAPES[known.shapes], batches, formats, known.budget, known.ship)


def ship(path: Path, found: dict[str, Plan]) -> None:
    """Add measured points to a table of plans."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    table |= {name: asdict(chosen) for name, chosen in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n", encoding="utf-8")


def best_of(
    tried: Sequence[Plan], form: gemm.Form, data: bench.Operands, m: int, about_us: float
) -> tuple[Plan, float, float] | None:
    """(fastest plan, its microseconds, those of the first plan); None if none works. A wrong result drops a plan, loudly.
    The fastest are timed twice and count with their better time."""
    times: dict[Plan, float] = {}
    for candidate in tried:
        try:
            times[candidate] = bench.time_plan(candidate, form, data, m, about_us)
        except (measure.WrongResult, RuntimeError) as error:
            print(f"DROPPED {candidate}: {error}", flush=True)
    if not times:
        return None
    for close in sorted(times, key=lambda p: times[p])[:FINALISTS]:  # the clock drifts while the others are timed
        times[close] = min(times[close], bench.time_plan(close, form, data, m, about_us))
    best = min(times, key=lambda p: times[p])
    return best, times[best], times.get(tried[0], float("nan"))


def run(options: Options) -> None:
    """Tune, remember, print."""
    start, capability = time.monotonic(), measure.require_gpu()
    _, processors, gpu = matmul._gpu(torch.cuda.current_device())
    properties = torch.cuda.get_device_properties()
    version = version_for(capability)
    if version not in TOKENS:
        raise measure.Unavailable(f"{OVERRIDE}={version}: this version has nothing to tune")
    points = [(name, m, n, k) for m in options.batches for n, k in options.layers.values() for name in options.formats]
    forms = {name: gemm.Form(128 // cases.FORMATS[name][0] if cases.FORMATS[name][0] else 0) for name in options.formats}
    limit = getattr(properties, "shared_memory_per_block_optin", gemm.SHARED_LIMIT)
    tried = {(name, m, n, k): candidates(version, m, n, k, forms[name], processors, limit) for name, m, n, k in points}
    broken = measure.compile_ahead([(p, forms[point[0]]) for point, ps in tried.items() for p in ps], capability)
    for (_, constants), message in broken.items():
        print(f"DROPPED {constants}: {message}", flush=True)
    print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    ceilings, seed = measure.measure_ceilings(capability), secrets.randbelow(1 << 20)
    rows: list[list[object]] = []
    found: dict[str, Plan] = {}
    last = None
    # a layer's operands are made once for all numbers of tokens
    for name, m, n, k in sorted(points, key=lambda p: (p[0], p[2:], p[1])):
        if time.monotonic() - start > options.budget:
            print(f"out of time: {len(points) - len(rows)} of {len(points)} points are left as they were", flush=True)
            break
        if last != (name, n, k):
            last, data = (name, n, k), bench.operands(n, k, name, max(options.batches), properties.L2_cache_size, seed)
        about = ceilings.bound(measure.gemm_bytes(m, n, k, cases.FORMATS[name][0]), measure.gemm_ops(m, n, k))
        usable = [p for p in tried[name, m, n, k] if (p.version, p.constants(forms[name])) not in broken]
        result = best_of(usable, forms[name], data, m, about)
        if result is None:
            rows.append([name, m, f"{n}x{k}", None, None, about, "nothing works"])
            continue
        best, us, by_rule = result
        point = key(gpu, m, n, k, forms[name].groups)
        found[point] = best
        remember(point, best)
        rows.append([name, m, f"{n}x{k}", us, by_rule, about, describe(best)])
    if options.ship:
        ship(options.ship, found)
    print(measure.table(["format", "m", "NxK", "us", "by rule", "bound", "plan"], rows), flush=True)


def describe(chosen: Plan) -> str:
    """A plan in a few characters."""
    text = f"{chosen.version} t{chosen.tokens} s{chosen.stages} "
    text += f"r{64 * chosen.warpgroups} k{chosen.split}" if chosen.split > 1 else f"c{chosen.cluster} w{chosen.workers}"
    return text if chosen.overlap else text + " alone"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    return measure.guarded(MODULE, lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
