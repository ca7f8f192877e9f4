"""Numbers from the host to a device that has work to do."""

from __future__ import annotations

from typing import Any

import torch


def sent(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``values`` (a number, lists of equally long lists of them, a tensor) on ``device``.

    Neither side waits: on a GPU the copy takes its place behind the work that was given before, from pinned memory. From
    other memory torch would first wait until that work is done, and the device would then wait for Python. A tensor that is
    pinned already is copied from where it is: leave it as it is until the device has it.
    """
    here = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and here.device.type == "cpu":
        return here.pin_memory().to(device, non_blocking=True)
    return here.to(device)
