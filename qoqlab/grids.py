"""Integer grids as values: which codes a format has.

A quantiser maps real numbers onto one of these grids; everything else (scales, zeros, packing) is bookkeeping around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


@dataclass(frozen=True)
class Grid:
    """The consecutive integers ``low..high``.

    >>> UINT4.levels, INT8_PROTECTED.high
    (16, 119)
    """

    name: str
    low: int
    high: int
    #: torch dtype that stores one code per element (4-bit codes are stored one per byte until they are packed)
    dtype: torch.dtype

    @property
    def levels(self) -> int:
        """Number of codes."""
        return self.high - self.low + 1

    @property
    def steps(self) -> int:
        """Number of intervals between the lowest and the highest code."""
        return self.high - self.low

    @property
    def bits(self) -> int:
        """Bits needed to store one code."""
        return (self.levels - 1).bit_length()

    def clamp(self, values: torch.Tensor) -> torch.Tensor:
        """Round half to even, clamp to the grid and store: float ``[...]`` -> ``dtype`` ``[...]``."""
        return values.round().clamp_(self.low, self.high).to(self.dtype)


class Zero(Enum):
    """How an asymmetric format stores its zero point.

    INTEGER  ``x ~ scale * (code - zero)``: the zero is itself a code (QServe checkpoints, paper section 4.1).
    SCALED   ``x ~ scale * code - zero``: the zero carries the scale (deepcompressor's later releases).
    """

    INTEGER = "integer"
    SCALED = "scaled"


#: Symmetric activations and 8-bit weights: -128 is left out so that a value and its negative have equal cost.
INT8 = Grid("INT8", -127, 127, torch.int8)
#: First level of progressive weights with an integer zero: the protective range (paper section 4.1).
INT8_PROTECTED = Grid("INT8_PROTECTED", -119, 119, torch.int8)
#: First level of progressive weights with a scaled zero: one step wider is still safe.
INT8_PROTECTED_SCALED = Grid("INT8_PROTECTED_SCALED", -120, 120, torch.int8)
#: 4-bit weights and KV cache.
UINT4 = Grid("UINT4", 0, 15, torch.uint8)
#: 4-bit symmetric activations, used to show why QoQ keeps activations at 8 bits.
INT4 = Grid("INT4", -7, 7, torch.int8)
#: 8-bit KV cache.
UINT8 = Grid("UINT8", 0, 255, torch.uint8)
