"""What fits: bytes of weights, cache and everything in between, and the largest batch that a memory budget allows.

`Memory.total` foresees what PyTorch's allocator hands out at most during a round (``torch.cuda.max_memory_allocated``). The
records of serving in ``data/benchmarks`` keep both, and a test holds them within 3 % of each other, but for exceptions which
it names. What PyTorch does not hand out to tensors is in neither: the CUDA context, loaded kernels, what the allocator
reserves without using it, and what captured graphs use of their private pools while they run. `CONTEXT` is set aside for
that, a guess which nothing checks, except that the rounds which fill a card did run.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from .. import roofline
from ..checks import require_count
from ..machines import Geometry
from ..schemes import Scheme

#: Tokens in a page of the cache.
PAGE = 64
#: Bytes that a process takes beside tensors that it knows of: the CUDA context, kernels, libraries' workspaces.
CONTEXT = 2.5e9


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU: ``weights``; ``cache`` of all pages; ``activations`` of the larger of a prefill and a step."""

    weights: float
    cache: float
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.cache + self.activations


def page_bytes(model: Geometry, scheme: Scheme) -> float:
    """A page of `PAGE` tokens over all layers, with scales and zeros."""
    return PAGE * roofline.cache_bytes_per_token(model, scheme)


def activation_bytes(model: Geometry, tokens: int, logits: int) -> float:
    """What lives at the widest point of a layer of ``tokens`` tokens: two hidden states in 16 bits, gate and up, and what
    their product becomes (counted as INT8, with a hidden state as INT8); or logits of ``logits`` tokens in fp32, twice,
    and in 16 bits, and as much as these for what chooses among them."""
    layer = tokens * (2 * 2 * model.hidden + 2 * 2 * model.intermediate + model.intermediate + model.hidden)
    return max(layer, tokens * 4 * model.hidden + logits * model.vocabulary * (2 + 4 + 4 + 2))


def memory(model: Geometry, scheme: Scheme, batch: int, tokens: int, prefill: int = 8192, sliced: bool = False) -> Memory:
    """Of a server with ``batch`` requests of at most ``tokens`` tokens each, whose steps take in ``prefill`` tokens of
    prompts at most. A request's last page counts in full. ``sliced``: ``model`` is what one of several GPUs holds
    (`qoqlab.parallel`); their sums are INT32 before scales are applied."""
    for name, value in (("batch", batch), ("tokens", tokens), ("prefill", prefill)):
        require_count(name, value, 1)
    pages, most = batch * -(-tokens // PAGE), max(prefill, batch)
    activations = activation_bytes(model, most, batch) + sliced * 4 * most * model.hidden
    return Memory(roofline.weight_bytes(model, scheme), pages * page_bytes(model, scheme), activations)


def largest_batch(
    model: Geometry, scheme: Scheme, budget: float, tokens: int, prefill: int = 8192, sliced: bool = False
) -> int:
    """The most requests of ``tokens`` tokens each that fit into ``budget`` bytes beside `CONTEXT`; 0 if not even one.
    Other arguments: as of `memory`.

    Raises ValueError for a budget that is no finite, positive number, or a count below 1.
    """
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not 0 < budget < math.inf:
        raise ValueError(f"budget: expected a finite, positive number of bytes, got {budget!r}")
    low, high = 0, 1
    while memory(model, scheme, high, tokens, prefill, sliced).total + CONTEXT <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if memory(model, scheme, middle, tokens, prefill, sliced).total + CONTEXT <= budget:
            low = middle
        else:
            high = middle
    return low
