"""Argument checks that name the argument, what came, and the rule."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch


def shape_of(value: torch.Tensor) -> str:
    """``4096x100`` for a tensor of that shape, ``scalar`` for a 0-d one."""
    return "x".join(map(str, value.shape)) or "scalar"


def require_enum(name: str, value: object, kind: type[Enum]) -> None:
    """Raise TypeError unless ``value`` is a member of ``kind``; its string value would not do."""
    if not isinstance(value, kind):
        members = ", ".join(f"{kind.__name__}.{m.name}" for m in kind)
        raise TypeError(f"{name}: expected one of {members}, got {value!r}")


def require_ratio(ratio: torch.Tensor | float) -> None:
    """Raise ValueError unless every clipping ratio lies in (0, 1]."""
    values = torch.as_tensor(ratio)
    if not bool(((values > 0) & (values <= 1)).all()):
        raise ValueError(f"ratio: expected numbers with 0 < ratio <= 1, got {float(values.min())}..{float(values.max())}")


def require_count(name: str, value: object, low: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``low`` (0 or 1)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        rule = "a positive integer" if low else "an integer of at least 0"
        raise ValueError(f"{name}: expected {rule}, got {value!r}")


def require_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a torch.Tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def require_columns(name: str, table: Any, columns: Iterable[str]) -> None:
    """Raise ValueError unless ``table``, a DataFrame, has these columns."""
    wanted, there = list(columns), list(table)
    if missing := [column for column in wanted if column not in there]:
        raise ValueError(
            f"{name}: expected columns {', '.join(wanted)}, got {', '.join(map(str, there)) or 'none'}; "
            f"missing {', '.join(missing)}"
        )


def require_positive(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: expected a positive number or None, got {value!r}")


def require_float(name: str, value: torch.Tensor) -> None:
    """Raise TypeError unless ``value`` is a floating-point tensor."""
    require_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype} of shape {shape_of(value)}")


def require_finite(name: str, value: torch.Tensor) -> None:
    """Raise ValueError if a floating-point tensor holds NaN or infinity."""
    require_float(name, value)
    if not bool(torch.isfinite(value).all()):
        nans, infs = int(value.isnan().sum()), int(value.isinf().sum())
        raise ValueError(f"{name}: holds {nans} NaN and {infs} infinite values; quantisation needs finite numbers")


def require_matrix(name: str, value: torch.Tensor) -> None:
    """Raise unless ``value`` is a finite floating-point matrix with at least one element."""
    require_finite(name, value)
    if value.ndim != 2 or value.numel() == 0:
        raise ValueError(f"{name}: expected a non-empty matrix [N, K], got shape {shape_of(value)}")


def require_rows(name: str, value: torch.Tensor) -> None:
    """Raise unless ``value`` is finite, floating-point and has a non-empty last dimension."""
    require_finite(name, value)
    if value.ndim == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [..., D] with D >= 1, got {shape_of(value)}")


def require_groups(name: str, value: torch.Tensor, group_size: int) -> None:
    """Raise ValueError unless the last dimension splits into groups of ``group_size``."""
    require_count("group_size", group_size, 1)
    if value.shape[-1] % group_size:
        raise ValueError(
            f"{name}: {shape_of(value)} is not divisible into groups of {group_size} along K; pass group_size=... or pad"
        )


def require_codes(name: str, value: torch.Tensor, low: int, high: int) -> None:
    """Raise unless ``value`` is an integer tensor whose entries lie in ``low..high``."""
    require_tensor(name, value)
    if value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer codes, got {value.dtype}")
    if value.numel() and not value.is_meta and (int(value.min()) < low or int(value.max()) > high):
        raise ValueError(f"{name}: codes must lie in {low}..{high}, got {int(value.min())}..{int(value.max())}")


def require_scale_fits(name: str, scale: torch.Tensor) -> None:
    """Raise ValueError when a scale overflowed its storage type, or came out of NaN."""
    if bool(scale.isnan().any()):
        raise ValueError(f"{name}: holds NaN values; quantisation needs finite numbers")
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"{name}: values are too large for {scale.dtype} scales; rescale the tensor first")
