"""Which version and which sizes for a problem: a measured table where there is one, otherwise rules."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import gemm
from .launch import cache_folder
from .layout import UNIT_N, blocks

#: Overrides the version, for lessons and tests: ``QOQLAB_KERNEL=v3``.
OVERRIDE = "QOQLAB_KERNEL"
SHIPPED = Path(__file__).with_name("tuned.json")
#: Tokens in a tile: what the tensor core takes as its n.
TOKENS = {"v4": (8, 16, 32, 64), "v5": (8, 16, 32, 64, 128, 256)}


@dataclass(frozen=True)
class Plan:
    """How one product is computed. ``warpgroups`` of 64 outputs each and ``tokens`` make a block's tile, ``stages`` of 128
    inputs are in flight, ``cluster`` blocks share activations, ``workers`` blocks (clusters) divide the work, or, with
    ``split``, clusters of so many blocks take one tile each and divide its inputs. v1 to v3 have no choices."""

    version: str
    tokens: int = 64
    warpgroups: int = 1
    stages: int = 0
    cluster: int = 1
    workers: int = 1
    overlap: bool = True
    split: int = 1

    def __post_init__(self) -> None:
        if self.version not in gemm.VERSIONS:
            raise ValueError(f"version: {self.version!r} is not one of {', '.join(gemm.VERSIONS)}")
        if self.version in TOKENS and self.tokens not in TOKENS[self.version]:
            raise ValueError(f"tokens: {self.tokens} is not one of {TOKENS[self.version]} ({self.version})")
        if self.version in TOKENS and self.stages < 2:
            raise ValueError(f"stages: {self.stages}; a ring has at least 2 ({self.version})")
        if self.version == "v5" and self.tokens >= 128 and (self.tokens, self.warpgroups) not in gemm.REGISTERS:
            known = tuple(count for tokens, count in gemm.REGISTERS if tokens == self.tokens)
            raise ValueError(f"warpgroups: {self.warpgroups}; tiles of {self.tokens} tokens have registers for {known}")
        if self.split not in (1, 2, 4, 8) or (self.split > 1 and (self.version != "v5" or self.cluster > 1)):
            raise ValueError(f"split: {self.split}; 1, 2, 4 or 8 blocks, only in v5 and without a cluster of another kind")
        if self.workers < 1 or self.cluster < 1 or self.warpgroups < 1:
            raise ValueError(f"plan: workers, cluster and warpgroups are at least 1, got {self}")

    def constants(self, form: gemm.Form) -> tuple:
        """Arguments of the version's builder."""
        if self.version == "v5":
            return (form, self.tokens, self.warpgroups, self.stages, self.cluster, self.overlap, self.split)
        return (form, self.tokens, self.stages) if self.version == "v4" else (form,)

    def tiles(self, m: int, n: int) -> tuple[int, int]:
        """Row tiles (of all blocks of a cluster) and token tiles."""
        return blocks(blocks(n, UNIT_N), self.warpgroups * self.cluster), blocks(m, self.tokens)

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        """Blocks to launch."""
        if self.version == "v2":
            return blocks(n, 16), blocks(m, 16), 1
        if self.version in ("v1", "v3"):
            return m, blocks(n, UNIT_N), 1
        if self.split > 1:
            row_tiles, token_tiles = self.tiles(m, n)
            return row_tiles * token_tiles * self.split, 1, 1
        return self.workers * self.cluster, 1, 1


def version_for(capability: tuple[int, int]) -> str:
    """The version that a GPU gets: what the override says, else v5 on Hopper and v4 from sm_80 on.

    Raises RuntimeError below sm_80, ValueError for an override that does not exist or that the GPU cannot run.
    """
    chosen = os.environ.get(OVERRIDE)
    if capability < (8, 0):
        raise RuntimeError(
            f"GPU: compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 (A100, RTX 30) or newer"
        )
    best = "v5" if capability == (9, 0) else "v4"
    if chosen is None:
        return best
    if chosen not in gemm.VERSIONS:
        raise ValueError(f"{OVERRIDE}: {chosen!r} is not one of {', '.join(gemm.VERSIONS)}")
    if chosen == "v5" and best != "v5":
        raise ValueError(
            f"{OVERRIDE}: v5 needs compute capability 9.0 (Hopper), this GPU has {capability[0]}.{capability[1]}"
        )
    return chosen


def key(gpu: str, m: int, n: int, k: int, groups: int) -> str:
    """Name of a tuned point: ``gpu`` as `matmul` names it, m rounded up to a power of two and to a tensor core's 8."""
    return f"{gpu}|m{1 << max(3, (m - 1).bit_length())}|{n}x{k}|{f'g{128 // groups}' if groups else 'channel'}"


@functools.cache
def tuned() -> dict[str, dict]:
    """The shipped table of measured best plans, and over it what was tuned on this machine."""
    table: dict[str, dict] = {}
    for path in (SHIPPED, cache_folder() / "tuned.json"):
        if path.is_file():
            table |= json.loads(path.read_text(encoding="utf-8"))
    return table


def remember(name: str, plan: Plan) -> None:
    """Add a tuned point to this machine's table."""
    path = cache_folder() / "tuned.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    table[name] = asdict(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(table, indent=1, sort_keys=True), encoding="utf-8")
    part.replace(path)
    forget()


def forget() -> None:
    """Read the tables again at their next use."""
    tuned.cache_clear()
    _plan_for.cache_clear()


def rules(version: str, m: int, n: int, k_blocks: int, form: gemm.Form, processors: int) -> Plan:
    """Sizes by rule, where nothing was measured."""
    sizes = TOKENS.get(version, (64,))
    tokens = next((size for size in sizes if size >= m), sizes[-1])
    if version == "v4":
        row_tiles, token_tiles = blocks(n, UNIT_N), blocks(m, tokens)
        return Plan("v4", tokens, 1, 4, 1, min(2 * processors, row_tiles * token_tiles * k_blocks))
    if version != "v5":
        return Plan(version)
    choose = _few_tokens if tokens <= 64 else _many_tokens
    return choose(m, n, k_blocks, form, processors, tokens)


def _workers(tiles: int, places: int, k_blocks: int) -> int:
    """As many workers as get the same number of whole tiles, if that keeps three quarters of the places busy, else one a
    place: stream-K."""
    whole = blocks(tiles, blocks(tiles, places))
    return whole if 4 * whole >= 3 * places else min(places, tiles * k_blocks)


def _few_tokens(m: int, n: int, k_blocks: int, form: gemm.Form, processors: int, tokens: int) -> Plan:
    """Up to 64 tokens memory limits: blocks small enough that those of the next kernel move in beside them and fetch.

    Tiles are split until there are about two blocks for every multiprocessor; narrow batches have room for half as many
    outputs a block.
    """
    half, two = gemm.SHARED_HALF, 2 * processors
    for warpgroups, split, limit, places in (
        (1, 4, half // 2, two),
        (2, 4, half, two),
        (2, 4, gemm.SHARED_LIMIT, processors),
        (2, 2, half, two),
    ):
        tiles = blocks(blocks(n, UNIT_N), warpgroups) * blocks(m, tokens)
        stages = gemm.stages_that_fit(tokens, warpgroups, form.unit, limit, split)
        if stages >= 3 and split <= k_blocks and tiles * split <= places:
            return Plan("v5", tokens, warpgroups, stages, split=split)
    stages, tiles = gemm.stages_that_fit(tokens, 2, form.unit, gemm.SHARED_HALF), blocks(n, 2 * UNIT_N) * blocks(m, tokens)
    return Plan("v5", tokens, 2, stages, workers=_workers(tiles, 2 * processors, k_blocks))


def _many_tokens(m: int, n: int, k_blocks: int, form: gemm.Form, processors: int, tokens: int) -> Plan:
    """One block a multiprocessor. Too few tiles are split; prefill shares activations between two blocks."""
    while tokens > 64 and 2 * blocks(n, 2 * UNIT_N) * blocks(m, tokens // 2) <= processors:
        tokens //= 2
    tiles = blocks(n, 2 * UNIT_N) * blocks(m, tokens)
    stages = gemm.stages_that_fit(tokens, 2, form.unit, split=2)
    if 2 * tiles <= processors and k_blocks >= 2 and stages >= 3:
        return Plan("v5", tokens, 2, stages, split=2)
    cluster = 2 if m >= 2048 and n > 2 * UNIT_N and processors > 1 else 1
    workers = _workers(blocks(n, 2 * UNIT_N * cluster) * blocks(m, tokens), processors // cluster, k_blocks)
    return Plan("v5", tokens, 2, gemm.stages_that_fit(tokens, 2, form.unit), cluster, workers)


def _fitted(plan: Plan, form: gemm.Form) -> Plan:
    """The plan with no more stages than leave its shared memory in the same quarter, third, half or whole."""
    if plan.version != "v5":
        return plan
    used = gemm.Ring(plan.tokens, plan.warpgroups, gemm.Form(1).unit, plan.stages, plan.split).total
    room = next(x for x in (gemm.SHARED_HALF // 2, gemm.SHARED_THIRD, gemm.SHARED_HALF, gemm.SHARED_LIMIT) if x >= used)
    return replace(
        plan, stages=min(plan.stages, gemm.stages_that_fit(plan.tokens, plan.warpgroups, form.unit, room, plan.split))
    )


def plan_for(m: int, n: int, k: int, form: gemm.Form, capability: tuple[int, int], processors: int, gpu: str = "") -> Plan:
    """The plan for a product on a GPU of ``processors`` multiprocessors: tuned if it was measured, else by `rules`."""
    return _plan_for(version_for(capability), m, n, k, form, processors, gpu)


@functools.lru_cache(maxsize=4096)
def _plan_for(version: str, m: int, n: int, k: int, form: gemm.Form, processors: int, gpu: str) -> Plan:
    for groups in (form.groups, 1):  # what is best for groups of 128 is good for others, whose units have other scales
        found = tuned().get(key(gpu, m, n, k, groups))
        if found and found["version"] == version:
            return _fitted(Plan(**found), form)
    return rules(version, m, n, blocks(k, 128), form, processors)
