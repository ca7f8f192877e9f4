"""Transforms of a linear layer's input that run with the network, because no earlier weight can absorb them.

A linear that has one holds it as the submodule ``online``: before quantisation an `OnlineLinear`, afterwards a
`runtime.QuantLinear`. Its weight acts on transformed inputs, which are also what statistics and quantisers see. QoQ needs
none, which is one of its points; QuaRot and Atom do.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import nn

from .hadamard import base_size, transform


class OnlineHadamard(nn.Module):
    """Multiply ``x [..., K]`` by ``H_size (x) I``: a Hadamard matrix across ``size`` blocks of K / size channels each.

    ``size`` = K mixes all channels; ``size`` = heads mixes heads, channel by channel. Raises ValueError for a size without a
    Hadamard matrix (see `hadamard.base_size`).
    """

    hadamard: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        base_size(size)
        self.size = size
        self.register_buffer("hadamard", torch.tensor(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` -> ``[..., K]`` in x's dtype."""
        return transform(x.unflatten(-1, (self.size, -1)).transpose(-1, -2)).transpose(-1, -2).flatten(-2)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"size={self.size}"


class OnlineReorder(nn.Module):
    """Gather channels: ``x[..., order]`` with ``order`` a permutation of K, stored as int32."""

    order: torch.Tensor

    def __init__(self, order: torch.Tensor) -> None:
        super().__init__()
        if order.ndim != 1 or not torch.equal(order.sort().values.cpu(), torch.arange(len(order), dtype=order.dtype)):
            raise ValueError(f"order: expected a permutation of 0..{order.numel() - 1}, got {order.tolist()[:4]} ...")
        self.register_buffer("order", order.int())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` -> ``[..., K]``."""
        return x.index_select(-1, self.order)


Online = OnlineHadamard | OnlineReorder


class OnlineLinear(nn.Linear):
    """An unquantised linear layer whose input passes ``online`` first. Shares the parameters of ``linear``."""

    def __init__(self, linear: nn.Linear, online: Online) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.online = online

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` -> ``[..., N]``."""
        return super().forward(self.online(x))


def of(linear: nn.Module) -> Online | None:
    """The online transform of a linear layer, quantised or not, or None."""
    return getattr(linear, "online", None)


def take(state: MutableMapping[str, torch.Tensor], name: str, columns: int) -> Online | None:
    """Remove and rebuild the online transform of layer ``name`` with ``columns`` inputs from a state dict, if there
    is one.

    Raises ValueError for tensors that do not describe one.
    """
    size, order = state.pop(f"{name}.online.hadamard", None), state.pop(f"{name}.online.order", None)
    if size is not None:
        if size.dtype != torch.int64 or size.ndim or int(size) < 1 or columns % int(size):
            raise ValueError(f"tensor {name}.online.hadamard: expected an int64 scalar that divides {columns}, got {size}")
        return OnlineHadamard(int(size))
    if order is not None:
        if order.dtype != torch.int32 or order.shape != (columns,):
            got = f"{order.dtype} {list(order.shape)}"
            raise ValueError(f"tensor {name}.online.order: expected torch.int32 [{columns}], got {got}")
        return OnlineReorder(order)
    return None
